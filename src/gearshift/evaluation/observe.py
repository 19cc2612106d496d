"""What is kept of a chunk of images: features, labels as a classifier sees them, distances to the full computation.

Everything is per image, so that any cut of the index range into chunks, processes and repeats can be put together
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gearshift.evaluation.features import FeatureExtractor
from gearshift.evaluation.metrics import Metric
from gearshift.evaluation.paired import Lpips, image_errors, ssim

Array = NDArray[Any]


def feature_name(extractor: FeatureExtractor, tap: str) -> str:
    """The array that holds a tap of an extractor."""
    return f"features/{extractor.fingerprint}/{tap}"


@dataclass(frozen=True)
class Observer:
    """What is looked at in every image.

    Attributes:
        taps: by fingerprint, an extractor and what is read from it in one pass.
        classifier: fingerprint of the extractor whose logits give predicted labels, or None.
        lpips: perceptual distances by their names in the results.
    """

    taps: Mapping[str, tuple[FeatureExtractor, tuple[str, ...]]]
    classifier: str | None
    lpips: Mapping[str, Lpips]

    @classmethod
    def of(cls, metrics: Sequence[Metric], classifier: FeatureExtractor | None, lpips: Mapping[str, Lpips]) -> Observer:
        """What the metrics need; `classifier` gives predicted labels. Extractors that several share run once."""
        wanted: dict[str, tuple[FeatureExtractor, dict[str, None]]] = {}
        needs = [need for metric in metrics for need in metric.needs]
        for extractor, tap in [*needs, *([(classifier, "logits")] if classifier is not None else [])]:
            wanted.setdefault(extractor.fingerprint, (extractor, {}))[1][tap] = None
        taps = {key: (extractor, tuple(names)) for key, (extractor, names) in wanted.items()}
        return cls(taps, None if classifier is None else classifier.fingerprint, lpips)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides what is observed."""
        parts = [f"{key}:{','.join(names)}" for key, (_, names) in sorted(self.taps.items())]
        parts += [str(self.classifier), *(f"{name}:{net.protocol}" for name, net in sorted(self.lpips.items()))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def names(self) -> tuple[str, ...]:
        """The arrays every image leaves."""
        kept = [
            feature_name(extractor, tap)
            for key, (extractor, names) in self.taps.items()
            for tap in names
            if (key, tap) != (self.classifier, "logits")
        ]
        predicted = () if self.classifier is None else ("predicted",)
        return (*kept, *predicted, "squared_error", "ssim", *self.lpips)

    def __call__(self, images_u8: Tensor, reference_u8: Tensor) -> dict[str, Array]:
        """Arrays of the images uint8 [N, C, H, W], beside those of the full computation from the same noise.

        The full computation itself is handed in as its own reference.
        """
        arrays: dict[str, Array] = {}
        for key, (extractor, names) in self.taps.items():
            read = extractor.read(images_u8, names)
            if key == self.classifier:
                arrays["predicted"] = read.pop("logits").argmax(dim=1).cpu().numpy()
            for tap, values in read.items():
                arrays[feature_name(extractor, tap)] = values.to(torch.float32).cpu().numpy()
        if reference_u8 is images_u8:
            none = np.zeros(len(images_u8))
            return arrays | {"squared_error": none, "ssim": none + 1.0} | dict.fromkeys(self.lpips, none)
        arrays["squared_error"] = image_errors(images_u8, reference_u8).cpu().numpy()
        arrays["ssim"] = ssim(images_u8, reference_u8).cpu().numpy()
        for name, network in self.lpips.items():
            arrays[name] = network(images_u8, reference_u8).cpu().numpy().astype(np.float64)
        return arrays
