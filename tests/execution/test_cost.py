"""Costs against formulas."""

from __future__ import annotations

import torch

from gearshift.execution.cost import Cost, CostTable
from gearshift.execution.outputs import Event
from gearshift.execution.stream import Rows

from ..contract import build, cost_table
from ..toys import Isotropic, LongSkips


def test_attention_products_are_two_n_squared_d() -> None:
    for depth, dim, heads in ((3, 16, 2), (2, 24, 3)):
        table = CostTable.measure(Isotropic(depth, dim, heads))
        tokens = 16
        for block in range(depth):
            cost = table.entries["block", 0, block, "full"]
            assert cost.attention == 2 * tokens**2 * dim
            # qkv and projection, MLP of ratio 2, and the modulation once per row.
            assert cost.linear == tokens * (4 * dim**2 + 4 * dim**2) + 4 * dim**2
            assert table.entries["block", 0, block, "qk"].linear == cost.linear - 2 * tokens * dim**2
            assert table.entries["block", 0, block, "map"].linear == cost.linear - 2 * tokens * dim**2
            assert table.entries["block", 0, block, "output"].linear == cost.linear - 4 * tokens * dim**2
            assert table.entries["block", 0, block, "bypass"] == Cost()
        assert table.entries["embed", 0, 0, "full"] == Cost(tokens * dim * 2 * 4)
        assert table.entries["readout", 0, 1, "full"] == Cost(tokens * dim * 8 + dim**2)


def test_skip_merge_is_what_bypass_costs() -> None:
    table = CostTable.measure(LongSkips(half=2, dim=12))
    tokens = 10
    assert [table.entries["block", 0, b, "bypass"].macs for b in range(5)] == [0, 0, 0, *[tokens * 2 * 12 * 12] * 2]


def test_uncertainty_heads() -> None:
    table = cost_table(build("exits-isotropic"))
    assert table.entries["uncertainty", 0, 2, "full"] == Cost(16 * 16 * 2 * 2 * 2)
    table = cost_table(build("exits-uvit"))  # one output per token from 16 channels, and the time once per row
    assert table.entries["uncertainty", 0, 2, "full"] == Cost(17 * 16 + 16)  # the time token too, in vain


def test_costs_add_and_flops_are_twice_macs() -> None:
    total = Cost(3, 4) + Cost(10, 20)
    assert (total.linear, total.attention, total.macs, total.flops) == (13, 24, 37, 74)


def test_events_are_looked_up_by_path() -> None:
    table = cost_table(build("two-decoders"))
    narrow = table.of(Event("block", 0, 3, "full", Rows(1)))
    wide = table.of(Event("block", 1, 6, "full", Rows(1)))
    assert narrow.macs < wide.macs
    assert table.full(build("two-decoders"), 0).macs < table.full(build("two-decoders"), 1).macs


def test_conditioning_can_be_given() -> None:
    """A real condition counts as the declared shape does."""
    backbone = build("uvit-text")
    declared = CostTable.measure(backbone)
    given = CostTable.measure(backbone, torch.zeros(1, 3, 5))
    assert declared.entries == given.entries
