"""The one place that runs blocks: exits, bypass, reuse, packing, routing to decoders, and the trace.

Rows that leave are read out at once; they are dropped from the stream when dropping pays (`Packing`). Rows that stand
in the order in which they leave, the last to leave first, cost nothing to drop: what goes on is a view of the stream.
Where an exit rule expects nobody to leave, its answer is looked at one block later: who left all the same is read out
from the state of that depth, and has run one block more, which the trace counts. In simulation every row runs to the
end and outputs are gathered: the same decisions, the same numbers up to rounding, no saving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gearshift.execution import reuse
from gearshift.execution.asking import Answer, Asking
from gearshift.execution.memory import NO_SLOT, Memory
from gearshift.execution.network import Network, common_prefix
from gearshift.execution.outputs import PACK, Event, Outputs, Packing
from gearshift.execution.plan import StepPlan
from gearshift.execution.present import Mask, Present, chosen, part
from gearshift.execution.reach import unread
from gearshift.execution.readouts import Readouts
from gearshift.execution.routes import Routes
from gearshift.execution.stream import Rows, Stream, adjacent, gather, to_device
from gearshift.runtime.errors import UsageError


def execute(
    backbone: Network, stream: Stream, plan: StepPlan, memory: Memory | None = None, *, packing: Packing = PACK
) -> Outputs:
    """Run `backbone` on `stream` as `plan` says.

    Args:
        stream: from `backbone.embed`; its rows may be a subset of the run's. Per-row tensors of the plan have one
            entry for each of the run's R rows (`stream.rows.total`).
        memory: needed where the plan reuses; entries it wants are stored as they are computed.

    Raises:
        UsageError: the plan names a depth, block or expert that the backbone does not have, or reuses without memory.
    """
    _check(backbone, stream, plan, memory)
    return _Execution(backbone, stream, plan, memory, packing).run(stream)


def _check(backbone: Network, stream: Stream, plan: StepPlan, memory: Memory | None) -> None:
    per_row = {"expert": plan.expert, "depth": plan.depth}
    per_row |= {f"bypass[{k}]": rows for k, rows in plan.bypass.items()} if isinstance(plan.bypass, Mapping) else {}
    for name, value in per_row.items():
        if isinstance(value, Tensor) and value.shape != (stream.rows.total,):
            raise ValueError(f"StepPlan.{name} has shape {list(value.shape)}; the run has {stream.rows.total} rows")
    known = range(len(backbone.blocks))
    for block in [*plan.bypass, *(block for block, _ in plan.reuse)]:
        if block not in known:
            raise UsageError(f"the plan names block {block}; {backbone.name} has blocks 0..{len(known) - 1}")
    if plan.reuse and memory is None:
        raise UsageError(f"the plan reuses {sorted(plan.reuse)} but the run has no memory for it")


class _Execution:
    """State of one call of `execute`."""

    def __init__(
        self, backbone: Network, stream: Stream, plan: StepPlan, memory: Memory | None, packing: Packing
    ) -> None:
        self.backbone, self.plan, self.memory, self.packing = backbone, plan, memory, packing
        self.blocks, self.device = backbone.blocks, stream.hidden.device
        self.trace: list[Event] = []
        self.routes = Routes(backbone, plan, stream.rows)
        self.readouts = Readouts(backbone, self.routes, stream.rows, self.trace)
        # Nobody is dropped, and every row is charged for what it needs alone.
        self.simulated = packing.simulate and not plan.taps
        self.asking: Asking | None = None
        if plan.exit is not None:
            # What rows leave in the memory, and what is tapped, goes by who is there: then answers are waited for.
            overlap = packing.overlaps(self.device) and memory is None and not plan.taps
            self.asking = Asking(backbone, plan.exit, self.routes, self.trace, stream.rows.total, packing, overlap)
        self.unread: frozenset[int] = frozenset()  # blocks whose output nobody reads in this call

    def run(self, stream: Stream) -> Outputs:
        used = self.routes.used
        parts = self.routes.split(stream.rows)
        for path, here in parts:
            rows = stream.rows if here is None else stream.rows.take(here)
            self.trace.append(Event("embed", path, 0, "full", rows))
        if len(used) == 1:
            self._walk(self.backbone.enter(stream, used[0]), True, used[0], 0)
            return self.readouts.outputs()
        # Shared blocks run once for everybody; only what goes on is split.
        prefix = common_prefix([self.backbone.paths[path] for path in used])
        alive: Mask = True
        previous: Tensor | None = None
        if prefix:
            stream, alive, previous = self._walk(stream, alive, used[0], 0, until=prefix)
        for path, here in self.routes.split(stream.rows):
            mine = part(alive, here)
            if self._runs_on(mine):
                before = None if previous is None else gather(previous, here)
                own = stream if here is None else stream.take(here)
                self._walk(own if prefix else self.backbone.enter(own, path), mine, path, prefix, previous=before)
        return self.readouts.outputs()

    # One path --------------------------------------------------------------------------------------------------------

    def _runs_on(self, alive: Mask) -> bool:
        """Whether blocks still have to run: somebody is left, or nobody may be dropped."""
        return alive is not False or self.packing.simulate or bool(self.plan.taps)

    def _walk(
        self,
        stream: Stream,
        alive: Mask,
        path: int,
        start: int,
        until: int | None = None,
        previous: Tensor | None = None,
    ) -> tuple[Stream, Mask, Tensor | None]:
        """Run `stream` from depth `start` until every row has left, or to depth `until`; returns what goes on there.

        Up to `until` the rows may be of several paths, which share the blocks of `path` but not their heads. `alive`
        marks the rows that have not left; the others are carried until dropping them pays. `previous` is the hidden
        state before the last block.
        """
        plan = self.plan
        blocks = self.backbone.paths[path]
        present = Present(len(stream.rows), self.routes.targets(stream.rows, plan.depth), alive)
        for own, _ in self.routes.split(stream.rows):
            for depth in plan.taps:
                self.backbone.check_depth(depth, own)
        pending: list[tuple[int, Tensor]] = []
        owed: list[tuple[int, Mask]] = []
        end = len(blocks) if self.simulated else max(present.deepest, *plan.taps, 0)
        last = end if until is None else until
        alike = start == 0 and until is None and isinstance(present.targets, int)
        self.unread = self._unread(stream, blocks[: present.deepest]) if alike else frozenset()
        unseen: tuple[Stream, int, Answer] | None = None
        for depth in range(start, last + 1):
            if unseen is not None:  # looked at before anybody is asked again or leaves
                before, asked_at, answer = unseen
                late = answer.read()
                self.readouts.leave(before, asked_at, late)
                present.leave(part(late, before.rows.positions_of(stream.rows)))
                unseen = None
            if depth == until:  # exits and taps here belong to the paths that go on
                break
            if depth in plan.taps:
                pending.append((depth, stream.hidden))
            self._leave(present, stream, depth, present.due(depth), owed)
            asked = None if self.asking is None else self.asking.ask(stream, depth, present.alive, previous)
            if asked is not None and asked.late:
                unseen = Stream(stream.hidden, stream.time, stream.rows, stream.cond), depth, asked
            elif asked is not None:
                self._leave(present, stream, depth, asked.read(), owed)
            if depth == last or not self._runs_on(present.alive):
                break
            stream, present = self._packed(stream, present, end - depth)
            previous = stream.hidden
            self._block(stream, path, blocks[depth], present.alive)
        self.readouts.read_taps(stream, pending, owed)
        return stream, present.alive, previous

    def _unread(self, stream: Stream, blocks: Sequence[int]) -> frozenset[int]:
        """Blocks that need not run, because all rows take a later one whole from memory and nobody looks in between."""
        if self.memory is None or self.plan.exit is not None or self.plan.taps:
            return frozenset()
        whole = reuse.whole(self.memory, self.plan, blocks, stream.rows)
        return unread(self.backbone, blocks, whole, len(stream.skips))

    def _leave(self, present: Present, stream: Stream, depth: int, leaving: Mask, owed: list[tuple[int, Mask]]) -> None:
        """Rows of `stream` that leave with the state they have at `depth`."""
        if leaving is False:
            return
        present.leave(leaving)
        if depth in self.plan.taps:  # the tap reads them too
            owed.append((depth, leaving))
        else:
            self.readouts.leave(stream, depth, leaving)

    def _packed(self, stream: Stream, present: Present, blocks: int) -> tuple[Stream, Present]:
        """Without the rows that have left, where dropping them pays; at most `blocks` more blocks run."""
        keep = present.kept()
        if keep is None or self.packing.simulate or self.plan.taps:
            return stream, present
        # A memory would still be asked for rows that left, and rows of several paths be gathered for every look of an
        # exit rule. Where the rest is a view, nothing is copied.
        at_once = self.memory is not None or (self.asking is not None and self.routes.only is None) or adjacent(keep)
        # A skip that an earlier drop has left longer than the stream is gathered anyhow.
        states = 1 + sum(len(skip.rows) == present.count for skip in stream.skips)
        if not at_once and not self.packing.pays(present.count - len(keep), len(keep), states, blocks):
            return stream, present
        return stream.take(keep), present.take(keep)

    # One block -------------------------------------------------------------------------------------------------------

    def _block(self, stream: Stream, path: int, block: int, alive: Mask) -> None:
        """Run, reuse or bypass one block, in place on the stream. Rows that have left leave no entry in the memory."""
        idle = block in self.unread
        if idle:
            self.trace.append(Event("block", path, block, "block", self._counted(stream.rows, alive)))
        if idle and not self.packing.simulate:
            if block in self.backbone.pops:
                stream.skips.pop()
            if block in self.backbone.pushes:
                stream.push()  # popped by another block that nobody reads
            return
        skip = stream.pop() if block in self.backbone.pops else None
        dropped = self.plan.bypassed(block, stream.rows)
        if idle:  # simulated: what comes behind the rows' depth wants its shapes, and leaves nothing behind
            stream.hidden = self.blocks[block](stream.hidden, stream.cond, skip, NO_SLOT)
        elif isinstance(dropped, Tensor):
            results: list[tuple[Tensor, Tensor]] = []
            for drops, mask in ((False, ~dropped), (True, dropped)):
                here = mask.nonzero().flatten()
                these, its_skip = stream.take(here), None if skip is None else gather(skip, here)
                results.append((here, self._after(these, path, block, its_skip, part(alive, here), drops)))
            stream.hidden = self._in_order(results)
        else:
            stream.hidden = self._after(stream, path, block, skip, alive, dropped)
        if block in self.backbone.pushes:
            stream.push()
        if block in self.backbone.carries:
            stream.cond = {**stream.cond, self.backbone.carries[block]: stream.hidden}

    def _after(self, stream: Stream, path: int, block: int, skip: Tensor | None, alive: Mask, dropped: bool) -> Tensor:
        """The hidden state after a block that all rows of the stream run, or all drop."""
        if self.memory is not None and not dropped:
            parts = []
            for group in reuse.groups(self.memory, self.plan.reused_part(block), block, stream.rows):
                rows = stream.rows if group.positions is None else stream.rows.take(group.positions)
                keep = part(alive, group.positions)
                self.trace.append(Event("block", path, block, group.mode or "full", self._counted(rows, keep)))
                hidden = reuse.after(self.backbone, self.memory, group, stream, rows, block, skip, keep)
                parts.append((torch.arange(len(rows)) if group.positions is None else group.positions, hidden))
            return parts[0][1] if len(parts) == 1 else self._in_order(parts)
        counted = self._counted(stream.rows, alive)
        self.trace.append(Event("block", path, block, "bypass" if dropped else "full", counted))
        if dropped:
            return self.backbone.bypass(block, stream.hidden, stream.cond, skip)
        result: Tensor = self.blocks[block](stream.hidden, stream.cond, skip, NO_SLOT)
        return result

    def _in_order(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(positions, tensor) of parts that together are the stream, in the order of its rows."""
        order = torch.cat([positions for positions, _ in parts])
        together = torch.cat([tensor for _, tensor in parts])
        if bool((order[1:] > order[:-1]).all()):
            return together
        return together.index_select(0, to_device(order.argsort(), self.device))

    def _counted(self, rows: Rows, alive: Mask) -> Rows:
        """The rows a block is charged for: in simulation those that need it, otherwise all it really runs on."""
        return chosen(rows, alive) if self.simulated else rows
