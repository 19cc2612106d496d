"""Random networks as feature extractors, which need no weights (Naeem et al., 2002.09797: VGG16, random
initialisation, fc2 cut to 64 dimensions).

Random features rank noise and blur and are nearly blind to content: they serve to compare runs with each other and
never to compare with published numbers. One seed is no measure; `build_extractor` gives three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.evaluation.features import FeatureExtractor, fingerprint_of, to_rgb
from gearshift.runtime import keys

RANDOM_DIM = 64
VGG_SIZE = 32


class RandomExtractor(FeatureExtractor):
    """A convolutional network whose weights are a function of the seed (He normal, zero biases) and are never
    trained."""

    def __init__(
        self, kind: str, seed: int, network: nn.Sequential, size: int | None, device: torch.device | str
    ) -> None:
        self.dim = RANDOM_DIM
        self.taps = {"features": RANDOM_DIM}
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
        # Seed and shapes decide the weights; their bytes may differ between mathematical libraries in a last bit.
        shapes = [tuple(value.shape) for value in network.state_dict().values()]
        self.fingerprint = fingerprint_of(self.protocol, repr(shapes))

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    def _forward(self, images_u8: Tensor) -> Mapping[str, Tensor]:
        images = to_rgb(images_u8).float().div(127.5).sub(1.0)
        if self._size is not None and images.shape[-1] != self._size:
            shrinks = images.shape[-1] > self._size
            images = F.interpolate(images, (self._size, self._size), mode="bilinear", antialias=shrinks)
        return {"features": self._network(images)}


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
