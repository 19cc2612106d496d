"""Networks that turn images into feature vectors, behind one interface, and how they are named.

Each extractor carries a name and a protocol string (weights, resizing, layer), because a Fréchet distance means nothing
without them, and a fingerprint, so that numbers of different networks are never pooled.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.evaluation.batches import in_batches
from gearshift.evaluation.classifier import Classifier
from gearshift.evaluation.weights import Unavailable
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError

EXTRACTORS: Mapping[str, str] = {
    "classifier": "penultimate layer of a small classifier that is trained on the data",
    "random_conv": "a light random convolutional network at the images' own size, three seeds",
    "random_vgg16": "VGG16 with random weights at 32 pixels, 64 features, three seeds",
    "inception": "Inception 2015-12-05 (2048 features of pool3), the network of published FIDs",
    "vgg16": "VGG16 trained on ImageNet (4096 features of fc2 after relu), for precision and recall",
}
SEEDS = (0, 1, 2)


class FeatureExtractor(ABC):
    """A network that reads uint8 images.

    Attributes:
        name: in the names of metrics (`fd_<name>`).
        dim: width of the tap "features".
        protocol: everything that changes the numbers, in one string.
        batch: images per pass through the network: fixed, because kernels round differently at other sizes.
        taps: what it gives per image, by name, with widths; "features" is always there.
        fingerprint: 16 hex digits over protocol and weights, equal only where numbers may be pooled.
    """

    name: str
    dim: int
    protocol: str
    batch: int = 128
    taps: Mapping[str, int]
    fingerprint: str

    def read(self, images_u8: Tensor, taps: Collection[str] = ("features",)) -> dict[str, Tensor]:
        """uint8 [N, C, H, W] with one or three channels -> for each tap float32 [N, taps[tap]] on the CPU.

        One pass through the network per batch, whatever the taps, in exact float32 whatever the precision outside; on
        the CPU the bits do not depend on the number of threads. Raises ValueError for other images or unknown taps.
        """
        unknown = sorted(set(taps) - set(self.taps))
        if unknown:
            raise ValueError(f"{self.name} has no tap {', '.join(unknown)}; there are {', '.join(self.taps)}")
        if images_u8.dtype != torch.uint8 or images_u8.dim() != 4 or images_u8.shape[1] not in (1, 3):
            raise ValueError(
                f"{self.name} reads uint8 [N, 1 or 3, H, W], got {images_u8.dtype} {tuple(images_u8.shape)}"
            )

        def one(part: Tensor) -> list[Tensor]:
            found = self._forward(part)
            return [found[tap] for tap in taps]

        parts = in_batches(one, [images_u8], self.batch, self.device)
        if not parts:
            return {tap: torch.empty(0, self.taps[tap]) for tap in taps}
        return {tap: torch.cat(pieces).cpu() for tap, pieces in zip(taps, zip(*parts, strict=True), strict=True)}

    def __call__(self, images_u8: Tensor) -> Tensor:
        """The tap "features" alone: float32 [N, dim] on the CPU."""
        return self.read(images_u8)["features"]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network is."""

    @abstractmethod
    def _forward(self, images_u8: Tensor) -> Mapping[str, Tensor]:
        """One batch on the device of the network: every tap, float32 [N, taps[tap]]. Several threads call it at
        once."""


class ClassifierExtractor(FeatureExtractor):
    """The penultimate layer of a classifier trained on the data set, and its logits: sees content, knows nothing beyond
    this data."""

    def __init__(self, classifier: Classifier, data_name: str) -> None:
        self.classifier = classifier
        self.dim = classifier.feature_dim
        self.batch = classifier.batch
        self.taps = {"features": classifier.feature_dim, "logits": classifier.num_classes}
        self.name = f"classifier_{data_name}"
        self.protocol = f"penultimate layer of the {classifier.describe()}"
        self.fingerprint = fingerprint_of(self.protocol, classifier.digest())

    @property
    def device(self) -> torch.device:
        return self.classifier.device

    def _forward(self, images_u8: Tensor) -> Mapping[str, Tensor]:
        features, logits = self.classifier.outputs(images_u8)
        return {"features": features, "logits": logits}


def build_extractor(
    name: str | Mapping[str, Any],
    *,
    image_size: int,
    data_name: str,
    classifier: Classifier | None = None,
    device: torch.device | str = "cpu",
    weights: Mapping[str, str | Path | None] | None = None,
) -> list[FeatureExtractor] | Unavailable:
    """The extractors of a name of `EXTRACTORS`: one, or three seeds of a random network; or why there are none here.

    `name` may also be a node whose `_target_` is a FeatureExtractor with a `Config` dataclass beside it; it is built as
    `target(Config(...), image_size=..., device=...)`. `weights` names files by "inception" and "vgg16". Raises
    UsageError for an unknown name or a node of another kind.
    """
    # They import the interface from here.
    from gearshift.evaluation.pretrained import load_inception, load_vgg16
    from gearshift.evaluation.random_nets import random_conv, random_vgg16

    if not isinstance(name, str):
        target = config.locate(str(name.get(config.TARGET)), "extractor")
        if not issubclass(target, FeatureExtractor):
            raise UsageError(f"extractor names {target.__name__}, which is not a FeatureExtractor")
        return [config.build(name, image_size=image_size, device=torch.device(device))]
    if name == "classifier":
        if classifier is None:
            reason = f"{data_name} has no classes to train a classifier on"
            return Unavailable(f"classifier_{data_name}", reason, "")
        return [ClassifierExtractor(classifier, data_name)]
    if name == "random_conv":
        return [random_conv(seed, image_size, device) for seed in SEEDS]
    if name == "random_vgg16":
        return [random_vgg16(seed, device) for seed in SEEDS]
    if name in ("inception", "vgg16"):
        found = (load_inception if name == "inception" else load_vgg16)((weights or {}).get(name), device)
        return found if isinstance(found, Unavailable) else [found]
    raise UsageError(f"there is no extractor {name!r}; there are {', '.join(EXTRACTORS)}")


def fingerprint_of(protocol: str, weights: str) -> str:
    """16 hex digits over a protocol string and whatever stands for the weights."""
    return hashlib.sha256(f"{protocol}\n{weights}".encode()).hexdigest()[:16]


def to_rgb(images_u8: Tensor) -> Tensor:
    """Grey repeated to three channels: [N, 1 or 3, H, W] -> [N, 3, H, W]."""
    return images_u8.expand(-1, 3, -1, -1)
