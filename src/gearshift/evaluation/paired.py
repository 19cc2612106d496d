"""How close two sets of images are, image by image: samples of a cheaper run against the full run from the same noise.

All of it is measured on grey levels after rounding, which is what a viewer gets, and given per image; `reduce_paired`
makes the numbers. PSNR says whether it pools the error over all images (global) or averages the images' own values (per
image); the two differ by several dB on the same pair. Images that are equal bit for bit have no PSNR: their share is
reported instead of a capped number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gearshift.data.pixels import to_pm1
from gearshift.evaluation.batches import in_batches
from gearshift.evaluation.weights import ALEXNET, VGG16, Unavailable, WeightFile, locate
from gearshift.runtime.errors import UsageError

PSNR_PROTOCOL = "dB on uint8, range 255; global: from the mean square error pooled over all images"
_BATCH = 32
Values = Tensor | NDArray[Any]


def psnr(mean_square_error: float) -> float | None:
    """Peak signal-to-noise ratio in dB at a range of 255; None for an error of 0, where it is infinite."""
    return None if mean_square_error == 0 else 10.0 * math.log10(255.0**2 / mean_square_error)


def image_errors(images: Tensor, reference: Tensor) -> Tensor:
    """Mean square error of each image in squared grey levels: two uint8 [N, C, H, W] -> float64 [N], exact."""
    _check(images, reference)
    return (images.to(torch.int64) - reference.to(torch.int64)).square().flatten(1).double().mean(dim=1)


def ssim_window(image_size: int) -> tuple[float, int]:
    """(sigma, window): the usual Gaussian of 1.5 in 11 x 11; below 16 pixels 0.5 in 5 x 5, so that it fits into 8 x
    8."""
    return (1.5, 11) if image_size >= 16 else (0.5, 5)


def ssim_protocol(image_size: int) -> str:
    """The window, for protocol strings."""
    sigma, window = ssim_window(image_size)
    return f"Gaussian sigma {sigma:g} ({window}x{window}), reflected borders, range 255 on uint8, mean over all pixels"


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of each image: two uint8 [N, C, H, W] -> float64 [N] in [-1, 1].

    Through torchmetrics, with the window of `ssim_window`; borders are reflected.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(images, reference)
    sigma, _ = ssim_window(images.shape[-1])

    def one(a: Tensor, b: Tensor) -> Tensor:
        values = structural_similarity_index_measure(
            a.double(), b.double(), sigma=sigma, data_range=255.0, reduction="none"
        )
        assert isinstance(values, Tensor)
        return values.reshape(len(a))

    parts = in_batches(one, [images, reference], _BATCH, images.device)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=images.device)


def reduce_paired(
    errors: Values, similarity: Values, perceptual: Mapping[str, Values] | None = None
) -> dict[str, float | None]:
    """The numbers of N >= 1 pairs from values per image: `image_errors`, `ssim`, and `Lpips` by name in the results.

    Gives `psnr_to_full` (global; None when every image is equal), `psnr_to_full_per_image` (mean over images that
    differ; None where none does), `identical_to_full` (share of equal images), `ssim_to_full`, and the mean of each of
    `perceptual`. Sums are rounded once, so neither the order of the images nor a cut into parts changes a bit. Raises
    ValueError without pairs or where the lengths differ.
    """
    each = {"error": _listed(errors), "ssim_to_full": _listed(similarity)}
    each |= {name: _listed(values) for name, values in (perceptual or {}).items()}
    count = len(each["error"])
    if count == 0 or any(len(values) != count for values in each.values()):
        raise ValueError(f"no image pairs, or of different numbers: { {k: len(v) for k, v in each.items()} }")
    decibels = [value for error in each["error"] if (value := psnr(error)) is not None]
    return {
        "psnr_to_full": psnr(math.fsum(each.pop("error")) / count),
        "psnr_to_full_per_image": math.fsum(decibels) / len(decibels) if decibels else None,
        "identical_to_full": (count - len(decibels)) / count,
        **{name: math.fsum(values) / count for name, values in each.items()},
    }


@dataclass(frozen=True)
class _Backbone:
    """`least` is the smallest side in pixels at which anything is left at LPIPS' last tap; `key` names its file."""

    title: str
    key: str
    file: WeightFile
    least: int


_BACKBONES = {"alex": _Backbone("AlexNet", "alexnet", ALEXNET, 64), "vgg": _Backbone("VGG16", "vgg16", VGG16, 16)}


class Lpips:
    """LPIPS (Zhang et al., 1801.03924) through torchmetrics: a perceptual distance, 0 for equal images.

    `net` is "alex", which is meant for reporting, or "vgg"; their values are not comparable.
    """

    def __init__(self, weights: Path, device: torch.device | str = "cpu", net: str = "alex") -> None:
        """`weights` is torchvision's file of the backbone; the linear heads come with torchmetrics."""
        from torchmetrics.functional.image.lpips import _LPIPS

        kind = _BACKBONES[net]
        with torch.random.fork_rng(devices=[]):
            self._network: nn.Module = _LPIPS(pretrained=True, net=net, pnet_rand=True)  # type: ignore[arg-type]
        backbone: nn.Module = self._network.net
        released = torch.load(weights, map_location="cpu", weights_only=True)
        # The library cuts the feature layers into slices and keeps their numbers: slice2.3.weight is features.3.weight.
        backbone.load_state_dict(
            {name: released["features." + name.split(".", 1)[1]] for name in backbone.state_dict()}
        )
        self._network.eval().requires_grad_(False).to(device)
        self._least = kind.least
        self.name = f"lpips_{net}"
        self.protocol = f"{kind.title}, torchmetrics heads, [-1,1] from uint8, bilinear to {kind.least}px when smaller"

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """Two uint8 [N, 1 or 3, H, W] -> float32 [N] on the CPU."""
        _check(images, reference)
        device = next(self._network.parameters()).device

        def one(a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self._network(self._prepare(a), self._prepare(b))
            return out.reshape(len(a))

        parts = in_batches(one, [images, reference], _BATCH, device)
        return torch.cat(parts).cpu() if parts else torch.empty(0)

    def _prepare(self, images: Tensor) -> Tensor:
        pixels = to_pm1(images).expand(-1, 3, -1, -1)
        if pixels.shape[-1] < self._least:
            pixels = nn.functional.interpolate(pixels, (self._least, self._least), mode="bilinear")
        return pixels


def load_lpips(
    net: str = "alex", weights: Mapping[str, str | Path | None] | None = None, device: torch.device | str = "cpu"
) -> Lpips | Unavailable:
    """LPIPS where the weights of its backbone are present, otherwise why not and how to fetch them.

    `weights` names files by "alexnet" and "vgg16"; then come GEARSHIFT_ALEXNET and GEARSHIFT_VGG16, then the cache of
    torch.hub. Raises UsageError for another net.
    """
    if net not in _BACKBONES:
        raise UsageError(f"there is no LPIPS with the backbone {net!r}; there are {', '.join(_BACKBONES)}")
    kind = _BACKBONES[net]
    found = locate(kind.file, f"lpips_{net}_to_full", (weights or {}).get(kind.key))
    return found if isinstance(found, Unavailable) else Lpips(found, device, net)


def _listed(values: Values) -> list[float]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    listed: list[float] = np.asarray(array, dtype=np.float64).tolist()
    return listed


def _check(images: Tensor, reference: Tensor) -> None:
    if images.dtype != torch.uint8 or reference.dtype != torch.uint8 or images.shape != reference.shape:
        raise ValueError(
            f"pairs must be uint8 of one shape, got {images.dtype} {tuple(images.shape)} and "
            f"{reference.dtype} {tuple(reference.shape)}"
        )
