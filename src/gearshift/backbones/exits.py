"""Exit heads and uncertainty heads around any backbone (DeeDiff / AdaDiff, arXiv 2309.17074).

Paper and official code differ; both are settings (`ExitsConfig`):

    head         shared: the backbone's own readout at every depth (official) | per_exit: a readout of its own each
    uncertainty  pixel_map: per token Linear(D -> p*p*C) and sigmoid, assembled to a C x H x W map (official)
                 token_mean: Linear(D -> 1) and sigmoid per token, averaged to one number per row (paper, as a scalar)
    time_embed   none (official: time enters through attention only) | concat: [L, temb(t)] (paper)
    detach_input true (official: the uncertainty loss trains the heads only) | false

Polarity is uncertainty everywhere: u = 1 - certainty, in [0, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.execution.stream import Stream
from gearshift.runtime.errors import UsageError


@dataclass
class ExitsConfig:
    """Schema of `EarlyExit`; the values are those of the module's docstring.

    Attributes:
        depths: exits, by depth; None is every depth the backbone can read out. The full depth is always one.
    """

    head: str = "shared"
    uncertainty: str = "pixel_map"
    time_embed: str = "none"
    detach_input: bool = True
    depths: list[int] | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("head", ("shared", "per_exit")),
            ("uncertainty", ("none", "pixel_map", "token_mean")),
            ("time_embed", ("none", "concat")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"exits.{name}={getattr(self, name)!r} is not one of {list(allowed)}")


class UncertaintyHead(nn.Module):
    """One head: tokens [n, N, D] (and time features) to uncertainty in [0, 1], in its weights' precision (fp32)."""

    def __init__(self, width: int, time_width: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width + time_width, out_features)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor, time: Tensor | None) -> Tensor:
        """[n, N, D] to [n, N, out_features]; the time part is one product per row, not per token."""
        tokens = tokens.to(self.linear.weight.dtype)
        kind = tokens.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # no autocast exists on meta
            if time is None:
                return torch.sigmoid(self.linear(tokens))
            width = tokens.shape[-1]
            from_tokens = nn.functional.linear(tokens, self.linear.weight[:, :width], self.linear.bias)
            from_time = nn.functional.linear(time.to(tokens.dtype), self.linear.weight[:, width:])
            return torch.sigmoid(from_tokens + from_time[:, None])


class EarlyExit(Backbone):
    """A backbone with exits: delegates everything, adds heads.

    Args:
        config: which heads.
        backbone: any backbone; with `head: shared` it must be readable at the chosen depths, with `per_exit` it gets a
            copy of its readout modules for each exit (`Backbone.readout_modules`).

    Raises:
        UsageError: an exit depth the backbone does not have.
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
        time_width = backbone.time_width if config.time_embed == "concat" else 0
        for path, depths in enumerate(self._exits):
            for depth in depths:
                if config.head == "per_exit" and depth != self.num_blocks(path):
                    self.exit_heads[f"{path}_{depth}"] = copy.deepcopy(backbone.readout_modules(depth, path))
                if self.has_uncertainty:
                    patch = backbone.patch(depth, path)
                    features = 1 if config.uncertainty == "token_mean" else patch * patch * backbone.in_channels
                    head = UncertaintyHead(backbone.width(depth, path), time_width, features)
                    self.uncertainty_heads[f"{path}_{depth}"] = head

    def copy_readout(self) -> None:
        """Make every exit head of its own a copy of the backbone's readout, as it is now."""
        for key, head in self.exit_heads.items():
            path, depth = map(int, key.split("_"))
            head.load_state_dict(self.backbone.readout_modules(depth, path).state_dict())

    def _chosen(self, path: int) -> tuple[int, ...]:
        readable = self.backbone.exits(path)
        full = self.num_blocks(path)
        if self.config.depths is None:
            return readable
        for depth in self.config.depths:
            if depth not in readable:
                raise UsageError(
                    f"exits.depths names depth {depth}; {self.backbone.name} can be read out at {list(readable)}"
                )
        return tuple(sorted({*self.config.depths, full}))

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

    def uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        """[n, C, H, W] in [0, 1] for `pixel_map`, [n] for `token_mean`."""
        values = self._values(hidden, time, depth, path)
        if self.config.uncertainty == "token_mean":
            return values.mean(dim=(1, 2))
        return self.backbone.assemble(values, self.in_channels, depth, path)

    def _values(self, hidden: Tensor, time: Tensor, depth: int, path: int) -> Tensor:
        """Per token, [n, N, features]."""
        # A slice of the tokens is not contiguous, and a linear layer over it is twice as slow.
        tokens = self.backbone.tokens(hidden, depth, path).contiguous()
        if self.config.detach_input:
            tokens = tokens.detach()
        features = self.backbone.time_features(time) if self.config.time_embed == "concat" else None
        values: Tensor = self.uncertainty_heads[f"{path}_{depth}"](tokens, features)
        return values

    def mean_uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        return self._values(hidden, time, depth, path).mean(dim=(1, 2))
