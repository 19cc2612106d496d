"""What an exit rule is asked, and when the host looks at its answers: the only waits of an execution.

An answer is a mask on the device; the host needs it to know which rows go on. Where the rule expects nobody to leave,
the mask travels to pinned memory while the device runs the next block, and is looked at after that block was launched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from gearshift.execution.exits import ExitView
from gearshift.execution.network import Network
from gearshift.execution.outputs import Event, Packing
from gearshift.execution.plan import ExitRule
from gearshift.execution.present import Mask, settled
from gearshift.execution.routes import Routes
from gearshift.execution.stream import Stream, gather


def send(mask: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start the way of a mask to the host; the device goes on. There is none to go where it lies on the host."""
    if mask.device.type != "cuda":
        return mask, None
    landing = torch.empty(mask.shape, dtype=mask.dtype, device="cpu", pin_memory=True)
    landing.copy_(mask, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(mask.device))
    return landing, arrived


def wait(mask: Tensor, arrived: torch.cuda.Event | None = None) -> Tensor:
    """A mask on the host. Nothing else in an execution waits for the device."""
    if arrived is None:
        return mask.cpu()
    arrived.synchronize()
    return mask


class Answer:
    """Which of a stream's rows want to leave.

    Attributes:
        late: it may be looked at after the next block.
    """

    def __init__(self, count: int, parts: list[tuple[Tensor | None, Tensor]], late: bool) -> None:
        self.late, self._count = late, count
        self._positions = [positions for positions, _ in parts]
        self._sent = [send(mask) if late else (mask, None) for _, mask in parts]

    def read(self) -> Mask:
        """Rows of the stream; waits."""
        if self._positions == [None]:
            return settled(wait(*self._sent[0]))
        leaving = torch.zeros(self._count, dtype=torch.bool)
        for positions, sent in zip(self._positions, self._sent, strict=True):
            leaving[slice(None) if positions is None else positions] = wait(*sent)
        return settled(leaving)


class Asking:
    """The exit rule of one execution over R rows.

    Args:
        overlap: answers at depths that the rule calls quiet may be looked at late.
    """

    def __init__(
        self,
        backbone: Network,
        rule: ExitRule,
        routes: Routes,
        trace: list[Event],
        num_rows: int,
        packing: Packing,
        overlap: bool,
    ) -> None:
        self.backbone, self.rule, self.routes, self.trace = backbone, rule, routes, trace
        self.charge_all = not packing.simulate
        self.overlap = overlap
        # The rule's state spans the run's rows, so packing and routing do not move it.
        self.state: Any = rule.begin(num_rows)
        self._named: dict[int, tuple[frozenset[int], frozenset[int]]] = {}

    def _depths(self, path: int) -> tuple[frozenset[int], frozenset[int]]:
        """Depths of a path at which the rule is asked, and those of them that it calls quiet."""
        if path not in self._named:
            exits = self.backbone.exits(path)
            quiet: Callable[[tuple[int, ...]], Collection[int]] | None = getattr(self.rule, "quiet", None)
            calm = frozenset(quiet(exits)) if self.overlap and quiet is not None else frozenset()
            self._named[path] = frozenset(self.rule.depths(exits)), calm
        return self._named[path]

    def ask(self, stream: Stream, depth: int, alive: Mask, previous: Tensor | None) -> Answer | None:
        """Ask about the rows that have not left; None where there is nobody to ask about. `previous` is the hidden
        state before the last block."""
        parts, late = [], True
        for path, here in self.routes.split(stream.rows, alive):
            depths, quiet = self._depths(path)
            if depth in depths:
                parts.append((here, self.rule.leaves(self._view(stream, path, depth, here, previous), self.state)))
                late = late and depth in quiet
        return Answer(len(stream.rows), parts, late) if parts else None

    def _view(self, stream: Stream, path: int, depth: int, here: Tensor | None, previous: Tensor | None) -> ExitView:
        rows = stream.rows if here is None else stream.rows.take(here)
        hidden, time = stream.hidden, stream.time

        def uncertainty() -> Tensor:
            # The few rows that are carried along cost less in the head than a copy of all others would; rows of another
            # path have another head.
            whole = self.routes.only is not None
            ran = stream.rows if whole and self.charge_all else rows
            self.trace.append(Event("uncertainty", path, depth, "full", ran))
            if whole:
                return gather(self.backbone.mean_uncertainty(hidden, time, depth, path), here)
            return self.backbone.mean_uncertainty(gather(hidden, here), gather(time, here), depth, path)

        return ExitView(depth, path, self.backbone.exits(path), rows, hidden, previous, uncertainty, here)
