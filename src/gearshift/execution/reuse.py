"""One block under a memory: rows that have what the plan takes from it reuse, the others compute in their own group.

What is computed is left behind for later calls where it is wanted. What was taken stays as it was written, and rows
that have left the run of this call, or whose block is taken whole, change nothing in the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.execution.memory import Memory, Slot
from gearshift.execution.network import Network
from gearshift.execution.plan import StepPlan
from gearshift.execution.present import Mask
from gearshift.execution.stream import Rows, Stream, gather


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a stream at `positions` (host int64; None: all) that take `mode` from memory (None: compute)."""

    mode: str | None
    positions: Tensor | None


def groups(memory: Memory, part: str | None, block: int, rows: Rows) -> list[Group]:
    """How `rows` part at a block of which the plan takes `part`."""
    valid = torch.zeros(len(rows), dtype=torch.bool) if part is None else memory.valid((block, part), rows)
    found = []
    for mode, mask in ((part, valid), (None, ~valid)):
        if bool(mask.any()):
            found.append(Group(mode, None if bool(mask.all()) else mask.nonzero().flatten()))
    return found


def whole(memory: Memory, plan: StepPlan, blocks: Sequence[int], rows: Rows) -> set[int]:
    """Those of `blocks` that all `rows` take whole from memory."""
    return {
        block
        for block in blocks
        if plan.reused_part(block) == "block"
        and plan.bypassed(block, rows) is False
        and bool(memory.valid((block, "block"), rows).all())
    }


def after(
    backbone: Network,
    memory: Memory,
    group: Group,
    stream: Stream,
    rows: Rows,
    block: int,
    skip: Tensor | None,
    keep: Mask,
) -> Tensor:
    """The hidden state of a group after a block. `rows` are the group's; of them those in `keep` leave what they
    compute behind."""
    held = memory.read((block, group.mode), rows) if group.mode is not None else {}
    if group.mode == "block":
        return held["block"][0]
    slot = Slot(group.mode, memory.wanted(block), held)
    hidden: Tensor = backbone.blocks[block](
        gather(stream.hidden, group.positions),
        {name: gather(value, group.positions) for name, value in stream.cond.items()},
        None if skip is None else gather(skip, group.positions),
        slot,
    )
    wanted = memory.wanted(block)
    if "block" in wanted:
        slot.store("block", hidden)
    for part in wanted:
        values = {name: tensors for name, tensors in slot.stored.items() if name.rsplit(".", 1)[-1] == part}
        if values and keep is not False:
            memory.write((block, part), rows, values, None if keep is True else keep)
    return hidden
