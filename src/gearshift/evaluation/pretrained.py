"""Networks with released weights as feature extractors, through torch-fidelity: Inception 2015-12-05 and VGG16.

Both resize inside, with the bilinear grid of TensorFlow 1 (no antialiasing, pixel centres at whole numbers), from uint8
on. torchvision's Inception is another network with other weights, and other grids move a FID by more than most methods
differ.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.evaluation.features import FeatureExtractor, fingerprint_of, to_rgb
from gearshift.evaluation.weights import INCEPTION, VGG16, Unavailable, locate, sha256_of

SPATIAL_CHANNELS = 7


class InceptionExtractor(FeatureExtractor):
    """Inception 2015-12-05: taps "features" (2048, pool3), "logits" (1008, without the bias, as the Inception score
    takes them) and "spatial" (2023: the first 7 channels of mixed_6/conv at 17 x 17, as sFID takes them)."""

    batch = 32

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        """`weights` is the released file (see `load_inception`)."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        with _safe_copy(weights) as copy, torch.random.fork_rng(devices=[]):
            self._network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
            ).to(device)
        # What the hook catches belongs to the thread that runs the batch.
        self._caught = threading.local()
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._catch)
        self.dim = 2048
        self.taps = {"features": 2048, "logits": 1008, "spatial": SPATIAL_CHANNELS * 17 * 17}
        self.name = "inception_2015_12_05"
        digest = sha256_of(weights)
        self.protocol = (
            f"inception-2015-12-05|pool3|tf1-bilinear-299|u8|weights={digest[:8]}|torch-fidelity's port; spatial: "
            f"{SPATIAL_CHANNELS} channels of mixed_6/conv, equality with ADM's graph not measured"
        )
        self.fingerprint = fingerprint_of(self.protocol, digest)

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self._network.parameters()).device
        return found

    def _catch(self, module: object, inputs: object, output: Tensor) -> None:
        # Rows, columns, channels: the order in which TensorFlow flattens, and so that of published statistics.
        self._caught.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def _forward(self, images_u8: Tensor) -> Mapping[str, Tensor]:
        features, logits = self._network(to_rgb(images_u8))
        return {"features": features, "logits": logits, "spatial": self._caught.spatial}


class Vgg16Extractor(FeatureExtractor):
    """VGG16 trained on ImageNet: 4096 features of fc2 after relu, as precision and recall take them (Kynkäänniemi et
    al., 1904.06991)."""

    batch = 32

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        """`weights` is torchvision's file (see `load_vgg16`)."""
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

        with _safe_copy(weights) as copy, torch.random.fork_rng(devices=[]):
            self._network: Any = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=copy).to(
                device
            )
        self.dim = 4096
        self.taps = {"features": 4096}
        self.name = "vgg16"
        digest = sha256_of(weights)
        self.protocol = f"vgg16|fc2_relu|tf1-bilinear-224|u8|weights={digest[:8]}|through torch-fidelity"
        self.fingerprint = fingerprint_of(self.protocol, digest)

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self._network.parameters()).device
        return found

    def _forward(self, images_u8: Tensor) -> Mapping[str, Tensor]:
        return {"features": self._network(to_rgb(images_u8))[0]}


def load_inception(
    path: str | Path | None = None, device: torch.device | str = "cpu", metric: str = "inception"
) -> InceptionExtractor | Unavailable:
    """The extractor of FID, or why it is not available here and how to fetch it; `metric` is what is then said to be
    missing. Random weights never bear this name."""
    found = locate(INCEPTION, metric, path)
    return found if isinstance(found, Unavailable) else InceptionExtractor(found, device)


def load_vgg16(
    path: str | Path | None = None, device: torch.device | str = "cpu", metric: str = "vgg16"
) -> Vgg16Extractor | Unavailable:
    """The extractor of precision and recall, or why it is not available here and how to fetch it."""
    found = locate(VGG16, metric, path)
    return found if isinstance(found, Unavailable) else Vgg16Extractor(found, device)


@contextmanager
def _safe_copy(weights: Path) -> Iterator[str]:
    """The library unpickles whatever a file holds, so it is given a copy that came through the safe loader."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(state, copy)
        yield str(copy)
