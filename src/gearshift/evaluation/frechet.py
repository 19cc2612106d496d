"""Fréchet distance between two sets of features, each taken for a Gaussian.

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S2^(1/2) S1 S2^(1/2))^(1/2)

(Dowson and Landau, 1982; Heusel et al., 1706.08500.) The symmetric form needs eigenvalues of symmetric matrices only,
so there is no complex square root that could go wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.evaluation.features import FeatureExtractor
from gearshift.evaluation.metric import USUAL_N, Metric
from gearshift.evaluation.moments import moments, spread
from gearshift.evaluation.reference import Statistics

# Where nothing published is compared with, below this the bias is a large part of the value.
SMALL_N = 10_000


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance, float64 [d, d]; negative eigenvalues (rounding) count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, root2: Tensor | None = None) -> float:
    """The squared distance above between two Gaussians (float64 [d], [d, d]); this is what is reported as FID or FD.

    `root2` is the square root of `cov2` where it is known: of a reference, it serves many times. Where fewer samples
    than dimensions make a covariance singular, a residue of about 1e-6 of the traces remains between equal sets.
    """
    root = square_root(cov2) if root2 is None else root2
    product = root @ cov1 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


class FrechetMetric(Metric):
    """FID, sFID and Fréchet distances on other networks.

    Standardising (random networks) is done on the moments, which an affine map changes exactly, and without the shift,
    to which the distance is blind.
    """

    reference = "moments"

    def __init__(
        self,
        name: str,
        extractors: Sequence[FeatureExtractor],
        key: str,
        minimum: int = 2,
        tap: str = "features",
        usual: int = SMALL_N,
    ) -> None:
        """Below `usual` images the bias is stated; 50,000 for what is compared with published numbers."""
        super().__init__(name, extractors, {key: -1}, minimum, tap)
        self._usual = usual

    def note(self, count: int) -> str | None:
        extractor, tap = self.needs[0]
        dim, key = extractor.taps[tap], self.keys[0]
        if count <= dim:
            few = f"samples in {dim} dimensions (singular covariance)"
        elif count < self._usual:
            few = "samples, biased upwards (bias falls like 1/n)"
        else:
            return None
        beside = f", published ones are at n={USUAL_N}" if self._usual == USUAL_N else ""
        return f"{key}: {count} {few}; compare only values at the same n{beside}"

    def _measure(self, features: Tensor, reference: Statistics | None, device: torch.device) -> Sequence[float]:
        assert reference is not None
        if reference not in self._prepared:
            mean2, cov2 = reference.mean.to(device), reference.covariance.to(device)
            scale = spread(mean2, cov2) if self.standardise else torch.ones_like(mean2)
            cov2 = cov2 / torch.outer(scale, scale)
            self._prepared[reference] = (scale, mean2 / scale, cov2, square_root(cov2))
        scale, mean2, cov2, root2 = self._prepared[reference]
        mean1, cov1 = moments(features, device=device)
        return (frechet_distance(mean1 / scale, cov1 / torch.outer(scale, scale), mean2, cov2, root2),)

    def _formula(self, count: int, reference: Sequence[Statistics]) -> str:
        return ""
