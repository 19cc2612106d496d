"""Fréchet distance between two sets of features, each described by count, sum and sum of outer products in float64.

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)

(Dowson and Landau, 1982; Heusel et al., 1706.08500.) The symmetric form needs eigenvalues of symmetric matrices only,
so there is no complex square root that could go wrong. Sums merge exactly in the order they are given: chunks of
samples on any number of processes, merged in chunk order, give the same bits.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gearshift.evaluation.classifier import Classifier
from gearshift.evaluation.features import (
    ClassifierExtractor,
    FeatureExtractor,
    load_inception,
    random_conv,
    random_vgg16,
)
from gearshift.evaluation.weights import Unavailable
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write

# Below this the bias of the estimate, which falls like 1/n, is a large part of the value (evaluation at n = 50,000 is
# usual).
SMALL_N = 10_000
METRICS = ("classifier", "random_conv", "random_vgg16", "inception")


class Accumulator:
    """count, sum float64 [d] and sum of outer products float64 [d, d], on the host."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        return self.sum.shape[0]

    def update(self, features: Tensor) -> None:
        """Add features [N, d] of any floating type. Raises ValueError for another width, RunError for non-finite
        ones."""
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features of shape {tuple(features.shape)} do not fit an accumulator of width {self.dim}")
        wide = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(wide).all():
            raise RunError("features hold values that are not finite; check the samples and the extractor's weights")
        self.count += len(wide)
        self.sum += wide.sum(dim=0)
        self.outer += wide.T @ wide

    def merge(self, other: Accumulator) -> None:
        """Add the sums of another shard."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge widths {self.dim} and {other.dim}")
        self.count += other.count
        self.sum += other.sum
        self.outer += other.outer

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean float64 [d] and unbiased covariance float64 [d, d]. Raises UsageError below two samples."""
        if self.count < 2:
            raise UsageError(f"a covariance needs at least 2 samples, got {self.count}; raise the number of samples")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, (covariance + covariance.T) / 2

    def save(self, path: str | Path, protocol: str) -> None:
        """Write an .npz with the sums, the count and the protocol string, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = np.frombuffer(json.dumps({"count": self.count, "protocol": protocol}).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, sum=self.sum.numpy(), outer=self.outer.numpy(), meta=meta)
        atomic_write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path, protocol: str | None = None) -> Accumulator:
        """Read what `save` wrote. Raises RunError when the file is broken or was made under another protocol."""
        try:
            # Opened here, because NumPy leaves a broken file open.
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as stored:
                meta = json.loads(stored["meta"].tobytes())
                found = cls(len(stored["sum"]))
                found.count = int(meta["count"])
                found.sum = torch.from_numpy(stored["sum"])
                found.outer = torch.from_numpy(stored["outer"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(
                f"{path} is not a file of reference statistics that can be read ({error}); make it again"
            ) from error
        if protocol is not None and meta["protocol"] != protocol:
            raise RunError(f"{path} was made under '{meta['protocol']}', this run needs '{protocol}'; make it again")
        return found


def merged(shards: Iterable[Accumulator]) -> Accumulator:
    """The sum of at least one shard, added in the order given."""
    parts = list(shards)
    total = Accumulator(parts[0].dim)
    for part in parts:
        total.merge(part)
    return total


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The squared distance above between two Gaussians (float64 [d], [d, d]); this is what is reported as FID or FD.

    Where fewer samples than dimensions make a covariance singular, a residue of about 1e-6 of the traces remains
    between equal sets.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ cov2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return float(distance)


def sample_warning(metric: str, count: int, dim: int) -> str | None:
    """One line to print beside the value when `count` samples are few, or None when they are enough."""
    if count <= dim:
        return f"{metric}: {count} samples in {dim} dimensions (singular covariance); compare only values at the same n"
    if count < SMALL_N:
        return f"{metric}: {count} samples, biased upwards (bias falls like 1/n); compare only values at the same n"
    return None


class FrechetMetric:
    """A named Fréchet distance: one extractor, or the mean of the distances under several that differ in their seed
    only.

    `standardise` divides each feature by its spread in the reference (random features differ in scale by chance). It is
    applied to the moments, which an affine map changes exactly, so the sums stay raw and one reference serves both.
    """

    def __init__(self, name: str, extractors: Sequence[FeatureExtractor], standardise: bool) -> None:
        self.name = name
        self.extractors = tuple(extractors)
        self.standardise = standardise

    @property
    def dim(self) -> int:
        return self.extractors[0].dim

    def new(self) -> tuple[Accumulator, ...]:
        """Empty sums, one per extractor."""
        return tuple(Accumulator(extractor.dim) for extractor in self.extractors)

    def update(self, sums: Sequence[Accumulator], images_u8: Tensor) -> None:
        """Add images uint8 [N, C, H, W] to `sums`."""
        for total, extractor in zip(sums, self.extractors, strict=True):
            total.update(extractor(images_u8))

    def of(self, images_u8: Tensor) -> tuple[Accumulator, ...]:
        """The sums of one set of images."""
        sums = self.new()
        self.update(sums, images_u8)
        return sums

    def distance(self, samples: Sequence[Accumulator], reference: Sequence[Accumulator]) -> float:
        """The distance of the samples to the reference, averaged over extractors. Not symmetric when standardised."""
        total = 0.0
        for ours, theirs in zip(samples, reference, strict=True):
            mean1, cov1 = ours.moments()
            mean2, cov2 = theirs.moments()
            if self.standardise:
                spread = cov2.diagonal().sqrt()
                # A feature that is constant over the reference has no scale of its own and keeps its unit.
                scale = torch.where(spread > 0, spread, torch.ones_like(spread))
                both = torch.outer(scale, scale)
                mean1, mean2, cov1, cov2 = mean1 / scale, mean2 / scale, cov1 / both, cov2 / both
            total += frechet_distance(mean1, cov1, mean2, cov2)
        return total / len(self.extractors)

    def protocol(self, count: int, reference: str, reference_count: int) -> str:
        """Everything that changes the number, in one string: extractor, standardisation, rounding, counts,
        reference."""
        seeds = f"mean over {len(self.extractors)} seeds|" if len(self.extractors) > 1 else ""
        scaled = "standardised by the reference|" if self.standardise else ""
        return (
            f"{self.name}[{self.extractors[0].protocol}|{seeds}{scaled}d={self.dim}|u8-round|n={count}"
            f"|ref={reference}-{reference_count}]"
        )


def build_metrics(
    names: Sequence[str],
    *,
    image_size: int,
    data_name: str,
    classifier: Classifier | None = None,
    device: torch.device | str = "cpu",
    seeds: Sequence[int] = (0, 1, 2),
    inception: str | Path | None = None,
) -> tuple[list[FrechetMetric], list[Unavailable]]:
    """The metrics of `names` (see METRICS) that can be computed here, and those that cannot, with reasons.

    `inception` is a path to its weights. Raises UsageError for an unknown name or fewer than three random seeds.
    """
    metrics: list[FrechetMetric] = []
    missing: list[Unavailable] = []
    for name in names:
        if name == "classifier":
            if classifier is None:
                reason = f"{data_name} has no classes to train a classifier on"
                missing.append(Unavailable(f"fd_classifier_{data_name}", reason, "data with class labels"))
            else:
                extractor = ClassifierExtractor(classifier, data_name)
                metrics.append(FrechetMetric(f"fd_{extractor.name}", [extractor], standardise=False))
        elif name in ("random_conv", "random_vgg16"):
            if len(seeds) < 3:
                raise UsageError(
                    f"{name} with seeds {list(seeds)}: one random network is no measure; give at least 3 seeds"
                )
            vgg = name == "random_vgg16"
            nets = [random_vgg16(seed, device) if vgg else random_conv(seed, image_size, device) for seed in seeds]
            span = f"s{seeds[0]}-s{seeds[-1]}" if _consecutive(seeds) else ",".join(f"s{seed}" for seed in seeds)
            metrics.append(FrechetMetric(f"fd_{name}_{nets[0].dim}[{span}]", nets, standardise=True))
        elif name == "inception":
            found = load_inception(inception, device, metric="fid")
            if isinstance(found, Unavailable):
                missing.append(found)
            else:
                metrics.append(FrechetMetric("fid", [found], standardise=False))
        else:
            raise UsageError(f"unknown distribution metric '{name}'; known are {', '.join(METRICS)}")
    return metrics, missing


def _consecutive(seeds: Sequence[int]) -> bool:
    return list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
