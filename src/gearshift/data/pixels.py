"""The one place where grey levels become numbers in [-1, 1] and numbers become grey levels.

Grey level v is v / 127.5 - 1, and back it goes by rounding to the nearest level, as in the reference evaluations of
diffusion models; truncating would darken every image by half a level, which moves a Fréchet distance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_pm1(images_u8: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1] of that shape: 0 -> -1 and 255 -> 1. Raises TypeError for another
    dtype."""
    if images_u8.dtype != torch.uint8:
        raise TypeError(f"to_pm1 takes uint8 grey levels, got {images_u8.dtype}")
    return images_u8.to(torch.float32).div_(127.5).sub_(1.0)


def to_u8(images: Tensor) -> Tensor:
    """Floating point in [-1, 1] -> uint8: (x + 1) * 127.5 rounded to nearest, values beyond the ends clipped to them.

    Computed in float32 at least, so that all 256 levels survive `to_u8(to_pm1(v))` and half-precision samples are
    rounded once. Raises TypeError for integers.
    """
    if not images.is_floating_point():
        raise TypeError(f"to_u8 takes floating point images in [-1, 1], got {images.dtype}")
    wide = images if images.dtype == torch.float64 else images.to(torch.float32)
    return wide.add(1.0).mul_(127.5).round_().clamp_(0.0, 255.0).to(torch.uint8)
