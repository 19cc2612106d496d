"""Reading out: rows that leave are set aside and read together at the end, tapped depths for all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.execution.network import Network
from gearshift.execution.outputs import Event, Outputs
from gearshift.execution.present import Mask, part
from gearshift.execution.routes import Routes
from gearshift.execution.stream import Rows, Stream, gather, gathering, to_device
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class _Left:
    """Rows that left, as they were at `depth`."""

    path: int
    depth: int
    rows: Rows
    hidden: Tensor
    cond: dict[str, Tensor]


class Readouts:
    """What one execution gives its rows."""

    def __init__(self, backbone: Network, routes: Routes, rows: Rows, trace: list[Event]) -> None:
        self.backbone, self.routes, self.rows, self.trace = backbone, routes, rows, trace
        self.depth = torch.zeros(rows.total, dtype=torch.int64)
        self._left: list[_Left] = []
        self._finished: list[tuple[Rows, Tensor]] = []
        self._tapped: dict[int, list[tuple[Rows, Tensor]]] = {}
        self._uncertainty: dict[int, list[tuple[Rows, Tensor]]] = {}

    def leave(self, stream: Stream, depth: int, leaving: Mask) -> None:
        """Set the leaving rows aside, to be read out."""
        for path, here in self.routes.split(stream.rows, leaving):
            rows = stream.rows if here is None else stream.rows.take(here)
            # Without gradients nothing else would keep the rows that go on in memory until the end.
            pick = gathering(here, stream.hidden.device, own=not torch.is_grad_enabled())
            cond = {name: pick(value) for name, value in stream.cond.items()}
            self.trace.append(Event("readout", path, depth, "full", rows))
            self._left.append(_Left(path, depth, rows, pick(stream.hidden), cond))
            self._note(rows, depth)

    def _note(self, rows: Rows, depth: int) -> None:
        if rows.index is None:
            self.depth.fill_(depth)
        else:
            self.depth[rows.index] = depth

    def read_taps(
        self, stream: Stream, pending: Sequence[tuple[int, Tensor]], owed: Sequence[tuple[int, Mask]]
    ) -> None:
        """Read every tapped depth (with the hidden state there), batched where the backbone can; `owed` are the rows
        that leave at one of them."""
        if not pending:
            return
        depths = [depth for depth, _ in pending]
        for path, here in self.routes.split(stream.rows):
            rows = stream.rows if here is None else stream.rows.take(here)
            pick = gathering(here, stream.hidden.device)
            hiddens = [pick(hidden) for _, hidden in pending]
            cond = {name: pick(value) for name, value in stream.cond.items()}
            predictions = dict(zip(depths, self.backbone.readouts(hiddens, cond, depths, path), strict=True))
            for depth, prediction in predictions.items():
                self.trace.append(Event("readout", path, depth, "full", rows))
                self._tapped.setdefault(depth, []).append((rows, prediction))
            for depth, leaving in owed:
                for _, mine in self.routes.split(rows, part(leaving, here)):
                    done = rows if mine is None else rows.take(mine)
                    self._finished.append((done, gather(predictions[depth], mine)))
                    self._note(done, depth)
            headed = [k for k, depth in enumerate(depths) if self.backbone.predicts_error(depth, path)]
            if headed:
                asked, there = [depths[k] for k in headed], [hiddens[k] for k in headed]
                values = self.backbone.uncertainties(there, pick(stream.time), asked, path)
                for depth, value in zip(asked, values, strict=True):
                    self.trace.append(Event("uncertainty", path, depth, "full", rows))
                    self._uncertainty.setdefault(depth, []).append((rows, value))

    def outputs(self) -> Outputs:
        """Read out everybody who left; results in the order of the run's rows."""
        self._read()
        return Outputs(
            prediction=self._merge(self._finished),
            depth=self.depth if self.rows.index is None else self.depth[self.rows.index],
            rows=self.rows,
            taps={depth: self._merge(parts) for depth, parts in self._tapped.items()},
            uncertainty={depth: self._merge(parts) for depth, parts in self._uncertainty.items()},
            trace=self.trace,
        )

    def _read(self) -> None:
        """One call for all rows that share a readout, at whatever depth they left."""
        groups: dict[Any, list[_Left]] = {}
        for left in self._left:
            groups.setdefault(self.backbone.readout_key(left.depth, left.path), []).append(left)
        for members in groups.values():
            first = members[0]
            hidden, cond = first.hidden, first.cond
            if len(members) > 1:
                hidden = torch.cat([member.hidden for member in members])
                cond = {name: torch.cat([member.cond[name] for member in members]) for name in cond}
            prediction = self.backbone.readout(hidden, cond, first.depth, first.path)
            pieces = prediction.split([len(member.rows) for member in members])
            self._finished += [(member.rows, piece) for member, piece in zip(members, pieces, strict=True)]

    def _merge(self, parts: list[tuple[Rows, Tensor]]) -> Tensor:
        """Parts over disjoint rows, in the order of the run's rows."""
        if len(parts) == 1 and len(parts[0][0]) == len(self.rows):
            return parts[0][1]
        order = torch.cat([rows.host() for rows, _ in parts])
        if len(order) != len(self.rows):
            raise UsageError("a tapped depth is not reached by every row; tap depths that all paths and plans have")
        together = torch.cat([tensor for _, tensor in parts])
        return together.index_select(0, to_device(order.argsort(), together.device))
