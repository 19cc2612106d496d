"""Full compute with fewer steps of the same solver: what any way of saving has to beat at equal MACs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gearshift.execution.cost import CostTable
from gearshift.policies.schedule import Full
from gearshift.runtime.errors import UsageError
from gearshift.sampling.costs import macs_of
from gearshift.sampling.loop import Sampler

GRIDS = ("log_snr", "linspace", "time", "trailing", "leading")
"""Spacings in the order in which one is looked for that a solver has and is not set to."""


def with_steps(sampler: Sampler, steps: int, spacing: str | None = None) -> Sampler | None:
    """Full compute with another number of steps, on another grid where `spacing` names one; None where the solver has
    no such thing."""
    config: Any = getattr(sampler.solver, "config", None)
    wanted: dict[str, Any] = {"steps": steps} if spacing is None else {"steps": steps, "spacing": spacing}
    if not all(hasattr(config, name) for name in wanted):
        return None
    kind: Any = type(sampler.solver)
    try:
        made = replace(sampler, solver=kind(replace(config, **wanted)), policy=Full())
        made.check()
    except UsageError:
        return None
    return made


def at_most(sampler: Sampler, macs: float, table: CostTable, spacing: str | None = None) -> tuple[int, Sampler] | None:
    """The most steps, fewer than the solver's own, whose full compute costs at most `macs` per image, and their
    sampler; the fewest there are where none is that cheap. None where the solver has no steps, or not on that grid."""
    usual = getattr(getattr(sampler.solver, "config", None), "steps", None)
    if usual is None or with_steps(sampler, usual, spacing) is None:
        return None
    full = macs_of(sampler, Full(), table)
    assert full is not None  # full compute decides by no data
    least = None
    # Not every solver calls once per step; none calls less often than its steps grow.
    for steps in range(min(usual - 1, int(usual * macs / full) + 1), 0, -1):
        made = with_steps(sampler, steps, spacing)
        if made is None:
            continue
        least = steps, made
        cost = macs_of(made, made.policy, table)
        if cost is not None and cost <= macs * (1 + 1e-9):  # shares of costs are rounded
            break
    return least


def other_grid(sampler: Sampler, macs: float, table: CostTable) -> tuple[str, int, Sampler] | None:
    """`at_most` on the first of `GRIDS` that the solver has besides its own, and that grid's name."""
    own = getattr(getattr(sampler.solver, "config", None), "spacing", None)
    for spacing in GRIDS if own is not None else ():
        found = at_most(sampler, macs, table, spacing) if spacing != own else None
        if found is not None:
            return spacing, *found
    return None
