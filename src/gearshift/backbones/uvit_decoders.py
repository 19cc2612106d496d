"""U-ViT with one decoder per stage of noise: the multi-decoder idea of arXiv 2312.09181 on arXiv 2209.12152.

Embeddings, encoder blocks and the middle block, all of width D, are shared. Stage k of the noise level has decoder
blocks, norm and readout of its own, of width `decoders[k]`; nothing of them is shared between stages. A decoder block
merges its skip of width D with a linear layer of its own, the first one taking the middle's D channels, every other its
own width. With one stage of width D this is the plain U-ViT, under other names (`decoders.0.` in front of `out_blocks`,
`norm`, `decoder_pred` and `final_layer`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from gearshift.backbones.layers import init_linear
from gearshift.backbones.staging import StageRouter
from gearshift.backbones.uvit import UViT, UViTBlock, UViTConfig
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class MultiDecoderUViTConfig(UViTConfig):
    """Shape of a U-ViT with several decoders: that of the encoder, and of every decoder what differs.

    Attributes:
        decoders: width of every stage's decoder, the stage next to the data first; multiples of the head width
            `embed_dim / num_heads`, which all decoders share. Empty is one decoder as wide as the encoder.
        boundaries: ratios sigma / alpha at which the stages end, ascending, the last stage left out.
    """

    decoders: tuple[int, ...] = ()
    boundaries: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        UViTConfig.__post_init__(self)
        for width in self.decoders:
            _require(
                width > 0 and width % self.head_dim == 0,
                f"decoders={list(self.decoders)}: {width} must be a positive multiple of the head width "
                f"embed_dim / num_heads = {self.head_dim}",
            )
        _require(
            len(self.boundaries) == len(self.widths) - 1,
            f"boundaries={list(self.boundaries)} end {len(self.boundaries)} stages before the last; "
            f"decoders={list(self.decoders)} needs {len(self.widths) - 1}",
        )

    @property
    def head_dim(self) -> int:
        """Width of an attention head, of encoder and decoders."""
        return self.embed_dim // self.num_heads

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every decoder."""
        return self.decoders or (self.embed_dim,)

    def plain(self, width: int) -> UViTConfig:
        """The plain U-ViT of this shape whose blocks have the given width."""
        shape = {field.name: getattr(self, field.name) for field in fields(UViTConfig)}
        return UViTConfig(**{**shape, "embed_dim": width, "num_heads": width // self.head_dim})

    def shrunk(self) -> MultiDecoderUViTConfig:
        """The same network, only narrower (four channels per head): depth, patches, image and conditioning stay."""
        small = min(self.head_dim, 4)
        decoders = tuple(width // self.head_dim * small for width in self.decoders)
        return replace(self, embed_dim=small * self.num_heads, decoders=decoders)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"U-ViT with several decoders: {message}")


class Decoder(nn.Module):
    """What one stage has of its own: decoder blocks of its width, norm and readout."""

    def __init__(self, config: MultiDecoderUViTConfig, width: int) -> None:
        super().__init__()
        shape, half = config.plain(width), config.depth // 2
        self.out_blocks = nn.ModuleList(UViTBlock(shape, merges_skip=True) for _ in range(half))
        for place, block in enumerate(self.out_blocks):
            entering = width if place else config.embed_dim
            block.skip_linear = nn.Linear(entering + config.embed_dim, width)
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.in_channels)
        self.final_layer: nn.Module = nn.Identity()
        if config.conv:
            self.final_layer = nn.Conv2d(config.in_channels, config.in_channels, 3, padding=1)

    def head(self) -> nn.ModuleDict:
        """The readout alone."""
        return nn.ModuleDict({"norm": self.norm, "decoder_pred": self.decoder_pred, "final_layer": self.final_layer})


class MultiDecoderUViT(UViT):
    """A U-ViT whose path k ends with the decoder of stage k.

    It can be read out after every decoder block, and inside the encoder too by a stage of the encoder's width.
    """

    Config = MultiDecoderUViTConfig
    config: MultiDecoderUViTConfig

    def __init__(self, config: MultiDecoderUViTConfig) -> None:
        super().__init__(config)
        del self.out_blocks, self.norm, self.decoder_pred, self.final_layer
        self.decoders = nn.ModuleList(Decoder(config, width) for width in config.widths)
        self.decoders.apply(init_linear)
        self.boundaries = config.boundaries
        self._router = StageRouter(config.boundaries)

        half = config.depth // 2
        shared = half + 1
        starts = [shared + stage * half for stage in range(len(config.widths))]
        self.paths = tuple((*range(shared), *range(start, start + half)) for start in starts)
        self.pops = frozenset(range(shared, starts[-1] + half))

    @property
    def blocks(self) -> list[UViTBlock]:
        return [
            *self.in_blocks,
            self.mid_block,
            *(block for decoder in self._decoders() for block in decoder.out_blocks),
        ]

    def _decoders(self) -> list[Decoder]:
        return [decoder for decoder in self.decoders if isinstance(decoder, Decoder)]

    def route(self, log_snr: Tensor) -> Tensor:
        return self._router.route(log_snr)

    def exits(self, path: int = 0) -> tuple[int, ...]:
        """Every depth at which the hidden state has the width of the path's readout."""
        first = 1 if self.config.widths[path] == self.config.embed_dim else self.config.depth // 2 + 2
        return tuple(range(first, self.num_blocks(path) + 1))

    def readable(self, path: int = 0, *, own: bool = False) -> tuple[int, ...]:
        """Where the path's readout is as wide as the encoder, the embedded image too."""
        exits = self.exits(path)
        return (0, *exits) if exits[0] == 1 else exits

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        """Shared by all depths of the path, as in a plain U-ViT."""
        return self.readout_with(self.readout_modules(depth, path), hidden, cond, depth, path)

    def readout_key(self, depth: int, path: int = 0) -> Hashable:
        return path

    def readouts(
        self, hiddens: Sequence[Tensor], cond: dict[str, Tensor], depths: Sequence[int], path: int = 0
    ) -> list[Tensor]:
        """All depths at once, the narrow results stacked for one unpatchify and one convolution."""
        if not hiddens:
            return []
        head = self._decoders()[path]
        pixels = torch.cat([head.decoder_pred(head.norm(hidden))[:, self.config.extras :] for hidden in hiddens])
        images: Tensor = head.final_layer(self.assemble(pixels, self.out_channels, depths[-1], path))
        return list(images.split([hidden.shape[0] for hidden in hiddens]))

    def readout_modules(self, depth: int, path: int = 0) -> nn.Module:
        return self._decoders()[path].head()

    def width(self, depth: int, path: int = 0) -> int:
        return self.config.widths[path] if depth > self.config.depth // 2 + 1 else self.config.embed_dim
