"""Text features beside the images they belong to: any number of captions per image, one of them drawn per sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextRows:
    """Features of the captions of N images.

    Attributes:
        pieces: [rows, L, D] (fp16 or fp32, often memory-mapped), the captions of the images in order, cut anywhere.
        starts: int64 [N + 1] beside them: captions of image i are rows starts[i]..starts[i + 1] - 1 over all pieces; at
            least one each.
    """

    pieces: tuple[Tensor, ...]
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(L, D)."""
        _, length, width = self.pieces[0].shape
        return length, width

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def take(self, index: Tensor, draw: Tensor | None = None) -> Tensor:
        """Features [B, L, D], as they are stored, of one caption of each image of `index` (int64 [B], on the device of
        the pieces). `draw` (uniform [B] in [0, 1)) says which; None is the first."""
        row = self.starts[index]
        if draw is not None:
            # In float64 the product stays below the count for every float32 below one.
            row = row + (draw.double() * (self.starts[index + 1] - row)).long()
        return self._rows(row)

    def to(self, device: torch.device) -> TextRows:
        """The same rows on `device`, in one piece there; on the host nothing is copied."""
        first = self.pieces[0]
        if device.type == "cpu" or first.device == device:
            return self
        whole = torch.empty(sum(map(len, self.pieces)), *first.shape[1:], dtype=first.dtype, device=device)
        done = 0
        for piece in self.pieces:
            whole[done : done + len(piece)] = piece
            done += len(piece)
        return replace(self, pieces=(whole,), starts=self.starts.to(device))

    def _rows(self, row: Tensor) -> Tensor:
        first = self.pieces[0]
        if len(self.pieces) == 1:
            return first[row]
        ends = torch.tensor([len(piece) for piece in self.pieces]).cumsum(0)
        numbers = torch.searchsorted(ends, row, right=True)
        out = torch.empty(len(row), *first.shape[1:], dtype=first.dtype)
        for number in numbers.unique().tolist():
            there = (numbers == number).nonzero()[:, 0]
            piece = self.pieces[number]
            out[there] = piece[row[there] - (int(ends[number]) - len(piece))]
        return out
