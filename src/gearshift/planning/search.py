"""Local search over schedules under a fixed budget: annealing and hill climbing, and greedy elimination.

`climb` and `anneal` propose neighbours of a schedule and never leave the budget (BudCache, arXiv 2606.13496, does so
over step masks). What a neighbour is, is a `Moves`; what it loses comes from a function, which may run the sampler or
predict. Everything is a function of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gearshift.planning.choices import Choice, Schedule

Loss = Callable[[Schedule], float]
Cost = Callable[[Schedule], float]
SLACK = 1e-9
"""Relative rounding of sums of costs."""


@dataclass(frozen=True)
class Moves:
    """Neighbours of a schedule: one call computes something else, two calls change at once, or two exchange what they
    compute (which keeps the cost of alike calls).

    Attributes:
        options: what each call may compute; one option means that it is settled.
        exchange_only: the third kind alone, for searches at a fixed number of computed calls.
    """

    options: Sequence[Sequence[Choice]]
    exchange_only: bool = False

    def propose(self, schedule: Schedule, draw: np.random.Generator) -> Schedule:
        """A random neighbour."""
        free = [k for k, options in enumerate(self.options) if len(options) > 1]
        changed = list(schedule)
        kind = draw.random()
        if self.exchange_only or kind < 0.35:
            a, b = (int(k) for k in draw.choice(free, 2, replace=False)) if len(free) > 1 else (free[0], free[0])
            if kind < 0.15 and a + 1 in free:  # neighbours in time, more often than chance has it
                b = a + 1
            if changed[a] in self.options[b] and changed[b] in self.options[a]:
                changed[a], changed[b] = changed[b], changed[a]
            return tuple(changed)
        for k in draw.choice(free, 2 if kind < 0.75 and len(free) > 1 else 1, replace=False):
            options = self.options[int(k)]
            changed[int(k)] = options[int(draw.integers(len(options)))]
        return tuple(changed)


@dataclass(frozen=True)
class Found:
    """The best schedule of a search, and how many were looked at."""

    schedule: Schedule
    loss: float
    looked_at: int


def within(cost: float, budget: float) -> bool:
    return cost <= budget * (1 + SLACK)


def anneal(
    start: Schedule,
    loss: Loss,
    cost: Cost,
    budget: float,
    moves: Moves,
    rounds: int,
    draw: np.random.Generator,
    *,
    heat: float = 0.1,
    on_round: Callable[[float], None] = lambda best: None,
) -> Found:
    """Simulated annealing: a neighbour that is worse by a share s of the loss is taken with probability exp(-s / T); T
    falls linearly from `heat` to 0, where this is hill climbing."""
    current, at = start, loss(start)
    best, best_loss, looked = current, at, 1
    for number in range(rounds):
        temperature = heat * (1 - number / rounds)
        candidate = moves.propose(current, draw)
        if candidate == current or not within(cost(candidate), budget):
            on_round(best_loss)
            continue
        value = loss(candidate)
        looked += 1
        worse = (value - at) / at if at else math.inf
        if worse < 0 or (temperature > 0 and draw.random() < math.exp(-worse / temperature)):
            current, at = candidate, value
            if at < best_loss:
                best, best_loss = current, at
        on_round(best_loss)
    return Found(best, best_loss, looked)


def climb(
    start: Schedule,
    loss: Loss,
    cost: Cost,
    budget: float,
    moves: Moves,
    evaluations: int,
    draw: np.random.Generator,
    *,
    prefer: Callable[[Schedule], float | None] | None = None,
    pool: int = 1,
    on_accept: Callable[[Schedule], None] = lambda schedule: None,
    on_round: Callable[[float], None] = lambda best: None,
) -> Found:
    """Hill climbing: of `pool` random neighbours within the budget that were not looked at before, the one that
    `prefer` expects to lose least is measured, and taken if it is better.

    `evaluations` is how often `loss` is asked for at most, the start included.
    """
    best, best_loss = start, loss(start)
    on_accept(best)
    seen, looked = {start}, 1
    for _ in range(50 * evaluations):  # neighbours may be used up
        if looked >= evaluations:
            break
        candidates: list[Schedule] = []
        for _ in range(4 * pool):
            candidate = moves.propose(best, draw)
            if candidate not in seen and candidate not in candidates and within(cost(candidate), budget):
                candidates.append(candidate)
            if len(candidates) == pool:
                break
        if not candidates:
            continue
        chosen = candidates[0]
        if prefer is not None:
            expected = [prefer(candidate) for candidate in candidates]
            known = [(value, k) for k, value in enumerate(expected) if value is not None]
            chosen = candidates[min(known)[1]] if known else chosen
        seen.add(chosen)
        value = loss(chosen)
        looked += 1
        if value < best_loss:
            best, best_loss = chosen, value
            on_accept(best)
        on_round(best_loss)
    return Found(best, best_loss, looked)


def eliminate(
    start: Schedule,
    loss: Loss,
    skip: Choice,
    *,
    least: int = 1,
    on_round: Callable[[float], None] = lambda best: None,
) -> dict[int, Found]:
    """Greedy elimination: skip, one after the other, the call whose absence loses least (the oracle that
    AdaptiveDiffusion grades its criterion by, arXiv 2410.09873).

    Returns, by number of computed calls, the schedule and its loss, from all calls down to `least`. The first call
    stays.
    """
    current, looked = start, 1
    found = {_computed(start): Found(start, loss(start), 1)}
    while _computed(current) > least:
        options: list[tuple[float, int, Schedule]] = []
        for position in range(1, len(current)):
            if current[position].branches:
                candidate = (*current[:position], skip, *current[position + 1 :])
                options.append((loss(candidate), position, candidate))
                looked += 1
        if not options:
            break
        value, _, current = min(options, key=lambda option: option[:2])
        found[_computed(current)] = Found(current, value, looked)
        on_round(value)
    return found


def _computed(schedule: Schedule) -> int:
    return sum(choice.branches > 0 for choice in schedule)
