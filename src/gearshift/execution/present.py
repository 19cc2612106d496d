"""Who is still in a stream: which rows have not left, and where each leaves at the latest.

All of it lies on the host. A mask over the rows of a stream is one answer for all of them (True, False) wherever they
agree, so a call in which nobody leaves handles no mask at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.execution.stream import Rows

Mask = Tensor | bool
"""Rows of a stream: host bool [n], or True for all and False for none of them."""


def settled(mask: Tensor) -> Mask:
    """A host mask as one answer where all rows have the same."""
    if not bool(mask.any()):
        return False
    return True if bool(mask.all()) else mask


def part(mask: Mask, positions: Tensor | None) -> Mask:
    """A mask over the rows at `positions` (host int64; None: all)."""
    return mask if positions is None or isinstance(mask, bool) else settled(mask[positions])


def chosen(rows: Rows, mask: Mask) -> Rows:
    """Those of `rows` that a mask names."""
    if mask is True:
        return rows
    return rows.take(torch.zeros(0, dtype=torch.int64) if mask is False else mask.nonzero().flatten())


class Present:
    """The rows of a stream.

    Attributes:
        count: n.
        targets: depth at which they leave at the latest: one for all, or host int64 [n].
        alive: those that have not left. The others are carried along until dropping them pays.
    """

    __slots__ = ("alive", "count", "targets")

    def __init__(self, count: int, targets: int | Tensor, alive: Mask = True) -> None:
        self.count, self.targets, self.alive = count, targets, alive

    @property
    def deepest(self) -> int:
        """The greatest target."""
        return self.targets if isinstance(self.targets, int) else int(self.targets.max())

    def due(self, depth: int) -> Mask:
        """Rows that leave at `depth` at the latest, and have not left."""
        if isinstance(self.targets, int):
            return self.alive if self.targets == depth else False
        return settled((self.targets == depth) & self.alive)

    def leave(self, leaving: Mask) -> None:
        """Mark rows as having left."""
        if isinstance(leaving, bool):
            self.alive = self.alive if leaving is False else False
        else:
            self.alive = settled(~leaving & self.alive)

    def kept(self) -> Tensor | None:
        """Positions of the rows that have not left, where some have; host int64."""
        return None if isinstance(self.alive, bool) else self.alive.nonzero().flatten()

    def take(self, positions: Tensor) -> Present:
        """Rows at `positions`, none of which has left."""
        return Present(len(positions), self.targets if isinstance(self.targets, int) else self.targets[positions])
