"""What an execution is asked for beside the plan, and what it gives: packing, events of the trace, outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gearshift.execution.stream import Rows


@dataclass(frozen=True, slots=True)
class Packing:
    """When rows that have left are dropped from the stream.

    Attributes:
        min_fraction: drop once at least this fraction of the stream has left; below it the copy costs more than the
            block would. 0 drops at once.
        simulate: never drop; run everything and gather.
    """

    min_fraction: float = 0.02
    simulate: bool = False


PACK = Packing()
SIMULATE = Packing(simulate=True)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that ran: `kind` embed | block | readout | uncertainty, at `index` (block, or depth of a head)."""

    kind: str
    path: int
    index: int
    mode: str
    rows: Rows


@dataclass(slots=True)
class Outputs:
    """Result of one execution. Tensors follow the order of `rows`.

    Attributes:
        prediction: [n, C, H, W].
        depth: blocks run per row, host int64 [n].
        rows: which rows of the run these are.
        taps: prediction at each tapped depth, [n, C, H, W].
        uncertainty: head output at each tapped depth (where the backbone has heads), [n, C, H, W] or [n].
        trace: what ran, for the ledger.
    """

    prediction: Tensor
    depth: Tensor
    rows: Rows
    taps: dict[int, Tensor] = field(default_factory=dict)
    uncertainty: dict[int, Tensor] = field(default_factory=dict)
    trace: list[Event] = field(default_factory=list)
