"""A data set as rows of numbers: which numbers a grey level means, read in blocks so that no copy lies in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.data.dataset import ImageSource
from gearshift.data.latents import LatentDataset
from gearshift.runtime.errors import UsageError

RANGES = ("unit", "symmetric")
"""Grey levels as [0, 1] (what the published boundaries were found on) or as [-1, 1] (what networks are trained on)."""


@dataclass(frozen=True)
class Rows:
    """Rows 0..count-1.

    Attributes:
        read: (start, stop) -> grey levels or numbers [stop - start, ...].
        count: how many there are.
        shape: of one row before it was made flat.
        range: "unit", "symmetric", or "values" where numbers are taken as they are.
    """

    read: Callable[[int, int], Tensor]
    count: int
    shape: tuple[int, ...]
    range: str

    @property
    def width(self) -> int:
        return torch.Size(self.shape).numel()

    @classmethod
    def of(cls, data: ImageSource | LatentDataset | Tensor, image_range: str = "unit") -> Rows:
        """Rows of images, of the means of latents, or of a tensor [N, ...] (uint8 grey levels, or numbers).

        `image_range` says what grey levels mean; numbers that are no grey levels stay as they are.

        Raises:
            UsageError: an unknown range, or fewer than 2 rows.
        """
        if image_range not in RANGES:
            raise UsageError(f"range={image_range} is not one of {', '.join(RANGES)}")
        if isinstance(data, LatentDataset):
            read: Callable[[int, int], Tensor] = lambda a, b: data.take(torch.arange(a, b)).floats()  # noqa: E731
            levels = False
        elif isinstance(data, Tensor):
            levels = data.dtype == torch.uint8
            read = lambda a, b: data[a:b]  # noqa: E731
        else:
            read, levels = data.read, True
        count, shape = len(data), _shape(data)
        if count < 2:
            raise UsageError(f"the data has {count} images, and an optimal denoiser needs at least 2; choose another")

        return cls(read, count, shape, image_range if levels else "values")

    def fill(self, out: Tensor, start: int) -> Tensor:
        """Writes the rows from `start` on into `out` [n, d], floating point on any device, and returns it.

        Into a buffer, because blocks of 25 MB, each freed before the next, leave a heap of holes.
        """
        out.copy_(self.read(start, start + len(out)).flatten(1).to(out.device))
        if self.range == "unit":
            out.div_(255.0)
        elif self.range == "symmetric":
            out.div_(127.5).sub_(1.0)
        return out

    def take(self, index: Tensor) -> Tensor:
        """Rows of host `index` [n], float64 [n, d]."""
        out = torch.empty(len(index), self.width, dtype=torch.float64)
        for place, row in enumerate(index.tolist()):
            self.fill(out[place : place + 1], row)
        return out


def _shape(data: ImageSource | LatentDataset | Tensor) -> tuple[int, ...]:
    return tuple(data.shape[1:]) if isinstance(data, Tensor) else (data.channels, data.image_size, data.image_size)
