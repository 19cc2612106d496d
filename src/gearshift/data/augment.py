"""Augmentations that the network is told of: geometric transforms of images, and the nine numbers that describe them.

Flips are exact. All else of an image is one affine map, applied as in StyleGAN2-ADA (arXiv 2006.06676, appendix B):
reflect the image at its edges, upsample by two with the sym6 wavelet, sample bilinearly on a grid of twice the wanted
resolution, downsample with the same wavelet. Without a map the two filters are each other's inverse, so translations by
whole pixels are exact too. Which transforms there are, their spread and their labels: EDM (arXiv 2206.00364, appendix
F.2). Images are extended by reflection without end, and an image that no map was drawn for is not resampled.

Every draw is a function of (seed, micro-batch, global slot). Draws and maps are made on the host, so that nothing waits
for a device, and images are resampled in float64 and rounded once: what becomes of an image does not depend on the rest
of its batch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from gearshift.data.latents import LatentDataset, Latents
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError

LABELS = ("xflip", "yflip", "scale", "cos r - 1", "sin r", "aniso cos a", "aniso sin a", "x", "y")
# The orthonormal lowpass filter of the wavelet sym6, twelve taps with six vanishing moments: of the eight spectral
# factors of Daubechies' polynomial of order six, the one whose phase is nearest to linear (Daubechies, "Ten lectures on
# wavelets", 8.1.1), computed with 50 digits.
SYM6 = (
    0.015404109327044824,
    0.0034907120842221626,
    -0.11799011114852002,
    -0.04831174258569806,
    0.49105594192797375,
    0.787641141028651,
    0.3379294217281658,
    -0.07263752278637658,
    -0.02106029251237085,
    0.04472490177078139,
    0.0017677118642540077,
    -0.00780070832503238,
)
_TAPS = len(SYM6)
_BEFORE = _TAPS // 2 - 1  # upsampled places before a pixel's own that its filter reaches
# Upsampled numbers at work at a time, so that large images do not fill the memory: 128 MB in float64.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class AugmentConfig:
    """Schema of the `augment` group; the defaults are EDM's for CIFAR-10.

    Attributes:
        p: probability of each transform.
        xflip, yflip, scale, rotate_frac, aniso, translate_frac: factors of p, each product counting as at most one;
            xflip is always on, and then mirrors one image in two.
        scale_std, aniso_std: standard deviation of the binary logarithm of the zoom, and of that in one direction.
        rotate_frac_max: greatest angle, as a part of half a turn.
        aniso_rotate_prob: how often the direction is any and not the horizontal.
        translate_frac_std: standard deviation of either translation, as a part of the side.
    """

    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1.0
    scale: float = 1.0
    rotate_frac: float = 1.0
    aniso: float = 1.0
    translate_frac: float = 1.0
    scale_std: float = 0.2
    rotate_frac_max: float = 1.0
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125

    def __post_init__(self) -> None:
        for name in ("p", "rotate_frac_max", "aniso_rotate_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"augment.{name}={getattr(self, name)} must be in [0, 1]")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"augment.{name}={value} must be a finite number of at least 0")


@dataclass(frozen=True)
class Transforms:
    """What is done to each image of a micro-batch; all on the host.

    Attributes:
        xflip, yflip: mirror left to right, and upside down; bool [B].
        rows: images that are resampled, int64 [n], ascending.
        maps: for those, where a place of the output lies in the input: float64 [n, 2, 3], x before y, in parts of the
            side from the centre.
        labels: float32 [B, 9], see `LABELS`; zeros for an image that is left as it is.
    """

    xflip: Tensor
    yflip: Tensor
    rows: Tensor
    maps: Tensor
    labels: Tensor


class AugmentPipe:
    """Draws transforms and applies them."""

    Config: ClassVar[type[AugmentConfig]] = AugmentConfig
    label_dim: ClassVar[int] = len(LABELS)

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    def __call__(self, images: Tensor, seed: int, slot: Tensor, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, H] float32 on any device, augmented, and their labels [B, 9] on that device.

        `slot` (host int64 [B]) are their places in the global micro-batch.
        """
        drawn = self.draw(seed, slot, micro_batch)
        return transform(images, drawn), _moved(drawn.labels, images.device)

    def draw(self, seed: int, slot: Tensor, micro_batch: int) -> Transforms:
        """The transforms of the samples at `slot` (host int64 [B]) of a micro-batch."""
        c = self.config
        uniform = keys.uniform(seed, "augment", slot, micro_batch, (11,)).double()
        normal = keys.normal(seed, "augment_normal", slot, micro_batch, (4,)).double()
        factors = [c.xflip, c.yflip, c.scale, c.rotate_frac, c.aniso, c.translate_frac]
        on = uniform[:, :6] < torch.tensor(factors, dtype=torch.float64) * c.p
        mirror_x, mirror_y, turn, direction, turned = uniform[:, 6:].unbind(1)
        xflip, yflip = on[:, 0] & (mirror_x < 0.5), on[:, 1] & (mirror_y < 0.5)
        zoom = normal[:, 0] * on[:, 2]
        angle = (2 * turn - 1) * math.pi * c.rotate_frac_max * on[:, 3]
        stretch = normal[:, 1] * on[:, 4]
        axis = (2 * direction - 1) * math.pi * (turned < c.aniso_rotate_prob)
        shift = normal[:, 2:] * on[:, 5, None]
        labels = torch.stack(
            [
                xflip.double(),
                yflip.double(),
                zoom,
                angle.cos() - 1,
                angle.sin(),
                stretch * axis.cos(),
                stretch * axis.sin(),
                shift[:, 0],
                shift[:, 1],
            ],
            dim=1,
        )
        rows = (labels[:, 2:] != 0).any(1).nonzero()[:, 0]
        whole, along = torch.exp2(-zoom * c.scale_std), torch.exp2(-stretch * c.aniso_std)
        maps = (
            _scaling(whole, whole)
            @ _rotation(angle)
            @ _rotation(-axis)
            @ _scaling(along, 1 / along)
            @ _rotation(axis)
            @ _translation(-shift * c.translate_frac_std)
        )
        return Transforms(xflip, yflip, rows, maps[rows, :2], labels.float())


def check_augment(pipe: AugmentPipe, data: object, *, flip: bool, augment_dim: int, network: str) -> None:
    """Whether data (a source or a split) and network (its `augment_dim` and name) go with a pipe.

    Raises UsageError.
    """
    if isinstance(data, (Latents, LatentDataset)):
        raise UsageError(
            "augment transforms images and the data are latents, for which a turned image is another image; set "
            "augment=none"
        )
    if flip:
        raise UsageError(
            f"data.flip=true and augment (augment.xflip={pipe.config.xflip:g}) would both mirror images, and the "
            "network is told of the second only; set data.flip=false"
        )
    if augment_dim != pipe.label_dim:
        raise UsageError(
            f"augment describes what it did in {pipe.label_dim} numbers and {network} takes {augment_dim}; without "
            f"them its samples would be augmented too: set backbone.augment_dim={pipe.label_dim}, or augment=none"
        )


def transform(images: Tensor, drawn: Transforms) -> Tensor:
    """Images [B, C, H, H] on any device, transformed; the same tensor where nothing is done to any of them."""
    device = images.device
    for flip, axis in ((drawn.xflip, -1), (drawn.yflip, -2)):
        if bool(flip.any()):
            images = torch.where(_moved(flip, device)[:, None, None, None], images.flip(axis), images)
    if not len(drawn.rows):
        return images
    out = images.clone()
    chunk = max(1, _CHUNK // (16 * images[0].numel()))
    for rows, maps in zip(drawn.rows.split(chunk), drawn.maps.split(chunk), strict=True):
        there = _moved(rows, device)
        out.index_copy_(0, there, _resample(images.index_select(0, there), _moved(maps, device)))
    return out


def _resample(images: Tensor, maps: Tensor) -> Tensor:
    """Images [n, C, H, H] under `maps` [n, 2, 3] as in `Transforms`, in their own precision."""
    side, device = images.shape[-1], images.device
    up, down, places = _upsampling(side, device), _downsampling(side, device), _places(side, device)
    period = len(up) - 1
    x, y, one = maps[..., None, None].unbind(2)
    inside = x * places + y * places[:, None] + one  # [n, 2, places, places]
    # From parts of the side to upsampled places, within one period of the endless image, to what grid_sample takes.
    grid = ((inside + 0.5) * (2 * side) - 1).remainder(period) * (2 / period) - 1
    sampled = grid_sample(
        up @ images.double() @ up.T, grid.movedim(1, -1), mode="bilinear", padding_mode="border", align_corners=True
    )
    return (down @ sampled @ down.T).to(images.dtype)


@functools.lru_cache(maxsize=16)
def _upsampling(side: int, device: torch.device) -> Tensor:
    """Pixels to one period of their reflection at twice the resolution, and the first place of the next period again:
    float64 [2 * period + 1, side]."""
    period = max(2 * side - 2, 1)
    matrix = torch.zeros(2 * period + 1, side, dtype=torch.float64)
    for place in range(2 * period + 1):
        for tap in range(_TAPS):
            pixel, between = divmod(place + _BEFORE - tap, 2)
            if not between:
                inside = pixel % period
                matrix[place, inside if inside < side else period - inside] += math.sqrt(2) * SYM6[tap]
    return matrix.to(device)


@functools.lru_cache(maxsize=16)
def _downsampling(side: int, device: torch.device) -> Tensor:
    """What `_places` lists, to pixels: float64 [side, 2 * side + 10]."""
    matrix = torch.zeros(side, 2 * side + _TAPS - 2, dtype=torch.float64)
    for pixel in range(side):
        matrix[pixel, 2 * pixel : 2 * pixel + _TAPS] = torch.tensor(SYM6, dtype=torch.float64) / math.sqrt(2)
    return matrix.to(device)


@functools.lru_cache(maxsize=16)
def _places(side: int, device: torch.device) -> Tensor:
    """The upsampled places that downsampling wants, in parts of the side from the centre: float64 [2 * side + 10]."""
    numbers = torch.arange(-_BEFORE, 2 * side + _TAPS - 2 - _BEFORE, dtype=torch.float64, device=device)
    # The filter has its weight about tap 5, so pixel i lies at place 2 i.
    return (numbers + 1) / (2 * side) - 0.5


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=1))


def _rotation(angle: Tensor) -> Tensor:
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [cos, -sin, zero, sin, cos, zero, zero, zero, torch.ones_like(angle)]
    return torch.stack(rows, dim=1).unflatten(1, (3, 3))


def _translation(shift: Tensor) -> Tensor:
    matrix = torch.eye(3, dtype=shift.dtype).repeat(len(shift), 1, 1)
    matrix[:, :2, 2] = shift
    return matrix


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
