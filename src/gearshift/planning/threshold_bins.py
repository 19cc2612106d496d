"""Thresholds by noise level that meet a budget: one for each bin, found on calibration noise.

What a threshold saves and spoils in one bin is measured with the others at 0; were bins independent, the best
thresholds would be those of least total loss whose costs add up to the budget. They are nearly so: what is found is
scaled until it meets the budget when it is run, and kept only where it is closer to full compute than the one threshold
that meets the budget everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gearshift.planning.threshold import Tuned
from gearshift.policies.base import Policy
from gearshift.policies.threshold_exit import ThresholdExit
from gearshift.runtime.errors import UsageError

FACTORS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
"""Of the one threshold, what is tried in every bin; and 0, where nobody leaves."""
ROUNDS = 8
BUCKETS = 1000


@dataclass(frozen=True)
class Measured:
    """What a policy took, as a share of full compute, and its loss against full compute."""

    policy: Policy
    cost: float
    loss: float


def runs_of(bins: int) -> int:
    """How many policies `tune_bins` runs at most."""
    return 1 + bins * len(FACTORS) + 1 + ROUNDS + 1


def with_thresholds(policy: ThresholdExit, thresholds: Sequence[float]) -> ThresholdExit:
    """The policy with these in place of what it has."""
    return replace(policy, threshold=None, thresholds=list(thresholds))


def check_binned(policy: Policy, bins: int) -> None:
    """Raises UsageError unless the policy can have a threshold for each of so many bins."""
    if bins < 2:
        raise UsageError(f"bins={bins} must be at least 2; leave it null for one threshold")
    if not isinstance(policy, ThresholdExit):
        raise UsageError(f"policy {type(policy).__name__} has one threshold for all noise levels; leave bins out")
    if policy.edges is not None and len(policy.edges) != bins - 1:
        raise UsageError(f"bins={bins} need {bins - 1} edges, and policy.edges has {len(policy.edges)}")
    with_thresholds(policy, [0.0] * bins)  # an axis without edges is refused before anything is run


def tune_bins(
    policy: ThresholdExit,
    single: Tuned,
    measure: Callable[[Policy], tuple[float, float]],
    budget: float,
    bins: int,
    on_round: Callable[[str], None] = lambda said: None,
) -> tuple[Measured, Measured]:
    """The best thresholds found, and the single one in every bin; the first is the second where nothing beats it.

    Args:
        single: the one threshold that meets the budget.
        measure: share of the cost of full compute, and loss, of a policy.
    """

    def of(thresholds: Sequence[float], said: str) -> Measured:
        on_round(said)
        made = with_thresholds(policy, thresholds)
        return Measured(made, *measure(made))

    on_round("one for all")
    uniform = Measured(single.policy, *measure(single.policy))
    tried = [0.0, *(min(single.threshold * factor, 1.0) for factor in FACTORS)]
    nothing = Measured(policy, 1.0, 0.0)
    costs, losses = np.ones((bins, len(tried))), np.zeros((bins, len(tried)))
    for place in range(bins):
        for number, value in enumerate(tried):
            alone = [value if k == place else 0.0 for k in range(bins)]
            found = of(alone, f"bin {place + 1} of {bins}") if value else nothing
            costs[place, number], losses[place, number] = found.cost, found.loss
    chosen = cheapest(1.0 - costs, losses, 1.0 - budget)
    if chosen is None:
        return uniform, uniform
    start = [tried[number] for number in chosen]
    best = of(start, "together")
    if best.cost > budget:
        best = _scaled(lambda factor: of([min(value * factor, 1.0) for value in start], "scaled"), budget) or uniform
    return (best if best.loss < uniform.loss else uniform), uniform


def _scaled(at: Callable[[float], Measured], budget: float) -> Measured | None:
    """The smallest common factor from 1 to 16 found that meets the budget; None where none does."""
    low, high = 0.0, math.log(16.0)
    best = at(math.exp(high))
    if best.cost > budget:
        return None
    for _ in range(ROUNDS):
        middle = 0.5 * (low + high)
        tried = at(math.exp(middle))
        if tried.cost <= budget:
            high, best = middle, tried
        else:
            low = middle
    return best


def cheapest(savings: np.ndarray, losses: np.ndarray, wanted: float) -> list[int] | None:
    """One candidate per bin ([bins, candidates] each) of least total loss whose savings add up to `wanted` or more.

    Savings are rounded down to `wanted` / BUCKETS, so what is found never falls short. None where all of them together
    do not reach it.
    """
    if wanted <= 0:
        return [int(number) for number in losses.argmin(axis=1)]
    units = np.floor(np.clip(savings, 0, None) / wanted * BUCKETS + 1e-9).astype(int)
    least = np.full(BUCKETS + 1, np.inf)  # least loss of the bins so far that saves at least so many buckets
    least[0] = 0.0
    taken = []
    for bin_units, bin_losses in zip(units, losses, strict=True):
        after, number = np.full(BUCKETS + 1, np.inf), np.full(BUCKETS + 1, -1)
        for candidate, (unit, loss) in enumerate(zip(bin_units, bin_losses, strict=True)):
            before = np.maximum(np.arange(BUCKETS + 1) - unit, 0)
            offered = least[before] + loss
            better = offered < after
            after[better], number[better] = offered[better], candidate
        least = after
        taken.append(number)
    if not np.isfinite(least[BUCKETS]):
        return None
    left, chosen = BUCKETS, []
    for bin_units, number in zip(units[::-1], taken[::-1], strict=True):
        chosen.append(int(number[left]))
        left = max(left - int(bin_units[chosen[-1]]), 0)
    return chosen[::-1]
