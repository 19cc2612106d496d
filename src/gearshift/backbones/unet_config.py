"""The shape of a U-Net of Score SDE and EDM: every setting, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gearshift.backbones.staging import StageRouter
from gearshift.runtime.errors import UsageError

_CHOICES = {
    "embedding": ("positional", "fourier"),
    "encoder": ("standard", "residual"),
    "middle": ("decoder", "shared"),
}


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Shape of a U-Net.

    Attributes:
        image_size: pixels per side, divisible by two for each level after the first.
        in_channels: channels of the image; the prediction has as many.
        model_channels: base width; that of the first convolution.
        channel_mult: widths of the levels over `model_channels`, the highest resolution first.
        num_blocks: encoder blocks per level; a decoder has one more.
        attention_resolutions: sides at which every encoder block and the last decoder block of a level attend.
        embedding: of time: positional (sinusoids; DDPM++) or fourier (fixed random frequencies; NCSN++).
        encoder: standard, or residual: a pyramid of the image is added after each step down (NCSN++).
        resample_filter: taps of the resampling filter, an even number of them.
        dropout: probability, inside blocks.
        num_classes: classes K of a class-conditional model; labels are 0..K-1.
        null_class: label K stands for none (a vector of zeros instead of a one): the null label of guidance.
        augment_dim: numbers per image that say how it was augmented; 0 without.
        num_heads: attention heads.
        max_groups: a norm over C channels has min(max_groups, C // 4) groups.
        nin: run attention's projections as matrix products and the pyramid's convolutions as an operator of its own, as
            Score SDE does: counters of layers do not see them, and published figures are of such counters. The result
            is the same.
        decoders: base width of each stage's decoder, stage 0 (next to the data) first; empty for one plain decoder.
        boundaries: noise-to-signal ratios at which stages end, one less than decoders, ascending.
        middle: decoder: the two blocks of the lowest resolution stand in each decoder; shared: before all of them.
    """

    image_size: int
    in_channels: int
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    embedding: str = "positional"
    encoder: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)
    dropout: float = 0.0
    num_classes: int | None = None
    null_class: bool = False
    augment_dim: int = 0
    num_heads: int = 1
    max_groups: int = 32
    nin: bool = False
    decoders: tuple[int, ...] = ()
    boundaries: tuple[float, ...] = ()
    middle: str = "decoder"

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "model_channels", "num_blocks", "num_heads", "max_groups"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("channel_mult", "decoders"):
            values = getattr(self, name)
            require(all(value > 0 for value in values), f"{name}={list(values)} must be positive numbers")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            require(value in allowed, f"{name}={value!r} is not one of {list(allowed)}")
        require(len(self.channel_mult) > 0, "channel_mult=[] names no level; give at least one number")
        require(
            self.model_channels % 4 == 0,
            f"model_channels={self.model_channels} must be a multiple of 4: sines and cosines, two each or more",
        )
        steps = 2 ** (len(self.channel_mult) - 1)
        require(
            self.image_size % steps == 0,
            f"image_size={self.image_size} must be a multiple of {steps}, for {len(self.channel_mult)} levels",
        )
        taps = list(self.resample_filter)
        require(
            len(taps) > 0 and len(taps) % 2 == 0 and sum(taps) != 0,
            f"resample_filter={taps} must have an even number of taps, whose sum is not zero",
        )
        require(len(taps) > 2 or taps[0] == taps[1], f"resample_filter={taps}: two taps must be equal")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)")
        require(
            self.num_classes is None or self.num_classes > 0,
            f"num_classes={self.num_classes} must be positive; leave it null to do without",
        )
        require(
            not self.null_class or self.num_classes is not None,
            f"null_class={self.null_class} needs num_classes, which is {self.num_classes}",
        )
        require(self.augment_dim >= 0, f"augment_dim={self.augment_dim} must be 0 or positive")
        require(
            len(self.boundaries) == max(len(self.decoders) - 1, 0),
            f"decoders={list(self.decoders)} make {max(len(self.decoders), 1)} stages, and boundaries="
            f"{list(self.boundaries)} make {len(self.boundaries) + 1}; give one boundary less than decoders",
        )
        StageRouter(self.boundaries)

    @property
    def noise_channels(self) -> int:
        """Width of the features of time."""
        return self.model_channels * (2 if self.embedding == "fourier" else 1)

    def shrunk(self) -> UNetConfig:
        """The same blocks and paths, only narrower: eight base channels, decoders in proportion."""
        base = min(self.model_channels, 8)
        decoders = tuple(max(4 * round(width * base / self.model_channels / 4), 4) for width in self.decoders)
        return replace(self, model_channels=base, decoders=decoders)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"U-Net: {message}")
