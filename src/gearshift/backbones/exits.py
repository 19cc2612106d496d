"""Exit heads and uncertainty heads around any backbone (DeeDiff / AdaDiff, arXiv 2309.17074).

Paper and official code differ, and the paper leaves open what it means; all of it is settings (`ExitsConfig`):

    head         shared: the backbone's own readout at every depth (official) | per_exit: a readout of its own each
    points       block_outputs (official) | block_inputs: before every block, so that exit 0 runs none, and the full
                 depth has no uncertainty head (the reproduction of arXiv 2410.09633)
    uncertainty  pixel_map: per token Linear(D -> p*p*C) and sigmoid, assembled to a C x H x W map (official)
                 token_mean: Linear(D -> 1) and sigmoid per token, averaged to one number per row (paper, as a scalar)
                 attention: one learned query over the tokens, then a linear layer and a sigmoid (arXiv 2410.09633)
    per          layer: weights for every exit (official) | timestep: for every training timestep (the w_t of Eq. 5) |
                 layer_timestep: for both | network: one set for all exits and times, as the learned exit of BERxiT
    tokens       image: those of the image alone (official) | all: also those of time, label and text (paper)
    time_embed   none (official: time enters through attention only) | concat: [L, temb(t)] (paper)
    detach_input true (official: the uncertainty loss trains the heads only) | false

Polarity is uncertainty everywhere: u = 1 - certainty, in [0, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.uncertainty_heads import AttentionHead, TokenHead
from gearshift.execution.stream import Stream
from gearshift.runtime.errors import UsageError

HEADS = ("none", "pixel_map", "token_mean", "attention")
FEW = 0.125
"""Of the image's tokens: so many others a head may look at in vain rather than have the image's copied."""
GRANULARITIES = ("layer", "timestep", "layer_timestep", "network")


@dataclass
class ExitsConfig:
    """Schema of `EarlyExit`; the values are those of the module's docstring.

    Attributes:
        depths: exits, by depth; None is every depth the backbone can read out. The full depth is always one.
        timesteps, first_timestep: of heads with weights per timestep: how many there are, and the first as the network
            is fed it (0 in DDPM's table, 1 in that of latent U-ViTs).
    """

    head: str = "shared"
    uncertainty: str = "pixel_map"
    time_embed: str = "none"
    detach_input: bool = True
    depths: list[int] | None = None
    points: str = "block_outputs"
    per: str = "layer"
    tokens: str = "image"
    timesteps: int = 1000
    first_timestep: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("head", ("shared", "per_exit")),
            ("uncertainty", HEADS),
            ("time_embed", ("none", "concat")),
            ("points", ("block_outputs", "block_inputs")),
            ("per", GRANULARITIES),
            ("tokens", ("image", "all")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"exits.{name}={getattr(self, name)!r} is not one of {list(allowed)}")
        if self.timesteps < 1:
            raise UsageError(f"exits.timesteps={self.timesteps} must be at least 1")
        if self.tokens == "all" and self.uncertainty == "pixel_map":
            raise UsageError(
                "exits.tokens=all and exits.uncertainty=pixel_map: only image tokens make a map; take tokens=image"
            )

    @property
    def by_timestep(self) -> bool:
        """Whether weights follow the timestep of a row."""
        return self.per in ("timestep", "layer_timestep")


class EarlyExit(Backbone):
    """A backbone with exits: delegates everything, adds heads.

    Args:
        config: which heads.
        backbone: any backbone; with `head: shared` it must be readable at the chosen depths, with `per_exit` it gets a
            copy of its readout modules for each exit (`Backbone.readout_modules`).

    Raises:
        UsageError: an exit depth the backbone does not have, or one head for exits of different shapes.
    """

    Config = ExitsConfig

    def __init__(self, config: ExitsConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.paths, self.pops, self.pushes = backbone.paths, backbone.pops, backbone.pushes
        self.carries, self.boundaries, self.augment_dim = (
            dict(backbone.carries),
            backbone.boundaries,
            backbone.augment_dim,
        )
        self.in_channels, self.out_channels = backbone.in_channels, backbone.out_channels
        self.image_size = backbone.image_size
        self.cond_kind, self.num_classes = backbone.cond_kind, backbone.num_classes
        self.has_uncertainty = config.uncertainty != "none"
        self._exits = tuple(self._chosen(path) for path in range(len(self.paths)))
        self.exit_heads = nn.ModuleDict()
        self.uncertainty_heads = nn.ModuleDict()
        self._shapes: dict[str, tuple[int, int]] = {}
        for path, depths in enumerate(self._exits):
            for depth in depths:
                if config.head == "per_exit" and depth != self.num_blocks(path):
                    self.exit_heads[f"{path}_{depth}"] = copy.deepcopy(backbone.readout_modules(depth, path))
                if self.predicts_error(depth, path):
                    self._add_head(depth, path)

    def _add_head(self, depth: int, path: int) -> None:
        """The uncertainty head of an exit, unless it has one already, in common with others."""
        config, backbone, key = self.config, self.backbone, self._key(depth, path)
        shape = backbone.width(depth, path), backbone.patch(depth, path)
        known = self._shapes.setdefault(key, shape)
        if known != shape:
            raise UsageError(
                f"exits.per={config.per} has one head for all depths, and those of {backbone.name} have widths "
                f"{known[0]} and {shape[0]} and patches of {known[1]} and {shape[1]} pixels; take per=layer or "
                "per=layer_timestep"
            )
        if key in self.uncertainty_heads:
            return
        time_width = backbone.time_width if config.time_embed == "concat" else 0
        timesteps = config.timesteps if config.by_timestep else None
        width, patch = shape
        if config.uncertainty == "attention":
            head: nn.Module = AttentionHead(width, time_width, timesteps)
        else:
            features = 1 if config.uncertainty == "token_mean" else patch * patch * backbone.in_channels
            head = TokenHead(width, time_width, features, timesteps)
        self.uncertainty_heads[key] = head

    def _key(self, depth: int, path: int) -> str:
        """The name of the uncertainty head of an exit."""
        return f"{path}_{depth}" if self.config.per in ("layer", "layer_timestep") else f"{path}"

    def copy_readout(self) -> None:
        """Make every exit head of its own a copy of the backbone's readout, as it is now; where the backbone cannot be
        read out, the head stays as it is."""
        for key, head in self.exit_heads.items():
            path, depth = map(int, key.split("_"))
            if depth in self.backbone.readable(path):
                head.load_state_dict(self.backbone.readout_modules(depth, path).state_dict())

    def untold_heads(self) -> list[int]:
        """Depths of exit heads that the backbone has no readout to begin with."""
        places = [tuple(map(int, key.split("_"))) for key in self.exit_heads]
        return sorted({depth for path, depth in places if depth not in self.backbone.readable(path)})

    def _chosen(self, path: int) -> tuple[int, ...]:
        readable = self.backbone.readable(path, own=self.config.head == "per_exit")
        full, inputs = self.num_blocks(path), self.config.points == "block_inputs"
        if inputs and 0 not in readable:
            raise UsageError(
                f"exits.points=block_inputs needs a readout before the first block, and {self.backbone.name} can be "
                f"read out at {list(readable)} only; take block_outputs"
            )
        if self.config.depths is None:
            return tuple(depth for depth in readable if depth > 0 or inputs)
        for depth in self.config.depths:
            if depth not in readable:
                own = self.backbone.readable(path, own=True)
                raise UsageError(
                    f"exits.depths names depth {depth}; {self.backbone.name} can be read out at {list(readable)}"
                    + (f", and by heads of their own (exits.head=per_exit) at {list(own)}" if own != readable else "")
                )
        return tuple(sorted({*self.config.depths, full}))

    def check_timesteps(self, count: int | None, first: float, process: str) -> None:
        """Raises UsageError where heads follow timesteps that the process does not have."""
        if not (self.has_uncertainty and self.config.by_timestep):
            return
        given = f"exits.per={self.config.per}"
        if count is None:
            raise UsageError(
                f"{given} has weights for {self.config.timesteps} timesteps, and process {process} is continuous; take "
                "per=layer, or a process with a table (linear, scaled_linear, cosine)"
            )
        if (count, first) != (self.config.timesteps, self.config.first_timestep):
            raise UsageError(
                f"{given} has weights for {self.config.timesteps} timesteps from {self.config.first_timestep} on, and "
                f"process {process} has {count} from {first:g} on; set exits.timesteps={count} and "
                f"exits.first_timestep={first:g}"
            )

    # Delegation ------------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Any:  # the backbone's own type
        return self.backbone.blocks

    @property
    def name(self) -> str:
        return self.backbone.name

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return self._exits[path]

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        return self.backbone.embed(x, time, cond)

    def embed_augmented(self, x: Tensor, time: Tensor, cond: Tensor | None, augment: Tensor) -> Stream:
        return self.backbone.embed_augmented(x, time, cond, augment)

    def enter(self, stream: Stream, path: int) -> Stream:
        return self.backbone.enter(stream, path)

    def bypass(self, block: int, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        return self.backbone.bypass(block, hidden, cond, skip)

    def tokens(self, hidden: Tensor, depth: int, path: int = 0) -> Tensor:
        return self.backbone.tokens(hidden, depth, path)

    def width(self, depth: int, path: int = 0) -> int:
        return self.backbone.width(depth, path)

    def patch(self, depth: int, path: int = 0) -> int:
        return self.backbone.patch(depth, path)

    @property
    def time_width(self) -> int:
        return self.backbone.time_width

    def time_features(self, time: Tensor) -> Tensor:
        return self.backbone.time_features(time)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        return self.backbone.null_cond(num_rows, device)

    def set_null_context(self, context: Tensor) -> None:
        self.backbone.set_null_context(context)

    def example_cond(self, num_rows: int, device: torch.device | str = "meta") -> Tensor | None:
        return self.backbone.example_cond(num_rows, device)

    def route(self, log_snr: Tensor) -> Tensor:
        return self.backbone.route(log_snr)

    # Heads -----------------------------------------------------------------------------------------------------------

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        key = f"{path}_{depth}"
        if key in self.exit_heads:
            return self.backbone.readout_with(self.exit_heads[key], hidden, cond, depth, path)
        return self.backbone.readout(hidden, cond, depth, path)

    def readout_key(self, depth: int, path: int = 0) -> Hashable:
        return (path, depth) if f"{path}_{depth}" in self.exit_heads else self.backbone.readout_key(depth, path)

    def readouts(
        self, hiddens: Sequence[Tensor], cond: dict[str, Tensor], depths: Sequence[int], path: int = 0
    ) -> list[Tensor]:
        if self.config.head == "shared":
            return self.backbone.readouts(hiddens, cond, depths, path)
        return super().readouts(hiddens, cond, depths, path)

    def predicts_error(self, depth: int, path: int = 0) -> bool:
        """At every exit; of exits at the inputs of blocks not at the full depth, which is no input of any."""
        last = self.config.points == "block_inputs" and depth == self.num_blocks(path)
        return self.has_uncertainty and not last

    def uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        """[n, C, H, W] in [0, 1] for `pixel_map`, else [n]."""
        values = self._values(hidden, time, depth, path)
        if self.config.uncertainty == "pixel_map":
            return self.backbone.assemble(values, self.in_channels, depth, path)
        return values.mean(dim=(1, 2))

    def _values(self, hidden: Tensor, time: Tensor, depth: int, path: int) -> Tensor:
        """Per token, [n, N, features]; of attention [n, 1, 1]."""
        if self.config.detach_input:
            hidden = hidden.detach()
        features = self.backbone.time_features(time) if self.config.time_embed == "concat" else None
        timestep = None
        if self.config.by_timestep:
            # Solvers call between the entries of a table too.
            nearest = (time - self.config.first_timestep).round().long()
            timestep = nearest.clamp(0, self.config.timesteps - 1)
        head = self.uncertainty_heads[self._key(depth, path)]
        sequence = hidden.ndim == 3
        tokens = hidden if sequence and self.config.tokens == "all" else self.backbone.tokens(hidden, depth, path)
        values: Tensor
        if isinstance(head, AttentionHead):
            values = head(tokens, features, timestep)
        elif tokens is not hidden and sequence and hidden.shape[1] <= (1 + FEW) * tokens.shape[1]:
            values = head(hidden, features, timestep, lambda wide: self.backbone.tokens(wide, depth, path))
        else:
            # A slice of the tokens is not contiguous, and a linear layer over it is twice as slow.
            values = head(tokens.contiguous(), features, timestep)
        return values

    def mean_uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        return self._values(hidden, time, depth, path).mean(dim=(1, 2))
