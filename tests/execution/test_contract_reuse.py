"""The contract of every backbone: reuse of attention parts and whole blocks from the memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gearshift.execution.memory import Memory
from gearshift.execution.outputs import SIMULATE, Outputs
from gearshift.execution.plan import PARTS
from gearshift.execution.stream import Rows
from gearshift.runtime.errors import UsageError

from ..contract import CASES, EAGER, TOLERANCE, Subject, build, macs_per_row, plain_loop, random_depths

PATHS = [(case.name, path) for case in CASES for path in range(len(build(case.name).paths))]


@pytest.fixture(params=PATHS, ids=[f"{name}-{path}" for name, path in PATHS])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject.of(*request.param)


def keys(subject: Subject, part: str) -> frozenset[tuple[int, str]]:
    return frozenset((block, part) for block in subject.blocks)


def has_attention(subject: Subject, block: int) -> bool:
    entries = subject.table().entries
    return entries["block", subject.path, block, "full"] != entries["block", subject.path, block, "qk"]


def remember(subject: Subject, part: str, rows: Tensor | None = None) -> Memory:
    """A memory after one full call on `rows`."""
    memory = Memory(subject.rows, keys(subject, part))
    memory.begin_call()
    if rows is None:
        subject.run(subject.plan(), memory)
    else:
        subject.run_some(rows, subject.plan(), memory)
    return memory


def reuse(subject: Subject, part: str, memory: Memory, **options: object) -> Outputs:
    memory.begin_call()
    return subject.run(subject.plan(reuse=keys(subject, part)), memory, **options)


def modes(outputs: Outputs, block: int) -> dict[str, list[int]]:
    """Rows of the block's events, by mode."""
    return {e.mode: e.rows.host().tolist() for e in outputs.trace if e.kind == "block" and e.index == block}


def test_empty_reuse_is_bit_identical(subject: Subject) -> None:
    memory = Memory(subject.rows, ())
    memory.begin_call()
    assert torch.equal(subject.run(subject.plan(), memory).prediction, plain_loop(subject))
    assert memory.num_bytes == 0


def test_storing_changes_nothing_but_rounding(subject: Subject) -> None:
    for part in PARTS:
        memory = Memory(subject.rows, keys(subject, part))
        memory.begin_call()
        prediction = subject.run(subject.plan(), memory).prediction
        if part == "map":  # the map has to be formed, so the fused kernel is not used
            torch.testing.assert_close(prediction, plain_loop(subject), **TOLERANCE)
        else:
            assert torch.equal(prediction, plain_loop(subject))


@pytest.mark.parametrize("part", PARTS)
def test_reuse_at_an_unchanged_input_is_the_computed_step(subject: Subject, part: str) -> None:
    outputs = reuse(subject, part, remember(subject, part))
    torch.testing.assert_close(outputs.prediction, plain_loop(subject), **TOLERANCE)
    for block in subject.blocks:
        taken = part == "block" or has_attention(subject, block)
        assert modes(outputs, block) == {part if taken else "full": list(range(subject.rows))}


@pytest.mark.parametrize("part", PARTS)
def test_reuse_takes_what_was_left_behind(subject: Subject, part: str) -> None:
    """On another image the reused part is the old one: the result is neither the old image's nor the new one's."""
    memory = remember(subject, part)
    after = reuse(subject.other(), part, memory).prediction
    assert (after - plain_loop(subject.other())).abs().max() > 1e-3
    if part == "block":  # nothing of the new image is left
        assert torch.equal(after, plain_loop(subject))
    else:
        assert (after - plain_loop(subject)).abs().max() > 1e-3


def test_query_and_key_give_the_same_as_their_map(subject: Subject) -> None:
    for dtype, tolerance in ((torch.float64, dict(rtol=0, atol=1e-10)), (torch.float32, TOLERANCE)):
        s = Subject.of(subject.case, subject.path, dtype=dtype)
        by_part = {part: reuse(s.other(), part, remember(s, part)).prediction for part in ("qk", "map")}
        torch.testing.assert_close(by_part["qk"], by_part["map"], **tolerance)


@pytest.mark.parametrize("part", PARTS)
def test_rows_without_an_entry_compute(subject: Subject, part: str) -> None:
    """The executor splits each block; results are those of the two groups alone, and each row pays its own way."""
    known, unknown = torch.tensor([1, 2, 5]), torch.tensor([0, 3, 4])
    memory = remember(subject, part, known)
    new = subject.other()
    plan = new.plan(reuse=keys(subject, part))
    memory.begin_call()
    mixed = new.run(plan, memory)
    torch.testing.assert_close(mixed.prediction[unknown], plain_loop(new, index=unknown), **TOLERANCE)
    memory = remember(subject, part, known)
    memory.begin_call()
    torch.testing.assert_close(mixed.prediction[known], new.run_some(known, plan, memory).prediction, **TOLERANCE)

    table, entries = subject.table(), subject.table().entries
    full = table.full(subject.backbone, subject.path).macs
    wanted = torch.full((subject.rows,), full)
    for block in subject.blocks:
        taken = part == "block" or has_attention(subject, block)
        assert modes(mixed, block) == ({part: [1, 2, 5], "full": [0, 3, 4]} if taken else {"full": list(range(6))})
        saved = entries["block", subject.path, block, "full"].macs - entries["block", subject.path, block, part].macs
        wanted[known] -= saved
    assert torch.equal(macs_per_row(table, mixed.trace, subject.rows), wanted)


@pytest.mark.parametrize("part", PARTS)
def test_rows_that_left_keep_their_entries(subject: Subject, part: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for packing in (EAGER, SIMULATE):
        memory = remember(subject, part)
        everybody = Rows(subject.rows)
        stored = [key for key in memory.keys if bool(memory.valid(key, everybody).all())]
        before = {key: memory.read(key, everybody) for key in stored}
        depths = random_depths(subject, generator)
        memory.begin_call()
        subject.other().run(subject.plan(depth=depths), memory, packing=packing)
        for position, block in enumerate(subject.blocks):
            key = (block, part)
            if key not in before:
                continue
            ran = depths > position
            assert memory.written(key).tolist() == ran.long().tolist()
            for name, tensors in memory.read(key, everybody).items():
                for now, old in zip(tensors, before[key][name], strict=True):
                    assert torch.equal(now[~ran], old[~ran])
                    # A map over few tokens may hardly move, but it moves.
                    assert not ran.any() or (now[ran] - old[ran]).abs().max() > 0


def test_reused_entries_are_not_rewritten(subject: Subject) -> None:
    memory = remember(subject, "block")
    reuse(subject.other(), "block", memory)
    assert all(memory.written((block, "block")).eq(0).all() for block in subject.blocks)


def test_invalidate_forgets_everything(subject: Subject) -> None:
    memory = remember(subject, "output")
    memory.invalidate()
    outputs = reuse(subject.other(), "output", memory)
    assert torch.equal(outputs.prediction, plain_loop(subject.other()))
    assert {event.mode for event in outputs.trace} == {"full"}


def test_reuse_with_exits_agrees_between_packed_and_simulated(subject: Subject) -> None:
    """Random parts per block, random rows known, random depths, several calls on one memory."""
    generator = torch.Generator().manual_seed(6)
    for _ in range(3):
        wanted = frozenset(
            (block, PARTS[int(torch.randint(len(PARTS), (), generator=generator))]) for block in subject.blocks
        )
        depths = [random_depths(subject, generator) for _ in range(3)]
        results = []
        for packing in (EAGER, SIMULATE):
            memory = Memory(subject.rows, wanted)
            predictions = []
            for call, depth in enumerate(depths):
                memory.begin_call()
                plan = subject.plan(depth=depth, reuse=wanted if call else frozenset())
                outputs = subject.other(call).run(plan, memory, packing=packing)
                predictions += [outputs.prediction, macs_per_row(subject.table(), outputs.trace, subject.rows)]
            results.append(predictions)
        for packed, simulated in zip(*results, strict=True):
            torch.testing.assert_close(packed, simulated, **TOLERANCE)


def test_reuse_needs_a_memory(subject: Subject) -> None:
    with pytest.raises(UsageError, match="no memory"):
        subject.run(subject.plan(reuse=keys(subject, "map")))
