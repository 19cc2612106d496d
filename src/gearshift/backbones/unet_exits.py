"""Exits of U-Nets: behind every level of a decoder, by a head of that level's width and resolution.

DeeDiff (arXiv 2309.17074) takes the hidden state to be as wide at every layer. That of a U-Net changes width and side
from level to level, so the readout of the full depth fits no other. An exit behind a lower level has a head of its own:

    group norm, SiLU, 3x3 convolution of the level's D channels to p*p*C, its values put in place as p x p pixels each

p is the side of the image over that of the hidden state. The convolution runs at the level's resolution, and what it
gives are the pixels (sub-pixel convolution: Shi et al., arXiv 1609.05158). The prediction is of noise, which is white.
C channels that are interpolated would have one number for p*p of the image, and could hold no more than that share of
its variance: at half the side a quarter; what lies above the level's own resolution is lost. p*p*C channels have a
number for every pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.unet_norm import normed
from gearshift.runtime.errors import UsageError


class Level(NamedTuple):
    """Where a level of a decoder ends.

    Attributes:
        depth: blocks that have run along the path.
        width: D, channels of the hidden state there.
        patch: p, pixels of the image per side of one position of the hidden state.
    """

    depth: int
    width: int
    patch: int


class LevelHead(nn.Module):
    """Norm, SiLU and convolution: a hidden state [n, D, s, s] to the pixels of its positions, [n, p*p*C, s, s]."""

    def __init__(self, norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
        super().__init__()
        self.norm, self.conv = norm, conv

    def forward(self, hidden: Tensor) -> Tensor:
        pixels: Tensor = self.conv(normed(hidden, self.norm, active=True))
        return pixels


class DecoderLevels(Backbone):
    """A U-Net that heads of their own can read out behind every level of its decoders. A subclass sets `levels` and
    `first_weights`, and defines `own_head` and `level_norm`.

    Attributes:
        levels: of each path, by depth; the last one ends at the full depth, where the network has its own readout. The
            middle blocks are no level.
        first_weights: factor on the first weights of the last convolution, as of the network's own.
    """

    levels: tuple[tuple[Level, ...], ...]
    first_weights: float

    def own_head(self, path: int) -> tuple[nn.GroupNorm, nn.Conv2d]:
        """Norm and convolution of the path's own readout."""
        raise NotImplementedError

    def level_norm(self, width: int) -> nn.GroupNorm:
        """A new norm over that many channels, of the kind the network has."""
        raise NotImplementedError

    def _level(self, depth: int, path: int) -> Level:
        for level in self.levels[path]:
            if level.depth == depth:
                return level
        ends = [level.depth for level in self.levels[path]]
        raise UsageError(
            f"depth {depth} is not the end of a decoder level of {self.name}; they end at {ends}, where exits can be "
            "set with heads of their own (exits.head=per_exit)"
        )

    def readable(self, path: int = 0, *, own: bool = False) -> tuple[int, ...]:
        """The full depth, by the network's own readout; with `own` the end of every decoder level."""
        return tuple(level.depth for level in self.levels[path]) if own else self.exits(path)

    def readout_modules(self, depth: int, path: int = 0) -> nn.Module:
        """At full depth the network's own, below it a new `LevelHead` whose predictions are nearly zero.

        Raises:
            UsageError: no decoder level ends at this depth.
        """
        level, (norm, own) = self._level(depth, path), self.own_head(path)
        if depth == self.num_blocks(path):
            return LevelHead(norm, own)
        convolution = nn.Conv2d(level.width, level.patch**2 * self.out_channels, 3, padding=1)
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            convolution.weight.mul_(self.first_weights)
        head = LevelHead(self.level_norm(level.width), convolution).to(own.weight)
        head.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return head

    def readout_with(
        self, head: nn.Module, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0
    ) -> Tensor:
        """Prediction [n, C, H, W] by a `LevelHead`; (p1, p2, C) is the order of its channels."""
        pixels = self.tokens(head(hidden), depth, path)
        return self.assemble(pixels, self.out_channels, depth, path).contiguous()

    def tokens(self, hidden: Tensor, depth: int, path: int = 0) -> Tensor:
        return hidden.permute(0, 2, 3, 1).flatten(1, 2)

    def width(self, depth: int, path: int = 0) -> int:
        return self._level(depth, path).width

    def patch(self, depth: int, path: int = 0) -> int:
        return self._level(depth, path).patch
