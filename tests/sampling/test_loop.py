"""The sampling loop: against a loop written by hand, over chunks and ranks, under policies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.diffusion.solvers.base import Call, Solver
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.diffusion.solvers.ddpm import DDPM, DDPMConfig
from gearshift.diffusion.solvers.dpmpp_2m import DPMpp2M, DPMpp2MConfig
from gearshift.diffusion.solvers.euler_maruyama import EulerMaruyama, EulerMaruyamaConfig
from gearshift.execution.outputs import SIMULATE
from gearshift.execution.plan import StepPlan
from gearshift.policies import Compose, ExitSchedule, FixedDepth, Full, Policy, SkipEvery, UncertaintyExit
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Chunk, Sampler, sample, sample_chunk

from ..contract import TOLERANCE, Impatient, build, cost_table
from ..toys import Isotropic

SOLVERS: list[Solver] = [
    DDIM(DDIMConfig(steps=4)),
    DDIM(DDIMConfig(steps=4, eta=0.5)),
    DDPM(DDPMConfig(steps=4)),
    EulerMaruyama(EulerMaruyamaConfig(steps=4)),
    DPMpp2M(DPMpp2MConfig(steps=4)),
]


def sampler(
    name: str = "isotropic", solver: Solver | None = None, policy: Policy | None = None, **fields: Any
) -> Sampler:
    solver = SOLVERS[0] if solver is None else solver
    continuous = isinstance(solver, EulerMaruyama)
    process = VPSDE(VPSDEConfig()) if continuous else Discrete(DiscreteConfig())
    return Sampler(Denoiser(build(name), process), solver, policy or Full(), chunk=fields.pop("chunk", 4), **fields)


def images(s: Sampler, count: int, **options: Any) -> Tensor:
    return torch.cat([chunk.images for chunk in sample(s, count, table=cost_table(s.denoiser.network), **options)])


@dataclass(frozen=True)
class Script(Policy):
    """Any plans, by position."""

    plans: tuple[StepPlan, ...] = ()

    def plan(self, state: Any, call: Call) -> StepPlan:
        return self.plans[call.position]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{s.name}-{s.stochastic}")
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_full_is_the_plain_loop_bit_for_bit(solver: Solver, guidance: float) -> None:
    s = sampler(solver=solver, guidance=guidance, seed=7)
    network, process = s.denoiser.network, s.denoiser.process
    index = torch.arange(4)
    labels = keys.integers(7, "sample_label", index, 0, 3)
    state = solver.begin(process, keys.normal(7, "init_noise", index, 0, (2, 8, 8)))
    for call in solver.calls(process):
        x = solver.network_input(state, call)
        rows, cond = x, labels
        if guidance != 1:
            rows, cond = torch.cat([x, x]), torch.cat([labels, torch.full((4,), 3)])
        stream = network.embed(rows, torch.full((len(rows),), float(process.network_time(call.time))), cond)
        hidden = stream.hidden
        for block in network.blocks:
            hidden = block(hidden, stream.cond)
        eps = network.readout(hidden, stream.cond, 4)
        if guidance != 1:
            eps = torch.lerp(eps[4:], eps[:4], guidance)
        noise = keys.normal(7, "step_noise", index, call.position, (2, 8, 8)) if call.needs_noise else None
        state = solver.advance(state, call, eps, noise=noise)
    chunk = sample_chunk(s, index, cost_table(network))
    assert torch.equal(chunk.images, solver.result(state))
    assert chunk.cond is not None and torch.equal(chunk.cond, labels)
    assert chunk.ledger.macs_saved == 0.0
    assert chunk.ledger.calls_per_image == 4 * (1 if guidance == 1 else 2)


@pytest.mark.parametrize("name", ["isotropic", "long-skips", "two-decoders", "uvit-class"])
def test_full_saves_nothing_and_costs_the_plain_network(name: str) -> None:
    """Also where the noise level routes calls to decoders of different cost."""
    chunk = next(sample(sampler(name), 4, table=cost_table(build(name))))
    assert chunk.ledger.macs_saved == 0.0
    network, table = build(name), cost_table(build(name))
    if name == "two-decoders":
        wanted = [table.full(network, int(level < 0)).macs for level in chunk.ledger.log_snr]
        assert len(set(wanted)) == 2
    else:
        wanted = [table.full(network).macs] * 4
    assert chunk.ledger.macs.tolist() == [[[w] * 4] for w in wanted]
    assert chunk.ledger.full_macs.tolist() == wanted


POLICIES: list[Policy] = [
    Full(),
    FixedDepth(2),
    ExitSchedule(depths=[4, 2, 1]),
    SkipEvery(2),
    Compose([SkipEvery(3), FixedDepth(3)]),
    UncertaintyExit(0.5),
    UncertaintyExit(0.5, statistic="batch"),  # neighbours matter, so the cut must not move with the range
]


def with_heads() -> Sampler:
    torch.manual_seed(5)
    network = EarlyExit(ExitsConfig(), Isotropic())
    for parameter in network.uncertainty_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return Sampler(Denoiser(network.requires_grad_(False), Discrete(DiscreteConfig())), SOLVERS[1], Full(), chunk=4)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_images_do_not_depend_on_range_or_ranks(policy: Policy) -> None:
    """At one chunk size bit for bit; between chunk sizes up to rounding (where no row stands at its threshold)."""
    s = replace(with_heads(), policy=policy)
    table = cost_table(s.denoiser.network)
    whole = [*sample(s, 11, table=table)]
    assert [len(chunk.images) for chunk in whole] == [4, 4, 3]
    assert torch.cat([chunk.index for chunk in whole]).tolist() == list(range(11))
    together = torch.cat([chunk.images for chunk in whole])
    for start, count in ((0, 1), (2, 5), (3, 8), (10, 1), (4, 4)):
        part = [*sample(s, count, start=start, table=table)]
        assert torch.equal(torch.cat([chunk.images for chunk in part]), together[start : start + count])
        assert torch.cat([chunk.index for chunk in part]).tolist() == list(range(start, start + count))
        ledger = LedgerData.merge([chunk.ledger for chunk in part])
        assert ledger.macs.tolist() == _cut(whole, start, count).macs.tolist()
    for world in (2, 3):
        parts: dict[int, Chunk] = {}
        for rank in range(world):
            for chunk in sample(s, 11, rank=rank, world_size=world, table=table):
                parts[int(chunk.index[0])] = chunk
        assert torch.equal(torch.cat([parts[first].images for first in sorted(parts)]), together)
    if policy.static:
        other = torch.cat([chunk.images for chunk in sample(replace(s, chunk=3), 11, table=table)])
        torch.testing.assert_close(other, together, rtol=1e-4, atol=1e-4)  # kernels round differently


def test_chunks_start_at_multiples_of_their_size() -> None:
    cut = [[int(index[0]), int(index[-1])] for index in sampler(chunk=4).chunks(5, 13)]
    assert cut == [[4, 7], [8, 11], [12, 15]]
    assert sampler(chunk=4).chunks(3, 3) == []


def _cut(chunks: list[Chunk], start: int, count: int) -> LedgerData:
    return LedgerData.merge([chunk.ledger for chunk in chunks]).take(slice(start, start + count))


def test_policies_save_what_they_say() -> None:
    s = with_heads()
    table = cost_table(s.denoiser.network)
    saved = {p.name: next(sample(replace(s, policy=p), 4, table=table)).ledger.macs_saved for p in POLICIES}
    assert saved["Full"] == 0
    cost = {d: table.path_cost(0, d, blocks=(0, 1, 2, 3)).macs for d in (1, 2, 3, 4)}
    assert saved["depth 2"] == pytest.approx(1 - cost[2] / cost[4], abs=1e-12)
    assert saved["skip every 2"] == pytest.approx(0.25, abs=1e-12)  # of four calls the second
    ledger = next(sample(replace(s, policy=SkipEvery(2)), 4, table=table)).ledger
    assert ledger.called[:, 0, 0].tolist() == [True, False, True, True]
    assert ledger.macs[:, 0, 0].tolist() == [cost[4], 0, cost[4], cost[4]]
    assert ledger.depth[:, 0, 0].tolist() == [4, 0, 4, 4]
    assert ledger.calls_per_image == 3


def test_composing_with_full_changes_no_bit() -> None:
    s = with_heads()
    for policy in POLICIES:
        alone, composed = (images(replace(s, policy=p), 4) for p in (policy, Compose([Full(), policy])))
        assert torch.equal(alone, composed)


def test_thresholds_at_the_ends() -> None:
    s = with_heads()
    assert torch.equal(images(replace(s, policy=UncertaintyExit(0.0)), 4), images(s, 4))
    first = images(replace(s, policy=UncertaintyExit(1.0)), 4)
    torch.testing.assert_close(first, images(replace(s, policy=FixedDepth(1)), 4), **TOLERANCE)


@dataclass(frozen=True)
class Moody(Policy):
    """A data-dependent rule from the contract suite."""

    static: ClassVar[bool] = False

    def plan(self, state: Any, call: Call) -> StepPlan:
        return StepPlan(exit=Impatient(0.6))


def test_packed_sampling_is_simulated_sampling_under_replayed_decisions() -> None:
    s = sampler(policy=Moody(), guidance=2.0)
    table = cost_table(s.denoiser.network)
    packed = sample_chunk(s, torch.arange(4), table)
    depths = torch.from_numpy(packed.ledger.depth).long().flatten(1)
    replay = Script(plans=tuple(StepPlan(depth=depth) for depth in depths))
    simulated = sample_chunk(replace(s, policy=replay, packing=SIMULATE), torch.arange(4), table)
    torch.testing.assert_close(packed.images, simulated.images, rtol=1e-4, atol=1e-4)
    assert (packed.ledger.macs == simulated.ledger.macs).all()
    assert len(set(depths.flatten().tolist())) > 1
    assert (packed.ledger.depth[:, 0] != packed.ledger.depth[:, 1]).any()  # the branches part


def test_reuse_is_remembered_between_calls() -> None:
    wanted = frozenset((block, "output") for block in range(4))
    plans = (StepPlan(), StepPlan(reuse=wanted), StepPlan(), StepPlan(reuse=wanted))
    s = sampler(policy=Script(plans=plans))
    table = cost_table(s.denoiser.network)
    ledger = sample_chunk(s, torch.arange(4), table).ledger
    assert ledger.reused[:, 0].tolist() == [[0] * 4, [4] * 4, [0] * 4, [4] * 4]
    saved = sum(
        table.entries["block", 0, b, "full"].macs - table.entries["block", 0, b, "output"].macs for b in range(4)
    )
    assert (ledger.full_macs - ledger.macs[:, 0, 0]).tolist() == [0, saved, 0, saved]


@dataclass(frozen=True)
class Watching(Policy):
    """Checks what it is shown."""

    static: ClassVar[bool] = False

    def begin(self, run: Any) -> list[Any]:
        return []

    def observe(self, state: list[Any], call: Call, before: Tensor, after: Tensor, prediction: Any) -> list[Any]:
        return [*state, (call.position, before, after, prediction)]

    def plan(self, state: list[Any], call: Call) -> StepPlan:
        assert [entry[0] for entry in state] == list(range(call.position))
        for (_, _, after, prediction), (_, before, _, _) in pairwise(state):
            assert torch.equal(after, before)
            assert prediction.called.all()
        return StepPlan()


def test_policies_observe_every_step() -> None:
    s = sampler(policy=Watching())
    assert torch.equal(images(s, 4), images(replace(s, policy=Full()), 4))


@pytest.mark.parametrize("name", ["long-skips", "uvit-class"])
def test_per_row_skips_reach_the_solver(name: str) -> None:
    """The solver with history is told which samples are fresh; a skipped sample is the one of a run that skips it."""
    solver = DPMpp2M(DPMpp2MConfig(steps=4))
    call = torch.tensor([True, False, True, False])
    mixed = images(sampler(name, solver, Script(plans=(StepPlan(), StepPlan(call=call), StepPlan(), StepPlan()))), 4)
    skipped = images(sampler(name, solver, Script(plans=(StepPlan(), StepPlan(call=False), StepPlan(), StepPlan()))), 4)
    full = images(sampler(name, solver), 4)
    torch.testing.assert_close(mixed[call], full[call], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[~call], skipped[~call], rtol=1e-4, atol=1e-4)
    assert (full - skipped).abs().max() > 1e-3


def test_labels() -> None:
    index = torch.arange(3000)
    drawn = sampler(seed=3).cond(index)
    assert drawn is not None
    assert torch.equal(drawn[1000:2000], sampler(seed=3).cond(index[1000:2000]))  # type: ignore[arg-type]
    assert torch.bincount(drawn, minlength=3).float().sub(1000).abs().max() < 110  # 4 standard deviations
    assert torch.equal(sampler(labels="balanced").cond(index), index % 3)  # type: ignore[arg-type]
    assert torch.equal(sampler(labels=2).cond(index), torch.full((3000,), 2))  # type: ignore[arg-type]
    assert sampler("long-skips").cond(index) is None
    with pytest.raises(UsageError, match="pass it as cond="):
        sampler("uvit-text").cond(index)


def test_condition_may_be_given() -> None:
    s = sampler("uvit-text")
    text = torch.randn(4, 3, 5)
    chunk = sample_chunk(s, torch.arange(4), cost_table(s.denoiser.network), cond=text)
    assert chunk.images.shape == (4, 2, 8, 8) and chunk.cond is text


def test_seeds_give_other_images() -> None:
    assert (images(sampler(seed=1), 4) - images(sampler(seed=2), 4)).abs().mean() > 0.1


def test_what_does_not_fit_is_said_before_the_first_call() -> None:
    for s, message in (
        (sampler(policy=FixedDepth(9)), "asks for depth 9"),
        (sampler(labels=3), r"label 3 is outside the classes 0\.\.2"),
        (sampler(labels="random"), "labels='random' is neither"),
        (sampler(chunk=0), "chunk=0"),
        (sampler("long-skips", guidance=2.0), "guidance needs a null condition, and LongSkips"),
        (sampler(policy=UncertaintyExit(0.1)), "needs uncertainty heads"),
        (sampler(policy=Compose([UncertaintyExit(0.1)] * 2)), "needs uncertainty heads"),
    ):
        with pytest.raises(UsageError, match=message):
            next(sample(s, 1))


def test_progress_is_told_of_every_call() -> None:
    told: list[int] = []
    images(sampler(), 5, on_call=lambda call: told.append(call.position))
    assert told == [0, 1, 2, 3] * 2


def test_lower_precision_keeps_x_in_fp32() -> None:
    s = sampler(dtype=torch.bfloat16)
    low, high = images(s, 4), images(replace(s, dtype=torch.float32), 4)
    assert low.dtype == torch.float32
    assert (low - high).abs().max() > 0 and torch.isfinite(low).all()
