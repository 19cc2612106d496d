"""Depth 0: the embedding is read out and no block is run, as a target, as a tap, and where a rule says so."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.execution.memory import Memory
from gearshift.execution.outputs import PACK, SIMULATE, Packing
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import Stream
from gearshift.runtime.errors import UsageError

from ..contract import EAGER, TOLERANCE, LeaveAt, Subject, cost_table, macs_per_row, plain_loop, random_depths
from ..toys import Isotropic, LongSkips, TwoDecoders

PACKINGS = [EAGER, PACK, Packing(100.0), Packing(0.0, overlap=True), SIMULATE]


class FromZero(Isotropic):
    """Conditioning reaches the head at the embedding, too."""

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return (0, *super().exits(path))


class Embedded(LongSkips):
    """The embedding pushes the long skips, and no block does."""

    pushes = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.pushes = frozenset()

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return (0, *super().exits(path))

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        stream = super().embed(x, time, cond)
        stream.push()
        stream.hidden = stream.hidden * 0.9
        stream.push()
        return stream


class Parted(TwoDecoders):
    """Both paths can be read at the embedding, by heads of their own."""

    def __init__(self) -> None:
        super().__init__()
        for path in (0, 1):
            self.heads[f"{path}_0"] = nn.Linear(8, 3)

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return (0, *super().exits(path))

    def width(self, depth: int, path: int = 0) -> int:
        return super().width(depth, path) if depth else 8


TOYS: dict[str, type[Backbone]] = {"from-zero": FromZero, "embedded": Embedded, "parted": Parted}


@functools.cache
def network(name: str) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        backbone = TOYS[name]()
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return backbone.eval().requires_grad_(False)


def subject(name: str, path: int = 0, rows: int = 8) -> Subject:
    net = network(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, net.in_channels, net.image_size, net.image_size, generator=generator)
    cond = torch.arange(rows) % 3 if net.cond_kind == "class" else None
    return Subject(name, net, path, x, torch.rand(rows, generator=generator) * 900, cond)


@pytest.fixture(params=TOYS)
def s(request: pytest.FixtureRequest) -> Subject:
    return subject(request.param)


@pytest.mark.parametrize("packing", PACKINGS)
def test_all_rows_at_the_embedding(s: Subject, packing: Packing) -> None:
    embedded = s.backbone.embed(s.x, s.time, s.cond)
    wanted = s.backbone.readout(embedded.hidden, embedded.cond, 0)
    nothing = torch.zeros(s.rows, dtype=torch.int64)
    for plan in (s.plan(depth=0), s.plan(depth=nothing), s.plan(exit=LeaveAt(nothing))):
        outputs = s.run(plan, packing=packing)
        assert torch.equal(outputs.prediction, wanted) and torch.equal(wanted, plain_loop(s, 0))
        assert outputs.depth.tolist() == [0] * s.rows
        blocks = [event for event in outputs.trace if event.kind == "block" and len(event.rows)]
        assert not blocks


@pytest.mark.parametrize("packing", PACKINGS)
def test_some_rows_at_the_embedding(s: Subject, packing: Packing) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        depths = random_depths(s, generator)
        depths[2], depths[5] = 0, s.exits[-1]
        for plan in (s.plan(depth=depths), s.plan(exit=LeaveAt(depths))):
            outputs = s.run(plan, packing=packing)
            assert torch.equal(outputs.depth, depths)
            for row, depth in enumerate(depths.tolist()):
                alone = plain_loop(s, depth, index=torch.tensor([row]))
                torch.testing.assert_close(outputs.prediction[row : row + 1], alone, **TOLERANCE)


def test_a_quiet_embedding_costs_who_leaves_there_one_block() -> None:
    class Quiet(LeaveAt):
        def quiet(self, exits: tuple[int, ...]) -> tuple[int, ...]:
            return exits

    s = subject("from-zero")
    depths = torch.tensor([0, 4, 2, 4, 0, 4, 4, 4])
    outputs = s.run(StepPlan(exit=Quiet(depths)), packing=Packing(0.0, overlap=True))
    assert torch.equal(outputs.depth, depths)
    table = cost_table(s.backbone)
    # At the last depth everybody who is left leaves, with or without a rule.
    wanted = [table.path_cost(0, d, blocks=s.blocks).macs + (d < 4) * _block(s, d) for d in depths.tolist()]
    assert macs_per_row(table, outputs.trace, s.rows).tolist() == wanted


def _block(s: Subject, depth: int) -> int:
    return cost_table(s.backbone).entries["block", 0, s.blocks[min(depth, 3)], "full"].macs


@pytest.mark.parametrize("packing", [EAGER, SIMULATE])
def test_taps_at_the_embedding(s: Subject, packing: Packing) -> None:
    depths = torch.tensor([0, s.exits[-1]] * 4)
    outputs = s.run(s.plan(taps=(0, s.exits[1]), depth=depths), packing=packing)
    for depth in (0, s.exits[1]):
        torch.testing.assert_close(outputs.taps[depth], plain_loop(s, depth), **TOLERANCE)
    assert torch.equal(outputs.depth, depths)
    torch.testing.assert_close(outputs.prediction[::2], plain_loop(s, 0)[::2], **TOLERANCE)
    torch.testing.assert_close(outputs.prediction[1::2], plain_loop(s)[1::2], **TOLERANCE)


def test_only_the_embedding_is_tapped(s: Subject) -> None:
    outputs = s.run(s.plan(taps=(0,), depth=0))
    assert torch.equal(outputs.taps[0], plain_loop(s, 0)) and torch.equal(outputs.prediction, outputs.taps[0])
    assert not [event for event in outputs.trace if event.kind == "block"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_of_two_paths_at_the_embedding(packing: Packing) -> None:
    both = [subject("parted", path) for path in (0, 1)]
    expert = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    depths = torch.tensor([0, 0, 2, 3, 6, 7, 4, 0])
    for plan in (StepPlan(expert=expert, depth=depths), StepPlan(expert=expert, exit=LeaveAt(depths))):
        outputs = both[0].run(plan, packing=packing)
        assert torch.equal(outputs.depth, depths)
        for row, (path, depth) in enumerate(zip(expert.tolist(), depths.tolist(), strict=True)):
            alone = plain_loop(both[path], depth, index=torch.tensor([row]))
            torch.testing.assert_close(outputs.prediction[row : row + 1], alone, **TOLERANCE)


def test_what_it_costs(s: Subject) -> None:
    table = cost_table(s.backbone)
    entries = table.entries
    alone = entries["embed", 0, 0, "full"] + entries["readout", 0, 0, "full"]
    assert table.path_cost(0, 0, blocks=s.blocks) == alone == table.of_plan(s.backbone, s.plan(depth=0))
    reuse = frozenset({(s.blocks[0], "block")})
    assert table.of_plan(s.backbone, s.plan(depth=0, reuse=reuse)) == alone
    mixed = torch.tensor([0, s.exits[-1]] * 4)
    for packing in (EAGER, SIMULATE):
        macs = macs_per_row(table, s.run(s.plan(depth=mixed), packing=packing).trace, s.rows)
        assert macs.tolist() == [alone.macs, table.full(s.backbone).macs] * 4


def test_the_memory_of_a_row_at_the_embedding_stays(s: Subject) -> None:
    memory = Memory(s.rows, {(block, "block") for block in s.blocks})
    depths = torch.tensor([0] * 4 + [s.exits[-1]] * 4)
    for _ in range(2):
        memory.begin_call()
        outputs = s.run(s.plan(depth=depths), memory)
    assert memory.written((s.blocks[0], "block")).tolist() == [-1] * 4 + [1] * 4
    torch.testing.assert_close(outputs.prediction[:4], plain_loop(s, 0)[:4], **TOLERANCE)


def test_it_goes_by_the_exits_of_the_network() -> None:
    for plan in (StepPlan(depth=0), StepPlan(depth=torch.tensor([4, 0, 4, 4, 4, 4])), StepPlan(taps=(0,))):
        with pytest.raises(UsageError, match="depth 0 is not an exit of Isotropic"):
            Subject.of("isotropic").run(plan)
