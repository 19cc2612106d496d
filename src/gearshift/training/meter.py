"""The loss terms of the steps since the last logged line, kept on the device without waiting for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributed as dist


class Meter:
    """One row of terms per micro-batch; read, and looked at for values that are not finite, only when asked.

    Args:
        capacity: micro-batches between two readings.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.names: tuple[str, ...] = ()
        self.first = 0  # micro-batch of row 0
        self._count = 0
        self._rows = torch.empty(0)

    def add(self, micro_batch: int, terms: dict[str, Tensor]) -> None:
        """Notes the terms of a micro-batch: one small kernel, no wait."""
        values = [value.detach().float() for value in terms.values()]
        if not self.names or len(self._rows) != self.capacity:
            self._allocate(tuple(terms), values[0].device)
        if self._count == 0:
            self.first = micro_batch
        torch.stack(values, out=self._rows[self._count])
        self._count += 1

    def reduce(self) -> None:
        """Averages every row over the processes; all of them have to call it."""
        if self._count and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            rows = self._rows[: self._count]
            dist.all_reduce(rows)
            rows.div_(dist.get_world_size())

    def not_finite(self) -> tuple[int, dict[str, float]] | None:
        """The first micro-batch with a term that is not finite, and its terms. Waits for the device."""
        rows = self._rows[: self._count].cpu()
        bad = (~rows.isfinite()).any(1).nonzero()
        if not len(bad):
            return None
        row = int(bad[0])
        return self.first + row, dict(zip(self.names, rows[row].tolist(), strict=True))

    def last_not_finite(self) -> bool:
        """Whether the newest row has a value that is not finite; for the host, where reading costs nothing."""
        return not all(map(math.isfinite, self._rows[self._count - 1].tolist()))

    def take(self) -> dict[str, float]:
        """The mean of each term, in float64, and a fresh start."""
        rows = self._rows[: self._count].double().cpu()
        self._count = 0
        return dict(zip(self.names, rows.mean(0).tolist(), strict=True)) if len(rows) else {}

    def state(self) -> dict[str, object]:
        """What a checkpoint needs to go on in the middle of a line."""
        return {"names": list(self.names), "first": self.first, "rows": self._rows[: self._count].cpu().clone()}

    def load(self, names: list[str], first: int, rows: Tensor, device: torch.device) -> None:
        """Takes up what `state` gave."""
        self.capacity = max(self.capacity, len(rows))
        self._allocate(tuple(names), device)
        self._rows[: len(rows)] = rows.to(device)
        self.first, self._count = first, len(rows)

    def _allocate(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self._rows = torch.zeros(self.capacity, len(names), device=device)
