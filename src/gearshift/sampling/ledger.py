"""What every call took: plan, depth, MACs, per call and row, counted from the trace and the cost table."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gearshift.diffusion.denoiser import Prediction
from gearshift.diffusion.solvers.base import Call
from gearshift.execution.cost import CostTable
from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write


@dataclass(frozen=True)
class LedgerData:
    """Arrays over calls K, branches G and samples N.

    Attributes:
        depth: blocks after which a row was read out [K, G, N], int16; 0 where it was read from the embedding, and where
            it was not called (`called` tells them apart).
        called: network evaluated [K, G, N], bool.
        macs: multiply-accumulates [K, G, N], heads included, int64; of all that ran, so also of blocks that a row ran
            beyond its depth before it was dropped.
        reused: blocks that took something from memory [K, G, N], int16.
        full_macs: of one row through the plain network (the path its noise level is routed to), int64 [K].
        time, log_snr: process time and log-SNR of each call [K].
        branches: branches that guidance asks for at each call, int16 [K]; fewer than G outside its interval.
        kept: bytes per sample that each call leaves in the memory for later ones, int64 [K].
    """

    depth: NDArray[np.int16]
    called: NDArray[np.bool_]
    macs: NDArray[np.int64]
    reused: NDArray[np.int16]
    full_macs: NDArray[np.int64]
    time: NDArray[np.float64]
    log_snr: NDArray[np.float64]
    branches: NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, dtype=np.int16))  # all G, if not given
    kept: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # nothing, if not given

    def __post_init__(self) -> None:
        if not self.kept.size:
            object.__setattr__(self, "kept", np.zeros(self.macs.shape[0], dtype=np.int64))
        if not self.branches.size:
            every = np.full(self.macs.shape[0], self.macs.shape[1], dtype=np.int16)
            object.__setattr__(self, "branches", every)

    @property
    def num_samples(self) -> int:
        return int(self.macs.shape[2])

    @property
    def macs_per_image(self) -> float:
        return float(self.macs.sum() / self.num_samples)

    @property
    def full_macs_per_image(self) -> int:
        """The plain network at every call, in every branch that guidance asks for there."""
        return int((self.full_macs * self.branches).sum())

    @property
    def macs_saved(self) -> float:
        """Fraction of the plain network's MACs at the same calls; negative where heads cost more than exits save."""
        return 1 - self.macs_per_image / self.full_macs_per_image

    @property
    def calls_per_image(self) -> float:
        """Network evaluations per image, each guidance branch counted."""
        return float(self.called.sum() / self.num_samples)

    @property
    def kept_bytes(self) -> int:
        """The most that is kept of one sample at a time for later calls, in bytes."""
        return int(self.kept.max(initial=0))

    @property
    def blocks_reused(self) -> float:
        """Share of the blocks along the evaluated rows' ways that took something from memory."""
        blocks = int(self.depth.sum(dtype=np.int64))
        return float(self.reused.sum(dtype=np.int64)) / blocks if blocks else 0.0

    def longest_skip(self) -> tuple[int, float]:
        """Most calls in a row that some sample did without the network, and the greatest span of log-SNR from a
        computed call to the last that used its prediction."""
        ran: NDArray[np.bool_] = np.any(self.called, axis=1)  # [K, N]
        longest, widest = 0, 0.0
        since = np.zeros(self.num_samples, dtype=np.int64)
        level = np.full(self.num_samples, self.log_snr[0])
        for call, evaluated in enumerate(ran):
            since = np.where(evaluated, 0, since + 1)
            level = np.where(evaluated, self.log_snr[call], level)
            longest, widest = max(longest, int(since.max())), max(widest, float((self.log_snr[call] - level).max()))
        return longest, widest

    def take(self, samples: slice) -> LedgerData:
        """Some of the samples."""
        return LedgerData(
            self.depth[..., samples],
            self.called[..., samples],
            self.macs[..., samples],
            self.reused[..., samples],
            self.full_macs,
            self.time,
            self.log_snr,
            self.branches,
            self.kept,
        )

    @staticmethod
    def merge(parts: Sequence[LedgerData]) -> LedgerData:
        """Parts over consecutive samples of the same calls."""
        first = parts[0]
        return LedgerData(
            depth=np.concatenate([part.depth for part in parts], axis=2),
            called=np.concatenate([part.called for part in parts], axis=2),
            macs=np.concatenate([part.macs for part in parts], axis=2),
            reused=np.concatenate([part.reused for part in parts], axis=2),
            full_macs=first.full_macs,
            time=first.time,
            log_snr=first.log_snr,
            branches=first.branches,
            kept=np.max([part.kept for part in parts], axis=0),
        )

    def save(self, path: Path) -> None:
        """Write as .npz, atomically."""
        arrays = {name: getattr(self, name) for name in self.__dataclass_fields__}
        atomic_write(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> LedgerData:
        """Raises RunError where the file is no ledger."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
                # Files from before guidance had an interval, or parts were reused, lack these.
                later = ("branches", "kept")
                return cls(**{n: data[n] for n in cls.__dataclass_fields__ if n in data or n not in later})
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise RunError(f"{path} is not a ledger ({error}); make it again with gearshift sample") from error


class Ledger:
    """Collects one chunk.

    Args:
        table: costs of the network.
        full_macs: of one row through the plain network, by position of the call.
        branches, batch: G and N.
    """

    def __init__(self, table: CostTable, full_macs: Sequence[int], branches: int, batch: int) -> None:
        self.table, self.full_macs = table, full_macs
        self.branches, self.batch = branches, batch
        self._calls: list[Call] = []
        self._rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._branches: list[int] = []
        self._kept: list[int] = []

    def record(self, call: Call, prediction: Prediction, kept_bytes: int = 0) -> None:
        """Enter one call, after which the memory holds `kept_bytes` for the whole chunk. Everything needed is on the
        host already."""
        total = self.branches * self.batch
        macs = torch.zeros(total, dtype=torch.int64)
        reused = torch.zeros(total, dtype=torch.int16)
        for event in prediction.trace:
            cost = self.table.of(event).macs
            taken = event.kind == "block" and event.mode not in ("full", "bypass")
            if event.rows.index is None:
                macs += cost
                reused += int(taken)
            else:
                macs[event.rows.index] += cost
                reused[event.rows.index] += int(taken)
        self._calls.append(call)
        self._rows.append((prediction.depth, prediction.called, macs, reused))
        self._branches.append(prediction.branches)
        self._kept.append(kept_bytes // self.batch)

    def close(self) -> LedgerData:
        """The arrays of the chunk."""
        shape = (len(self._rows), self.branches, self.batch)
        depth, called, macs, reused = (
            torch.stack(list(column)).reshape(shape) for column in zip(*self._rows, strict=True)
        )
        return LedgerData(
            depth=depth.to(torch.int16).numpy(),
            called=called.numpy(),
            macs=macs.numpy(),
            reused=reused.numpy(),
            full_macs=np.array([self.full_macs[call.position] for call in self._calls], dtype=np.int64),
            time=np.array([call.time for call in self._calls], dtype=np.float64),
            log_snr=np.array([call.log_snr for call in self._calls], dtype=np.float64),
            branches=np.array(self._branches, dtype=np.int16),
            kept=np.array(self._kept, dtype=np.int64),
        )
