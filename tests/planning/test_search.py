"""Searches: against brute force where everything can be tried, and what must hold whatever they find."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gearshift.planning.additive import Stretch, best_way, pareto, stretches
from gearshift.planning.choices import Choice, Menu, Schedule, as_policy
from gearshift.planning.planner import (
    Effort,
    by_annealing,
    by_elimination,
    by_responses,
    check_budget,
    evenly,
    late_reuse,
    least_cost,
)
from gearshift.planning.problem import Problem
from gearshift.planning.responses import History, Responses, measure_responses
from gearshift.planning.search import Moves, anneal, climb, eliminate, within
from gearshift.planning.threshold import tune
from gearshift.policies import AdaptiveSkip, Full, SkipEvery, UncertaintyExit
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import sample_chunk

from ..contract import cost_table
from .conftest import problem, shared

SKIP = Choice(0)


def masks(p: Problem, count: int, skip: Choice = SKIP) -> list[Schedule]:
    """Every schedule with `count` computed calls."""
    total, full = len(p.calls), p.full[0]
    return [
        tuple(full if k == 0 or k in some else skip for k in range(total))
        for some in itertools.combinations(range(1, total), count - 1)
    ]


# Dynamic programming -------------------------------------------------------------------------------------------------


def random_ways(seed: int, total: int = 6) -> list[list[Stretch]]:
    draw = np.random.default_rng(seed)
    ways = []
    for position in range(total):
        some = []
        for length in range(min(3, total - position)):
            for number in range(3):
                choices = (Choice(1, depth=number), *(SKIP,) * length)
                some.append(Stretch(choices, float(draw.integers(1, 9)) / 16, float(draw.random())))
        ways.append(some)
    return ways


def every_way(ways: list[list[Stretch]], position: int = 0):
    if position == len(ways):
        yield ()
        return
    for stretch in ways[position]:
        for rest in every_way(ways, position + len(stretch.choices)):
            yield (stretch, *rest)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.5, 1.0, 2.0])
def test_dynamic_programming_finds_the_best_way(seed: int, budget: float) -> None:
    """Costs are multiples of the unit here, so nothing is rounded; every way is tried beside it."""
    ways = random_ways(seed)
    fitting = [way for way in every_way(ways) if sum(s.cost for s in way) <= budget + 1e-12]
    found = best_way(ways, budget, buckets=int(16 * budget))
    if not fitting:
        assert found is None
        return
    wanted = min(fitting, key=lambda way: sum(s.loss for s in way))
    assert found == tuple(choice for stretch in wanted for choice in stretch.choices)


def test_rounding_of_costs_never_exceeds_the_budget() -> None:
    ways = [[Stretch((Choice(1),), 0.3334, 0.0), Stretch((Choice(1, depth=1),), 0.1, 1.0)] for _ in range(3)]
    found = best_way(ways, 1.0, buckets=7)
    assert found is not None
    cost = sum(0.3334 if choice.depth == 0 else 0.1 for choice in found)
    assert cost <= 1.0 and any(choice.depth == 0 for choice in found)


def test_what_is_beaten_in_cost_and_loss_is_left_out() -> None:
    a, b, c, d = (Stretch((SKIP,), cost, loss) for cost, loss in ((1, 1), (2, 0.5), (2, 0.7), (3, 0.5)))
    assert pareto([d, c, b, a]) == [b, a]


# Responses -----------------------------------------------------------------------------------------------------------


def test_single_decisions_are_predicted_exactly() -> None:
    """What was tried alone is known; two far apart decisions are near the sum of their differences."""
    p, menu = shared()
    found = measure_responses(p, menu, 2)
    for position in (1, 4):
        for choice in p.menu_at(menu, position).computing()[1:6]:
            if sum([choice.branches < 1, bool(choice.depth), bool(choice.reuse)]) > 1:
                continue
            schedule = (*p.full[:position], choice, *p.full[position + 1 :])
            assert found.predict(schedule) == pytest.approx(p.measure(schedule).loss, rel=1e-4, abs=1e-9)
    for forecast in (False, True):
        skip = Choice(0, forecast=forecast)
        schedule = (*p.full[:3], skip, skip, *p.full[5:])
        assert found.predict(schedule) == pytest.approx(p.measure(schedule).loss, rel=1e-4, abs=1e-9)
    assert found.predict(p.full) == 0.0
    assert found.predict((p.full[0], *(SKIP,) * 6)) is None  # longer than was tried
    assert found.predict((p.full[0], SKIP, Choice(0, forecast=True), *p.full[3:])) is None  # mixed


def test_differences_add_up_as_vectors() -> None:
    """Two decisions whose differences cancel are predicted to lose nothing."""
    number = {(1, SKIP, 1): 0, (3, SKIP, 1): 1} | {(k, Choice(1), 0): 2 for k in range(5)}
    gram = np.zeros((3, 3))
    gram[:2, :2] = [[1.0, -1.0], [-1.0, 1.0]]
    found = Responses(number, gram, np.arange(6.0)[::-1], 1, ((0,),) * 5)
    one = (Choice(1), Choice(1), SKIP, Choice(1), Choice(1))
    both = (Choice(1), Choice(1), SKIP, Choice(1), SKIP)
    assert found.predict(one) == 1.0 and found.predict(both) == 0.0


def test_age_of_what_comes_from_memory() -> None:
    path = (0, 1, 2, 3)
    prefix, attention = frozenset({(1, "block")}), frozenset({(2, "output")})
    history = History().after(0, Choice(2), 2, path)
    assert history.age(1, Choice(-1, reuse=prefix)) == 1
    history = history.after(1, Choice(2, reuse=prefix), 2, path)
    # Block 1 goes back to call 0; so does what block 2 computed from it at call 1.
    assert history.age(2, Choice(-1, reuse=prefix)) == 2
    assert history.age(2, Choice(-1, reuse=frozenset({(2, "block")}))) == 2
    history = history.after(2, Choice(2, reuse=attention), 2, path)
    assert history.age(3, Choice(-1, reuse=prefix)) == 1
    assert history.age(3, Choice(-1, reuse=attention)) == 3  # its own entry was not written at call 2
    shallow = History().after(0, Choice(2), 2, path).after(1, Choice(1, depth=2), 2, path)
    assert shallow.age(2, Choice(-1, reuse=frozenset({(2, "block")}))) == 2
    assert shallow.age(2, Choice(1)) == 2 and shallow.age(2, Choice(1, forecast=True)) == 3


# Local search --------------------------------------------------------------------------------------------------------


def toy(total: int = 8) -> tuple[list[list[Choice]], object, object]:
    """A loss with a known best mask: late calls matter less."""
    weights = [math.exp(-0.5 * k) for k in range(total)]
    options = [[Choice(1)]] + [[Choice(1), SKIP]] * (total - 1)

    def loss(schedule: Schedule) -> float:
        return sum(w for w, choice in zip(weights, schedule, strict=True) if not choice.branches) + 1e-6

    def cost(schedule: Schedule) -> float:
        return sum(choice.branches for choice in schedule) / total

    return options, loss, cost


@pytest.mark.parametrize("exchange_only", [False, True])
def test_local_searches_find_the_best_mask_within_the_budget(exchange_only: bool) -> None:
    options, loss, cost = toy()
    start = tuple(Choice(1) if k % 2 == 0 else SKIP for k in range(8))
    best = tuple(Choice(1) if k < 4 else SKIP for k in range(8))
    moves = Moves(options, exchange_only)
    asked: list[Schedule] = []

    def watched(schedule: Schedule) -> float:
        asked.append(schedule)
        return loss(schedule)

    annealed = anneal(start, watched, cost, 0.5, moves, 600, np.random.default_rng(0))
    climbed = climb(start, watched, cost, 0.5, moves, 60, np.random.default_rng(0))
    assert annealed.schedule == climbed.schedule == best
    assert all(cost(schedule) <= 0.5 for schedule in asked)
    if exchange_only:
        assert all(cost(schedule) == 0.5 for schedule in asked)
    assert climbed.looked_at == len(asked) - annealed.looked_at <= 60


def test_searches_are_functions_of_the_seed() -> None:
    p, menu = shared()
    responses = measure_responses(p, menu, 2)
    effort = Effort(evaluations=12, predictions=300, pool=4)

    def found(seed: int) -> Schedule:
        return by_responses(p, menu, responses, p, 0.6, effort, seed).best.schedule

    assert found(3) == found(3)
    start, options = evenly(p, 0.6, SKIP), [[p.full[0]]] + [[p.full[0], SKIP]] * 6
    again = [by_annealing(p, start, options, 0.6, Effort(16), 5).best.schedule for _ in range(2)]
    assert again[0] == again[1]


def test_a_climb_asks_for_no_schedule_twice_and_takes_what_is_expected_to_be_best() -> None:
    options, loss, cost = toy()
    start = tuple(Choice(1) if k % 2 == 0 else SKIP for k in range(8))
    asked: list[Schedule] = []

    def watched(schedule: Schedule) -> float:
        asked.append(schedule)
        return loss(schedule)

    guided = climb(start, watched, cost, 0.5, Moves(options), 4, np.random.default_rng(1), prefer=loss, pool=30)
    assert len(set(asked)) == len(asked)
    blind = climb(start, loss, cost, 0.5, Moves(options), 4, np.random.default_rng(1))
    assert guided.loss < blind.loss


# Problems small enough to try everything -----------------------------------------------------------------------------


def test_greedy_elimination_is_the_oracle_no_rule_beats() -> None:
    """At equal numbers of calls no mask of the online rule is better than the best the oracle found; on seven calls the
    oracle itself is held against every mask."""
    p, _ = shared(space=("steps",))
    outcome, oracle = by_elimination(p, 2 / 7)
    assert within(outcome.best.cost, 2 / 7)
    for count in range(2, 7):
        losses = sorted(p.measure(schedule).loss for schedule in masks(p, count))
        assert oracle[count].loss >= losses[0] * (1 - 1e-6)
        assert oracle[count].loss <= losses[len(losses) // 3], "greedy elimination is near the best mask"
    table = cost_table(p.run.network)
    for threshold in (0.03, 0.1, 0.3, 1.0):
        policy = AdaptiveSkip(threshold, warmup_steps=3, max_skip_steps=None, tail_steps=0)
        chunk = sample_chunk(replace(p.sampler, policy=policy), torch.arange(3), table)
        calls = int(chunk.ledger.called[:, 0, 0].sum())
        assert p.loss_of(chunk.images) >= oracle[calls].loss * (1 - 1e-5)


def test_elimination_goes_one_call_at_a_time() -> None:
    _, loss, _ = toy()
    found = eliminate((Choice(1),) * 8, loss, SKIP, least=3)
    assert sorted(found) == [3, 4, 5, 6, 7, 8]
    for count, one in found.items():
        assert one.schedule == tuple(Choice(1) if k < count else SKIP for k in range(8))


@pytest.mark.parametrize("budget", [0.35, 0.6, 0.85])
def test_plans_meet_their_budget_and_are_no_worse_than_where_they_began(budget: float) -> None:
    p, menu = problem("exits-uvit")
    responses = measure_responses(p, menu, 3)
    alone = evenly(p, budget, Choice(0, forecast=True))
    effort = Effort(evaluations=25, predictions=2000)
    found = by_responses(p, menu, responses, p, budget, effort, 0, also={"even": alone})
    assert within(found.best.cost, budget)
    assert all(found.best.loss <= one.loss for one in found.starts.values())
    assert found.best.loss <= p.measure(alone).loss
    policy = as_policy(found.best.schedule, p.run, "ddim")
    chunk = sample_chunk(replace(p.sampler, policy=policy), torch.arange(3), cost_table(p.run.network))
    assert chunk.ledger.macs_per_image <= budget * chunk.ledger.full_macs_per_image * (1 + 1e-9)
    assert p.loss_of(chunk.images) == pytest.approx(found.best.loss, rel=1e-3, abs=1e-9)


def test_phast_is_no_worse_than_hurry_and_keeps_the_budget() -> None:
    """PHAST (arXiv 2401.01008): from HURRY, calls exchange computing and reusing; the first never reuses."""
    p, menu = problem(space=("attention",))
    other = replace(menu.full, reuse=menu.reuse[-1])
    budget = p.cost((*p.full[:4], *(other,) * 3))
    start = late_reuse(p, other, budget)
    assert start == (*p.full[:4], *(other,) * 3)
    options = [[menu.full]] + [[menu.full, other]] * 6
    results = [by_annealing(p, start, options, budget, Effort(30, restarts=1), 4) for _ in range(2)]
    assert results[0].best.schedule == results[1].best.schedule
    assert results[0].best.loss <= p.measure(start).loss
    assert sum(choice == other for choice in results[0].best.schedule) == 3
    assert results[0].best.schedule[0] == menu.full
    with pytest.raises(UsageError, match="still costs"):
        late_reuse(p, other, 0.3)


def test_a_budget_that_cannot_be_met_says_what_is_least() -> None:
    p, menu = shared(space=("depth",))
    least = least_cost(p, menu)
    assert 0.3 < least < 0.9
    check_budget(p, menu, least, lambda share: f"{share:.3f}")
    with pytest.raises(
        UsageError, match=rf"budget=0\.100 cannot be met: in this space no plan costs less than {least:.3f}"
    ):
        check_budget(p, menu, 0.1, lambda share: f"{share:.3f}")


def test_even_gaps() -> None:
    p, _ = shared()
    schedule = evenly(p, 3 / 7, SKIP)
    assert [choice.branches for choice in schedule] == [1, 0, 1, 0, 0, 1, 0]
    with pytest.raises(UsageError, match="does not pay for the first of 7 calls"):
        evenly(p, 0.1, SKIP)


# Thresholds ----------------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_smallest_that_meets_the_budget() -> None:
    def cost(policy) -> float:
        return 1.0 if policy.threshold < 0.02 else 0.5

    found = tune(AdaptiveSkip(), cost, 0.5, rounds=30)
    assert found.cost == 0.5 and found.threshold == pytest.approx(0.02, rel=1e-6)
    assert found.policy == replace(AdaptiveSkip(), threshold=found.threshold)
    # Between 0 and 1 for uncertainties.
    seen: list[float] = []
    tune(UncertaintyExit(0.1), cost, 0.5, on_round=seen.append)
    assert seen[0] == 1.0 and max(seen) <= 1.0


def test_thresholds_that_cannot_be_tuned() -> None:
    with pytest.raises(UsageError, match=r"budget=0\.3 cannot be met: policy AdaptiveSkip costs 0\.4 at its greatest"):
        tune(AdaptiveSkip(), lambda policy: 0.4, 0.3)
    for policy in (Full(), SkipEvery(2)):
        with pytest.raises(UsageError, match="has no threshold to tune"):
            tune(policy, lambda policy: 0.1, 0.3)


def test_stretches_hold_what_was_tried() -> None:
    p, menu = shared()
    responses = measure_responses(p, menu, 2)
    for position in range(len(p.calls)):
        some = stretches(p, menu, responses, position)
        assert {len(s.choices) for s in some} == set(range(1, min(3, len(p.calls) - position) + 1))
        for one in some:
            assert one.cost == pytest.approx(sum(p.cost_at(position + k, c) for k, c in enumerate(one.choices)))
        if position == 0:
            assert all(s.choices[0] == menu.full for s in some)


def test_a_menu_of_one_thing_cannot_be_exchanged_away() -> None:
    moves = Moves([[Choice(1)], [Choice(1), SKIP]], exchange_only=True)
    draw = np.random.default_rng(0)
    assert {moves.propose((Choice(1), SKIP), draw) for _ in range(20)} == {(Choice(1), SKIP)}
    assert Menu.of(shared()[0].run.network, 1, ["steps"]).keys == frozenset()
