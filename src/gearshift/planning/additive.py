"""Dynamic programming over the calls of a run, for losses that add up.

A run is a way through its calls: each computed call, with the skipped ones after it, is a stretch that costs something
and loses something. Were the losses of stretches independent, the best way under a budget would be a shortest path
(as in LeMiCa, arXiv 2511.00090, over calls and budget). They are nearly so; what is found is where searches begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearshift.planning.choices import Choice, Menu, Schedule
from gearshift.planning.problem import Problem
from gearshift.planning.responses import History, Responses

BUCKETS = 400


@dataclass(frozen=True)
class Stretch:
    """A computed call and the skipped ones after it."""

    choices: tuple[Choice, ...]
    cost: float
    loss: float


def stretches(problem: Problem, menu: Menu, responses: Responses, position: int) -> list[Stretch]:
    """What may begin at a call, without those that cost no less and lose no less than another of the same length."""
    total, full = len(problem.calls), menu.full
    here = problem.menu_at(menu, position)
    computing = [choice for choice in here.all() if choice.branches] if position else [full]
    found: list[Stretch] = []
    # What goes before is not known here: at best, full compute at the call before.
    history = History(position - 1, position - 1)
    for length in range(min(responses.longest, total - 1 - position) + 1 if menu.skips else 1):
        some = []
        for choice in computing:
            for forecast in (False, True) if length and position else (False,):
                skipped = (Choice(0, forecast=forecast),) * length
                terms = responses.segment(position, choice, skipped, history)
                if terms is not None:
                    cost = problem.cost_at(position, choice) + sum(
                        problem.cost_at(position + 1 + k, skip) for k, skip in enumerate(skipped)
                    )
                    some.append(Stretch((choice, *skipped), cost, responses.loss(terms)))
        found += pareto(some)
    return found


def pareto(candidates: list[Stretch]) -> list[Stretch]:
    """Those that no other beats in both cost and loss, dearest first."""
    kept: list[Stretch] = []
    for one in sorted(candidates, key=lambda s: (s.cost, s.loss)):
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return kept[::-1]


def best_way(ways: list[list[Stretch]], budget: float, buckets: int = BUCKETS) -> Schedule | None:
    """The way of least total loss whose cost is at most `budget`; None where there is none.

    Costs are rounded up to budget / buckets, so what is found never exceeds the budget.
    """
    total, unit = len(ways), budget / buckets
    # least[k][b]: loss of the calls from k on with b buckets to spend.
    least = [np.full(buckets + 1, np.inf) for _ in range(total)] + [np.zeros(buckets + 1)]
    taken: list[NDArray[np.int64]] = [np.full(buckets + 1, -1) for _ in range(total)]
    for position in reversed(range(total)):
        for number, stretch in enumerate(ways[position]):
            spent = int(np.ceil(stretch.cost / unit - 1e-9)) if unit else 0
            if spent > buckets:
                continue
            after = least[position + len(stretch.choices)]
            offered = np.full(buckets + 1, np.inf)
            offered[spent:] = after[: buckets + 1 - spent] + stretch.loss
            better = offered < least[position]
            least[position][better], taken[position][better] = offered[better], number
    if not np.isfinite(least[0][buckets]):
        return None
    schedule: list[Choice] = []
    left = buckets
    while len(schedule) < total:
        position = len(schedule)
        stretch = ways[position][int(taken[position][left])]
        left -= int(np.ceil(stretch.cost / unit - 1e-9)) if unit else 0
        schedule += stretch.choices
    return tuple(schedule)
