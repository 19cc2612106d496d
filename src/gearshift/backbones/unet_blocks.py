"""One block of the U-Nets of Score SDE and EDM (arXiv 2011.13456, 2206.00364): residual convolutions, then attention.

    h = cat(hidden, skip)                                          where it pops a long skip
    r = conv1(dropout(silu(norm1(conv0(silu(norm0(h))) + affine(emb)))))
    h = (r + shortcut(h)) / sqrt 2                                 conv0 and the shortcut resample before they weigh
    h = (h + proj(attention(norm2(h)))) / sqrt 2                   where it attends

In NCSN++ a level of the input pyramid, h = (h + conv(aux)) / sqrt 2, is a block of its own after each step down. Names
of parameters are the official ones. Images lie channels last, so that attention sees their pixels as tokens
without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.backbones.attention import Attention
from gearshift.backbones.unet_norm import normed
from gearshift.backbones.unet_resample import ResampleConv2d, per_channel, square_filter
from gearshift.execution.memory import NO_SLOT, Slot
from gearshift.runtime.errors import UsageError

EPS = 1e-6
HALF = math.sqrt(0.5)
SMALL = 1e-5
"""Factor on the first weights of what ends a residual branch, and of the last convolution."""


@dataclass(frozen=True, slots=True)
class BlockStyle:
    """What all blocks of a network have in common.

    Attributes:
        emb_channels: width of the embedding of time, label and augmentation.
        max_groups: groups of a norm over C channels are min(max_groups, C // 4).
        num_heads: attention heads.
        dropout: probability.
        taps: of the resampling filter.
        nin: attention's projections are written as matrix products, which counters of layers do not see.
    """

    emb_channels: int
    max_groups: int
    num_heads: int
    dropout: float
    taps: Sequence[float]
    nin: bool


def group_norm(channels: int, max_groups: int) -> nn.GroupNorm:
    """Raises UsageError where the channels do not divide into the groups of the rule."""
    groups = min(max_groups, channels // 4)
    if groups < 1 or channels % groups:
        raise UsageError(
            f"U-Net: a norm over {channels} channels would have min({max_groups}, {channels}//4) = {groups} groups, "
            "which do not divide them; change max_groups, model_channels or decoders"
        )
    return nn.GroupNorm(groups, channels, eps=EPS)


class Pointwise(nn.Linear):
    """A 1x1 convolution over tokens [n, N, in], with the weight of a convolution: [out, in, 1, 1].

    With `product` it runs as a matrix product, which counters of layers do not see.
    """

    def __init__(self, in_channels: int, out_channels: int, product: bool) -> None:
        super().__init__(in_channels, out_channels)
        self.product = product
        self.weight = nn.Parameter(self.weight.detach()[:, :, None, None])

    def rows(self, x: Tensor, start: int) -> Tensor:
        """The outputs from number `start` on, [n, N, out - start]."""
        weight, bias = self.weight[start:, :, 0, 0], self.bias[start:]
        return x @ weight.t() + bias if self.product else F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0)


class PixelAttention(Attention):
    """The shared operator on projections that are registered elsewhere, under their official names."""

    def __init__(self, qkv: Pointwise, proj: Pointwise, num_heads: int) -> None:
        nn.Module.__init__(self)
        self.num_heads = num_heads
        self.qkv, self.proj = qkv, proj

    def value(self, x: Tensor) -> Tensor:
        assert isinstance(self.qkv, Pointwise)
        return self._heads(self.qkv.rows(x, 2 * x.shape[-1]), 1)[0]


class UNetBlock(nn.Module):
    """See the module's docstring.

    Args:
        in_channels: of what goes in, the popped skip included.
        resample: None, "up" or "down".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        resample: str | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm0 = group_norm(in_channels, style.max_groups)
        self.conv0 = ResampleConv2d(in_channels, out_channels, 3, resample, style.taps)
        self.affine = nn.Linear(style.emb_channels, out_channels)
        self.norm1 = group_norm(out_channels, style.max_groups)
        self.dropout = nn.Dropout(style.dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip: nn.Module | None = None
        if out_channels != in_channels or resample is not None:
            self.skip = ResampleConv2d(in_channels, out_channels, 1, resample, style.taps)
        # In a tuple, so that the state dict has the projections once.
        self._attention: tuple[PixelAttention, ...] = ()
        if attention:
            if out_channels % style.num_heads:
                raise UsageError(f"U-Net: attention over {out_channels} channels has no num_heads={style.num_heads}")
            self.norm2 = group_norm(out_channels, style.max_groups)
            self.qkv = Pointwise(out_channels, 3 * out_channels, style.nin)
            self.proj = Pointwise(out_channels, out_channels, style.nin)
            self._attention = (PixelAttention(self.qkv, self.proj, style.num_heads),)

    @property
    def attends(self) -> bool:
        return bool(self._attention)

    def initialise(self) -> None:
        """Branches start near zero, so that at first a block is its shortcut."""
        with torch.no_grad():
            self.conv1.weight.mul_(SMALL)
            if self.attends:
                self.qkv.weight.mul_(math.sqrt(0.2))
                self.proj.weight.mul_(SMALL)

    def shortcut(self, hidden: Tensor, skip: Tensor | None) -> Tensor:
        """What a dropped block leaves: skip concatenated, resampled, brought to the new width; else the identity."""
        return self._short(_merged(hidden, skip))

    def _short(self, merged: Tensor) -> Tensor:
        return merged if self.skip is None else self.skip(merged)

    def forward(
        self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None = None, slot: Slot = NO_SLOT
    ) -> Tensor:
        """hidden [n, C, H, W]; `cond["emb"]` is [n, E]."""
        merged = _merged(hidden, skip)
        inner = self.conv0(normed(merged, self.norm0, active=True))
        inner = inner + self.affine(cond["emb"])[:, :, None, None]
        inner = self.conv1(self.dropout(normed(inner, self.norm1, active=True)))
        hidden = _halved(self._short(merged), inner)
        for attention in self._attention:
            n, channels, height, width = hidden.shape
            tokens = normed(hidden, self.norm2, active=False).permute(0, 2, 3, 1).reshape(n, height * width, channels)
            mixed = attention(tokens, slot).reshape(n, height, width, channels).permute(0, 3, 1, 2)
            hidden = _halved(hidden, mixed)
        return hidden


class PyramidBlock(nn.Conv2d):
    """A level of the input pyramid (NCSN++): filter and 3x3 convolution with stride two of the level above, added.

    Both run over one zero border, the filter first, so that only the pixels that stay are weighed. Dropped, it leaves
    the hidden state as it is.

    Args:
        counted: counters of layers see the convolution; that of Score SDE is an operator of its own, which they do not.
    """

    resample_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[float], counted: bool) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2)
        self.counted = counted
        self.register_buffer("resample_filter", square_filter(taps))

    def initialise(self) -> None:
        """Nothing beyond what every convolution gets."""

    def shortcut(self, hidden: Tensor, skip: Tensor | None) -> Tensor:
        return hidden

    def forward(  # type: ignore[override]
        self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None = None, slot: Slot = NO_SLOT
    ) -> Tensor:
        """hidden [n, out, H/2, W/2]; `cond["aux"]` is the level above, [n, in, H, W]: at first the image."""
        aux = cond["aux"]
        border = 1 + (self.resample_filter.shape[-1] - 1) // 2
        weight = per_channel(self.resample_filter, aux.shape[1], aux)
        filtered = F.conv2d(aux, weight, padding=border, groups=aux.shape[1])
        # A view is no parameter, and costs nothing.
        kernel = self.weight if self.counted else self.weight.view_as(self.weight)
        return _halved(hidden, F.conv2d(filtered, kernel, self.bias, stride=2))


def _merged(hidden: Tensor, skip: Tensor | None) -> Tensor:
    return hidden if skip is None else torch.cat([hidden, skip], dim=1)


def _halved(a: Tensor, b: Tensor) -> Tensor:
    """(a + b) / sqrt 2: a sum of two unit variances keeps it."""
    return (a + b).mul_(HALF)
