"""Resampling by two with a fixed separable filter, and convolutions that resample before they weigh.

The filter is the outer product of a short row of taps with itself, divided by its sum. [1, 1] is the mean of 2x2 pixels
on the way down and their repetition on the way up, and runs as such; a longer one ([1, 3, 3, 1]) is a convolution of
each channel for itself, with zeros beyond the border. Filters are buffers of the state dict, as in the official files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESAMPLE = (None, "up", "down")


def square_filter(taps: Sequence[float]) -> Tensor:
    """[1, 1, k, k], fp32, with sum one."""
    row = torch.tensor([float(tap) for tap in taps])
    return (torch.outer(row, row) / row.sum().square())[None, None]


def down(x: Tensor, kernel: Tensor) -> Tensor:
    """[n, C, H, W] to [n, C, H/2, W/2]."""
    taps = kernel.shape[-1]
    if taps == 2:
        return F.avg_pool2d(x, 2)
    channels = x.shape[1]
    return F.conv2d(x, per_channel(kernel, channels, x), stride=2, padding=(taps - 1) // 2, groups=channels)


def up(x: Tensor, kernel: Tensor) -> Tensor:
    """[n, C, H, W] to [n, C, 2H, 2W]; the filter's gain is four, so that a constant stays what it is."""
    taps = kernel.shape[-1]
    if taps == 2:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    channels = x.shape[1]
    weight = per_channel(4.0 * kernel, channels, x)
    return F.conv_transpose2d(x, weight, stride=2, padding=(taps - 1) // 2, groups=channels)


def per_channel(kernel: Tensor, channels: int, x: Tensor) -> Tensor:
    """One copy of the filter per channel, in the precision of `x`: [C, 1, k, k]."""
    return kernel.to(x.dtype).repeat(channels, 1, 1, 1)


class ResampleConv2d(nn.Conv2d):
    """Resample, then convolve with an odd kernel and "same" padding.

    Args:
        resample: None, "up" or "down"; only with one of the latter there is a buffer `resample_filter`.
        taps: of the filter.
    """

    resample_filter: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, resample: str | None, taps: Sequence[float]
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.resample = resample
        if resample is not None:
            self.register_buffer("resample_filter", square_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            x = down(x, self.resample_filter)
        elif self.resample == "up":
            x = up(x, self.resample_filter)
        return super().forward(x)
