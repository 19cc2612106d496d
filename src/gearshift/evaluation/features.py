"""Networks that turn images into feature vectors, behind one interface.

Each extractor carries a name and a protocol string (weights, resizing, layer), because a Fréchet distance means nothing
without them. Here are Inception 2015-12-05 (where its weights are present), random networks that need no weights (Naeem
et al., 2002.09797: VGG16, random initialisation, fc2 cut to 64 dimensions), and the penultimate layer of a classifier
that was trained on the data. Random features rank noise and blur and are nearly blind to content: they serve to
compare runs with each other and never to compare with published numbers.
"""

from __future__ import annotations

import math
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.evaluation.classifier import Classifier
from gearshift.evaluation.weights import Unavailable, WeightFile, exact_fp32, locate, sha256_of
from gearshift.runtime import keys

INCEPTION = WeightFile(
    file_name="weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256_prefix="6726825d",
    variable="GEARSHIFT_INCEPTION",
)
RANDOM_DIM = 64
VGG_SIZE = 32


class FeatureExtractor(ABC):
    """uint8 images [N, C, H, W] -> float32 features [N, dim].

    `name` names metrics (`fd_<name>`), `protocol` says everything that changes the numbers, `batch` is how many images
    go through the network at a time: fixed, because kernels round differently at other sizes.
    """

    name: str
    dim: int
    protocol: str
    batch: int = 128

    def __call__(self, images_u8: Tensor) -> Tensor:
        """Features on the device of the network, in exact float32 whatever the precision outside."""
        device = self.device
        with exact_fp32(device):
            parts = [self._features(part.to(device)) for part in images_u8.split(self.batch)]
        return torch.cat(parts) if parts else torch.empty(0, self.dim, device=device)

    def logits(self, images_u8: Tensor) -> Tensor | None:
        """Class logits [N, classes] of the same network, or None where it has none."""
        return None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network is."""

    @abstractmethod
    def _features(self, images_u8: Tensor) -> Tensor:
        """One batch on the device of the network."""


class RandomExtractor(FeatureExtractor):
    """A convolutional network whose weights are a function of the seed (He normal, zero biases) and are never
    trained."""

    def __init__(
        self, kind: str, seed: int, network: nn.Sequential, size: int | None, device: torch.device | str
    ) -> None:
        self.dim = RANDOM_DIM
        self.kind = kind
        self.seed = seed
        self.name = f"{kind}_{RANDOM_DIM}[s{seed}]"
        self._size = size
        resize = f"bilinear to {size}px (antialiased when shrinking)" if size else "own size"
        self.protocol = (
            f"{kind}, he-normal(seed {seed}), zero bias, {resize}, grey repeated to RGB, last linear before relu"
        )
        _initialise(network, seed)
        self._network = network.eval().requires_grad_(False).to(device)

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    def _features(self, images_u8: Tensor) -> Tensor:
        images = _rgb(images_u8).float().div(127.5).sub(1.0)
        if self._size is not None and images.shape[-1] != self._size:
            shrinks = images.shape[-1] > self._size
            images = F.interpolate(images, (self._size, self._size), mode="bilinear", antialias=shrinks)
        out: Tensor = self._network(images)
        return out


def random_vgg16(seed: int, device: torch.device | str = "cpu") -> RandomExtractor:
    """R64 of Naeem et al. at 32 pixels: the thirteen convolutions and five poolings of VGG16, fc1 of 4096, fc2 of 64.

    At 32 pixels the last pooling leaves one position, so fc1 reads 512 numbers instead of 49 copies of them.
    """
    layers: list[nn.Module] = []
    width = 3
    for stage, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [nn.Conv2d(width, stage, 3, padding=1, device="meta"), nn.ReLU(inplace=True)]
            width = stage
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512, 4096, device="meta"), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(4096, RANDOM_DIM, device="meta"))
    return RandomExtractor("random_vgg16", seed, nn.Sequential(*layers), VGG_SIZE, device)


def random_conv(seed: int, image_size: int, device: torch.device | str = "cpu") -> RandomExtractor:
    """A light relative at the images' own size: a 3x3 convolution of 32, then strided ones of 64, 128, 128, ... until
    at most 2 x 2 positions are left, then one linear layer of 64. A hundredth of the cost of the VGG on small
    images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1, device="meta"), nn.ReLU(inplace=True)]
    width, side = 32, image_size
    while side > 2:
        wider = min(2 * width, 128)
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1, device="meta"), nn.ReLU(inplace=True)]
        width, side = wider, (side + 1) // 2
    layers += [nn.Flatten(), nn.Linear(width * side * side, RANDOM_DIM, device="meta")]
    return RandomExtractor("random_conv", seed, nn.Sequential(*layers), None, device)


class ClassifierExtractor(FeatureExtractor):
    """The penultimate layer of a classifier trained on the data set: sees content, knows nothing beyond this data."""

    def __init__(self, classifier: Classifier, data_name: str) -> None:
        self.classifier = classifier
        self.dim = classifier.feature_dim
        self.name = f"classifier_{data_name}"
        self.protocol = f"penultimate layer of the {classifier.describe()}"

    @property
    def device(self) -> torch.device:
        return self.classifier.device

    def _features(self, images_u8: Tensor) -> Tensor:
        return self.classifier.features(images_u8)

    def logits(self, images_u8: Tensor) -> Tensor:
        return self.classifier.logits(images_u8)


class InceptionExtractor(FeatureExtractor):
    """Inception 2015-12-05 through torch-fidelity: 2048-d pool3, TF1 bilinear resize to 299, logits without the bias.

    The network of published FIDs; torchvision's Inception is another one.
    """

    batch = 32

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        """`weights` is the released file (see `load_inception`)."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The library unpickles whatever the file holds, so it is given a copy that came through the safe loader.
        state = torch.load(weights, map_location="cpu", weights_only=True)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "inception.pth"
            torch.save(state, copy)
            self._network: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy)
            ).to(device)
        self.dim = 2048
        self.name = "inception_2015_12_05"
        self.protocol = f"inception-2015-12-05|pool3|tf1-bilinear-299|u8|weights={sha256_of(weights)[:8]}"

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    def _features(self, images_u8: Tensor) -> Tensor:
        features: Tensor = self._network(_rgb(images_u8))[0]
        return features

    def logits(self, images_u8: Tensor) -> Tensor:
        """Unbiased logits [N, 1008], as the Inception score takes them."""
        with exact_fp32(self.device):
            return torch.cat([self._network(_rgb(part.to(self.device)))[1] for part in images_u8.split(self.batch)])


def load_inception(
    path: str | Path | None = None, device: torch.device | str = "cpu", metric: str = "fid"
) -> InceptionExtractor | Unavailable:
    """The extractor of FID, or why it is not available here and how to fetch it. Random weights never bear this
    name."""
    found = locate(INCEPTION, metric, path)
    return found if isinstance(found, Unavailable) else InceptionExtractor(found, device)


def _rgb(images_u8: Tensor) -> Tensor:
    return images_u8.expand(-1, 3, -1, -1) if images_u8.shape[1] == 1 else images_u8


def _initialise(network: nn.Module, seed: int) -> None:
    """He-normal weights from keyed draws, one key per layer: the same network on every machine and torch version."""
    network.to_empty(device="cpu")
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for number, layer in enumerate(layers):
        weight = layer.weight
        draw = keys.normal(seed, "feature_weights", torch.tensor([number]), 0, tuple(weight.shape))[0]
        with torch.no_grad():
            weight.copy_(draw * math.sqrt(2.0 / math.prod(weight.shape[1:])))
            if layer.bias is not None:
                layer.bias.zero_()
