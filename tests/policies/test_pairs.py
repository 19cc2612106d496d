"""Every pair of policies, against a loop that goes row by row and knows no executor.

What one call of one row does is decided in this order: is it skipped, does it leave, is a block taken whole, is
attention taken. What a decision leaves out does not happen, so its state stays: rows that are skipped or have left, and
blocks that nobody reads, leave in the memory what the last call that computed them wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers import DDIM, Call, DDIMConfig, DPMpp2M, DPMpp2MConfig, Solver
from gearshift.execution.memory import Slot
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import Rows
from gearshift.policies import (
    AdaptiveSkip,
    AttentionReuse,
    BypassSchedule,
    Compose,
    DeepFeatureReuse,
    ExitSchedule,
    FixedDepth,
    Full,
    Planned,
    Policy,
    SkipEvery,
    UncertaintyExit,
)
from gearshift.policies.threshold_exit import BelowThreshold
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Chunk, Sampler, sample_chunk
from gearshift.sampling.stepping import Stepper

from ..contract import TOLERANCE, build, cost_table

STEPS, SEED = 7, 1
PROCESS = Discrete(DiscreteConfig(beta_end=0.006))
"""Ends at sigma / alpha = 4: from where random networks blow rounding up."""

# The reference -------------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """What policies are shown of a call."""

    eps: Tensor
    called: Tensor
    branches: int


@dataclass
class Row:
    """One sample in one branch of guidance: what its calls left behind."""

    cond: Tensor | None
    predictions: list[tuple[float, Tensor]] = field(default_factory=list)
    memory: dict[tuple[int, str], Mapping[str, tuple[Tensor, ...]]] = field(default_factory=dict)


@dataclass
class Way:
    """What one call of one row did."""

    depth: int = 0
    macs: int = 0
    reused: int = 0


def of_row(value: Any, row: int) -> Any:
    return value[row].item() if isinstance(value, Tensor) else value


def evaluate(
    network: Backbone, wanted: frozenset[tuple[int, str]], row: Row, x: Tensor, call: Call, plan: StepPlan, number: int
) -> tuple[Tensor, Way]:
    """The prediction of one row. The hidden state after a block is worked out when somebody asks for it."""
    entries = cost_table(network).entries
    path = int(network.route(torch.tensor([call.log_snr], dtype=torch.float64)))
    blocks = network.paths[path]
    target = len(blocks) if plan.depth is None else min(of_row(plan.depth, number), len(blocks))
    fed = torch.full((1,), float(PROCESS.network_time(call.time)))
    stream = network.enter(network.embed(x, fed, row.cond), path)
    way = Way(macs=entries["embed", path, 0, "full"].macs)
    states: dict[int, Tensor] = {-1: stream.hidden}
    modes: dict[int, str] = {}

    pending: list[int | Tensor] = [skip.hidden for skip in stream.skips]
    skip_of: dict[int, int | Tensor] = {}
    for position, block in enumerate(blocks):
        if block in network.pops:
            skip_of[position] = pending.pop()
        if block in network.pushes:
            pending.append(position)

    def after(position: int) -> Tensor:
        if position not in states:
            states[position] = run(position, blocks[position])
        return states[position]

    def run(position: int, block: int) -> Tensor:
        taken = [part for part in ("qk", "map", "output", "block") if (block, part) in plan.reuse]
        part = taken[-1] if taken and (block, taken[-1]) in row.memory else None
        dropped = block in plan.bypass
        if part == "block" and not dropped:
            modes[block] = "block"
            return row.memory[block, "block"]["block"][0]
        skip = skip_of.get(position)
        skip = after(skip) if isinstance(skip, int) else skip
        hidden = after(position - 1)
        modes[block] = "bypass" if dropped else part or "full"
        if dropped:
            return network.bypass(block, hidden, stream.cond, skip)
        mine = frozenset(p for b, p in wanted if b == block)
        slot = Slot(part, mine, dict(row.memory[block, part]) if part else {})
        result = network.blocks[block](hidden, stream.cond, skip, slot)
        slot.store("block", result)
        for kept in mine:
            stored = {name: values for name, values in slot.stored.items() if name.rsplit(".", 1)[-1] == kept}
            if stored:
                row.memory[block, kept] = stored
        return result

    looks = () if plan.exit is None else plan.exit.depths(network.exits(path))
    for depth in range(target + 1):
        way.depth = depth
        if depth == target:
            break
        if depth in looks:
            assert isinstance(plan.exit, BelowThreshold)
            way.macs += entries["uncertainty", path, depth, "full"].macs
            if float(network.mean_uncertainty(after(depth - 1), fed, depth, path)) < plan.exit.threshold:
                break
        if plan.exit is not None:
            after(depth)  # a rule may look at any depth
    output = network.readout(after(way.depth - 1), stream.cond, way.depth, path)
    way.macs += entries["readout", path, way.depth, "full"].macs
    for block in blocks[: way.depth]:
        mode = modes.get(block, "block")  # nobody asked for it
        way.macs += entries["block", path, block, mode].macs
        way.reused += mode not in ("full", "bypass")
    return output[:, : x.shape[1]], way


def by_hand(s: Sampler) -> tuple[Tensor, list[list[Way]]]:
    """Images, and what every row did at every call."""
    network, policy, solver = s.denoiser.network, s.policy, s.solver
    index, calls = torch.arange(s.chunk), s.calls()
    batch, branches = s.chunk, s.branches
    conds: list[Tensor | None] = [None] * batch
    if network.cond_kind == "class":
        labels = keys.integers(s.seed, "sample_label", index, 0, network.num_classes or 0)
        null = torch.full((batch,), network.num_classes or 0)
        conds = list(torch.cat([labels, null]).split(1))
    rows = [Row(conds[r]) for r in range(batch * branches)]
    shape = (network.in_channels, network.image_size, network.image_size)
    state = solver.begin(PROCESS, keys.normal(s.seed, "init_noise", index, 0, shape))
    info = s.info(calls)
    told, wanted = policy.begin(info), policy.memory_keys(info)
    record = []
    for call in calls:
        plan, x, ratio = policy.plan(told, call), solver.network_input(state, call), call.sigma / call.alpha
        ways, parts, own = [], [], []
        for number, row in enumerate(rows):
            if of_row(plan.call, number) or not row.predictions:
                eps, way = evaluate(network, wanted, row, x[number % batch][None], call, plan, number)
                row.predictions = [*row.predictions[-1:], (ratio, eps)]
            else:
                eps, way = row.predictions[-1][1], Way()
                if plan.forecast and len(row.predictions) == 2:
                    (r0, e0), (r1, e1) = row.predictions
                    eps = e1 + (ratio - r1) / (r1 - r0) * (e1 - e0)
            own.append(way.depth > 0 or bool(plan.forecast and len(row.predictions) == 2))
            ways.append(way)
            parts.append(eps)
        stacked = torch.cat(parts)
        eps = stacked if branches == 1 else stacked[batch:] + s.guidance * (stacked[:batch] - stacked[batch:])
        fresh = torch.tensor(own).reshape(branches, batch).all(0)
        state = solver.advance(state, call, eps, fresh=fresh)
        called = torch.tensor([way.depth > 0 for way in ways])
        told = policy.observe(told, call, x, solver.result(state), Shown(eps, called, branches))
        record.append(ways)
    return solver.result(state), record


def compare(s: Sampler) -> Chunk:
    """A run and its reference: images, and the whole ledger."""
    s.check()
    chunk = sample_chunk(s, torch.arange(s.chunk), cost_table(s.denoiser.network))
    with torch.no_grad():
        images, record = by_hand(s)
    shape = (STEPS, s.branches, s.chunk)
    for name in ("depth", "macs", "reused"):
        wanted = torch.tensor([[getattr(way, name) for way in ways] for ways in record]).reshape(shape)
        assert getattr(chunk.ledger, name).tolist() == wanted.tolist(), name
        if name == "depth":
            assert chunk.ledger.called.tolist() == (wanted > 0).tolist()
    scale = max(1.0, float(images.abs().max()))
    torch.testing.assert_close(chunk.images / scale, images / scale, rtol=0, atol=1e-4)
    return chunk


# Networks and policies -----------------------------------------------------------------------------------------------


@cache
def network_of(name: str) -> Backbone:
    """Of the contract suite; the one that normalises nothing with weights that do not blow rounding up."""
    network = copy.deepcopy(build(name))
    if name == "exits-two-decoders":
        for parameter in network.parameters():
            parameter.mul_(0.7)
    return network


@dataclass(frozen=True)
class Setting:
    """A network with a run on it, and depths it can be read out at."""

    name: str
    solver: Solver
    samples: int = 3
    guidance: float = 1.0
    depth: int | None = None
    schedule: tuple[int, ...] = ()
    threshold: float = 0.5

    @cache  # noqa: B019  # settings live as long as the module
    def sampler(self) -> Sampler:
        denoiser = Denoiser(network_of(self.name), PROCESS)
        return Sampler(denoiser, self.solver, Full(), seed=SEED, chunk=self.samples, guidance=self.guidance)


DDIM_7 = DDIM(DDIMConfig(STEPS))
SETTINGS = [
    Setting("exits-isotropic", DDIM_7, samples=2, guidance=2.0, depth=3, schedule=(4, 3, 1, 2)),
    Setting("exits-uvit", DPMpp2M(DPMpp2MConfig(STEPS)), depth=4, schedule=(5, 4, 5, 2)),
    Setting("unet-class", DDIM_7),
    Setting("exits-two-decoders", DDIM_7, depth=3, schedule=(4, 3, 5, 7)),
]


def planned(setting: Setting) -> Planned:
    """Calls, depths and parts that change from call to call, and between branches."""
    s, network = setting.sampler(), network_of(setting.name)
    last = len(network.blocks) - 1
    depth = setting.depth or 0
    one = 1 if s.branches == 2 else s.branches
    return Planned(
        network=network.name,
        blocks=last + 1,
        solver=s.solver.name,
        log_snr=[call.log_snr for call in s.calls()],
        branches=s.branches,
        call=[s.branches, s.branches, one, 0, s.branches, one, s.branches],
        depth=[0, depth, 0, 0, 0, depth, 0],
        reuse=[{}, {2: "map"}, {0: "block"}, {}, {2: "output"}, {2: "qk", last: "block"}, {1: "block"}],
    )


def adaptive(criterion: str, **fields: Any) -> Callable[[Setting], AdaptiveSkip]:
    """At a threshold that tells the samples of the plain run apart, or its calls where it decides for all at once."""

    @cache
    def of(setting: Setting) -> AdaptiveSkip:
        policy = AdaptiveSkip(1e-9, max_skip_steps=2, warmup_steps=3, criterion=criterion, **fields)
        s = replace(setting.sampler(), policy=policy)
        record = sample_chunk(s, torch.arange(s.chunk), cost_table(network_of(setting.name))).record["skip_statistic"]
        values = record[3:-1].reshape(STEPS - 4, -1).sort().values
        if values.shape[1] == 1:
            values = values.T.sort().values
        widest = (values[:, 1:] / values[:, :-1]).flatten().argmax()
        low, high = values[:, :-1].flatten()[widest], values[:, 1:].flatten()[widest]
        return replace(policy, threshold=float((low * high).sqrt()))

    return of


POLICIES: dict[str, Callable[[Setting], Policy]] = {
    "full": lambda of: Full(),
    "depth": lambda of: FixedDepth(of.depth or 0),
    "every": lambda of: SkipEvery(3, extrapolate=of.guidance > 1),
    "exits": lambda of: ExitSchedule(list(of.schedule)),
    "bypass": lambda of: BypassSchedule([1, 2, 0, 1]),
    "uncertainty": lambda of: UncertaintyExit(of.threshold),
    "magnitude": adaptive("displacement_magnitude", decision="per_sample"),
    "third": adaptive("third_difference", extrapolate=True),
    "error": adaptive("embedded_error", decision="per_sample"),
    "map": lambda of: AttentionReuse(operator="map", interval=2),  # at 1, 3, 5
    "qk": lambda of: AttentionReuse(operator="qk", computed=[0, 1, 4]),  # at 2, 3, 5, 6
    "output": lambda of: AttentionReuse(operator="output", last=3),  # at 4, 5, 6
    "deep": lambda of: DeepFeatureReuse(computed=[0, 2, 5]),  # at 1, 3, 4, 6
    "planned": planned,
}
LACKING = {
    "exits-isotropic": {"bypass", "deep"},
    "exits-uvit": set(),
    "unet-class": {"depth", "exits", "uncertainty"},
    "exits-two-decoders": set(),
}


def supported(setting: Setting) -> list[str]:
    return [name for name in POLICIES if name not in LACKING[setting.name]]


SINGLE = [(setting, name) for setting in SETTINGS for name in supported(setting)]
PAIRS = [(setting, a, b) for setting in SETTINGS for a, b in combinations(supported(setting), 2)]


@pytest.mark.parametrize(("setting", "name"), SINGLE, ids=[f"{s.name}-{name}" for s, name in SINGLE])
def test_every_policy_does_something(setting: Setting, name: str) -> None:
    """So that the pairs below are pairs."""
    s = setting.sampler()
    chunk = compare(replace(s, policy=POLICIES[name](setting)))
    full = compare(s)
    assert full.ledger.macs_saved == 0
    assert torch.equal(chunk.images, full.images) == (name == "full")
    if name == "uncertainty":
        assert len(set(chunk.ledger.depth.flatten().tolist())) > 1


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_samples_skip_apart(setting: Setting) -> None:
    """So that some pairs pack rows."""
    apart = 0
    for name in ("magnitude", "error"):
        s = replace(setting.sampler(), policy=POLICIES[name](setting))
        called = sample_chunk(s, torch.arange(s.chunk), cost_table(network_of(setting.name))).ledger.called[:, 0]
        apart += int((called.any(1) != called.all(1)).sum())
    assert apart > 0


@pytest.mark.parametrize(("setting", "a", "b"), PAIRS, ids=[f"{s.name}-{a}-{b}" for s, a, b in PAIRS])
def test_a_pair_is_the_reference(setting: Setting, a: str, b: str) -> None:
    compare(replace(setting.sampler(), policy=Compose([POLICIES[name](setting) for name in (a, b)])))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_the_order_of_the_parts_does_not_matter(setting: Setting) -> None:
    names = [name for name in supported(setting) if name in ("exits", "uncertainty", "magnitude", "map", "deep")]
    images = []
    for order in (names, names[::-1]):
        policy = Compose([POLICIES[name](setting) for name in order])
        images.append(compare(replace(setting.sampler(), policy=policy)).images)
    assert torch.equal(*images)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_what_a_network_lacks_is_refused(setting: Setting) -> None:
    s = setting.sampler()
    for name in LACKING[setting.name]:
        policy = FixedDepth(3) if name == "depth" else ExitSchedule([3]) if name == "exits" else POLICIES[name](setting)
        for refused in (policy, Compose([SkipEvery(2), policy])):
            with pytest.raises(UsageError, match=network_of(setting.name).name):
                refused.check(s.info(s.calls()))


def test_two_exit_rules_are_refused() -> None:
    for setting in SETTINGS:
        if "uncertainty" in LACKING[setting.name]:
            continue
        s = replace(setting.sampler(), policy=Compose([UncertaintyExit(0.4), Full(), UncertaintyExit(0.6)]))
        with pytest.raises(UsageError, match="two exit rules in one plan"):
            s.check()


# A skipped step freezes what is inside it ----------------------------------------------------------------------------


def test_a_skipped_step_changes_no_attention_and_the_next_takes_the_last_computed_map() -> None:
    """Calls 0 and 1 compute, 2 is skipped, 3 takes the map that call 1 left, not that of call 0 or of its own x."""
    setting = SETTINGS[1]
    policy = Compose([SkipEvery(3), AttentionReuse(operator="map", computed=[0, 1])])
    s = replace(setting.sampler(), policy=policy)
    network, info = s.denoiser.network, s.info(s.calls())
    stepper = Stepper(s, torch.arange(setting.samples), None, policy.memory_keys(info))
    everybody = Rows(info.num_rows)

    def maps() -> dict[int, Tensor]:
        assert point.memory is not None
        return {block: point.memory.read((block, "map"), everybody)["map"][0] for block in range(len(network.blocks))}

    state, point, kept, written = policy.begin(info), stepper.begin(), [], []
    with torch.no_grad():
        for call in info.calls[:4]:
            point, x, prediction = stepper.step(point, call, policy.plan(state, call))
            assert point.memory is not None
            kept.append(maps())
            written.append([point.memory.written((block, "map")).tolist() for block in range(len(network.blocks))])
            assert bool(prediction.called.all()) == (call.position != 2)
        per_call = [{row for rows in calls for row in rows} for calls in written]
        assert per_call == [{0}, {1}, {1}, {1}]
        for block in range(len(network.blocks)):
            assert (kept[1][block] - kept[0][block]).abs().max() > 1e-4
            assert kept[2][block] is kept[1][block] or torch.equal(kept[2][block], kept[1][block])
            assert torch.equal(kept[3][block], kept[1][block])

        def with_maps(taken: dict[int, Tensor]) -> Tensor:
            call = info.calls[3]
            stream = network.embed(x, torch.full((len(x),), float(PROCESS.network_time(call.time))), None)
            hidden, skips = stream.hidden, []
            for number, block in enumerate(network.blocks):
                popped = skips.pop() if number in network.pops else None
                slot = Slot("map", frozenset(), {"map": (taken[number],)})
                hidden = block(hidden, stream.cond, popped, slot)
                if number in network.pushes:
                    skips.append(hidden)
            return network.readout(hidden, stream.cond, len(network.blocks))

        torch.testing.assert_close(prediction.eps, with_maps(kept[1]), **TOLERANCE)
        assert (prediction.eps - with_maps(kept[0])).abs().max() > 1e-4
