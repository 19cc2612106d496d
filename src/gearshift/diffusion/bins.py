"""A number that depends on the noise level alone and is constant between edges: what a schedule is made of."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.runtime.errors import UsageError

DOMAINS = ("training_index", "log_snr")
INDICES = 1000
"""Equal bins share out this many training indices, 0 (closest to the data) to 999."""
ROUNDING = 1e-9
"""What a level may fall short of an edge by and still be on it: times are float64, and grids round."""


class NoiseBins:
    """Bins of the noise level, numbered from data to noise.

    A level belongs to the bin whose lower edge (the one nearer the data) it has reached, so fractional indices floor
    to their bin. Everything beyond the last edge is in the last bin, and everything nearer the data than the first
    edge in the first one. That includes a negative index, which can only mean "cleaner than any trained level"; the
    published code of ASE would put it into the last bin, but never meets one.

    Args:
        count: number of bins, at least 1.
        domain: ``training_index`` (0..999) or ``log_snr`` (falls towards noise).
        edges: ``count - 1`` inner edges from data to noise: rising over ``training_index``, falling over ``log_snr``.
            None is equal bins of the training index.
        owner: what messages call the object whose bins these are.

    Raises:
        UsageError: an unknown domain, or edges that do not fit.
    """

    def __init__(
        self, count: int, domain: str = "training_index", edges: Sequence[float] | None = None, *, owner: str
    ) -> None:
        if domain not in DOMAINS:
            raise UsageError(f"{owner}: domain {domain!r} is neither 'training_index' nor 'log_snr'")
        if edges is None and domain == "log_snr":
            raise UsageError(f"{owner}: equal bins exist over training_index only; give edges for log_snr")
        self.sign = 1.0 if domain == "training_index" else -1.0
        self.domain = domain
        if edges is None:
            edges = [INDICES * k / count for k in range(1, count)]
        self.keys = [self.sign * edge for edge in edges]
        rises = all(low < high for low, high in zip(self.keys, self.keys[1:], strict=False))
        if len(self.keys) != count - 1 or not rises:
            raise UsageError(
                f"{owner}: {count} bins need {count - 1} edges ordered from data to noise, got {list(edges)} over "
                f"{domain}"
            )

    def of(self, training_index: float, log_snr: float) -> int:
        """Bin of one level, which is given on both axes (of a ``Call``: its own two numbers)."""
        level = training_index if self.domain == "training_index" else log_snr
        return bisect_right(self.keys, self.sign * level + ROUNDING)

    def of_all(self, training_index: Tensor, log_snr: Tensor) -> Tensor:
        """Bins of levels, float64 [n] each (``Process.training_index`` and ``.log_snr`` of times), as int64 [n]."""
        level = training_index if self.domain == "training_index" else log_snr
        keys = torch.tensor(self.keys, dtype=torch.float64, device=level.device)
        return torch.bucketize(self.sign * level.to(torch.float64) + ROUNDING, keys, right=True)
