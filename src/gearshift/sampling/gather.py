"""Chunks of several processes, put together in chunk order on the main one."""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.runtime.launch import is_main, rank, world_size
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

    Collective where several processes are at work (torchrun or srun); starts the process group if nobody has.
    """
    local = [Chunk(c.index.cpu(), c.images.cpu(), None if c.cond is None else c.cond.cpu(), c.ledger) for c in mine]
    if world_size() == 1:
        return Gathered(tuple(local))
    import torch.distributed as dist

    if not dist.is_initialized():
        _meet()
    everything: list[list[Chunk]] | None = [[] for _ in range(world_size())] if is_main() else None
    dist.gather_object(local, everything)
    if everything is None:
        return None
    merged = sorted((chunk for part in everything for chunk in part), key=lambda chunk: int(chunk.index[0]))
    return Gathered(tuple(merged))


def _meet() -> None:
    import torch.distributed as dist

    if "MASTER_ADDR" not in os.environ:  # srun names the nodes, but not where to meet
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        os.environ["MASTER_ADDR"] = SLURMEnvironment.resolve_root_node_address(nodes)
        # Of its own for each job, and the same in all of its processes.
        os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ.get("SLURM_JOB_ID", "0")[-4:])))
    # Processes meet when they are through with their chunks, which may be long after one another.
    dist.init_process_group("gloo", rank=rank(), world_size=world_size(), timeout=datetime.timedelta(days=1))
    # Left to the end of the interpreter, its threads abort the process.
    atexit.register(dist.destroy_process_group)
