"""Group normalisation, with or without SiLU after it, of images that lie channels last.

torch's own is slow there when a group has few channels, and on CUDA copies the image to the other layout and leaves it
so. Here statistics are sums over pixels per channel, which that layout has side by side; they are taken in two passes
(mean, then squares of what is left), in fp32 at least. The backward pass makes the activation anew instead of keeping
it, so that one image per norm is kept, not two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PIXELS = (2, 3)


class _Normed(torch.autograd.Function):
    """x [n, C, H, W], weight and bias [C], groups, eps, whether SiLU follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, active: bool) -> Tensor:
        centre = _spread(_over_groups(x.mean(PIXELS), groups), x.shape[1])
        left = x - centre
        variance = _over_groups((left * left).mean(PIXELS), groups)
        rstd = (variance + eps).rsqrt()
        gain = _spread(rstd, x.shape[1]) * weight[:, None, None]
        ctx.save_for_backward(x, weight, bias, centre, rstd)
        ctx.groups, ctx.active = groups, active
        normed = torch.addcmul(bias[:, None, None], left, gain)
        return F.silu(normed, inplace=True) if active else normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, weight, bias, centre, rstd = ctx.saved_tensors
        channels = x.shape[1]
        scale = _spread(rstd, channels)
        gain = scale * weight[:, None, None]
        left = x - centre
        if ctx.active:
            grad = torch.ops.aten.silu_backward(grad, torch.addcmul(bias[:, None, None], left, gain))
        total, along = grad.sum(PIXELS), (grad * left).sum(PIXELS)  # [n, C]
        # The gradient of the normed values loses its mean over the group, and what of it lies along them.
        pixels = x.shape[2] * x.shape[3]
        mean = _spread(_over_groups(total * weight, ctx.groups) / pixels, channels) * scale
        slope = _spread(_over_groups(along * weight, ctx.groups) / pixels, channels) * scale**3
        grad_x = torch.addcmul(left.mul_(-slope).sub_(mean), grad, gain)
        return grad_x, (along * scale[:, :, 0, 0]).sum(0), total.sum(0), None, None, None


def _over_groups(per_channel: Tensor, groups: int) -> Tensor:
    """Means over the channels of each group, [n, C] to [n, groups]."""
    return per_channel.unflatten(1, (groups, -1)).mean(2)


def _spread(per_group: Tensor, channels: int) -> Tensor:
    """[n, groups] to [n, C, 1, 1]."""
    return per_group.repeat_interleave(channels // per_group.shape[1], dim=1)[:, :, None, None]


def normed(x: Tensor, norm: nn.GroupNorm, active: bool) -> Tensor:
    """`norm` of x [n, C, H, W], then SiLU if `active`; in fp32 at least, given back in the precision of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    assert norm.weight is not None and norm.bias is not None
    weight, bias = norm.weight.to(wide), norm.bias.to(wide)
    result: Tensor = _Normed.apply(x.to(wide), weight, bias, norm.num_groups, norm.eps, active)
    return result.to(x.dtype)
