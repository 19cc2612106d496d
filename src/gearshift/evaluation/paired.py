"""How close two sets of images are, image by image: samples of a cheaper run against the full run from the same noise.

All of it is measured on grey levels after rounding, which is what a viewer gets. PSNR says whether it pools the error
over all images (global) or averages the images' own values (per image); the two differ by several dB on the same
pair. Images that are equal bit for bit have no PSNR: their share is reported instead of a capped number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gearshift.data.pixels import to_pm1
from gearshift.evaluation.weights import Unavailable, WeightFile, exact_fp32, locate

ALEXNET = WeightFile(
    file_name="alexnet-owt-7be5be79.pth",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256_prefix="7be5be79",
)
# The smallest image that AlexNet's poolings leave anything of is 63 pixels at LPIPS' taps; smaller ones are enlarged.
LPIPS_SIZE = 64
PSNR_PROTOCOL = "dB on uint8, range 255; global: from the mean square error pooled over all images"


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
    with exact_fp32(images.device):
        values = structural_similarity_index_measure(
            images.double(), reference.double(), sigma=sigma, data_range=255.0, reduction="none"
        )
    assert isinstance(values, Tensor)
    return values.reshape(len(images))


@dataclass
class PairedSums:
    """Running sums over chunks of image pairs; `update` in chunk order, `merge` across shards, `compute` at the end."""

    count: int = 0
    identical: int = 0
    error: float = 0.0
    psnr: float = 0.0
    ssim: float = 0.0
    lpips: float = 0.0
    network: Lpips | None = field(default=None, repr=False)

    def update(self, images: Tensor, reference: Tensor) -> None:
        """Add pairs of uint8 [N, C, H, W]. Raises ValueError when shapes or types differ."""
        errors = image_errors(images, reference)
        self.count += len(errors)
        self.identical += int((errors == 0).sum())
        self.error += errors.sum().item()
        self.psnr += (10.0 * torch.log10(255.0**2 / errors[errors > 0])).sum().item()
        self.ssim += ssim(images, reference).double().sum().item()
        if self.network is not None:
            self.lpips += self.network(images, reference).double().sum().item()

    def merge(self, other: PairedSums) -> None:
        """Add the sums of another shard."""
        for name in ("count", "identical", "error", "psnr", "ssim", "lpips"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def compute(self) -> dict[str, float | None]:
        """`psnr_to_full` (global; None when every image is equal), `psnr_to_full_per_image` (mean over images that
        differ), `identical_to_full` (share of equal images), `ssim_to_full`, and `lpips_alex_to_full` where there is
        a
        network."""
        if self.count == 0:
            raise ValueError("no image pairs were added")
        differing = self.count - self.identical
        values = {
            "psnr_to_full": psnr(self.error / self.count),
            "psnr_to_full_per_image": self.psnr / differing if differing else None,
            "identical_to_full": self.identical / self.count,
            "ssim_to_full": self.ssim / self.count,
        }
        if self.network is not None:
            values["lpips_alex_to_full"] = self.lpips / self.count
        return values


def label_agreement(predicted: Tensor, requested: Tensor) -> float:
    """Share of samples whose predicted class int64 [N] is the requested one, in [0, 1]."""
    if predicted.shape != requested.shape or len(predicted) == 0:
        raise ValueError(f"{tuple(predicted.shape)} predictions for {tuple(requested.shape)} labels")
    return (predicted.cpu() == requested.cpu()).double().mean().item()


class Lpips:
    """LPIPS with AlexNet (Zhang et al., 1801.03924) through torchmetrics: a perceptual distance, 0 for equal images."""

    name = "lpips_alex"

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        """`weights` is torchvision's AlexNet file; the linear heads come with torchmetrics."""
        from torchmetrics.functional.image.lpips import _LPIPS

        self._network: nn.Module = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
        backbone: nn.Module = self._network.net
        released = torch.load(weights, map_location="cpu", weights_only=True)
        # The library cuts the feature layers into slices and keeps their numbers: slice2.3.weight is features.3.weight.
        backbone.load_state_dict(
            {name: released["features." + name.split(".", 1)[1]] for name in backbone.state_dict()}
        )
        self._network.eval().requires_grad_(False).to(device)
        self.protocol = f"AlexNet, torchmetrics heads, [-1,1] from uint8, bilinear to {LPIPS_SIZE}px when smaller"

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """Two uint8 [N, C, H, W] -> float32 [N]."""
        _check(images, reference)
        device = next(self._network.parameters()).device
        with exact_fp32(device):
            out: Tensor = self._network(self._prepare(images.to(device)), self._prepare(reference.to(device)))
        return out.reshape(len(images))

    @staticmethod
    def _prepare(images: Tensor) -> Tensor:
        pixels = to_pm1(images).expand(-1, 3, -1, -1)
        if pixels.shape[-1] < LPIPS_SIZE:
            pixels = nn.functional.interpolate(pixels, (LPIPS_SIZE, LPIPS_SIZE), mode="bilinear")
        return pixels


def load_lpips(path: str | Path | None = None, device: torch.device | str = "cpu") -> Lpips | Unavailable:
    """LPIPS where AlexNet's weights are present (`path`, or the cache of torch.hub), otherwise why not and how to
    fetch them."""
    found = locate(ALEXNET, "lpips_alex_to_full", path)
    return found if isinstance(found, Unavailable) else Lpips(found, device)


def _check(images: Tensor, reference: Tensor) -> None:
    if images.dtype != torch.uint8 or reference.dtype != torch.uint8 or images.shape != reference.shape:
        raise ValueError(
            f"pairs must be uint8 of one shape, got {images.dtype} {tuple(images.shape)} and "
            f"{reference.dtype} {tuple(reference.shape)}"
        )
