"""The optimal denoiser of a finite data set: its posterior mean in closed form, streamed over data and queries.

For x_t = alpha y + alpha sigma eps with y uniform over the data y_1..y_N and z = x_t / alpha = y + sigma eps,

    y*(z) = sum_i w_i y_i,   w = softmax_i(-|z - y_i|^2 / (2 sigma^2)),   eps* = (z - y*) / sigma

(arXiv 2312.09181, Proposition 1). `sigma` is the noise-to-signal ratio everywhere here, so one function serves every
process. Data go by in blocks under a running maximum, sum and weighted sum, as in fused attention: nothing of size
queries x data is ever kept, and blocks are made from grey levels as they are needed.

Digits: the square is expanded, and |z|^2 cancels in the softmax. The data are centred first, which takes the common
part out of the products. Products are float32 by default (relative error about 1e-6 of |z||y|, which at small sigma is
much less than the gap to the second nearest image); norms, maximum, exponentials, sums and the mean are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.stages.parallel import in_parts
from gearshift.stages.rows import Rows

# Queries worked on together and rows of data at a time, at most, and numbers in either: about 150 MB per thread. They
# decide the last bits, so they follow the data alone and not the machine.
_QUERIES, _ROWS, _QUERY_NUMBERS, _ROW_NUMBERS = 512, 2048, 512 * 3072, 2048 * 3072
# Blocks that are prepared in one go, and rows among them that are squared together.
_GROUP, _FEW = 8, 128
# Weights below exp(-45) = 3e-20 of the greatest are left out: all 10^5 of them together are below float64's rounding.
_NEGLIGIBLE = 45.0


@dataclass(frozen=True)
class Posterior:
    """What is known of the image behind each query.

    Attributes:
        mean: posterior mean, float64, in the shape of the queries.
        max_weight: the greatest weight, float64 [B] in (0, 1]; 1 where one image explains the query.
        entropy: of the weights, in nats, float64 [B] in [0, log N].
    """

    mean: Tensor
    max_weight: Tensor
    entropy: Tensor


class OptimalDenoiser:
    """The posterior mean over `rows`.

    Args:
        rows: the data; read once here, and again for every chunk of queries.
        device: where the products are made.
        dtype: of the products, float32 or float64.
    """

    def __init__(self, rows: Rows, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.rows, self.device, self.dtype = rows, torch.device(device), dtype
        self.chunk_size = max(1, min(_QUERIES, _QUERY_NUMBERS // rows.width))
        """Queries that are worked on together."""
        size = max(1, min(_ROWS, _ROW_NUMBERS // rows.width))
        blocks = [(start, min(start + size, rows.count)) for start in range(0, rows.count, size)]
        host = torch.device("cpu")
        groups = [blocks[first : first + _GROUP] for first in range(0, len(blocks), _GROUP)]
        sums = in_parts(self._sum, groups, host)
        # Rounded to what is subtracted from the data, so that adding it again is exact.
        self._centre = (torch.stack(sums).sum(0) / rows.count).to(dtype)
        self.mean = self._centre.double()
        """Mean of the data, float64 [d] on the host: what the posterior mean is at infinite noise."""
        self._blocks = blocks
        self._centre = self._centre.to(self.device)
        self._half_norms = torch.cat(in_parts(self._norms, groups, self.device)).mul_(0.5)

    def posterior(self, z: Tensor, sigma: Tensor | float) -> Posterior:
        """What is known at z [B, ...] = y + sigma eps; `sigma` [B] or a number, positive and finite.

        Raises:
            ValueError: a shape that is not that of the data, or a sigma that is not positive and finite.
        """
        flat = z.flatten(1)
        if flat.shape[1] != self.rows.width:
            raise ValueError(f"queries have {flat.shape[1]} numbers and the data {self.rows.width}")
        sigmas = torch.as_tensor(sigma, dtype=torch.float64).to(self.device).expand(len(z))
        if not bool((sigmas.isfinite() & (sigmas > 0)).all()):
            raise ValueError("sigma must be positive and finite")
        size = self.chunk_size
        spans = [slice(start, start + size) for start in range(0, len(z), size)]
        found = in_parts(lambda span: self.chunk(flat[span].to(self.device), sigmas[span]), spans, self.device)
        return Posterior(
            torch.cat([part.mean for part in found]).reshape(z.shape),
            torch.cat([part.max_weight for part in found]),
            torch.cat([part.entropy for part in found]),
        )

    def eps(self, z: Tensor, sigma: Tensor | float) -> Tensor:
        """The optimal noise prediction at z [B, ...], float64."""
        return (z.to(self.device).double() - self.posterior(z, sigma).mean) / self._column(sigma, z)

    def score(self, z: Tensor, sigma: Tensor | float) -> Tensor:
        """Gradient of the log-density of z [B, ...] = y + sigma eps, float64: (y* - z) / sigma^2 (Tweedie)."""
        return (self.posterior(z, sigma).mean - z.to(self.device).double()) / self._column(sigma, z) ** 2

    def eps_at(self, process: Process, x: Tensor, t: Tensor | float) -> Tensor:
        """The optimal noise prediction at x [B, ...] = alpha(t) y + sigma(t) eps of a process; `t` [B] or a number."""
        ratio = torch.exp(-0.5 * process.log_snr(t))
        z = x.to(self.device).double() / self._column(process.alpha(t), x)
        return self.eps(z, ratio)

    def chunk(self, z: Tensor, sigma: Tensor) -> Posterior:
        """`posterior` of one chunk, z [q, d] and sigma float64 [q] on the device, without threads and without checks.
        Within `in_parts` only, which says how products are made."""
        queries = (z.double() - self._centre.double()).to(self.dtype)
        precision = sigma.double().square().reciprocal()
        top = torch.full_like(precision, -math.inf)
        total, slope = torch.zeros_like(top), torch.zeros_like(top)
        weighted = torch.zeros(queries.shape, dtype=torch.float64, device=z.device)
        buffer = self._buffer()
        for start, stop in self._blocks:
            data = self._read(buffer, start, stop)
            logits = (queries @ data.T).double().sub_(self._half_norms[start:stop]).mul_(precision[:, None])
            best = logits.amax(1)
            raised = torch.maximum(top, best)
            # At little noise a block holds nothing near most of the queries.
            rows = (best > raised - _NEGLIGIBLE).nonzero().flatten()
            if len(rows) == 0:
                continue
            behind = logits[rows].sub_(raised[rows, None])
            near = behind > -_NEGLIGIBLE
            weights = torch.where(near, behind.exp(), 0.0)
            columns = near.any(0).nonzero().flatten()
            if 2 * len(columns) < stop - start:
                product = weights[:, columns].to(self.dtype) @ data[columns]
            else:
                product = weights.to(self.dtype) @ data
            kept = torch.exp(top[rows] - raised[rows])  # 0 at first
            rise = torch.where(total[rows] > 0, raised[rows] - top[rows], 0.0)
            slope[rows] = kept * (slope[rows] - rise * total[rows]) + torch.where(near, weights * behind, 0.0).sum(1)
            total[rows] = kept * total[rows] + weights.sum(1)
            weighted[rows] = kept[:, None] * weighted[rows] + product.double()
            top = raised
        mean = weighted.div_(total[:, None]).add_(self._centre.double())
        return Posterior(mean, total.reciprocal(), (total.log() - slope / total).clamp_(min=0.0))

    def _buffer(self) -> Tensor:
        """For one block of data, on the device."""
        start, stop = self._blocks[0]
        return torch.empty(stop - start, self.rows.width, dtype=self.dtype, device=self.device)

    def _read(self, buffer: Tensor, start: int, stop: int) -> Tensor:
        """Centred rows start..stop-1, in the buffer."""
        return self.rows.fill(buffer[: stop - start], start).sub_(self._centre)

    def _sum(self, blocks: Sequence[tuple[int, int]]) -> Tensor:
        """Sum of the rows of some blocks, float64 [d] on the host."""
        total = torch.zeros(self.rows.width, dtype=torch.float64)
        buffer = torch.empty(blocks[0][1] - blocks[0][0], self.rows.width, dtype=self.dtype)
        for start, stop in blocks:
            total += self.rows.fill(buffer[: stop - start], start).sum(0, dtype=torch.float64)
        return total

    def _norms(self, blocks: Sequence[tuple[int, int]]) -> Tensor:
        """Squared norms of the centred rows of some blocks, float64, on the device."""
        norms = torch.empty(blocks[-1][1] - blocks[0][0], dtype=torch.float64, device=self.device)
        buffer = self._buffer()
        for start, stop in blocks:
            data = self._read(buffer, start, stop)
            for first in range(start, stop, _FEW):  # few at a time in float64
                last = min(first + _FEW, stop)
                norms[first - blocks[0][0] : last - blocks[0][0]] = (
                    data[first - start : last - start].double().square_().sum(1)
                )
        return norms

    def _column(self, value: Tensor | float, like: Tensor) -> Tensor:
        column = torch.as_tensor(value, dtype=torch.float64).to(self.device)
        return column.reshape(-1, *[1] * (like.ndim - 1)) if column.ndim else column
