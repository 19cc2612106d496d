"""Extractors in name only, and features without images: metrics never look at a picture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gearshift.evaluation.features import FeatureExtractor, fingerprint_of
from gearshift.evaluation.reference import Statistics

ABOUT = {"data": "noise", "split": "train", "digest": "1234abcd5678"}


class Named(FeatureExtractor):
    """Says what a network says about itself and reads nothing."""

    def __init__(self, name: str = "flat", dim: int = 4, **taps: int) -> None:
        self.name, self.dim, self.protocol = name, dim, f"protocol of {name}"
        self.taps = {"features": dim, **taps}
        self.fingerprint = fingerprint_of(self.protocol, "no weights")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _forward(self, images_u8: Tensor) -> Mapping[str, Tensor]:
        raise AssertionError("a metric asked for images")


def draw(n: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Standard normal float32 [n, dim], scaled and shifted."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


def mixed(n: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated float32 [n, dim]."""
    return draw(n, dim, seed) @ draw(dim, dim, 1000 + seed) * scale + shift


def reference_of(features: Tensor, **options: int) -> Statistics:
    return Statistics.of(features, provenance=ABOUT, **options)
