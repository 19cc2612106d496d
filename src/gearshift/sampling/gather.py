"""Chunks of several processes, put together in chunk order on the main one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.runtime import peers
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Chunk


@dataclass(frozen=True)
class Gathered:
    """All chunks of a range, on the host, in order."""

    chunks: tuple[Chunk, ...]

    @property
    def images(self) -> Tensor:
        """[N, C, H, W] fp32."""
        return torch.cat([chunk.images for chunk in self.chunks])

    @property
    def labels(self) -> Tensor | None:
        """[N] int64, or None without labels."""
        conds = [chunk.cond for chunk in self.chunks if chunk.cond is not None]
        return torch.cat(conds) if conds and conds[0].ndim == 1 else None

    @property
    def ledger(self) -> LedgerData:
        return LedgerData.merge([chunk.ledger for chunk in self.chunks])


def gather_chunks(mine: Sequence[Chunk]) -> Gathered | None:
    """The chunks of every process; None on all but the main one.

    Collective where several processes are at work (torchrun or srun).
    """
    local = [Chunk(c.index.cpu(), c.images.cpu(), None if c.cond is None else c.cond.cpu(), c.ledger) for c in mine]
    everything = peers.gather(local, "its chunks were sampled")
    if everything is None:
        return None
    merged = sorted((chunk for part in everything for chunk in part), key=lambda chunk: int(chunk.index[0]))
    return Gathered(tuple(merged))
