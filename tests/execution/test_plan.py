"""Plans and their composition."""

from __future__ import annotations

import itertools

import pytest
import torch

from gearshift.execution.plan import FULL, PARTS, StepPlan, join
from gearshift.runtime.errors import UsageError

from ..contract import LeaveAt, Subject


def same(a: object, b: object) -> bool:
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_the_default_computes_everything() -> None:
    assert FULL.call is True and FULL.depth is None and FULL.exit is None and FULL.expert is None
    assert not FULL.bypass and not FULL.reuse and not FULL.taps
    empty = join([])
    assert all(getattr(empty, name) == getattr(FULL, name) for name in FULL.__dataclass_fields__)


def test_join_takes_the_least() -> None:
    rule = LeaveAt(torch.tensor([1]))
    joined = join(
        [
            StepPlan(depth=5, bypass=frozenset({1}), reuse=frozenset({(0, "map")}), taps=(3, 1)),
            StepPlan(depth=4, bypass=frozenset({2}), reuse=frozenset({(0, "qk"), (2, "output")}), taps=(2, 3)),
            StepPlan(call=False, exit=rule, expert=1),
        ]
    )
    assert joined.call is False and joined.depth == 4 and joined.expert == 1 and joined.exit is rule
    assert joined.bypass == {1, 2} and joined.taps == (1, 2, 3)
    assert joined.reuse == {(0, "map"), (0, "qk"), (2, "output")}


def test_join_of_per_row_decisions() -> None:
    a = StepPlan(call=torch.tensor([True, False, True]), depth=torch.tensor([1, 5, 3]), expert=torch.tensor([0, 0, 0]))
    b = StepPlan(call=torch.tensor([True, True, False]), depth=4, expert=0)
    joined = join([a, b])
    assert same(joined.call, torch.tensor([True, False, False]))
    assert same(joined.depth, torch.tensor([1, 4, 3]))
    assert same(join([a, StepPlan(call=False)]).call, torch.tensor([False, False, False]))


def test_join_does_not_depend_on_the_order() -> None:
    plans = [StepPlan(depth=3), StepPlan(depth=torch.tensor([2, 4])), StepPlan(call=torch.tensor([True, False])), FULL]
    for order in itertools.permutations(plans):
        joined = join(order)
        assert same(joined.call, torch.tensor([True, False])) and same(joined.depth, torch.tensor([2, 3]))


def test_two_rules_or_two_experts_are_refused() -> None:
    rule = LeaveAt(torch.tensor([1]))
    with pytest.raises(UsageError, match="two exit rules in one plan \\(LeaveAt and LeaveAt\\)"):
        join([StepPlan(exit=rule), FULL, StepPlan(exit=rule)])
    with pytest.raises(UsageError, match=r"different experts for one call \(0 and \[0, 1\]\)"):
        join([StepPlan(expert=0), StepPlan(expert=torch.tensor([0, 1]))])


def test_the_part_that_computes_least_wins() -> None:
    for wanted in itertools.permutations(PARTS, 2):
        plan = StepPlan(reuse=frozenset((3, part) for part in wanted))
        assert plan.reused_part(3) == max(wanted, key=PARTS.index)
        assert plan.reused_part(2) is None


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"names \['scores'\]"):
        StepPlan(reuse=frozenset({(0, "scores")}))


def test_plans_that_do_not_fit_the_network() -> None:
    s = Subject.of("long-skips")  # exits 3, 4, 5; blocks 0..4
    for plan, message in (
        (StepPlan(depth=2), r"depth 2 is not an exit of LongSkips; its exits are \[3, 4, 5\]"),
        (StepPlan(depth=6), "depth 6 is not an exit"),
        (StepPlan(depth=torch.tensor([3, 4, 5, 6, 3, 3])), "depth 6 is not an exit"),
        (StepPlan(depth=torch.tensor([3, 4, 5, 2, 3, 3])), "depth 2 is not an exit"),
        (StepPlan(taps=(0,)), "depth 0 is not an exit"),
        (StepPlan(bypass=frozenset({5})), r"names block 5; LongSkips has blocks 0\.\.4"),
        (StepPlan(reuse=frozenset({(7, "map")})), "names block 7"),
        (StepPlan(expert=1), "expert 1 does not exist; LongSkips has 1"),
    ):
        with pytest.raises(UsageError, match=message):
            s.run(plan)
    with pytest.raises(ValueError, match=r"depth has shape \[2\]; the run has 6 rows"):
        s.run(StepPlan(depth=torch.tensor([3, 4])))


def test_plans_are_told_apart_by_what_they_compute() -> None:
    assert FULL.key() == StepPlan().key() != StepPlan(depth=3).key()
    rows = torch.tensor([True, False])
    assert StepPlan(call=rows).key() == StepPlan(call=rows.clone()).key() != StepPlan(call=~rows).key()
    assert StepPlan(bypass={2: rows}).key() != StepPlan(bypass={1: rows}).key()
    assert StepPlan(exit=object()).key() is None  # type: ignore[arg-type]
