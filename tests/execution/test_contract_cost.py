"""The contract of every backbone: what a run is charged is what it computes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gearshift.execution.cost import Cost, CostTable, meta_twin
from gearshift.execution.outputs import PACK, SIMULATE, Packing

from ..contract import CASES, EAGER, LeaveAt, Subject, build, macs_per_row, plain_loop

PATHS = [(case.name, path) for case in CASES for path in range(len(build(case.name).paths))]


@pytest.fixture(params=PATHS, ids=[f"{name}-{path}" for name, path in PATHS])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject.of(*request.param)


def by_hand(subject: Subject, depth: int, rows_alive: list[int] | None = None) -> int:
    entries, path = subject.table().entries, subject.path
    blocks = sum(entries["block", path, block, "full"].macs for block in subject.blocks[:depth])
    return entries["embed", path, 0, "full"].macs + blocks + entries["readout", path, depth, "full"].macs


def test_table_adds_up_to_what_torch_counts(subject: Subject) -> None:
    """Counted over the plain loop in one go, on the meta device, for three rows."""
    twin = meta_twin(subject.backbone)
    size = twin.image_size
    x = torch.empty(3, twin.in_channels, size, size, device="meta")
    meta = Subject(subject.case, twin, subject.path, x, torch.empty(3, device="meta"), twin.example_cond(3))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        plain_loop(meta)
    full = subject.table().full(subject.backbone, subject.path)
    assert counter.get_total_flops() == 3 * full.flops
    assert full.macs == full.linear + full.attention


def test_measuring_leaves_the_backbone_alone(subject: Subject) -> None:
    before = plain_loop(subject)
    assert all(p.device.type == "cpu" for p in subject.backbone.parameters())
    CostTable.measure(subject.backbone)
    assert all(p.device.type == "cpu" for p in subject.backbone.parameters())
    assert torch.equal(plain_loop(subject), before)


def test_deeper_costs_more(subject: Subject) -> None:
    costs = [macs_per_row(subject.table(), subject.run(subject.plan(depth=d)).trace, 6) for d in subject.exits]
    for depth, cost in zip(subject.exits, costs, strict=True):
        assert cost.tolist() == [by_hand(subject, depth)] * 6
    for less, more in pairwise(costs):
        assert bool((less < more).all())


def test_each_row_pays_for_what_it_ran(subject: Subject) -> None:
    script = torch.tensor(subject.exits)[torch.arange(subject.rows) % len(subject.exits)]
    wanted = [by_hand(subject, depth) for depth in script.tolist()]
    for packing in (EAGER, SIMULATE):
        for plan in (subject.plan(depth=script), subject.plan(exit=LeaveAt(script))):
            outputs = subject.run(plan, packing=packing)
            assert macs_per_row(subject.table(), outputs.trace, subject.rows).tolist() == wanted


def test_rows_that_are_carried_are_charged(subject: Subject) -> None:
    """Where dropping does not pay rows that left run on, and the trace says so; they are read out where they left."""
    first, last = subject.exits[0], subject.exits[-1]
    if first == last:
        pytest.skip("one exit")
    depths = torch.full((subject.rows,), last)
    depths[2] = first  # 1 of 6 rows
    carried = macs_per_row(subject.table(), subject.run(subject.plan(depth=depths), packing=Packing(100.0)).trace, 6)
    entries = subject.table().entries
    rest = sum(entries["block", subject.path, block, "full"].macs for block in subject.blocks[first:])
    assert carried[2] == by_hand(subject, first) + rest
    assert carried[[0, 1, 3, 4, 5]].tolist() == [by_hand(subject, last)] * 5
    dropped = macs_per_row(subject.table(), subject.run(subject.plan(depth=depths), packing=PACK).trace, 6)
    assert dropped[2] == by_hand(subject, first)


def test_bypass_is_charged_for_what_remains(subject: Subject) -> None:
    entries = subject.table().entries
    for block in subject.blocks:
        outputs = subject.run(subject.plan(bypass=frozenset({block})))
        cost = macs_per_row(subject.table(), outputs.trace, subject.rows)
        saved = (
            entries["block", subject.path, block, "full"].macs - entries["block", subject.path, block, "bypass"].macs
        )
        assert saved > 0
        assert cost.tolist() == [by_hand(subject, len(subject.blocks)) - saved] * subject.rows
        if block in subject.backbone.pops:
            assert entries["block", subject.path, block, "bypass"].macs > 0  # the skip merge


def test_parts_cost_less_from_left_to_right(subject: Subject) -> None:
    entries = subject.table().entries
    for block in subject.blocks:
        full, qk, kept, output, whole = (
            entries["block", subject.path, block, mode] for mode in ("full", "qk", "map", "output", "block")
        )
        assert whole == Cost()
        if full != qk:  # there is attention; filters that resample are on its side of the count, too
            assert full.macs > qk.macs > kept.macs > output.macs > 0
            products = 2 * (qk.macs - kept.macs)  # scores, and as much again for the values
            assert qk.attention - kept.attention == products // 2
            if full.attention == products:
                assert qk.attention == full.attention == 2 * kept.attention
            else:  # projections written as matrix products are on this side, too
                assert full.attention > qk.attention > products
            assert output.attention == 0
        else:
            assert full == qk == kept == output


def test_heads_are_charged(subject: Subject) -> None:
    entries = subject.table().entries
    for depth in subject.exits:
        assert entries["readout", subject.path, depth, "full"].macs > 0
    outputs = subject.run(subject.plan(taps=subject.exits))
    wanted = entries["embed", subject.path, 0, "full"].macs
    wanted += sum(entries["block", subject.path, block, "full"].macs for block in subject.blocks)
    wanted += sum(entries["readout", subject.path, depth, "full"].macs for depth in subject.exits)
    if subject.backbone.has_uncertainty:
        wanted += sum(entries["uncertainty", subject.path, depth, "full"].macs for depth in subject.exits)
    assert macs_per_row(subject.table(), outputs.trace, subject.rows).tolist() == [wanted] * subject.rows
