"""What an exit rule sees after a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gearshift.execution.stream import Rows


@dataclass(frozen=True, slots=True)
class ExitView:
    """The rows still running, after `depth` blocks of `path`.

    Attributes:
        rows: which rows these are (branch-major: row r is sample r % B).
        hidden: their hidden state [n, ...].
        previous: their hidden state before the last block, [n, ...] (saturation rules compare the two).
        uncertainty: computes the uncertainty head here, its mean per row [n] in [0, 1]; the cost enters the trace.
    """

    depth: int
    path: int
    exits: tuple[int, ...]
    rows: Rows
    hidden: Tensor
    previous: Tensor | None
    uncertainty: Callable[[], Tensor]
