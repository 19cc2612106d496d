"""The shrinking batch: rows in the order in which they leave run as views, and are what a plain gather gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.execution.memory import Memory
from gearshift.execution.outputs import PACK, SIMULATE, Outputs
from gearshift.execution.plan import StepPlan, join
from gearshift.execution.stream import adjacent, gather

from ..contract import CASES, EAGER, Subject, build, macs_per_row, plain_loop, random_depths

PATHS = [(case.name, path) for case in CASES for path in range(len(build(case.name).paths))]
SKIPPING = ["long-skips", "uvit-class", "uvit-text", "exits-uvit"]


@contextmanager
def learning(*backbones: nn.Module) -> Iterator[None]:
    for backbone in backbones:
        backbone.requires_grad_(True)
    try:
        yield
    finally:
        for backbone in backbones:
            backbone.requires_grad_(False)


def plain_gather(s: Subject, depths: Tensor) -> Tensor:
    """Every block on every row; row i is picked from the readouts at depths[i]."""
    every = torch.stack([plain_loop(s, depth) for depth in s.exits])
    return every[torch.tensor([s.exits.index(depth) for depth in depths.tolist()]), torch.arange(len(depths))]


def gradients(output: Tensor, weight: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    given = torch.autograd.grad((output * weight).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(given, parameters, strict=True)]


def depth_sets(s: Subject) -> list[Tensor]:
    """Sorted random ones, some that leave the last block out, all alike, and each exit once."""
    generator = torch.Generator().manual_seed(5)
    mixed = [random_depths(s, generator).sort(descending=True).values for _ in range(2)]
    shallow = mixed[0].clamp(max=s.exits[max(len(s.exits) - 2, 0)])
    return [*mixed, shallow, torch.full((s.rows,), s.exits[0])]


@pytest.mark.parametrize(("name", "path"), PATHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, dict(rtol=0, atol=1e-10)), (torch.float32, dict(rtol=1e-5, atol=2e-5))]
)
def test_outputs_and_gradients_are_those_of_the_plain_gather(
    name: str, path: int, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    for rows in (6, 1):
        s = Subject.of(name, path, rows=rows, dtype=dtype)
        parameters = list(s.backbone.parameters())
        generator = torch.Generator().manual_seed(6)
        shape = (s.rows, s.backbone.out_channels, s.backbone.image_size, s.backbone.image_size)
        weight = torch.randn(shape, generator=generator).to(dtype) / rows
        for depths in depth_sets(s) if rows > 1 else [torch.tensor([depth]) for depth in s.exits]:
            with learning(s.backbone):
                wanted = plain_gather(s, depths)
                shrunk = s.run(s.plan(depth=depths))
                assert torch.equal(shrunk.depth, depths)
                torch.testing.assert_close(shrunk.prediction, wanted, **tolerance)
                expected = gradients(wanted, weight, parameters)
                assert any(bool(g.any()) for g in expected)
                for actual, other in zip(gradients(shrunk.prediction, weight, parameters), expected, strict=True):
                    torch.testing.assert_close(actual, other, **tolerance)


@contextmanager
def watched(s: Subject) -> Iterator[dict[int, list[tuple[Any, ...]]]]:
    """(hidden, cond, skip, output) of every call of a block, by block."""
    calls: dict[int, list[tuple[Any, ...]]] = {index: [] for index in range(len(s.backbone.blocks))}
    handles = [
        s.backbone.blocks[index].register_forward_hook(
            lambda _module, inputs, output, index=index: calls[index].append((*inputs[:3], output))
        )
        for index in calls
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", [case.name for case in CASES if len(build(case.name).paths) == 1])
def test_every_block_runs_on_the_rows_that_need_it_and_on_no_copy(name: str) -> None:
    s = Subject.of(name, rows=9)
    depths = random_depths(s, torch.Generator().manual_seed(2)).sort(descending=True).values
    with watched(s) as calls:
        s.run(StepPlan(depth=depths))
    # A skip that the embedding pushes is the hidden state it gives.
    embedded = s.backbone.embed(s.x, s.time, s.cond)
    pushed: list[Tensor] = [calls[s.blocks[0]][0][0] for _ in embedded.skips]
    before: Tensor | None = None
    for block in s.blocks:
        need = int((depths > block).sum())  # one path: block i is the one after depth i
        assert [len(hidden) for hidden, *_ in calls[block]] == ([need] if need else [])
        if not need:
            break
        hidden, cond, skip, output = calls[block][0]
        assert all(len(value) == need for value in cond.values())
        if before is not None:
            assert memory_of(hidden) == memory_of(before)  # a view of what the block before gave
        if block in s.backbone.pops:
            assert len(skip) == need and memory_of(skip) == memory_of(pushed.pop())
        if block in s.backbone.pushes:
            pushed.append(output)
        before = output
    counted = sum(len(hidden) for calls_of in calls.values() for hidden, *_ in calls_of)
    assert counted == int(depths.sum())


def test_rows_in_another_order_give_the_same() -> None:
    """The general packing, which copies, and the views agree: only the order of the rows is different."""
    s = Subject.of("isotropic", rows=9)
    depths = random_depths(s, torch.Generator().manual_seed(2))
    order = depths.sort(descending=True, stable=True).indices
    there = Subject(s.case, s.backbone, s.path, s.x[order], s.time[order], None if s.cond is None else s.cond[order])
    for packing in (EAGER, PACK, SIMULATE):
        mixed = s.run(s.plan(depth=depths), packing=packing).prediction
        ordered = there.run(s.plan(depth=depths[order]), packing=packing).prediction
        torch.testing.assert_close(mixed[order], ordered, rtol=1e-5, atol=1e-5)


def test_adjacent_rows_are_views() -> None:
    tensor = torch.arange(10.0).reshape(5, 2)
    for positions, together in (([0, 1, 2], True), ([3, 4], True), ([2], True), ([0, 2], False), ([], False)):
        index = torch.tensor(positions, dtype=torch.int64)
        assert adjacent(index) is together
        assert torch.equal(gather(tensor, index), tensor[index])
        assert (memory_of(gather(tensor, index)) == memory_of(tensor)) is together
        assert memory_of(gather(tensor, index, own=True)) != memory_of(tensor)


def test_rows_that_left_do_not_keep_the_others_in_memory() -> None:
    s = Subject.of("isotropic", rows=8)
    depths = torch.tensor([4] * 7 + [1])
    kept: list[int] = []
    readout = s.backbone.readout

    def noting(hidden: Tensor, *arguments: Any) -> Tensor:
        kept.append(hidden.untyped_storage().nbytes() // hidden[0].nbytes)
        return readout(hidden, *arguments)

    s.backbone.readout = noting  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            s.run(StepPlan(depth=depths))
    finally:
        del s.backbone.readout
    assert kept == [1, 7]


# Blocks that some rows drop ------------------------------------------------------------------------------------------


def drops(s: Subject) -> dict[int, Tensor]:
    """The last 0, 1, ... decoder blocks dropped, least first; rows 0 and 1 drop none."""
    decoder = [block for block in s.blocks if block in s.backbone.pops]
    count = (torch.arange(s.rows) - 1).clamp(0, len(decoder))
    return {block: count >= len(decoder) - place for place, block in enumerate(decoder)}


def by_hand(s: Subject, dropped: dict[int, Tensor]) -> Tensor:
    alone = [
        plain_loop(s, bypass=[block for block, rows in dropped.items() if bool(rows[row])], index=torch.tensor([row]))
        for row in range(s.rows)
    ]
    return torch.cat(alone)


def shuffled(dropped: dict[int, Tensor], rows: int) -> dict[int, Tensor]:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    return {block: mask[order] for block, mask in dropped.items()}


@pytest.mark.parametrize("name", SKIPPING)
def test_a_row_that_drops_a_block_runs_what_remains_of_it(name: str) -> None:
    s = Subject.of(name, dtype=torch.float64)
    parameters = list(s.backbone.parameters())
    generator = torch.Generator().manual_seed(6)
    for dropped in (drops(s), shuffled(drops(s), s.rows)):
        for memory in (None, Memory(s.rows, [(0, "map")])):
            if memory is not None:
                memory.begin_call()
            with learning(s.backbone):
                wanted, got = by_hand(s, dropped), s.run(StepPlan(bypass=dropped), memory).prediction
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
                weight = torch.randn(wanted.shape, generator=generator).double()
                for a, b in zip(gradients(got, weight, parameters), gradients(wanted, weight, parameters), strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SKIPPING)
def test_dropped_rows_are_not_run_and_not_charged(name: str) -> None:
    s = Subject.of(name)
    dropped = drops(s)
    with watched(s) as calls:
        outputs = s.run(StepPlan(bypass=dropped))
    for block, mask in dropped.items():
        assert [len(hidden) for hidden, *_ in calls[block]] == [int((~mask).sum())]
    whole = charged(s, s.run())
    for row, macs in enumerate(charged(s, outputs).tolist()):
        mine = frozenset(block for block, mask in dropped.items() if bool(mask[row]))
        assert macs == int(charged(s, s.run(StepPlan(bypass=mine)))[row])
        assert (macs < int(whole[row])) == bool(mine)


def charged(s: Subject, outputs: Outputs) -> Tensor:
    return macs_per_row(s.table(), outputs.trace, s.rows)


def test_dropping_nothing_and_dropping_all_are_the_plans_for_all_rows() -> None:
    s = Subject.of("long-skips")
    none, every = (torch.full((s.rows,), value) for value in (False, True))
    assert torch.equal(s.run(StepPlan(bypass={3: none, 4: none})).prediction, s.run().prediction)
    alike = s.run(StepPlan(bypass=frozenset({3, 4}))).prediction
    assert torch.equal(s.run(StepPlan(bypass={3: every, 4: every})).prediction, alike)


def test_dropped_blocks_compose() -> None:
    rows = torch.tensor([True, False, True])
    joined = join([StepPlan(bypass={3: rows}), StepPlan(bypass=frozenset({4})), StepPlan(bypass={3: ~rows, 5: rows})])
    assert {block: mask.tolist() for block, mask in joined.bypass.items()} == {  # type: ignore[union-attr]
        3: [True] * 3,
        4: [True] * 3,
        5: rows.tolist(),
    }


def test_a_mask_of_another_size_is_refused() -> None:
    s = Subject.of("long-skips")
    with pytest.raises(ValueError, match=r"StepPlan.bypass\[3\] has shape \[2\]; the run has 6 rows"):
        s.run(StepPlan(bypass={3: torch.tensor([True, False])}))
