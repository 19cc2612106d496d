"""Rows that left are dropped where the blocks they are spared outweigh copying the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gearshift.execution.executor import execute
from gearshift.execution.exits import ExitView
from gearshift.execution.memory import Memory
from gearshift.execution.outputs import PACK, Outputs, Packing
from gearshift.execution.plan import StepPlan

from ..contract import EAGER, LeaveAt, Subject


def ran(outputs: Outputs) -> list[int]:
    """Rows of every block."""
    return [len(event.rows) for event in outputs.trace if event.kind == "block"]


def leaving(rows: int, depths: dict[int, int], full: int = 5) -> Tensor:
    """Row r leaves at depths[r], the others at the end."""
    script = torch.full((rows,), full)
    for row, depth in depths.items():
        script[row] = depth
    return script


def test_the_break_even() -> None:
    """gone x blocks to come against fraction x kept x states."""
    assert PACK.pays(gone=1, kept=250, states=1, blocks=5) and not PACK.pays(gone=1, kept=251, states=1, blocks=5)
    assert PACK.pays(gone=3, kept=250, states=3, blocks=5) and not PACK.pays(gone=2, kept=250, states=3, blocks=5)
    assert EAGER.pays(gone=1, kept=10**6, states=9, blocks=1)
    assert not Packing(100.0).pays(gone=1, kept=2, states=1, blocks=100)


# LongSkips: five blocks, two long skips; it can be read out at 3, 4 and 5. A row that leaves at 3 is spared 2 blocks,
# for 3 states of each of the others.
@pytest.mark.parametrize("by_rule", [True, False])
@pytest.mark.parametrize(
    ("rows", "depths", "wanted"),
    [
        (34, {7: 3}, [34, 34, 34, 33, 33]),  # 2 >= 0.02 x 33 x 3
        (35, {7: 3}, [35] * 5),
        (60, {7: 3, 9: 3}, [60, 60, 60, 58, 58]),
        (60, {7: 3, 9: 4}, [60] * 5),  # then 2 >= 0.02 x 58 x 2 does not hold either
        (25, {7: 4}, [25] * 4 + [24]),  # 1 >= 0.02 x 24 x 2
        (34, {7: 4}, [34] * 5),
        (60, {7: 3, 9: 3, 11: 4}, [60, 60, 60, 58, 58]),  # then 1 < 0.02 x 57
        (51, {7: 3, 9: 3, 11: 4}, [51, 51, 51, 49, 48]),  # 1 >= 0.02 x 48: the skip that is left is gathered anyhow
        (50, {49: 3}, [50, 50, 50, 49, 49]),  # a view
    ],
)
def test_rows_are_carried_until_dropping_pays(
    by_rule: bool, rows: int, depths: dict[int, int], wanted: list[int]
) -> None:
    s = Subject.of("long-skips", rows=rows)
    script = leaving(rows, depths)
    plan = StepPlan(exit=LeaveAt(script)) if by_rule else StepPlan(depth=script)
    outputs = s.run(plan)
    assert ran(outputs) == wanted
    assert torch.equal(outputs.depth, script)
    torch.testing.assert_close(outputs.prediction, s.run(plan, packing=EAGER).prediction, rtol=1e-5, atol=1e-5)


def test_with_a_memory_rows_are_dropped_at_once() -> None:
    s = Subject.of("long-skips", rows=60)
    memory = Memory(60, {(4, "block")})
    memory.begin_call()
    assert ran(s.run(StepPlan(depth=leaving(60, {7: 3})), memory)) == [60, 60, 60, 59, 59]


@dataclass(frozen=True)
class Curious:
    """Row 7 leaves at the first exit; what the rule is shown after that is kept."""

    seen: list[tuple[ExitView, Tensor | None]]
    looks: bool = True

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return exits[:-1]

    def begin(self, num_rows: int) -> None:
        return None

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        values = view.uncertainty()
        self.seen.append((view, values))
        if self.looks:
            assert view.previous is not None and len(view.hidden) == len(view.previous) == len(view.rows)
        return (view.rows.host() == 7) & (view.depth == 1)


def test_a_rule_is_shown_only_those_who_are_left() -> None:
    s = Subject.of("exits-isotropic", rows=40)
    carried, dropped = Curious([]), Curious([])
    outputs = s.run(StepPlan(exit=carried), packing=Packing(100.0))
    assert ran(outputs) == [40] * 4
    assert ran(s.run(StepPlan(exit=dropped), packing=EAGER)) == [40, 39, 39, 39]
    for (view, values), (other, others) in zip(carried.seen, dropped.seen, strict=True):
        assert view.rows.host().tolist() == other.rows.host().tolist()
        assert len(view.rows) == (40 if view.depth == 1 else 39)
        torch.testing.assert_close(view.hidden, other.hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(view.previous, other.previous, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, others, rtol=1e-5, atol=1e-5)
    # The head runs on the one that is carried, too, and the trace says so.
    assert [len(event.rows) for event in outputs.trace if event.kind == "uncertainty"] == [40] * 3


class Operators(TorchDispatchMode):
    """Counts operators on tensors of at least `least` entries, and those on fewer."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.large, self.small = least, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        large = max((value.numel() for value in tensors), default=0) >= self.least
        (self.large if large else self.small)[func.overloadpacket.__name__] += 1
        return result


def counted(s: Subject, plan: StepPlan, packing: Packing = PACK) -> Operators:
    stream = s.backbone.embed(s.x, s.time, s.cond)
    with torch.no_grad(), Operators(least=s.rows * 16) as found:
        execute(s.backbone, stream, plan, packing=packing)
    return found


def test_no_state_is_copied_for_a_rule_that_does_not_look_at_it() -> None:
    s = Subject.of("exits-isotropic", rows=40)
    blind, looking = (counted(s, StepPlan(exit=Curious([], looks)), Packing(100.0)) for looks in (False, True))
    # At the end the others' state and conditioning are told from the one that was carried, and all results merged.
    assert blind.large["index_select"] == 3
    assert looking.large["index_select"] == 3 + 2 * 3  # two depths, three looks each


@dataclass(frozen=True)
class Nobody:
    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return exits[:-1]

    def begin(self, num_rows: int) -> None:
        return None

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        return torch.zeros(len(view.rows), dtype=torch.bool)


@pytest.mark.parametrize("name", ["exits-isotropic", "exits-uvit", "long-skips", "dit-class"])
def test_where_nobody_leaves_one_question_per_exit_is_all_that_is_added(name: str) -> None:
    s = Subject.of(name, rows=40)
    plain, asked = counted(s, StepPlan()), counted(s, StepPlan(exit=Nobody()))
    exits = len(s.exits) - 1
    assert asked.large == plain.large
    added = asked.small - plain.small
    assert added["zeros"] == added["any"] == exits  # the answer itself, and whether anybody is in it
    assert added.total() == 3 * exits, added  # and the host's look at that
