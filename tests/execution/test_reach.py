"""Blocks that nobody reads: in closed form, against a run that leaves nothing out, and what a run is charged for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import combinations

import pytest
import torch
from torch import Tensor

from gearshift.execution.memory import NO_SLOT, Memory
from gearshift.execution.outputs import SIMULATE, Outputs
from gearshift.execution.plan import PARTS, StepPlan
from gearshift.execution.reach import embedded_skips, unread
from gearshift.execution.stream import Rows

from ..contract import CASES, EAGER, TOLERANCE, LeaveAt, Subject, build, macs_per_row

PATHS = [(case.name, path) for case in CASES for path in range(len(build(case.name).paths))]


@pytest.fixture(params=PATHS, ids=[f"{name}-{path}" for name, path in PATHS])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject.of(*request.param)


@dataclass
class Structure:
    """What `unread` looks at of a network."""

    pushes: frozenset[int] = frozenset()
    pops: frozenset[int] = frozenset()
    carries: dict[int, str] = field(default_factory=dict)


CHAIN = Structure()
UVIT = Structure(frozenset({0, 1}), frozenset({3, 4}))
UNET = Structure(frozenset({0, 1}), frozenset({3, 4, 6}))  # the last pops what the embedding pushed
SIGNAL = Structure(carries={2: "aux"})


@pytest.mark.parametrize(
    ("network", "blocks", "whole", "embedded", "wanted"),
    [
        (CHAIN, 5, (), 0, ()),
        (CHAIN, 5, (0,), 0, ()),
        (CHAIN, 5, (3,), 0, (0, 1, 2)),
        (CHAIN, 5, (4,), 0, (0, 1, 2, 3)),
        (CHAIN, 5, (1, 3), 0, (0, 1, 2)),  # what is kept of 1 is not read either
        (CHAIN, 3, (3,), 0, ()),  # left before it
        (CHAIN, 3, (2, 3), 0, (0, 1)),
        (UVIT, 5, (2,), 0, ()),  # both skips are still popped
        (UVIT, 5, (3,), 0, (1, 2)),
        (UVIT, 5, (4,), 0, (0, 1, 2, 3)),
        (UVIT, 5, (2, 4), 0, (0, 1, 2, 3)),
        (UVIT, 4, (3,), 0, (0, 1, 2)),  # read out before the outer skip is popped
        (UVIT, 5, (0, 3), 0, (1, 2)),  # the skip is the kept one
        (UNET, 7, (2,), 1, ()),
        (UNET, 7, (3,), 1, (1, 2)),
        (UNET, 7, (4,), 1, (0, 1, 2, 3)),
        (UNET, 7, (5,), 1, (0, 1, 2, 3, 4)),
        (UNET, 7, (6,), 1, (0, 1, 2, 3, 4, 5)),
        (SIGNAL, 5, (4,), 0, (3,)),
        (SIGNAL, 5, (2, 4), 0, (0, 1, 3)),
        (SIGNAL, 5, (1, 4), 0, (0, 3)),
        (SIGNAL, 2, (1,), 0, (0,)),
    ],
)
def test_closed_form(network, blocks, whole, embedded, wanted) -> None:  # type: ignore[no-untyped-def]
    assert unread(network, range(blocks), set(whole), embedded) == set(wanted)


def test_no_blocks() -> None:
    assert unread(CHAIN, (), {0}, 0) == frozenset()  # type: ignore[arg-type]


def test_skips_of_the_embedding(subject: Subject) -> None:
    stream = subject.backbone.enter(subject.backbone.embed(subject.x, subject.time, subject.cond), subject.path)
    assert embedded_skips(subject.backbone, subject.blocks) == len(stream.skips)


# On the networks -----------------------------------------------------------------------------------------------------


# Without maps the fused kernel is used throughout, and runs can be compared bit for bit.
FUSED = ("qk", "output", "block")


def everything(subject: Subject, parts: Collection[str] = FUSED) -> frozenset[tuple[int, str]]:
    return frozenset((block, part) for block in subject.blocks for part in parts)


def remember(subject: Subject, parts: Collection[str] = FUSED) -> Memory:
    """A memory of these parts after a full call."""
    memory = Memory(subject.rows, everything(subject, parts))
    memory.begin_call()
    subject.run(subject.plan(), memory)
    memory.begin_call()
    return memory


def whole(blocks: Collection[int]) -> frozenset[tuple[int, str]]:
    return frozenset((block, "block") for block in blocks)


def choices(subject: Subject) -> list[tuple[int, frozenset[int]]]:
    """(depth, blocks taken whole): single blocks and pairs at the full depth, then the last block of each exit."""
    full, blocks = len(subject.blocks), subject.blocks
    few = 1 + len(blocks) // 8
    singles, pairs = blocks[::-few], list(combinations(blocks, 2))[:: 3 * few**2]
    found = [(full, frozenset({block})) for block in singles] + [(full, frozenset(pair)) for pair in pairs]
    return found + [(depth, frozenset({blocks[depth - 1]})) for depth in subject.exits[:-1]]


def by_hand(subject: Subject, depth: int, held: dict[int, Tensor], broken: int | None = None) -> Tensor:
    """Every block runs, then the output of those in `held` is replaced; that of `broken` is spoilt."""
    backbone = subject.backbone
    stream = backbone.enter(backbone.embed(subject.x, subject.time, subject.cond), subject.path)
    hidden, skips, signals = stream.hidden, [skip.hidden for skip in stream.skips], stream.cond
    for block in subject.blocks[:depth]:
        skip = skips.pop() if block in backbone.pops else None
        hidden = backbone.blocks[block](hidden, signals, skip, NO_SLOT)
        hidden = held.get(block, hidden)
        if block == broken:
            hidden = hidden.flip(0) * 3 + 1
        if block in backbone.pushes:
            skips.append(hidden)
        if block in backbone.carries:
            signals = {**signals, backbone.carries[block]: hidden}
    return backbone.readout(hidden, signals, depth, subject.path)


class Counter:
    """How often each block of a network runs."""

    def __init__(self, subject: Subject) -> None:
        self.runs = dict.fromkeys(subject.blocks, 0)
        self.hooks = [subject.backbone.blocks[block].register_forward_hook(self._of(block)) for block in self.runs]

    def _of(self, block: int):  # type: ignore[no-untyped-def]
        def count(*_: object) -> None:
            self.runs[block] += 1

        return count

    def __enter__(self) -> dict[int, int]:
        return self.runs

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def dead(subject: Subject, depth: int, chosen: Collection[int]) -> frozenset[int]:
    return unread(subject.backbone, subject.blocks[:depth], chosen, embedded_skips(subject.backbone, subject.blocks))


def test_nobody_reads_what_is_named_and_somebody_reads_the_rest(subject: Subject) -> None:
    """Whether a block is read shows when its output is spoilt."""
    memory = remember(subject)
    new = subject.other()
    for depth, chosen in choices(subject):
        held = {block: memory.read((block, "block"), Rows(subject.rows))["block"][0] for block in chosen}
        named, plain = dead(subject, depth, chosen), by_hand(new, depth, held)
        for block in subject.blocks[:depth]:
            if block not in named and subject.backbone.carries:
                continue  # what is carried counts as read, whether it is or not
            assert torch.equal(by_hand(new, depth, held, broken=block), plain) == (block in named)


def test_leaving_out_changes_no_bit(subject: Subject) -> None:
    """Against a run of everything by hand, and against a plan that takes the blocks nobody reads from memory, too."""
    for depth, chosen in choices(subject):
        left_out = dead(subject, depth, chosen)
        memory, new = remember(subject), subject.other()
        stored = [key for key in memory.keys if bool(memory.written(key).eq(0).all())]
        entries = {key: memory.read(key, Rows(subject.rows)) for key in stored}
        held = {block: entries[block, "block"]["block"][0] for block in chosen}
        with Counter(subject) as runs:
            outputs = new.run(new.plan(depth=depth, reuse=whole(chosen)), memory)
        assert torch.equal(outputs.prediction, by_hand(new, depth, held))
        ran = set(subject.blocks[:depth]) - left_out - chosen
        assert runs == {block: int(block in ran) for block in subject.blocks}
        for key, entry in entries.items():
            if key[0] in ran:
                assert memory.written(key).eq(1).all()
                continue
            assert memory.written(key).eq(0).all()
            for name, tensors in memory.read(key, Rows(subject.rows)).items():
                assert all(now is old for now, old in zip(tensors, entry[name], strict=True))
        again = new.run(new.plan(depth=depth, reuse=whole(chosen | left_out)), remember(subject))
        assert torch.equal(again.prediction, outputs.prediction)


def modes(outputs: Outputs) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for event in outputs.trace:
        if event.kind == "block":
            found.setdefault(event.index, set()).add(event.mode)
    return found


def test_who_looks_in_between_has_everything_run(subject: Subject) -> None:
    """An exit rule may look at any block, a tap reads one, and rows that leave elsewhere need what lies before."""
    last = subject.blocks[-1]
    assert dead(subject, len(subject.blocks), {last})
    full = torch.full((subject.rows,), len(subject.blocks))
    plans = [
        subject.plan(exit=LeaveAt(full), reuse=whole({last})),
        subject.plan(taps=(len(subject.blocks),), reuse=whole({last})),
    ]
    if len(subject.exits) > 1:
        elsewhere = full.clone()
        elsewhere[-1] = subject.exits[0]
        plans.append(subject.plan(depth=elsewhere, reuse=whole({last})))
    for plan in plans:
        memory = remember(subject)
        with Counter(subject) as runs:
            outputs = subject.other().run(plan, memory)
        assert all(runs[block] == 1 for block in subject.blocks[:-1]) and runs[last] == 0
        assert modes(outputs) == {block: {"full"} for block in subject.blocks[:-1]} | {last: {"block"}}


def test_a_row_without_an_entry_has_everything_run(subject: Subject) -> None:
    last, memory = subject.blocks[-1], remember(subject)
    memory.forget(torch.tensor([2]))
    with Counter(subject) as runs:
        outputs = subject.other().run(subject.plan(reuse=whole({last})), memory)
    assert set(runs.values()) == {1}
    assert modes(outputs) == {block: {"full"} for block in subject.blocks[:-1]} | {last: {"full", "block"}}
    # And where nobody has one, the plan is the full one.
    fresh = Memory(subject.rows, everything(subject))
    fresh.begin_call()
    with Counter(subject) as runs:
        subject.run(subject.plan(reuse=whole({last})), fresh)
    assert set(runs.values()) == {1}


def test_a_block_that_is_dropped_reads_what_comes_before(subject: Subject) -> None:
    last = subject.blocks[-1]
    outputs = subject.other().run(subject.plan(reuse=whole({last}), bypass=frozenset({last})), remember(subject))
    assert modes(outputs) == {block: {"full"} for block in subject.blocks[:-1]} | {last: {"bypass"}}


def test_one_path_leaves_out_nothing_of_another() -> None:
    """Rows of two separate networks in one call: the first takes its last block, the second runs."""
    subject = Subject.of("separate")
    expert, memory = torch.tensor([0, 1] * 3), Memory(6, {(4, "block")})
    for seed, reuse in enumerate((frozenset[int](), {4})):
        memory.begin_call()
        outputs = subject.other(seed).run(StepPlan(expert=expert, reuse=whole(reuse)), memory)
    assert modes(outputs) == {block: {"block" if block < 5 else "full"} for block in range(9)}


def test_packed_and_simulated_leave_the_same_behind(subject: Subject) -> None:
    """Over three calls at one depth: the second takes a block whole, the third reads what lies before it."""
    for depth in subject.exits:
        last = subject.blocks[depth - 1]
        parts = whole({last}), frozenset((block, "output") for block in subject.blocks) | whole(subject.blocks[:1])
        results = []
        for packing in (EAGER, SIMULATE):
            memory, found = Memory(subject.rows, everything(subject)), []
            for call, reuse in enumerate((frozenset(), *parts)):
                memory.begin_call()
                outputs = subject.other(call).run(subject.plan(depth=depth, reuse=reuse), memory, packing=packing)
                found += [outputs.prediction, macs_per_row(subject.table(), outputs.trace, subject.rows)]
            results.append(found)
        for packed, simulated in zip(*results, strict=True):
            torch.testing.assert_close(packed, simulated, **TOLERANCE)


# What it costs -------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_plan_is_what_its_trace_adds_up_to(subject: Subject) -> None:
    generator = torch.Generator().manual_seed(7)

    def some(share: float) -> list[int]:
        return [block for block in subject.blocks if float(torch.rand((), generator=generator)) < share]

    for round_ in range(12):
        depth = [None, *subject.exits][int(torch.randint(len(subject.exits) + 1, (), generator=generator))]
        parts = frozenset((b, PARTS[int(torch.randint(4, (), generator=generator))]) for b in some(0.4 * (round_ % 3)))
        plan = subject.plan(depth=depth, bypass=frozenset(some(0.2)), reuse=parts)
        outputs = subject.other().run(plan, remember(subject, PARTS))
        wanted = subject.table().of_plan(subject.backbone, plan, subject.path).macs
        assert macs_per_row(subject.table(), outputs.trace, subject.rows).tolist() == [wanted] * subject.rows


def test_the_cost_of_the_full_plan(subject: Subject) -> None:
    table = subject.table()
    assert table.of_plan(subject.backbone, subject.plan(), subject.path) == table.full(subject.backbone, subject.path)
    for depth in subject.exits:
        wanted = table.path_cost(subject.path, depth, blocks=subject.blocks)
        assert table.of_plan(subject.backbone, subject.plan(depth=depth), subject.path) == wanted


def test_plans_that_tell_rows_apart_have_no_cost_beforehand() -> None:
    subject = Subject.of("isotropic")
    depths = torch.full((6,), 4)
    for plan in (
        subject.plan(depth=depths),
        subject.plan(exit=LeaveAt(depths)),
        subject.plan(bypass={0: depths > 3}),
    ):
        with pytest.raises(ValueError, match="tells rows apart"):
            subject.table().of_plan(subject.backbone, plan)
