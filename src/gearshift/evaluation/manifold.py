"""Precision and recall, density and coverage: does one set lie within balls around the other?

A point's ball reaches to its k-th nearest neighbour in its own set (k + 1 smallest distances, the point itself being
the first).

    precision  part of the samples within a ball of the reference      k = 3, distance <= radius (1904.06991)
    recall     part of the reference within a ball of the samples      k = 3, <=
    density    reference balls around a sample, over k, on average     k = 5, distance <  radius (2002.09797)
    coverage   part of the reference balls that hold a sample          k = 5, <

The two protocols are those of torch-fidelity and of the authors' prdc; values of one k do not compare with another's.
For equal distributions the expected density is 1 and the expected coverage 1 - prod_{i=1..k} (m - i) / (n + m - i).

Distances are squared, computed in float64 and compared in float32, and made a tile at a time: no matrix of all pairs
exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gearshift.evaluation.features import FeatureExtractor
from gearshift.evaluation.metric import Metric
from gearshift.evaluation.reference import Statistics
from gearshift.runtime.errors import UsageError

PRECISION_RECALL_K = 3
DENSITY_COVERAGE_K = 5
# 64 MiB of float64.
_TILE = (1024, 8192)
# Squared distances below this part of the squared norms are what cancellation leaves of zero: a copy is at distance 0.
_ZERO = 1e-13


def radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of every point [n, d] to its k-th nearest other, float32 [n]. Raises UsageError for n <= k."""
    if len(points) <= k:
        raise UsageError(f"{len(points)} points have no {k}-th nearest neighbours; raise the number of images")
    out = torch.empty(len(points), dtype=torch.float32, device=points.device)
    for rows, tiles in _rows(points, points):
        nearest = torch.empty(len(points[rows]), 0, dtype=torch.float32, device=points.device)
        for _, squared in tiles:
            least = squared.topk(min(k + 1, squared.shape[1]), largest=False).values
            nearest = torch.cat([nearest, least], dim=1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
        out[rows] = nearest.amax(dim=1)
    return out


def precision_recall(
    samples: Tensor, reference: Tensor, k: int = PRECISION_RECALL_K, reference_radii: Tensor | None = None
) -> tuple[float, float]:
    """Precision and recall, in [0, 1], of samples [n, d] against reference [m, d].

    `reference_radii` are `radii(reference, k)` where they are known. Raises UsageError unless n, m > k.
    """
    theirs = radii(reference, k) if reference_radii is None else reference_radii
    ours = radii(samples, k)
    realistic = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reached = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, tiles in _rows(reference, samples):
        for columns, squared in tiles:
            realistic[columns] |= (squared <= theirs[rows, None]).any(dim=0)
            reached[rows] |= (squared <= ours[None, columns]).any(dim=1)
    return _share(realistic), _share(reached)


def density_coverage(
    samples: Tensor, reference: Tensor, k: int = DENSITY_COVERAGE_K, reference_radii: Tensor | None = None
) -> tuple[float, float]:
    """Density, >= 0, and coverage, in [0, 1], of samples [n, d] against reference [m, d].

    `reference_radii` are `radii(reference, k)` where they are known. Raises UsageError unless m > k and n > 0.
    """
    if len(samples) == 0:
        raise UsageError("density and coverage of no images; raise the number of images")
    theirs = radii(reference, k) if reference_radii is None else reference_radii
    balls = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, tiles in _rows(reference, samples):
        for _, squared in tiles:
            within = squared < theirs[rows, None]
            balls += int(within.sum())
            covered[rows] |= within.any(dim=1)
    return balls / (k * len(samples)), _share(covered)


def _rows(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Iterator[tuple[slice, Tensor]]]]:
    """Squared distances of x [n, d] to y [m, d] by tiles: slices of x, and for each the slices of y with a tile."""
    # Distances do not see a shift, but |x|^2 + |y|^2 - 2 x.y loses digits far from the origin.
    centre = x.mean(dim=0)
    x, y = x - centre, y - centre
    x2, y2 = x.square().sum(dim=1), y.square().sum(dim=1)

    def tiles(rows: slice) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(y), _TILE[1]):
            columns = slice(start, start + _TILE[1])
            norms = x2[rows, None] + y2[None, columns]
            squared = torch.addmm(norms, x[rows], y[columns].T, alpha=-2)
            # A product rounds differently in another tile; to float32 one distance is one number wherever it is made,
            # and a radius equals the distance it was taken from.
            yield columns, squared.masked_fill_(squared <= norms.mul_(_ZERO), 0.0).float()

    for start in range(0, len(x), _TILE[0]):
        rows = slice(start, start + _TILE[0])
        yield rows, tiles(rows)


def _share(marked: Tensor) -> float:
    return int(marked.sum()) / len(marked)


class ManifoldMetric(Metric):
    """What the two pairs of numbers have in common: k nearest neighbours among the kept features of the reference."""

    reference = "features"
    k: int
    compare: str

    def __init__(self, name: str, extractors: Sequence[FeatureExtractor], keys: Mapping[str, int]) -> None:
        super().__init__(name, extractors, keys, self.k + 2, "features")

    def refusal(self, reference: Sequence[Statistics]) -> str | None:
        for statistics in reference:
            if statistics.features is not None and len(statistics.features) <= self.k:
                return f"{self.name} needs more than {self.k} features of the reference, it has {statistics.describe()}"
        return super().refusal(reference)

    def _formula(self, count: int, reference: Sequence[Statistics]) -> str:
        return f"k={self.k}, distance {self.compare} radius"

    def _radii(self, statistics: Statistics, features: Tensor) -> Tensor:
        if statistics not in self._prepared:
            self._prepared[statistics] = radii(features, self.k)
        found: Tensor = self._prepared[statistics]
        return found


class PrecisionRecall(ManifoldMetric):
    """`precision_<group>` and `recall_<group>`."""

    k = PRECISION_RECALL_K
    compare = "<="

    def __init__(self, name: str, extractors: Sequence[FeatureExtractor], group: str) -> None:
        super().__init__(name, extractors, {f"precision_{group}": 1, f"recall_{group}": 1})

    def _measure(self, features: Tensor, reference: Statistics | None, device: torch.device) -> Sequence[float]:
        assert reference is not None
        samples, theirs = self._pair(features, reference, device)
        return precision_recall(samples, theirs, self.k, self._radii(reference, theirs))


class DensityCoverage(ManifoldMetric):
    """`density_<group>` and `coverage_<group>`."""

    k = DENSITY_COVERAGE_K
    compare = "<"

    def __init__(self, name: str, extractors: Sequence[FeatureExtractor], group: str) -> None:
        super().__init__(name, extractors, {f"density_{group}": 1, f"coverage_{group}": 1})

    def _measure(self, features: Tensor, reference: Statistics | None, device: torch.device) -> Sequence[float]:
        assert reference is not None
        samples, theirs = self._pair(features, reference, device)
        return density_coverage(samples, theirs, self.k, self._radii(reference, theirs))
