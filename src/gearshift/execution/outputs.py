"""What an execution is asked for beside the plan, and what it gives: packing, events of the trace, outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gearshift.execution.stream import Rows


@dataclass(frozen=True, slots=True)
class Packing:
    """When rows that have left are dropped from the stream, and when the host waits for who leaves.

    Attributes:
        min_fraction: what copying the state of one row costs, as a fraction of one block on it. Rows that left are
            dropped once sparing them the blocks to come outweighs copying the other rows' hidden state and long skips
            (`pays`); until then they are carried along. 0 drops at once.
        simulate: never drop; run everything and gather.
        overlap: where an exit rule expects nobody to leave (`ExitRule`), run the next block before its answer is
            looked at. None: on CUDA, where the device would stand idle while the host waits.
    """

    min_fraction: float = 0.02
    simulate: bool = False
    overlap: bool | None = None

    def pays(self, gone: int, kept: int, states: int, blocks: int) -> bool:
        """Whether to drop `gone` rows that would run at most `blocks` more, when `states` tensors (the hidden state,
        and pending skips) have to be copied for the `kept` ones.

        A block of a transformer or a U-Net writes some 20 times what its hidden state holds and reads as much, before
        its products are counted; a copy reads and writes it once. So a copy is 1/20 of a block where memory is all that
        counts, and less where products do: 1/50 by default.
        """
        return gone * blocks >= self.min_fraction * kept * states

    def overlaps(self, device: torch.device) -> bool:
        """Whether answers are looked at late, on this device. Never in simulation, which charges each row for what it
        needs."""
        wanted = device.type == "cuda" if self.overlap is None else self.overlap
        return wanted and not self.simulate


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
        depth: blocks after which each row was read out, host int64 [n].
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
