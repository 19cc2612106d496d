"""Layers of the latent-diffusion U-Net: residual blocks, spatial attention, resampling; names as in its code.

Hidden states are [n, C, H, W] in channels_last memory, so that attention sees its tokens [n, H*W, C] without a copy.
Convolutions that end a residual branch start at zero, as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.backbones.attention import Attention
from gearshift.execution.memory import NO_SLOT, Slot

STEM = "stem"
"""Name in `cond` of the image after the first convolution, which the last block of every decoder merges."""
TIME = "time"
"""Name in `cond` of the activated embedding of time and label, [n, 4 * model_channels]."""


class GroupNorm(nn.GroupNorm):
    """Group normalisation (eps 1e-5) computed in at least fp32 and given back in the precision of the input."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps).to(x.dtype)


class PointLinear(nn.Linear):
    """A 1x1 convolution over tokens [n, N, D]; the weight has the shape of `Conv1d`, [out, in, 1].

    Written as a matrix product: the counters behind published figures do not see these layers either, so their MACs
    are on the side of attention (`execution.cost.Cost`).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(self.weight.detach()[..., None])

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0)

    def rows(self, x: Tensor, start: int) -> Tensor:
        """Outputs `start` and following alone, [n, N, out - start]."""
        weight = self.weight[start:, :, 0]
        return torch.addmm(self.bias[start:], x.flatten(0, 1), weight.t()).unflatten(0, x.shape[:2])


class SpatialAttention(Attention):
    """Normalised self-attention over the pixels of [n, C, H, W], added to its input.

    Rows of `qkv` are the q, k and v blocks, heads inside each, as everywhere in the project; files of the official code
    have them the other way round (`backbones.ldm_unet_weights`).
    """

    def __init__(self, dim: int, num_heads: int, num_groups: int) -> None:
        super().__init__(dim, num_heads, qkv_bias=True)
        del self.proj
        self.norm = GroupNorm(num_groups, dim)
        self.qkv = PointLinear(dim, 3 * dim)
        self.proj_out = zeroed(PointLinear(dim, dim))

    def value(self, x: Tensor) -> Tensor:
        assert isinstance(self.qkv, PointLinear)
        return self._heads(self.qkv.rows(x, 2 * x.shape[-1]), 1)[0]

    def out(self, mixed: Tensor) -> Tensor:
        projected: Tensor = self.proj_out(mixed.transpose(1, 2).flatten(2))
        return projected

    def forward(self, x: Tensor, slot: Slot = NO_SLOT) -> Tensor:
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        attended = super().forward(tokens, slot)
        return x + attended.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice; the embedding of time is added in between, the input at the end."""

    def __init__(self, channels: int, out_channels: int, embedding: int, num_groups: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(num_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        # The activation in front (index 0 there) has no weights and is the same for all blocks: it is done once.
        self.emb_layers = nn.ModuleDict({"1": nn.Linear(embedding, out_channels)})
        self.out_layers = nn.Sequential(
            GroupNorm(num_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection: nn.Module = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """x: [n, channels, H, W]; activated: [n, embedding]."""
        hidden = self.in_layers(x) + self.emb_layers["1"](activated)[:, :, None, None]
        out: Tensor = self.skip_connection(x) + self.out_layers(hidden)
        return out


class Downsample(nn.Module):
    """Half the side: a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Twice the side: nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(doubled(x))
        return out


class Block(nn.ModuleList):
    """One entry of `input_blocks`, `output_blocks`, or the middle: its layers in order, numbered as there.

    Args:
        takes_stem: the block merges `cond["stem"]` instead of a long skip that is handed in.
    """

    def __init__(self, layers: list[nn.Module], takes_stem: bool = False) -> None:
        super().__init__(layers)
        self.takes_stem = takes_stem

    def forward(
        self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None = None, slot: Slot = NO_SLOT
    ) -> Tensor:
        """hidden [n, C, H, W]; a long skip [n, C', H, W] is concatenated behind it."""
        hidden = self.merge(hidden, cond, skip)
        for layer in self:
            if isinstance(layer, ResBlock):
                hidden = layer(hidden, cond[TIME])
            elif isinstance(layer, SpatialAttention):
                hidden = layer(hidden, slot)
            else:
                hidden = layer(hidden)
        return hidden

    def shortcut(self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None = None) -> Tensor:
        """What remains of a dropped block: skip connections, and resampling without its convolution."""
        hidden = self.merge(hidden, cond, skip)
        for layer in self:
            if isinstance(layer, ResBlock):
                hidden = layer.skip_connection(hidden)
            elif isinstance(layer, Downsample):
                hidden = F.avg_pool2d(hidden, 2)
            elif isinstance(layer, Upsample):
                hidden = doubled(hidden)
        return hidden

    def merge(self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        """The long skip behind the hidden state, along the channels."""
        if self.takes_stem:
            skip = cond[STEM]
        return hidden if skip is None else torch.cat([hidden, skip], dim=1)


def doubled(x: Tensor) -> Tensor:
    """Twice the side by nearest neighbours."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all its weights zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
