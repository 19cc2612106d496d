"""The threshold of an online policy that meets a budget, found on calibration noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from gearshift.policies.base import Policy
from gearshift.runtime.errors import UsageError

ROUNDS = 14


@dataclass(frozen=True)
class Tuned:
    """A policy whose threshold was set, and its share of the cost of full compute."""

    policy: Policy
    threshold: float
    cost: float


def has_threshold(policy: Policy) -> bool:
    some: Any = policy
    return is_dataclass(some) and any(field.name == "threshold" for field in fields(some))


def check_threshold(policy: Policy) -> None:
    """Raises UsageError where a policy has none."""
    if not has_threshold(policy):
        raise UsageError(f"policy {type(policy).__name__} has no threshold to tune; plan without policy=")


def tune(
    policy: Policy,
    cost: Callable[[Policy], float],
    budget: float,
    *,
    rounds: int = ROUNDS,
    shown: Callable[[float], str] = lambda value: f"{value:g}",
    on_round: Callable[[float], None] = lambda threshold: None,
) -> Tuned:
    """The smallest threshold found at which `cost` is at most `budget`: bisection over its logarithm.

    Costs need not fall with the threshold everywhere; what is returned was run and met the budget.

    Raises:
        UsageError: the policy has no threshold, or no threshold meets the budget.
    """
    check_threshold(policy)
    highest = _highest(policy)

    def at(threshold: float) -> Tuned:
        some: Any = policy
        made: Policy = replace(some, **{**_one_for_all(some), "threshold": threshold})
        on_round(threshold)
        return Tuned(made, threshold, cost(made))

    best = at(highest)
    if best.cost > budget:
        raise UsageError(
            f"budget={shown(budget)} cannot be met: policy {type(policy).__name__} costs {shown(best.cost)} at its "
            f"greatest threshold, {highest:g}; raise the budget or loosen its caps"
        )
    low, high = math.log(1e-6), math.log(highest)
    for _ in range(rounds):
        middle = 0.5 * (low + high)
        tried = at(math.exp(middle))
        if tried.cost <= budget:
            high = middle
            best = tried
        else:
            low = middle
    return best


def _one_for_all(policy: Any) -> dict[str, None]:
    """What takes the place of a threshold, put away."""
    return {field.name: None for field in fields(policy) if field.name == "thresholds"}


def _highest(policy: Policy) -> float:
    """Uncertainty and the like lie in [0, 1]; statistics of skipping have no upper end, and at 100 nothing is left."""
    some: Any = policy
    try:
        replace(some, **{**_one_for_all(some), "threshold": 100.0})
    except UsageError:
        return 1.0
    return 100.0
