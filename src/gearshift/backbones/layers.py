"""Small layers that transformer backbones share: patches, sinusoids of time and position, MLP, initialisation.

Attribute names are those of the official repositories (timm's), so that released weights load.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoid(time: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Features [n, width] of time [n]: cosines, then sines, of time * max_period^(-k / (width/2)), always in fp32.

    `width` is even. At time 0 the first half is 1 and the second half 0 (arXiv 2006.11239, with the halves in the order
    of the guided-diffusion code, which U-ViT and DiT follow).
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time.float()[:, None] * torch.exp(steps * (-math.log(max_period) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(width: int, rows: int, columns: int, max_period: float = 10000.0) -> Tensor:
    """Fixed table [1, rows * columns, width] of a row-major grid, fp32, computed in float64 (arXiv 2212.09748).

    The column of a token fills the first half of the channels and its row the second; each half is sines, then cosines,
    of the coordinate times max_period^(-k / (width/4)). `width` divides by four.
    """
    quarter = width // 4
    rates = 1 / max_period ** (torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(length: int) -> Tensor:
        angles = torch.outer(torch.arange(length, dtype=torch.float64), rates)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across = axis(columns)[None].expand(rows, columns, -1)
    down = axis(rows)[:, None].expand(rows, columns, -1)
    return torch.cat([across, down], dim=2).reshape(1, rows * columns, width).to(torch.float32)


class PatchEmbed(nn.Module):
    """Images [n, C, H, W] to tokens [n, (H/p)(W/p), D], row-major; one strided convolution with bias."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, GELU, linear over tokens [n, N, D]; `hidden` is the inner width.

    `approximate` is that of `torch.nn.GELU`: "none" for the exact function, "tanh" for its approximation.
    """

    def __init__(self, dim: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


def init_linear(module: nn.Module) -> None:
    """For `Module.apply`: linear weights normal with std 0.02 (cut at ±2), biases zero; other layers as they are."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
