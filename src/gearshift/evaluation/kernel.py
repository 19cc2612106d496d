"""Kernel distance (KID on Inception): unbiased squared maximum mean discrepancy under k(x, y) = (x.y / d + 1)^3.

    sum_{i != j} k(x_i, x_j) / n(n-1) + sum_{i != j} k(y_i, y_j) / m(m-1) - 2 sum_{i, j} k(x_i, y_j) / nm

(Bińkowski et al., 1801.01401.) Its expectation does not depend on the number of samples, and it may fall below zero.
By convention it is the mean over 100 subsets of 1000. Where one side has no more than that, subsets would repeat that
side: one estimate over everything has the same expectation and less variance, and is taken instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.evaluation.features import FeatureExtractor
from gearshift.evaluation.metric import Metric, kept_features
from gearshift.evaluation.reference import Statistics
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 0
# 64 MiB of float64.
_TILE = (1024, 8192)


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> float:
    """The mean of the estimate above over `subsets` pairs of subsets of x [n, d] and y [m, d], both float64.

    Subsets are drawn without replacement and keyed by `seed`, so they are the same in every process and whatever else
    draws random numbers. With n or m <= `size` it is one estimate over all of both. Raises UsageError below two rows.
    """
    if min(len(x), len(y)) < 2:
        raise UsageError(
            f"a kernel distance needs at least 2 samples on both sides, got {len(x)} and {len(y)}; raise the number of "
            "images"
        )
    if min(len(x), len(y)) <= size:
        return float(_estimate(x, y))
    values = []
    for subset in range(subsets):
        ours, theirs = (
            values_of[keys.permutation(seed, f"kernel_subsets/{side}", subset, len(values_of))[:size].to(x.device)]
            for side, values_of in (("samples", x), ("reference", y))
        )
        values.append(_estimate(ours, theirs))
    return float(torch.stack(values).mean())


def _estimate(x: Tensor, y: Tensor) -> Tensor:
    n, m = len(x), len(y)
    within = (_sum(x, x) - _diagonal(x)) / (n * (n - 1)) + (_sum(y, y) - _diagonal(y)) / (m * (m - 1))
    return within - 2 * _sum(x, y) / (n * m)


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """Of the kernel over all pairs, a tile at a time."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in x.split(_TILE[0]):
        for columns in y.split(_TILE[1]):
            total += (rows @ columns.T).div_(x.shape[1]).add_(1).pow_(3).sum()
    return total


def _diagonal(x: Tensor) -> Tensor:
    return x.square().sum(dim=1).div_(x.shape[1]).add_(1).pow_(3).sum()


class KernelMetric(Metric):
    """KID, and kernel distances (KD) on other networks."""

    reference = "features"

    def __init__(self, name: str, extractors: Sequence[FeatureExtractor], key: str, minimum: int = 2) -> None:
        super().__init__(name, extractors, {key: -1}, minimum, "features")

    def _measure(self, features: Tensor, reference: Statistics | None, device: torch.device) -> Sequence[float]:
        assert reference is not None
        return (kernel_distance(*self._pair(features, reference, device)),)

    def _formula(self, count: int, reference: Sequence[Statistics]) -> str:
        subsets = f"{SUBSETS} subsets of {SUBSET_SIZE}, seed {SEED}"
        whole = min(count, kept_features(reference[0])) <= SUBSET_SIZE
        return f"unbiased mmd^2, (x.y/d+1)^3, {'all of both sets' if whole else subsets}"
