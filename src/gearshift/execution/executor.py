"""The one place that runs blocks: exits, bypass, reuse, packing, routing to decoders, and the trace.

Rows that leave are read out at once; they are dropped from the stream when dropping pays (`Packing`). Rows that stand
in the order in which they leave, the last to leave first, cost nothing to drop: what goes on is a view of the stream.
In simulation every row runs to the end and outputs are gathered: the same decisions, the same numbers up to rounding,
no saving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gearshift.execution import reuse
from gearshift.execution.exits import ExitView
from gearshift.execution.memory import NO_SLOT, Memory
from gearshift.execution.network import Network, common_prefix
from gearshift.execution.outputs import PACK, Event, Outputs, Packing
from gearshift.execution.plan import StepPlan
from gearshift.execution.reach import unread
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
    return _Execution(backbone, stream, plan, memory, packing).run(stream)


class _Execution:
    """State of one call of `execute`."""

    def __init__(
        self, backbone: Network, stream: Stream, plan: StepPlan, memory: Memory | None, packing: Packing
    ) -> None:
        self.backbone, self.plan, self.memory, self.packing = backbone, plan, memory, packing
        self.rows = stream.rows
        self.device = stream.hidden.device
        self.trace: list[Event] = []
        self.left: list[tuple[int, int, Rows, Tensor, dict[str, Tensor]]] = []
        self.finished: list[tuple[Rows, Tensor]] = []
        self.depth = torch.zeros(stream.rows.total, dtype=torch.int64)
        # A rule's state spans the run's rows, so packing and routing do not move it.
        self.rule_state: Any = plan.exit.begin(stream.rows.total) if plan.exit is not None else None
        self.tapped: dict[int, list[tuple[Rows, Tensor]]] = {}
        self.tapped_uncertainty: dict[int, list[tuple[Rows, Tensor]]] = {}
        self.only: int | None = None  # the one path all rows take
        self.unread: frozenset[int] = frozenset()  # blocks whose output nobody reads in this call
        self.path = torch.zeros(stream.rows.total, dtype=torch.int64)  # of each of the run's rows
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

    # Routing ---------------------------------------------------------------------------------------------------------

    def run(self, stream: Stream) -> Outputs:
        used = self._route(stream.rows)
        for path, here in self._by_path(stream.rows):
            rows = stream.rows if len(here) == len(stream.rows) else stream.rows.take(here)
            self.trace.append(Event("embed", path, 0, "full", rows))
        alive = torch.ones(len(stream.rows), dtype=torch.bool)
        if len(used) == 1:
            self._walk(self.backbone.enter(stream, used[0]), alive, used[0], 0)
        else:
            # Shared blocks run once for everybody; only what goes on is split.
            prefix = common_prefix([self.backbone.paths[path] for path in used])
            previous: Tensor | None = None
            if prefix:
                stream, alive, previous = self._walk(stream, alive, used[0], 0, until=prefix)
            for path, here in self._by_path(stream.rows):
                if self._runs_on(alive[here]):
                    before = None if previous is None else gather(previous, here)
                    part = stream.take(here) if prefix else self.backbone.enter(stream.take(here), path)
                    self._walk(part, alive[here], path, prefix, previous=before)
        self._read()
        depth = self.depth if self.rows.index is None else self.depth[self.rows.index]
        return Outputs(
            prediction=self._merge(self.finished),
            depth=depth,
            rows=self.rows,
            taps={d: self._merge(parts) for d, parts in self.tapped.items()},
            uncertainty={d: self._merge(parts) for d, parts in self.tapped_uncertainty.items()},
            trace=self.trace,
        )

    def _route(self, rows: Rows) -> list[int]:
        """Settle the path of every row; the paths in use, ascending."""
        expert = self.plan.expert
        if expert is None and len(self.backbone.paths) > 1:
            raise UsageError(f"{self.backbone.name} has {len(self.backbone.paths)} paths; the plan must route its rows")
        expert = 0 if expert is None else expert
        used = [expert] if isinstance(expert, int) else sorted(set(expert[rows.host()].tolist()))
        for path in used:
            if path not in range(len(self.backbone.paths)):
                raise UsageError(f"expert {path} does not exist; {self.backbone.name} has {len(self.backbone.paths)}")
        self.only = used[0] if len(used) == 1 else None
        if isinstance(expert, int):
            self.path.fill_(expert)
        else:
            self.path = expert
        return used

    def _by_path(self, rows: Rows, mask: Tensor | None = None) -> list[tuple[int, Tensor]]:
        """(path, positions in `rows`) for each path that some row (of those in the host bool `mask`) takes."""
        positions = torch.arange(len(rows)) if mask is None else mask.nonzero().flatten()
        if self.only is not None:
            return [(self.only, positions)] if len(positions) else []
        paths = self.path[rows.host()[positions]]
        return [(path, positions[paths == path]) for path in sorted(set(paths.tolist()))]

    def _merge(self, parts: list[tuple[Rows, Tensor]]) -> Tensor:
        """Parts over disjoint rows, in the order of the run's rows."""
        if len(parts) == 1 and len(parts[0][0]) == len(self.rows):
            return parts[0][1]
        order = torch.cat([rows.host() for rows, _ in parts])
        if len(order) != len(self.rows):
            raise UsageError("a tapped depth is not reached by every row; tap depths that all paths and plans have")
        return torch.cat([tensor for _, tensor in parts]).index_select(0, to_device(order.argsort(), self.device))

    # One path --------------------------------------------------------------------------------------------------------

    def _targets(self, rows: Rows) -> Tensor:
        """Depth at which each row leaves at the latest, host int64 [n]."""
        backbone, wanted = self.backbone, self.plan.depth
        deepest = max(backbone.num_blocks(path) for path in range(len(backbone.paths)))
        targets = torch.empty(len(rows), dtype=torch.int64)
        for path, here in self._by_path(rows):
            full = backbone.num_blocks(path)
            if wanted is None:
                targets[here] = full
                continue
            asked = torch.tensor([wanted]) if isinstance(wanted, int) else wanted[rows.host()[here]]
            for depth in set(asked.tolist()):
                # One number for all paths may be more than a short one has: that row runs to its end.
                if not full < depth <= deepest:
                    backbone.check_depth(depth, path)
            targets[here] = asked.clamp(max=full)
        return targets

    def _runs_on(self, alive: Tensor) -> bool:
        """Whether blocks still have to run: somebody is left, or nobody may be dropped."""
        return bool(alive.any()) or self.packing.simulate or bool(self.plan.taps)

    def _walk(
        self,
        stream: Stream,
        alive: Tensor,
        path: int,
        start: int,
        until: int | None = None,
        previous: Tensor | None = None,
    ) -> tuple[Stream, Tensor, Tensor | None]:
        """Run `stream` from depth `start` until every row has left, or to depth `until`; returns what goes on there.

        Up to `until` the rows may be of several paths, which share the blocks of `path` but not their heads. `alive`
        (host bool [n]) marks the rows that have not left; the others are carried until dropping them pays. `previous`
        is the hidden state before the last block.
        """
        plan = self.plan
        blocks = self.backbone.paths[path]
        targets = self._targets(stream.rows)
        for own, _ in self._by_path(stream.rows):
            for depth in plan.taps:
                self.backbone.check_depth(depth, own)
        pending: list[tuple[int, Tensor]] = []
        owed: list[tuple[int, Tensor]] = []
        if self.packing.simulate and not plan.taps:
            last = len(blocks)
        else:
            last = max(int(targets.max()), *plan.taps, 0)
        if until is not None:
            last = until
        one_depth = start == 0 and until is None and bool((targets == targets[0]).all())
        self.unread = self._unread(stream, blocks[: int(targets[0])]) if one_depth else frozenset()
        for depth in range(start, last + 1):
            if depth == until:  # exits and taps here belong to the paths that go on
                break
            if depth in plan.taps:
                pending.append((depth, stream.hidden))
            leaving = alive & (targets == depth)
            leaving = leaving | self._asked(stream, depth, alive & ~leaving, previous)
            if bool(leaving.any()):
                alive = alive & ~leaving
                if depth in plan.taps:  # the tap reads them too
                    owed.append((depth, leaving))
                else:
                    self._leave(stream, depth, leaving)
            if depth == last or not self._runs_on(alive):
                break
            keep = alive.nonzero().flatten()
            if self._drops(len(alive) - len(keep), keep):
                stream, targets = stream.take(keep), targets[keep]
                alive = torch.ones(len(keep), dtype=torch.bool)
            previous = stream.hidden
            self._block(stream, path, blocks[depth], alive)
        self._read_taps(stream, pending, owed)
        return stream, alive, previous

    def _unread(self, stream: Stream, blocks: Sequence[int]) -> frozenset[int]:
        """Blocks that need not run, because all rows take a later one whole from memory and nobody looks in between."""
        if self.memory is None or self.plan.exit is not None or self.plan.taps:
            return frozenset()
        whole = reuse.whole(self.memory, self.plan, blocks, stream.rows)
        return unread(self.backbone, blocks, whole, len(stream.skips))

    def _drops(self, gone: int, keep: Tensor) -> bool:
        """Whether to go on with the rows at `keep` alone, `gone` others having left."""
        if self.packing.simulate or self.plan.taps or not gone:
            return False
        # A memory would still be asked for rows that left, and an exit rule be shown a copy without them at every
        # depth: then dropping at once is cheaper. Where the rest is a view, nothing is copied.
        at_once = self.memory is not None or self.plan.exit is not None or adjacent(keep)
        return at_once or gone >= self.packing.min_fraction * (len(keep) + gone)

    def _asked(self, stream: Stream, depth: int, candidates: Tensor, previous: Tensor | None) -> Tensor:
        """Ask the exit rule about the candidate rows; host bool over the stream's rows. The one sync of a block."""
        leaving = torch.zeros(len(candidates), dtype=torch.bool)
        rule = self.plan.exit
        if rule is None or not bool(candidates.any()):
            return leaving
        for path, here in self._by_path(stream.rows, candidates):
            exits = self.backbone.exits(path)
            if depth not in rule.depths(exits):
                continue
            positions = None if len(here) == len(stream.rows) else here
            view = self._view(stream, path, depth, exits, positions, previous)
            leaving[here] = rule.leaves(view, self.rule_state).cpu()
        return leaving

    def _view(
        self,
        stream: Stream,
        path: int,
        depth: int,
        exits: tuple[int, ...],
        positions: Tensor | None,
        previous: Tensor | None,
    ) -> ExitView:
        rows = stream.rows if positions is None else stream.rows.take(positions)
        hidden = gather(stream.hidden, positions)
        time = gather(stream.time, positions)

        def uncertainty() -> Tensor:
            self.trace.append(Event("uncertainty", path, depth, "full", rows))
            return self.backbone.mean_uncertainty(hidden, time, depth, path)

        before = None if previous is None else gather(previous, positions)
        return ExitView(depth, path, exits, rows, hidden, before, uncertainty)

    def _leave(self, stream: Stream, depth: int, leaving: Tensor) -> None:
        """Set the leaving rows aside, to be read out."""
        for path, here in self._by_path(stream.rows, leaving):
            positions = None if len(here) == len(stream.rows) else here
            rows = stream.rows if positions is None else stream.rows.take(positions)
            # Without gradients nothing else would keep the rows that go on in memory until the end.
            hidden = gather(stream.hidden, positions, own=not torch.is_grad_enabled())
            cond = {name: gather(value, positions) for name, value in stream.cond.items()}
            self.trace.append(Event("readout", path, depth, "full", rows))
            self.left.append((path, depth, rows, hidden, cond))
            self.depth[rows.host()] = depth

    def _read(self) -> None:
        """Read out the rows that left: one call for all that share a readout, at whatever depth they left."""
        groups: dict[Any, list[tuple[int, int, Rows, Tensor, dict[str, Tensor]]]] = {}
        for left in self.left:
            groups.setdefault(self.backbone.readout_key(left[1], left[0]), []).append(left)
        for members in groups.values():
            path, depth, _, hidden, cond = members[0]
            if len(members) > 1:
                hidden = torch.cat([member[3] for member in members])
                cond = {name: torch.cat([member[4][name] for member in members]) for name in cond}
            parts = self.backbone.readout(hidden, cond, depth, path).split([len(member[2]) for member in members])
            self.finished += [(member[2], part) for member, part in zip(members, parts, strict=True)]

    def _read_taps(
        self, stream: Stream, pending: Sequence[tuple[int, Tensor]], owed: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Read every tapped depth, batched where the backbone can; `owed` are the rows that leave at one of them."""
        if not pending:
            return
        depths = [depth for depth, _ in pending]
        for path, here in self._by_path(stream.rows):
            positions = None if len(here) == len(stream.rows) else here
            rows = stream.rows if positions is None else stream.rows.take(positions)
            hiddens = [gather(hidden, positions) for _, hidden in pending]
            cond = {name: gather(value, positions) for name, value in stream.cond.items()}
            predictions = dict(zip(depths, self.backbone.readouts(hiddens, cond, depths, path), strict=True))
            for depth, prediction in predictions.items():
                self.trace.append(Event("readout", path, depth, "full", rows))
                self.tapped.setdefault(depth, []).append((rows, prediction))
            for depth, leaving in owed:
                mine = leaving[here].nonzero().flatten()
                if len(mine):
                    part = None if len(mine) == len(rows) else mine
                    done = rows if part is None else rows.take(part)
                    self.finished.append((done, gather(predictions[depth], part)))
                    self.depth[done.host()] = depth
            if self.backbone.has_uncertainty:
                values = self.backbone.uncertainties(hiddens, gather(stream.time, positions), depths, path)
                for depth, value in zip(depths, values, strict=True):
                    self.trace.append(Event("uncertainty", path, depth, "full", rows))
                    self.tapped_uncertainty.setdefault(depth, []).append((rows, value))

    # One block -------------------------------------------------------------------------------------------------------

    def _block(self, stream: Stream, path: int, block: int, alive: Tensor) -> None:
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
            stream.hidden = self.backbone.blocks[block](stream.hidden, stream.cond, skip, NO_SLOT)
        elif isinstance(dropped, Tensor):
            results: list[tuple[Tensor, Tensor]] = []
            for drops, mask in ((False, ~dropped), (True, dropped)):
                here = mask.nonzero().flatten()
                part, its_skip = stream.take(here), None if skip is None else gather(skip, here)
                results.append((here, self._after(part, path, block, its_skip, alive[here], drops)))
            stream.hidden = self._in_order(results)
        else:
            stream.hidden = self._after(stream, path, block, skip, alive, dropped)
        if block in self.backbone.pushes:
            stream.push()
        if block in self.backbone.carries:
            stream.cond = {**stream.cond, self.backbone.carries[block]: stream.hidden}

    def _after(
        self, stream: Stream, path: int, block: int, skip: Tensor | None, alive: Tensor, dropped: bool
    ) -> Tensor:
        """The hidden state after a block that all rows of the stream run, or all drop."""
        if self.memory is not None and not dropped:
            parts = []
            for group in reuse.groups(self.memory, self.plan.reused_part(block), block, stream.rows):
                rows = stream.rows if group.positions is None else stream.rows.take(group.positions)
                keep = alive if group.positions is None else alive[group.positions]
                self.trace.append(Event("block", path, block, group.mode or "full", self._counted(rows, keep)))
                hidden = reuse.after(self.backbone, self.memory, group, stream, rows, block, skip, keep)
                parts.append((torch.arange(len(rows)) if group.positions is None else group.positions, hidden))
            return parts[0][1] if len(parts) == 1 else self._in_order(parts)
        counted = self._counted(stream.rows, alive)
        self.trace.append(Event("block", path, block, "bypass" if dropped else "full", counted))
        if dropped:
            return self.backbone.bypass(block, stream.hidden, stream.cond, skip)
        result: Tensor = self.backbone.blocks[block](stream.hidden, stream.cond, skip, NO_SLOT)
        return result

    def _in_order(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(positions, tensor) of parts that together are the stream, in the order of its rows."""
        order = torch.cat([positions for positions, _ in parts])
        together = torch.cat([tensor for _, tensor in parts])
        if bool((order[1:] > order[:-1]).all()):
            return together
        return together.index_select(0, to_device(order.argsort(), self.device))

    def _counted(self, rows: Rows, alive: Tensor) -> Rows:
        """The rows a block is charged for: in simulation those that need it, otherwise all it really runs on."""
        return rows.take(alive.nonzero().flatten()) if self.packing.simulate and not self.plan.taps else rows
