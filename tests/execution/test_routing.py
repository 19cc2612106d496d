"""Rows that take different paths through one network: shared prefix, own decoders, own heads."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from gearshift.execution.memory import Memory
from gearshift.execution.outputs import PACK, SIMULATE, Packing
from gearshift.execution.plan import StepPlan
from gearshift.runtime.errors import UsageError

from ..contract import EAGER, TOLERANCE, Impatient, LeaveAt, Subject, cost_table, macs_per_row, plain_loop

EXPERT = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
PACKINGS = [EAGER, PACK, Packing(0.6), SIMULATE]


@pytest.fixture(params=["two-decoders", "exits-two-decoders"])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def subjects(case: str) -> list[Subject]:
    return [Subject.of(case, path, rows=len(EXPERT)) for path in (0, 1)]


def alone(case: str, depths: Tensor | None = None) -> list[Tensor]:
    """Each row by hand, through its own path and heads."""
    by_path = subjects(case)
    return [
        plain_loop(by_path[path], None if depths is None else int(depths[row]), index=torch.tensor([row]))[0]
        for row, path in enumerate(EXPERT.tolist())
    ]


@pytest.mark.parametrize("packing", PACKINGS)
def test_mixed_batch_is_each_group_alone(case: str, packing: Packing) -> None:
    subject = subjects(case)[0]
    outputs = subject.run(StepPlan(expert=EXPERT), packing=packing)
    torch.testing.assert_close(outputs.prediction, torch.stack(alone(case)), **TOLERANCE)
    assert outputs.depth.tolist() == [6 if path == 0 else 7 for path in EXPERT.tolist()]


def test_shared_prefix_runs_once(case: str) -> None:
    subject = subjects(case)[0]
    ran: Counter[int] = Counter()
    hooks = [
        block.register_forward_hook(lambda *_, i=index: ran.update([i]))
        for index, block in enumerate(subject.backbone.blocks)
    ]
    outputs = subject.run(StepPlan(expert=EXPERT))
    for hook in hooks:
        hook.remove()
    assert ran == dict.fromkeys(range(10), 1)
    rows = {event.index: event.rows.host().tolist() for event in outputs.trace if event.kind == "block"}
    everybody, low, high = list(range(8)), [0, 3, 5, 6], [1, 2, 4, 7]
    assert [rows[i] for i in range(10)] == [everybody] * 3 + [low] * 3 + [high] * 4


def test_one_expert_for_all_is_that_path(case: str) -> None:
    for path, subject in enumerate(subjects(case)):
        wanted = plain_loop(subject)
        for expert in (path, torch.full((8,), path)):
            assert torch.equal(subject.run(StepPlan(expert=expert)).prediction, wanted)


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_leave_by_their_own_heads(case: str, packing: Packing) -> None:
    """Path 1 can be read inside the shared part (depth 2), both at its end (depth 3), with heads of their own."""
    subject = subjects(case)[0]
    for depths in ([3, 2, 3, 6, 7, 4, 3, 5], [6, 2, 2, 4, 2, 4, 6, 2], [3, 3, 3, 3, 3, 3, 3, 3]):
        script = torch.tensor(depths)
        wanted = torch.stack(alone(case, script))
        for plan in (StepPlan(expert=EXPERT, depth=script), StepPlan(expert=EXPERT, exit=LeaveAt(script))):
            outputs = subject.run(plan, packing=packing)
            assert torch.equal(outputs.depth, script)
            torch.testing.assert_close(outputs.prediction, wanted, **TOLERANCE)
            readouts = {
                (e.path, e.index, row) for e in outputs.trace if e.kind == "readout" for row in e.rows.host().tolist()
            }
            assert readouts == {
                (path, depth, row) for row, (path, depth) in enumerate(zip(EXPERT.tolist(), depths, strict=True))
            }


def test_rules_see_the_same_in_mixed_and_separate_batches(case: str) -> None:
    """Hidden states, the states before (across the split too) and the rule's memory of each row."""
    subject = subjects(case)[0]
    mixed = subject.run(StepPlan(expert=EXPERT, exit=Impatient(0.7)), packing=EAGER)
    for path in (0, 1):
        rows = (path == EXPERT).nonzero().flatten()
        group = subject.run_some(rows, StepPlan(expert=EXPERT, exit=Impatient(0.7)))
        assert torch.equal(group.depth, mixed.depth[rows])
        torch.testing.assert_close(group.prediction, mixed.prediction[rows], **TOLERANCE)
    assert len(set(mixed.depth.tolist())) > 1


def test_taps_that_both_paths_have(case: str) -> None:
    subject = subjects(case)[0]
    for packing in (EAGER, SIMULATE):
        outputs = subject.run(
            StepPlan(expert=EXPERT, taps=(3,), depth=torch.tensor([6, 2, 3, 3, 7, 4, 6, 5])), packing=packing
        )
        torch.testing.assert_close(outputs.taps[3], torch.stack(alone(case, torch.full((8,), 3))), **TOLERANCE)
        assert outputs.depth.tolist() == [6, 2, 3, 3, 7, 4, 6, 5]
    with pytest.raises(UsageError, match="depth 2 is not an exit"):
        subject.run(StepPlan(expert=EXPERT, taps=(2,)))


def test_taps_inside_the_shared_part() -> None:
    """Where every row in the batch can be read there, though another path cannot."""
    subject = subjects("two-decoders")[1]
    outputs = subject.run(StepPlan(expert=torch.ones(8, dtype=torch.int64), taps=(2, 7)))
    assert torch.equal(outputs.taps[2], plain_loop(subject, 2))
    assert torch.equal(outputs.prediction, outputs.taps[7])


def test_one_depth_for_paths_of_different_length(case: str) -> None:
    subject = subjects(case)[0]
    outputs = subject.run(StepPlan(expert=EXPERT, depth=7))
    assert outputs.depth.tolist() == [6 if path == 0 else 7 for path in EXPERT.tolist()]
    torch.testing.assert_close(outputs.prediction, torch.stack(alone(case)), **TOLERANCE)


def test_each_row_pays_for_its_own_path(case: str) -> None:
    subject = subjects(case)[0]
    table = cost_table(subject.backbone)
    outputs = subject.run(StepPlan(expert=EXPERT))
    wanted = [table.full(subject.backbone, path).macs for path in EXPERT.tolist()]
    assert macs_per_row(table, outputs.trace, 8).tolist() == wanted
    assert wanted[0] < wanted[1]


def test_reuse_across_a_change_of_path(case: str) -> None:
    """A row that changes its decoder has entries in the shared blocks and none in the new ones."""
    first = subjects(case)[0]
    wanted = frozenset((block, "block") for block in range(10))
    memory = Memory(8, wanted)
    memory.begin_call()
    first.run(StepPlan(expert=0), memory)
    memory.begin_call()
    outputs = first.other().run(StepPlan(expert=EXPERT, reuse=wanted), memory)
    mode = {(e.index, e.mode): e.rows.host().tolist() for e in outputs.trace if e.kind == "block"}
    assert mode[2, "block"] == list(range(8))
    assert mode[4, "block"] == [0, 3, 5, 6]
    assert mode[8, "full"] == [1, 2, 4, 7]
    torch.testing.assert_close(outputs.prediction, torch.stack(alone(case)), **TOLERANCE)


def test_what_cannot_be_routed(case: str) -> None:
    subject = subjects(case)[0]
    with pytest.raises(UsageError, match="2 paths; the plan must route"):
        subject.run(StepPlan())
    with pytest.raises(UsageError, match="expert 2 does not exist"):
        subject.run(StepPlan(expert=EXPERT + 1))
    with pytest.raises(UsageError, match="depth 8 is not an exit"):
        subject.run(StepPlan(expert=EXPERT, depth=8))
    with pytest.raises(UsageError, match="depth 2 is not an exit"):
        subject.run(StepPlan(expert=EXPERT, depth=2))
    with pytest.raises(ValueError, match=r"expert has shape \[3\]; the run has 8 rows"):
        subject.run(StepPlan(expert=EXPERT[:3]))
