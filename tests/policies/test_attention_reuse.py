"""Reuse of attention (arXiv 2401.01008): when, what, and what it does to a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.backbones.attention import Attention
from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_config import UNetConfig
from gearshift.diffusion.denoiser import Denoiser, Prediction
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers import DDIM, Call, DDIMConfig
from gearshift.execution.executor import execute
from gearshift.execution.memory import Memory, Slot
from gearshift.execution.plan import StepPlan
from gearshift.policies import AttentionReuse, Compose, DeepFeatureReuse, Full, Policy, RunInfo
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Sampler, sample, sample_chunk

from ..contract import TOLERANCE, Subject, build, cost_table

STEPS = 6
INDEX = torch.arange(3)
OPERATORS = ("map", "qk", "output")
GUIDED = ("uvit-class", "dit-class", "unet-class")
PROCESS = Discrete(DiscreteConfig())


def sampler(name: str, policy: Policy | None = None, guidance: float = 2.0, **fields: Any) -> Sampler:
    denoiser = Denoiser(build(name), PROCESS)
    return Sampler(denoiser, DDIM(DDIMConfig(steps=STEPS)), policy or Full(), chunk=3, guidance=guidance, **fields)


def run(name: str = "uvit-class", steps: int = STEPS) -> RunInfo:
    return RunInfo(DDIM(DDIMConfig(steps=steps)).calls(PROCESS), build(name), batch=2, branches=2)


def reused_at(policy: AttentionReuse, info: RunInfo) -> list[int]:
    policy.check(info)
    state = policy.begin(info)
    return [call.position for call in info.calls if policy.plan(state, call).reuse]


@dataclass(frozen=True)
class Script(Policy):
    """Any plans, by position."""

    plans: tuple[StepPlan, ...] = ()

    def plan(self, state: Any, call: Call) -> StepPlan:
        return self.plans[call.position]


# When ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", range(STEPS))
def test_hurry_reuses_the_last_calls(last: int) -> None:
    assert reused_at(AttentionReuse(last=last), run()) == list(range(STEPS - last, STEPS))


def test_hurry_cannot_reuse_at_the_first_call() -> None:
    message = r"reuses at the last 6 calls of a run of 6, whose first has nothing to reuse; set last to at most 5"
    with pytest.raises(UsageError, match=message):
        AttentionReuse(last=STEPS).check(run())
    assert AttentionReuse(last=STEPS).reusing(run()) == [False] + [True] * (STEPS - 1)  # nor if nobody asks


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (dict(interval=1), []),
        (dict(interval=2), [1, 3, 5]),
        (dict(interval=4), [1, 2, 3, 5]),
        (dict(interval=99), [1, 2, 3, 4, 5]),
        (dict(computed=[0]), [1, 2, 3, 4, 5]),
        (dict(computed=[0, 3, 4]), [1, 2, 5]),
        (dict(computed=[4, 0, 3]), [1, 2, 5]),
        (dict(computed=[*range(STEPS)]), []),
    ],
)
def test_other_calls(arguments: dict[str, Any], wanted: list[int]) -> None:
    assert reused_at(AttentionReuse(**arguments), run()) == wanted


def test_a_window_of_log_snr_narrows_the_choice() -> None:
    """Both ends are inside; what lies outside computes, and the first call does in any case."""
    info = run()
    levels = [call.log_snr for call in info.calls]
    assert reused_at(AttentionReuse(interval=99, window=[levels[2], levels[4]]), info) == [2, 3, 4]
    assert reused_at(AttentionReuse(interval=2, window=[levels[2], levels[4]]), info) == [3]
    assert reused_at(AttentionReuse(last=2, window=[levels[0], levels[4]]), info) == [4]
    assert reused_at(AttentionReuse(interval=99, window=[levels[0] - 1, levels[1]]), info) == [1]
    assert reused_at(AttentionReuse(computed=[0], window=[50, 60]), info) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "needs one of last, interval and computed to say when it reuses, and has none"),
        (dict(last=2, interval=3), "and has last=2 and interval=3"),
        (dict(last=-1), "last=-1 calls must be at least 0"),
        (dict(interval=0), "interval=0 must be at least 1"),
        (dict(computed=[]), r"computed=\[\] must begin with call 0"),
        (dict(computed=[1, 3]), r"computed=\[1, 3\] must begin with call 0"),
        (dict(computed=[-1, 0]), r"computed=\[-1, 0\] must begin with call 0"),
        (dict(last=1, window=[2, 1]), r"window=\[2, 1\] is no interval"),
        (dict(last=1, window=[1]), r"window=\[1\] is no interval"),
        (dict(last=1, operator="values"), "operator 'values' is not one of map, qk, output, auto"),
        (dict(last=1, prefer="good"), "prefer 'good' is not one of faithful, fast"),
    ],
)
def test_what_makes_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"policy AttentionReuse.*{message}"):
        AttentionReuse(**arguments)


def test_computed_calls_must_be_in_the_run() -> None:
    with pytest.raises(UsageError, match=r"computes at call 6 of a run of 6 calls \(0\.\.5\)"):
        AttentionReuse(computed=[0, 6]).check(run())


# What ----------------------------------------------------------------------------------------------------------------


def test_layers() -> None:
    """All that attend, or those that are named."""
    info = run("two-decoders")
    policy = AttentionReuse(operator="map", last=1)
    assert policy.blocks_on(info.network) == [2, 6, 9]
    assert policy.memory_keys(info) == {(2, "map"), (6, "map"), (9, "map")}
    some = replace(policy, layers=[2, 9])
    some.check(info)
    assert some.memory_keys(info) == {(2, "map"), (9, "map")}
    assert some.name == "attention map last 1 in 2 layers" and policy.name == "attention map last 1"
    assert some.kept_bytes(info.network, 5) == 5 * 4 * (2 * 16 * 16 + 2 * 64 * 64)
    assert replace(policy, last=0).memory_keys(info) == frozenset()


def test_layers_without_attention_are_refused() -> None:
    message = r"layers \[3, 77\] of TwoDecoders have no attention to take qk from; those that have are \[2, 6, 9\]"
    with pytest.raises(UsageError, match=message):
        AttentionReuse(operator="qk", last=1, layers=[2, 3, 77]).check(run("two-decoders"))


def test_networks_without_attention_are_refused() -> None:
    sizes = dict(image_size=8, in_channels=2, model_channels=8, channel_mult=(1, 2), num_blocks=1, middle="decoder")
    network = UNet(UNetConfig(**sizes, attention_resolutions=()))
    for block in network.blocks:
        block._attention = ()  # the middle attends in any case
    with pytest.raises(UsageError, match=r"takes output from attention, and UNet has no block with attention"):
        AttentionReuse(operator="output", last=1).check(replace(run(), network=network))


@pytest.mark.parametrize(
    ("side", "backend", "prefer", "wanted"),
    [
        (64, "cpu", "faithful", "map"),  # 1024 tokens
        (66, "cpu", "faithful", "qk"),  # 1089
        (8, "cuda", "faithful", "qk"),
        (8, "cpu", "fast", "output"),
        (66, "cuda", "fast", "output"),
    ],
)
def test_auto(side: int, backend: str, prefer: str, wanted: str) -> None:
    """It is settled by network and device, and the name says what it came to."""
    with torch.device("meta"):
        network = DiT(DiTConfig(image_size=side, in_channels=1, patch_size=2, embed_dim=8, depth=2, num_heads=2))
    info = replace(run(), network=network, backend=backend)
    policy = AttentionReuse(last=2, prefer=prefer)
    assert policy.name == "attention auto last 2"
    settled = policy.resolved(info)
    assert settled.operator == wanted and settled.name == f"attention {wanted} last 2"
    assert settled.resolved(replace(info, backend="cuda")) is settled
    assert policy.memory_keys(info) == settled.memory_keys(info) == {(0, wanted), (1, wanted)}
    assert Compose([Full(), policy]).resolved(info).name == f"Full + attention {wanted} last 2"


# The operators -------------------------------------------------------------------------------------------------------


def test_the_error_of_each_operator() -> None:
    """P_s V_s - P_t V_t = (P_s - P_t) V_t + P_s (V_s - V_t): maps carry the first term, outputs carry both."""
    torch.manual_seed(0)
    attention = Attention(12, 3, qkv_bias=True).double().requires_grad_(False)
    then, now = torch.randn(2, 2, 7, 12, dtype=torch.float64)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = attention._heads(attention.qkv(x), 3)
        return attention.scores(q, k), v

    def linear(mixed: Tensor) -> Tensor:
        return attention.out(mixed) - attention.proj.bias

    (p_s, v_s), (p_t, v_t) = parts(then), parts(now)
    computed = attention(now)
    first, second = linear((p_s - p_t) @ v_t), linear(p_s @ (v_s - v_t))
    assert first.abs().max() > 0.01 and second.abs().max() > 0.01
    for operator, wanted in (("map", first), ("qk", first), ("output", first + second)):
        kept = Slot(wanted=frozenset({operator}))
        attention(then, kept)
        error = attention(now, Slot(operator, frozenset(), kept.stored)) - computed
        torch.testing.assert_close(error, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GUIDED)
def test_reuse_at_an_unchanged_input_is_the_computed_step(name: str) -> None:
    info = run(name)
    denoiser, x = Denoiser(build(name), PROCESS), torch.randn(2, 2, 8, 8)
    labels, time = torch.tensor([0, 2]), info.calls[3].time
    for operator in OPERATORS:
        policy = AttentionReuse(operator=operator, last=1)
        memory = Memory(info.num_rows, policy.memory_keys(info))
        found = []
        for call in info.calls[-2:]:
            memory.begin_call()
            plan = policy.plan(policy.begin(info), call)
            found.append(denoiser.predict(x, time, labels, plan=plan, guidance=2.0, memory=memory))
        assert {event.mode for event in found[1].trace if event.kind == "block"} >= {operator}
        torch.testing.assert_close(found[1].eps, found[0].eps, **TOLERANCE)


@pytest.mark.parametrize("name", ["uvit-class", "dit-class", "unet-class", "ldm-class", "uvit-text", "long-skips"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_map_is_qk(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call after call on other images; where queries and keys are kept, no map is ever formed."""
    info, formed = run(name), []
    plain = Attention.scores

    def scores(self: Attention, q: Tensor, k: Tensor) -> Tensor:
        if q.device.type != "meta":  # where parts are listed
            formed.append(operator)
        return plain(self, q, k)

    monkeypatch.setattr(Attention, "scores", scores)
    subject = Subject.of(name, dtype=dtype)
    found: dict[str, list[Tensor]] = {}
    for operator in ("map", "qk"):
        policy = AttentionReuse(operator=operator, computed=[0, 3])
        memory = Memory(subject.rows, policy.memory_keys(info))
        for call in info.calls:
            memory.begin_call()
            plan = policy.plan(policy.begin(info), call)
            found.setdefault(operator, []).append(subject.other(call.position).run(plan, memory).prediction)
    assert formed == ["map"] * 2 * len(policy.blocks_on(info.network))
    tolerance = dict(rtol=0, atol=1e-10) if dtype == torch.float64 else TOLERANCE
    for by_map, by_qk in zip(found["map"], found["qk"], strict=True):
        torch.testing.assert_close(by_map, by_qk, **tolerance)
    for call, by_qk in enumerate(found["qk"]):  # and it is not the computed step
        away = (by_qk - subject.other(call).run().prediction).abs().max()
        assert away < 1e-5 if call in (0, 3) else away > 1e-3


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("name", "guidance"), [*((name, 2.0) for name in GUIDED), ("ldm-class", 2.0), ("two-decoders", 1.0)]
)
def test_reusing_nowhere_changes_no_bit(name: str, guidance: float, operator: str) -> None:
    table, plain = cost_table(build(name)), sample_chunk(sampler(name, None, guidance), INDEX, cost_table(build(name)))
    for when in (dict(last=0), dict(interval=1), dict(computed=[*range(STEPS)]), dict(last=3, window=[50, 60])):
        policy = AttentionReuse(operator=operator, **when)
        chunk = sample_chunk(sampler(name, policy, guidance), INDEX, table)
        assert torch.equal(chunk.images, plain.images)
        assert chunk.ledger.macs_saved == 0 and chunk.ledger.kept_bytes == 0


def by_hand(s: Sampler, reuse: frozenset[tuple[int, str]], when: list[int], skipped: tuple[int, ...] = ()) -> Tensor:
    """A guided DDIM run, each branch in calls of its own with a memory of its own; skipped calls hold both."""
    network, solver = s.denoiser.network, s.solver
    size = network.image_size
    labels = s.cond(INDEX)
    conds = {"cond": labels, "null": network.null_cond(3, torch.device("cpu"))}
    memories = {name: Memory(3, reuse) for name in conds}
    state = solver.begin(PROCESS, keys.normal(s.seed, "init_noise", INDEX, 0, (network.in_channels, size, size)))
    eps: dict[str, Tensor] = {}
    for call in s.calls():
        x = solver.network_input(state, call)
        if call.position not in skipped:
            for name, cond in conds.items():
                memories[name].begin_call()
                stream = network.embed(x, torch.full((3,), float(PROCESS.network_time(call.time))), cond)
                plan = StepPlan(reuse=reuse if call.position in when else frozenset())
                eps[name] = execute(network, stream, plan, memories[name]).prediction[:, : network.in_channels]
        state = solver.advance(state, call, torch.lerp(eps["null"], eps["cond"], s.guidance))
    return solver.result(state)


RUN = dict(rtol=1e-4, atol=1e-4)  # rounding, carried through a run


@torch.no_grad()
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", GUIDED)
def test_both_branches_at_once_are_two_runs(name: str, operator: str) -> None:
    s = sampler(name, AttentionReuse(operator=operator, interval=3))
    images = sample_chunk(s, INDEX, cost_table(build(name))).images
    wanted = by_hand(s, s.policy.memory_keys(s.info(s.calls())), when=[1, 2, 4, 5])
    torch.testing.assert_close(images, wanted, **RUN)
    plain = sample_chunk(replace(s, policy=Full()), INDEX, cost_table(build(name))).images
    assert (images - plain).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_skipped_call_leaves_memory_alone(operator: str) -> None:
    """Call 3 would have computed and is skipped: 4 and 5 take what call 0 left."""
    skip = Script(tuple(StepPlan(call=k != 3) for k in range(STEPS)))
    s = sampler("uvit-class", Compose([AttentionReuse(operator=operator, computed=[0, 3]), skip]))
    chunk = sample_chunk(s, INDEX, cost_table(build("uvit-class")))
    reuse = s.policy.memory_keys(s.info(s.calls()))
    torch.testing.assert_close(chunk.images, by_hand(s, reuse, when=[1, 2, 4, 5], skipped=(3,)), **RUN)
    assert chunk.ledger.reused[:, 0, 0].tolist() == [0, 5, 5, 0, 5, 5]
    assert chunk.ledger.called[:, 0, 0].tolist() == [True] * 3 + [False] + [True] * 2


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", GUIDED)
def test_a_second_generation_is_the_second_alone(name: str, operator: str) -> None:
    s = sampler(name, AttentionReuse(operator=operator, last=3))
    table = cost_table(build(name))
    both = [*sample(s, 6, table=table)]
    [alone] = sample(s, 3, start=3, table=table)
    assert torch.equal(both[1].images, alone.images)
    assert (both[0].images - alone.images).abs().max() > 1e-3
    [first] = sample(s, 3, table=table)
    assert torch.equal(first.images, both[0].images)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("name", "guidance", "last"), [*((name, 2.0, 2) for name in GUIDED), ("two-decoders", 1.0, 1)])
def test_the_ledger(name: str, guidance: float, last: int, operator: str) -> None:
    """What is taken, what is kept and when, and what is saved: by block, from the table."""
    policy = AttentionReuse(operator=operator, last=last)
    s, table, network = sampler(name, policy, guidance), cost_table(build(name)), build(name)
    ledger = sample_chunk(s, INDEX, table).ledger
    levels = torch.tensor([call.log_snr for call in s.calls()], dtype=torch.float64)
    paths = network.route(levels).tolist()
    assert len(set(paths[-1 - last :])) == 1  # so that what is kept is what is taken
    layers = [block for block in network.paths[paths[-1]] if block in policy.blocks_on(network)]
    computed = STEPS - last
    assert ledger.reused.tolist() == [[[0] * 3] * s.branches] * computed + [[[len(layers)] * 3] * s.branches] * last
    costs = [table.entries["block", paths[-1], block, mode].macs for block in layers for mode in ("full", operator)]
    saved = sum(costs[::2]) - sum(costs[1::2])
    assert saved > 0
    for position, (macs, full) in enumerate(zip(ledger.macs, ledger.full_macs.tolist(), strict=True)):
        assert (macs == full - (saved if position >= computed else 0)).all()
    held = replace(policy, layers=layers).kept_bytes(network, s.branches)
    assert ledger.kept.tolist() == [0] * (computed - 1) + [held] * last + [0]
    assert ledger.kept_bytes == held > 0


def predictions(s: Sampler) -> list[Prediction]:
    found: list[Prediction] = []
    sample_chunk(s, INDEX, cost_table(s.denoiser.network), on_prediction=lambda _, p: found.append(p))
    return found


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", GUIDED)
def test_only_the_last_computed_call_stores(name: str, operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it the run is the plain one bit for bit, with the fused kernel: maps that nobody reads are not formed."""
    formed: list[int] = []
    plain, scores = predictions(sampler(name)), Attention.scores

    def counted(self: Attention, q: Tensor, k: Tensor) -> Tensor:
        if q.device.type != "meta":  # where parts are listed
            formed.append(len(found))
        return scores(self, q, k)

    found: list[Prediction] = []
    monkeypatch.setattr(Attention, "scores", counted)
    s = sampler(name, AttentionReuse(operator=operator, last=2))
    sample_chunk(s, INDEX, cost_table(s.denoiser.network), on_prediction=lambda _, p: found.append(p))
    for position in range(STEPS - 3):
        assert torch.equal(found[position].eps, plain[position].eps)
    torch.testing.assert_close(found[STEPS - 3].eps, plain[STEPS - 3].eps, **TOLERANCE)
    assert not torch.equal(found[STEPS - 2].eps, plain[STEPS - 2].eps)
    layers = len(AttentionReuse(last=2).blocks_on(s.denoiser.network))
    assert formed == ([STEPS - 3] * layers if operator == "map" else [])


def test_with_deep_features() -> None:
    """Blocks inside the branch do not run, so their attention is not taken; those outside take theirs."""
    parts = [AttentionReuse(operator="output", interval=2), DeepFeatureReuse(interval=2)]
    s = sampler("uvit-class", Compose(parts))
    [_, second, *_] = predictions(s)
    modes = {event.index: event.mode for event in second.trace if event.kind == "block"}
    assert modes == {0: "output", 1: "block", 2: "block", 3: "block", 4: "output"}
