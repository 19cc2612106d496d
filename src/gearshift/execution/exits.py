"""What an exit rule sees after a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gearshift.execution.stream import Rows, gather


@dataclass(frozen=True, slots=True)
class ExitView:
    """The rows still running, after `depth` blocks of `path`.

    Attributes:
        rows: which rows these are (branch-major: row r is sample r % B).
        stream_hidden, stream_previous: hidden state after the last block and before it (None at depth 0), of all rows
            of the stream, some of which may have left or take another path. Rules look at `hidden` and `previous`.
        uncertainty: computes the uncertainty head here, its mean per row [n] in [0, 1]; the cost enters the trace.
        positions: where `rows` stand in the stream, host int64; None: they are all of it.
    """

    depth: int
    path: int
    exits: tuple[int, ...]
    rows: Rows
    stream_hidden: Tensor
    stream_previous: Tensor | None
    uncertainty: Callable[[], Tensor]
    positions: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """Hidden state of the rows, [n, ...]; gathered when it is asked for."""
        return gather(self.stream_hidden, self.positions)

    @property
    def previous(self) -> Tensor | None:
        """Their hidden state before the last block, [n, ...] (saturation rules compare the two); None at depth 0."""
        return None if self.stream_previous is None else gather(self.stream_previous, self.positions)
