"""What flows between blocks: hidden state, conditioning, pending skips, and which rows are still in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Rows:
    """A subset of the rows of a run, ascending. The index lives on the host, so its size is known without a sync.

    Args:
        total: number of rows of the whole run, R.
        index: host int64 [n], ascending original indices; None means all rows.
    """

    __slots__ = ("_device_index", "index", "total")

    def __init__(self, total: int, index: Tensor | None = None) -> None:
        self.total = total
        self.index = index
        self._device_index: Tensor | None = None

    def __len__(self) -> int:
        return self.total if self.index is None else len(self.index)

    def host(self) -> Tensor:
        """Original indices, host int64 [n]."""
        return torch.arange(self.total) if self.index is None else self.index

    def on(self, device: torch.device) -> Tensor:
        """Original indices on `device`, moved once."""
        if self._device_index is None or self._device_index.device != device:
            everybody = self.index is None
            self._device_index = (
                torch.arange(self.total, device=device) if everybody else to_device(self.host(), device)
            )
        return self._device_index

    def take(self, positions: Tensor) -> Rows:
        """The rows at these positions (host int64, ascending) of this subset."""
        return Rows(self.total, positions if self.index is None else self.index[positions])

    def positions_of(self, other: Rows) -> Tensor | None:
        """Where each row of `other` (a subset of this one) stands here, host int64; None if both are the same rows."""
        if self is other or len(self) == len(other):
            return None
        if self.index is None:
            return other.host()
        return torch.searchsorted(self.index, other.host())


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """Move a host index without waiting for the device."""
    if device.type == "cuda":  # a pageable copy would wait for the stream
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)


def adjacent(positions: Tensor) -> bool:
    """Whether `positions` (host int64, ascending) follow each other without a gap, so that a view holds their rows."""
    count = len(positions)
    return count > 0 and int(positions[-1]) - int(positions[0]) == count - 1


def gather(tensor: Tensor, positions: Tensor | None, *, own: bool = False) -> Tensor:
    """Rows of `tensor` at `positions` (host int64, ascending); None leaves it as it is.

    Adjacent rows are a view: no copy, and no index travels to the device. `own` asks for a copy of these too, so that
    keeping a few rows does not keep the whole tensor in memory.
    """
    return gathering(positions, tensor.device, own=own)(tensor)


def gathering(positions: Tensor | None, device: torch.device, *, own: bool = False) -> Callable[[Tensor], Tensor]:
    """`gather` for several tensors on one device, to which the index is moved once."""
    if positions is None:
        return lambda tensor: tensor
    if adjacent(positions):
        first, count = int(positions[0]), len(positions)
        if own:
            return lambda tensor: tensor.narrow(0, first, count).clone()
        return lambda tensor: tensor.narrow(0, first, count)
    index = to_device(positions, device)
    return lambda tensor: tensor.index_select(0, index)


@dataclass(frozen=True, slots=True)
class Skip:
    """A pending long skip together with the rows it was pushed for."""

    hidden: Tensor
    rows: Rows


@dataclass(slots=True)
class Stream:
    """State between two blocks. The first dimension of every tensor is the rows still in the stream.

    Attributes:
        hidden: [n, ...], shape owned by the backbone.
        time: [n] the time value the network was fed (heads may embed it).
        rows: which rows of the run these are.
        cond: named conditioning tensors [n, ...] that blocks and heads read.
        skips: pushed and not yet popped; gathered only when popped, so dropping rows copies none of them.
    """

    hidden: Tensor
    time: Tensor
    rows: Rows
    cond: dict[str, Tensor] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)

    def take(self, positions: Tensor) -> Stream:
        """The stream of the rows at `positions` (host int64, ascending)."""
        pick = gathering(positions, self.hidden.device)
        return Stream(
            hidden=pick(self.hidden),
            time=pick(self.time),
            rows=self.rows.take(positions),
            cond={name: pick(value) for name, value in self.cond.items()},
            skips=list(self.skips),
        )

    def belong_to(self, rows: Rows) -> None:
        """Say which of a run's rows these are, of a stream that was embedded as if they were all."""
        self.rows, self.skips = rows, [Skip(skip.hidden, rows) for skip in self.skips]

    def push(self) -> None:
        """Push the hidden state as a long skip."""
        self.skips.append(Skip(self.hidden, self.rows))

    def pop(self) -> Tensor:
        """Pop the latest skip, narrowed to the rows still here."""
        skip = self.skips.pop()
        return gather(skip.hidden, skip.rows.positions_of(self.rows))
