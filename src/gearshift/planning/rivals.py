"""What a plan has to beat at its own budget: fewer steps of the same solver, and schedules made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from gearshift.execution.cost import CostTable
from gearshift.policies import (
    AttentionReuse,
    BypassSchedule,
    Compose,
    DeepFeatureReuse,
    ExitSchedule,
    FixedDepth,
    Policy,
    SkipEvery,
)
from gearshift.policies.base import RunInfo
from gearshift.runtime.errors import UsageError
from gearshift.sampling.costs import macs_of
from gearshift.sampling.fewer_steps import at_most, other_grid
from gearshift.sampling.loop import Sampler


@dataclass(frozen=True)
class Rival:
    """A way of sampling, and its share of the cost of the full run."""

    name: str
    sampler: Sampler
    cost: float


def images_of(sampler: Sampler, index: Tensor, table: CostTable) -> tuple[Tensor, float]:
    """Images [n, C, H, W] of `index`, and MACs per image."""
    chunk = replace(sampler, chunk=len(index)).generate(index, table)
    return chunk.images, chunk.ledger.macs_per_image


def fewer_steps(sampler: Sampler, budget: float, full: float, table: CostTable) -> list[Rival]:
    """Full compute with as many steps as `budget` (a share of `full` MACs) pays for, on the solver's own grid and,
    where it has another, on that."""
    found: list[tuple[str, Sampler]] = []
    if (own := at_most(sampler, budget * full, table)) is not None:
        found.append((f"{own[0]} steps", own[1]))
    if (other := other_grid(sampler, budget * full, table)) is not None:
        found.append((f"{other[1]} steps, {other[0]}", other[2]))
    rivals = [Rival(name, made, (macs_of(made, made.policy, table) or 0) / full) for name, made in found]
    return [rival for rival in rivals if rival.cost <= budget * (1 + 1e-9)]


def by_hand(sampler: Sampler, budget: float, full: float, table: CostTable) -> list[Rival]:
    """Of every family of static policies of the project, the members that come closest to the budget from below."""
    info = sampler.info(sampler.calls())
    found: list[Rival] = []
    for family in _families(info):
        fitting: list[Rival] = []
        for policy in family:
            try:
                policy.check(info)
            except UsageError:
                continue  # not on this network
            macs = macs_of(sampler, policy, table)
            if macs is not None and macs <= budget * full * (1 + 1e-9):
                fitting.append(Rival(policy.name, replace(sampler, policy=policy), macs / full))
        if fitting:
            found.append(max(fitting, key=lambda rival: rival.cost))
    return found


def _families(info: RunInfo) -> Iterator[list[Policy]]:
    network, total = info.network, len(info.calls)
    exits = sorted({depth for path in range(len(network.paths)) for depth in network.exits(path)})
    deepest = exits[-1]
    for how in (False, True):
        yield [SkipEvery(k, extrapolate=how) for k in range(2, total + 1)]
        # Stretches longer than one call.
        some = ((2, 3), (2, 3, 5), (2, 5), (2, 7), (3, 4), (3, 5))
        yield [Compose([SkipEvery(k, extrapolate=how) for k in ks]) for ks in some]
    yield [FixedDepth(depth) for depth in exits]
    # From full depth next to the data down to some depth at the noise, and the other way round.
    ramps = [
        [exits[round(k * (place - len(exits) + 1) / 4) + len(exits) - 1] for k in range(5)]
        for place in range(len(exits))
    ]
    yield [ExitSchedule(depths=ramp) for ramp in ramps]
    yield [ExitSchedule(depths=ramp[::-1]) for ramp in ramps]
    # ASE's published schedule and heavier ones, in proportion to the depth.
    published = ([28, 28, 24, 24, 20, 20, 16, 16, 12, 12], [28, 28, 24, 22, 18, 16, 14, 12, 12, 10])
    yield [ExitSchedule(depths=list(depths), of=28) for depths in published if deepest > 1]
    yield [BypassSchedule(dropped=[0, 0, 1, 2, 2, 3, 4, 4, 5, 5], of=6)]
    for operator in ("output", "qk"):
        yield [AttentionReuse(last=last, operator=operator) for last in range(1, total)]
    merging = max(sum(block in network.pops for block in path) for path in network.paths)
    for branch in range(merging):
        yield [DeepFeatureReuse(interval=interval, branch=branch) for interval in range(2, total)]
    for k in (2, 3, 4):
        yield [Compose([SkipEvery(k), ExitSchedule(depths=ramp)]) for ramp in ramps]
        yield [Compose([SkipEvery(k), AttentionReuse(last=r, operator="output")]) for r in range(1, total)]
