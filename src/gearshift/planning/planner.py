"""The best schedule under a budget: predict from responses, then measure neighbours of what is predicted to be best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gearshift.planning.additive import Stretch, best_way, stretches
from gearshift.planning.choices import Choice, Menu, Schedule, describe
from gearshift.planning.problem import Measured, Problem
from gearshift.planning.responses import Responses
from gearshift.planning.search import Moves, anneal, climb, eliminate, within
from gearshift.runtime.errors import UsageError

SEARCHES = ("responses", "anneal", "greedy")
"""`responses`: predict from single decisions, then measure. `anneal`: measure only, from a schedule of even gaps
(BudCache). `greedy`: skip one call after the other (AdaptiveDiffusion's oracle)."""
UNKNOWN = 1e9
"""Predicted loss of a schedule that holds what was not tried."""


@dataclass(frozen=True)
class Effort:
    """How much is looked at.

    Attributes:
        evaluations: schedules that are measured.
        predictions: rounds of annealing over predicted losses, which are cheap.
        pool: neighbours of which the one predicted to be best is measured.
        restarts: further climbs, each from the best schedule with some calls exchanged.
    """

    evaluations: int = 150
    predictions: int = 20_000
    pool: int = 16
    restarts: int = 0


@dataclass(frozen=True)
class Outcome:
    """A schedule with what was predicted and measured of it.

    Attributes:
        predicted: mean squared error; None where nothing was predicted.
        starts: by name, what the search began with, measured.
        looked_at: schedules that were measured.
    """

    best: Measured
    predicted: float | None
    starts: dict[str, Measured]
    looked_at: int


def least_cost(problem: Problem, menu: Menu) -> float:
    """The least share of full compute that a schedule of the menu can cost."""
    first = problem.cost_at(0, menu.full)
    return first + sum(
        min(problem.cost_at(k, choice) for choice in problem.menu_at(menu, k).all())
        for k in range(1, len(problem.calls))
    )


def check_budget(problem: Problem, menu: Menu, budget: float, shown: Callable[[float], str]) -> None:
    """Raises UsageError where no schedule can meet the budget, saying what the least is."""
    least = least_cost(problem, menu)
    if not within(least, budget):
        raise UsageError(
            f"budget={shown(budget)} cannot be met: in this space no plan costs less than {shown(least)}, because the "
            "first call computes everything; raise the budget, take more steps, or widen space"
        )


def by_responses(
    problem: Problem,
    menu: Menu,
    responses: Responses,
    trial: Problem,
    budget: float,
    effort: Effort,
    seed: int,
    *,
    also: dict[str, Schedule] | None = None,
    on_round: Callable[[float], None] = lambda best: None,
) -> Outcome:
    """Dynamic programming, annealing over predicted losses, hill climbing over measured ones.

    Args:
        problem: whose losses are measured.
        trial: the problem that the responses were measured on, usually of fewer images.
        also: further schedules to begin with; those beyond the budget are left out.
    """
    draw = np.random.default_rng(seed)
    ways = [stretches(trial, menu, responses, k) for k in range(len(problem.calls))]
    moves = Moves(options_of(ways, menu))
    starts: dict[str, Schedule] = {"dynamic programming": _required(best_way(ways, budget))}
    starts |= {name: schedule for name, schedule in (also or {}).items() if within(problem.cost(schedule), budget)}

    def predicted(schedule: Schedule) -> float:
        value = responses.predict(schedule)
        return UNKNOWN if value is None else value

    annealed = [
        anneal(begin, predicted, problem.cost, budget, moves, effort.predictions // len(starts), draw)
        for begin in starts.values()
    ]
    starts["predicted best"] = min(annealed, key=lambda found: found.loss).schedule
    measured = {name: problem.measure(schedule) for name, schedule in starts.items()}
    begin = min(measured.values(), key=lambda one: one.loss).schedule
    found = climb(
        begin,
        lambda schedule: problem.measure(schedule).loss,
        problem.cost,
        budget,
        moves,
        effort.evaluations,
        draw,
        prefer=responses.predict,
        pool=effort.pool,
        on_accept=problem.hold,
        on_round=on_round,
    )
    best = Measured(found.schedule, found.loss, problem.cost(found.schedule))
    return Outcome(best, responses.predict(found.schedule), measured, found.looked_at + len(measured))


def options_of(ways: list[list[Stretch]], menu: Menu) -> list[list[Choice]]:
    """What each call may compute in a local search: whatever is worth its cost somewhere."""
    skips = [Choice(0), Choice(0, forecast=True)] if menu.skips else []
    found = []
    for position, some in enumerate(ways):
        computing = list(dict.fromkeys([menu.full, *(stretch.choices[0] for stretch in some)]))
        found.append([*computing, *skips] if position else [menu.full])
    return found


def by_annealing(
    problem: Problem,
    start: Schedule,
    options: list[list[Choice]],
    budget: float,
    effort: Effort,
    seed: int,
    *,
    on_round: Callable[[float], None] = lambda best: None,
) -> Outcome:
    """Annealing, then hill climbing, over measured losses alone; calls exchange what they compute, so the cost stays.

    With masks of skipped calls this is the search of BudCache (arXiv 2606.13496); with masks of reuse that begin late,
    it is PHAST (arXiv 2401.01008), which starts from HURRY.
    """
    draw = np.random.default_rng(seed)
    moves = Moves(options, exchange_only=True)

    def loss(schedule: Schedule) -> float:
        return problem.measure(schedule).loss

    first = problem.measure(start)
    half = effort.evaluations // 2
    warm = anneal(start, loss, problem.cost, budget, moves, half, draw, on_round=on_round)
    best, looked = warm, warm.looked_at
    for restart in range(effort.restarts + 1):
        begin = best.schedule
        for _ in range(2 * restart):
            begin = moves.propose(begin, draw)
        found = climb(
            begin,
            loss,
            problem.cost,
            budget,
            moves,
            max(2, half // (effort.restarts + 1)),
            draw,
            on_accept=problem.hold,
            on_round=on_round,
        )
        looked += found.looked_at
        best = found if found.loss < best.loss else best
    measured = Measured(best.schedule, best.loss, problem.cost(best.schedule))
    return Outcome(measured, None, {"start": first}, looked)


def by_elimination(
    problem: Problem, budget: float, *, forecast: bool = False, on_round: Callable[[float], None] = lambda best: None
) -> tuple[Outcome, dict[int, Measured]]:
    """The greedy oracle: the outcome at the budget, and the best found at every number of computed calls."""
    least = sum(1 for _ in problem.calls)
    while least > 1 and not within(least / len(problem.calls), budget):
        least -= 1
    found = eliminate(
        problem.full,
        lambda schedule: problem.measure(schedule).loss,
        Choice(0, forecast=forecast),
        least=least,
        on_round=on_round,
    )
    all_of_them = {count: Measured(one.schedule, one.loss, problem.cost(one.schedule)) for count, one in found.items()}
    fitting = [one for one in all_of_them.values() if within(one.cost, budget)]
    best = max(fitting, key=lambda one: one.cost)
    return Outcome(best, None, {}, max(one.looked_at for one in found.values())), all_of_them


def evenly(problem: Problem, budget: float, skip: Choice) -> Schedule:
    """As many computed calls as the budget allows, at even gaps, the first among them."""
    total = len(problem.calls)
    for count in range(total, 0, -1):
        chosen = {round(k * total / count) for k in range(count)}
        schedule = tuple(problem.full[0] if k in chosen else skip for k in range(total))
        if within(problem.cost(schedule), budget):
            return schedule
    raise UsageError(f"budget={budget:g} does not pay for the first of {total} calls, which computes everything")


def _required(schedule: Schedule | None) -> Schedule:
    if schedule is None:  # the budget was checked before
        raise RuntimeError("no schedule within the budget")
    return schedule


def late_reuse(problem: Problem, alternative: Choice, budget: float) -> Schedule:
    """HURRY (arXiv 2401.01008): `alternative` at the fewest last calls that meet the budget.

    Raises:
        UsageError: not even at all calls but the first.
    """
    total = len(problem.calls)
    for last in range(total):
        schedule = problem.full[: total - last] + (alternative,) * last
        if within(problem.cost(schedule), budget):
            return schedule
    raise UsageError(
        f"budget={budget:g} cannot be met: {describe(alternative, problem.full[0])} at the last {total - 1} of {total} "
        f"calls still costs {problem.cost(schedule):.4f} of full compute; raise the budget or widen space"
    )
