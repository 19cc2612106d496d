"""The U-Net of latent diffusion (Rombach et al., arXiv 2112.10752), and its form with one decoder per stage of noise.

Blocks are the entries of the official `input_blocks` (the first convolution belongs to `embed`), the middle, and those
of `output_blocks`; parameters have the official names, and released weights load after one permutation
(`backbones.ldm_unet_weights`). By itself it can be read out at full depth only; heads of exits can be set behind every
decoder level (`backbones.unet_exits`), whose last block doubles the side: there the state has that of the next level.

With several decoders (Zhang et al., arXiv 2312.09181) time embedding, encoder and middle are shared, and stage k of
the noise level has a decoder of its own width: `decoders.{k}.output_blocks` and `decoders.{k}.out`. One decoder, of
whatever width, has the official names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.backbones.layers import sinusoid
from gearshift.backbones.ldm_unet_blocks import (
    STEM,
    TIME,
    Block,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialAttention,
    Upsample,
    zeroed,
)
from gearshift.backbones.ldm_unet_weights import from_official, to_official
from gearshift.backbones.staging import StageRouter
from gearshift.backbones.unet_exits import DecoderLevels, Level
from gearshift.execution.stream import Rows, Stream
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class LdmUNetConfig:
    """Shape of a latent-diffusion U-Net.

    Attributes:
        image_size: pixels per side of the (latent) image, a multiple of 2^(levels - 1).
        in_channels: channels of the image; the prediction has as many.
        model_channels: width of the encoder at full resolution, even.
        channel_mult: width of every level over `model_channels`; as many levels, each half the side of the one before.
        num_res_blocks: residual blocks per level of the encoder; a decoder has one more.
        attention_downsamplings: downsampling factors at which every residual block is followed by attention; the middle
            always has it.
        head_dim: channels per attention head.
        num_groups: groups of all normalisations; divides every width.
        dropout: inside the residual blocks.
        num_classes: classes K of a class-conditional model; the label is embedded and added to the time.
        null_class: one more row in the label embedding, index K: the null label of guidance.
        decoders: width of every stage's decoder, the stage next to the data first; empty is one decoder as wide as the
            encoder.
        decoder_attention: whether each decoder has attention at all; empty is yes.
        boundaries: ratios sigma / alpha at which the stages end, ascending, the last stage left out.
    """

    image_size: int
    in_channels: int
    model_channels: int
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 2
    attention_downsamplings: tuple[int, ...] = (2, 4, 8)
    head_dim: int = 32
    num_groups: int = 32
    dropout: float = 0.0
    num_classes: int | None = None
    null_class: bool = False
    decoders: tuple[int, ...] = ()
    decoder_attention: tuple[bool, ...] = ()
    boundaries: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "model_channels", "num_res_blocks", "head_dim", "num_groups"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("channel_mult", "attention_downsamplings", "decoders"):
            values = list(getattr(self, name))
            _require(all(value > 0 for value in values), f"{name}={values} must be positive numbers")
        _require(len(self.channel_mult) > 0, "channel_mult=[] must have at least one level")
        _require(0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)")
        _require(
            self.model_channels % 2 == 0, f"model_channels={self.model_channels} must be even: half cosines, half sines"
        )
        factors = [2**level for level in range(len(self.channel_mult))]
        _require(
            self.image_size % factors[-1] == 0,
            f"image_size={self.image_size} must be a multiple of {factors[-1]}, the lowest of {len(factors)} levels",
        )
        for factor in self.attention_downsamplings:
            _require(
                factor in factors,
                f"attention_downsamplings={list(self.attention_downsamplings)}: {factor} is none of {factors}",
            )
        self._check_conditioning()
        self._check_stages()
        self._check_widths()

    def _check_conditioning(self) -> None:
        classes = self.num_classes
        _require(classes is None or classes > 0, f"num_classes={classes} must be positive; leave it null to do without")
        _require(
            not self.null_class or classes is not None,
            f"null_class={self.null_class} needs num_classes, which is {classes}",
        )

    def _check_stages(self) -> None:
        stages = len(self.widths)
        _require(
            len(self.boundaries) == stages - 1,
            f"boundaries={list(self.boundaries)} end {len(self.boundaries)} stages before the last; "
            f"decoders={list(self.decoders)} needs {stages - 1}",
        )
        _require(
            len(self.decoder_attention) in (0, stages),
            f"decoder_attention={list(self.decoder_attention)} must have one entry per decoder, {stages}, or none",
        )

    def _check_widths(self) -> None:
        for name, width in (("model_channels", self.model_channels), *(("decoders", width) for width in self.widths)):
            _require(
                width % self.num_groups == 0, f"{name}: {width} must be a multiple of num_groups={self.num_groups}"
            )
            for level, factor in enumerate(self.channel_mult):
                attends = 2**level in self.attention_downsamplings or level == len(self.channel_mult) - 1
                _require(
                    not attends or width * factor % self.head_dim == 0,
                    f"{name}: {width} x {factor} must be a multiple of head_dim={self.head_dim}",
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every decoder."""
        return self.decoders or (self.model_channels,)

    @property
    def label_rows(self) -> int:
        """Rows of the label embedding: K, and one more with a null class."""
        return (self.num_classes or 0) + int(self.null_class)

    def attends(self, level: int, stage: int | None = None) -> bool:
        """Whether residual blocks of a level are followed by attention, in the encoder or in the decoder of a stage."""
        allowed = stage is None or not self.decoder_attention or self.decoder_attention[stage]
        return allowed and 2**level in self.attention_downsamplings

    def shrunk(self) -> LdmUNetConfig:
        """The same network, only narrower (8 channels in the encoder, decoders in proportion, 4 per group and head)."""
        if self.model_channels <= 8:
            return self

        def narrow(width: int) -> int:
            return 4 * max(1, round(2 * width / self.model_channels))

        small = dict(model_channels=8, head_dim=4, num_groups=4)
        return replace(self, **small, decoders=tuple(map(narrow, self.decoders)))  # type: ignore[arg-type]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"LDM U-Net: {message}")


class Decoder(nn.Module):
    """The way up of one stage: `output_blocks`, and `out`, which gives the image.

    Attributes:
        levels: where its levels end, counted from its own first block.
    """

    def __init__(self, config: LdmUNetConfig, stage: int, channels: int, skips: list[int]) -> None:
        """channels: of the middle; skips: channels of the stem and of every encoder block."""
        super().__init__()
        skips = list(skips)
        width, groups = config.widths[stage], config.num_groups
        blocks: list[Block] = []
        self.levels: list[Level] = []
        for level in reversed(range(len(config.channel_mult))):
            for place in range(config.num_res_blocks + 1):
                wide = width * config.channel_mult[level]
                layers: list[nn.Module] = [_res(config, channels + skips.pop(), wide)]
                channels = wide
                if config.attends(level, stage):
                    layers.append(SpatialAttention(channels, channels // config.head_dim, groups))
                if level and place == config.num_res_blocks:
                    layers.append(Upsample(channels))
                blocks.append(Block(layers, takes_stem=not skips))
            # Behind its last block the state has the side of the next level.
            self.levels.append(Level(len(blocks), channels, 2 ** max(level - 1, 0)))
        self.output_blocks = nn.ModuleList(blocks)
        last = nn.Conv2d(channels, config.in_channels, 3, padding=1)
        self.out = nn.Sequential(GroupNorm(groups, channels), nn.SiLU(), zeroed(last))


def _res(config: LdmUNetConfig, channels: int, out_channels: int) -> ResBlock:
    return ResBlock(channels, out_channels, 4 * config.model_channels, config.num_groups, config.dropout)


class LdmUNet(DecoderLevels):
    """The network as a passive list of blocks; path k ends with the decoder of stage k."""

    Config = LdmUNetConfig
    first_weights = 0.0

    def __init__(self, config: LdmUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = self.out_channels = config.in_channels
        self.image_size = config.image_size
        self.num_classes = config.num_classes
        self.cond_kind = "class" if config.num_classes else "none"
        self.boundaries = config.boundaries
        self._router = StageRouter(config.boundaries)

        width = config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        if config.num_classes:
            self.label_emb = nn.Embedding(config.label_rows, 4 * width)
        skips = self._build_encoder()
        decoders = [Decoder(config, stage, skips[-1], skips) for stage in range(len(config.widths))]
        if len(decoders) == 1:
            self.output_blocks, self.out = decoders[0].output_blocks, decoders[0].out
        else:
            self.decoders = nn.ModuleList(decoders)

        shared, own = len(skips), len(decoders[0].output_blocks)
        starts = [shared + stage * own for stage in range(len(decoders))]
        self.paths = tuple((*range(shared), *range(start, start + own)) for start in starts)
        self.levels = tuple(
            tuple(level._replace(depth=shared + level.depth) for level in decoder.levels) for decoder in decoders
        )
        self.pushes = frozenset(range(shared - 1))
        self.pops = frozenset(block for start in starts for block in range(start, start + own - 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _build_encoder(self) -> list[int]:
        """`input_blocks` and `middle_block`; returns the channels of every output that a decoder merges."""
        config, groups = self.config, self.config.num_groups
        channels = config.model_channels
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, channels, 3, padding=1)])])
        skips = [channels]
        for level, factor in enumerate(config.channel_mult):
            if level:
                self.input_blocks.append(Block([Downsample(channels)]))
                skips.append(channels)
            for _ in range(config.num_res_blocks):
                wide = config.model_channels * factor
                layers: list[nn.Module] = [_res(config, channels, wide)]
                channels = wide
                if config.attends(level):
                    layers.append(SpatialAttention(channels, channels // config.head_dim, groups))
                self.input_blocks.append(Block(layers))
                skips.append(channels)
        attention = SpatialAttention(channels, channels // config.head_dim, groups)
        self.middle_block = Block([_res(config, channels, channels), attention, _res(config, channels, channels)])
        return skips

    # A property, not a second container: each block has one name in the state dict, the official one.
    @property
    def blocks(self) -> list[nn.Module]:
        decoders: Iterable[Any] = [self] if len(self.config.widths) == 1 else self.decoders
        own = [block for decoder in decoders for block in decoder.output_blocks]
        return [*self.input_blocks[1:], self.middle_block, *own]

    def _out(self, path: int) -> Any:
        return self.out if len(self.config.widths) == 1 else self.decoders[path].out

    def own_head(self, path: int) -> tuple[nn.GroupNorm, nn.Conv2d]:
        norm, _, convolution = self._out(path)
        return norm, convolution

    def level_norm(self, width: int) -> nn.GroupNorm:
        return GroupNorm(self.config.num_groups, width)

    def route(self, log_snr: Tensor) -> Tensor:
        return self._router.route(log_snr)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        """The first convolution, and the embedding of time and label that every residual block is given.

        Args:
            x: images [n, C, H, W].
            time: [n], the value the network is fed (raw: the sinusoid has no scale of its own).
            cond: labels int64 [n] in 0..num_classes-1, or num_classes for the null class; or None.

        Raises:
            UsageError: shapes or kinds that the network does not take. Label values are not looked at: that would wait
                for the device.
        """
        self._check(x, time, cond)
        # In fp32 under autocast, as the parameters are; a network cast as a whole takes the time in its own precision.
        features = self.time_features(time).to(next(self.time_embed.parameters()).dtype)
        embedded = self.time_embed(features)
        if cond is not None:
            embedded = embedded + self.label_emb(cond)
        stem = self.input_blocks[0][0](x.contiguous(memory_format=torch.channels_last))  # type: ignore[index]
        # The stem is the first long skip. It travels by name, because skips are pushed by blocks, and it is not one's.
        return Stream(stem, time, Rows(x.shape[0]), {TIME: F.silu(embedded), STEM: stem})

    def _check(self, x: Tensor, time: Tensor, cond: Tensor | None) -> None:
        size, n = self.image_size, x.shape[0]
        fits = x.dim() == 4 and x.shape[1:] == (self.in_channels, size, size)
        _require(fits, f"images must be [n, {self.in_channels}, {size}, {size}], got {list(x.shape)}")
        _require(time.shape == (n,), f"time must be [{n}], one value per image, got {list(time.shape)}")
        if cond is None:
            _require(self.cond_kind == "none", "this network needs class conditioning, got none")
            return
        _require(
            self.cond_kind == "class", f"this network is unconditional, got conditioning of shape {list(cond.shape)}"
        )
        fits = cond.shape == (n,) and cond.dtype in (torch.int64, torch.int32)
        _require(fits, f"labels must be integers [{n}], got {cond.dtype} {list(cond.shape)}")

    def bypass(self, block: int, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        """A dropped block keeps its skip connections and its change of resolution."""
        module = self.blocks[block]
        assert isinstance(module, Block)
        return module.shortcut(hidden, cond, skip)

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        """Norm, SiLU and convolution of the path's decoder."""
        image: Tensor = self._out(path)(hidden)
        return image.contiguous()

    @property
    def time_width(self) -> int:
        return self.config.model_channels

    def time_features(self, time: Tensor) -> Tensor:
        """The sinusoid before its MLP; fp32 [n, model_channels]."""
        return sinusoid(time, self.config.model_channels)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        """Label K of a network with a null class."""
        if self.cond_kind == "class" and self.config.null_class:
            return torch.full((num_rows,), self.config.num_classes or 0, dtype=torch.int64, device=device)
        if self.cond_kind == "class":
            raise UsageError(
                f"guidance needs a null label; this LDM U-Net has null_class=false and its {self.num_classes} classes"
            )
        return super().null_cond(num_rows, device)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the official code (or the network's part of a whole checkpoint) under this network's rows."""
        return from_official(state, self.config.head_dim)

    def to_official(self) -> dict[str, Tensor]:
        """The network's state dict with attention's rows in the official order."""
        return to_official(self.state_dict(), self.config.head_dim)
