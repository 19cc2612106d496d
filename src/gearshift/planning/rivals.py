"""What a plan has to beat at its own budget: fewer steps of the same solver, and schedules made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gearshift.diffusion.solvers.base import Solver
from gearshift.execution.cost import CostTable
from gearshift.policies import (
    AttentionReuse,
    BypassSchedule,
    Compose,
    DeepFeatureReuse,
    ExitSchedule,
    FixedDepth,
    Full,
    Policy,
    SkipEvery,
)
from gearshift.policies.base import RunInfo
from gearshift.runtime.errors import UsageError
from gearshift.sampling.costs import macs_of
from gearshift.sampling.loop import Sampler, sample_chunk


@dataclass(frozen=True)
class Rival:
    """A way of sampling, and its share of the cost of the full run."""

    name: str
    sampler: Sampler
    cost: float


def images_of(sampler: Sampler, index: Tensor, table: CostTable) -> tuple[Tensor, float]:
    """Images [n, C, H, W] of `index`, and MACs per image."""
    chunk = sample_chunk(replace(sampler, chunk=len(index)), index, table)
    return chunk.images, chunk.ledger.macs_per_image


def fewer_steps(sampler: Sampler, budget: float, full: float, table: CostTable) -> list[Rival]:
    """Full compute with as many steps as `budget` (a share of `full` MACs) pays for, on the solver's own grid and,
    where it has others, on those."""
    found = []
    for name, solver in with_steps(sampler.solver, sampler, budget * full, table):
        cost = _full_macs(replace(sampler, solver=solver), table) / full
        found.append(Rival(name, replace(sampler, solver=solver), cost))
    return found


def with_steps(solver: Solver, sampler: Sampler, macs: float, table: CostTable) -> Iterator[tuple[str, Solver]]:
    """The solver with the most steps that cost at most `macs`; once per grid it can have."""
    config: Any = getattr(solver, "config", None)
    if config is None or not hasattr(config, "steps"):
        return
    own = getattr(config, "spacing", None)
    grids = (
        [own] if own not in ("linspace", "log_snr", "trailing") else list(dict.fromkeys([own, "linspace", "log_snr"]))
    )
    for grid in grids:
        chosen = config if grid == own else replace(config, spacing=grid)
        for steps in range(config.steps - 1, 0, -1):
            kind: Any = type(solver)
            try:
                made: Solver = kind(replace(chosen, steps=steps))
                fits = _full_macs(replace(sampler, solver=made), table) <= macs * (1 + 1e-9)
            except UsageError:  # a grid or number of steps that the solver does not have
                continue
            if fits:
                yield f"{steps} steps" + ("" if grid == own else f", {grid}"), made
                break


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


def _full_macs(sampler: Sampler, table: CostTable) -> float:
    macs = macs_of(sampler, Full(), table)
    assert macs is not None
    return float(macs)
