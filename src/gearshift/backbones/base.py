"""The contract of a backbone: a passive list of blocks between an embedding and a readout.

A backbone never runs its blocks itself; `gearshift.execution.executor.execute` does. It knows nothing of noise levels
beyond the time value it is fed, and nothing of policies.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.execution.stream import Stream
from gearshift.runtime.errors import UsageError


class Backbone(nn.Module):
    """Base class. A subclass sets the attributes below and implements `embed`, `readout` and, for heads, `tokens`.

    Attributes:
        blocks: block i is called `blocks[i](hidden, cond, skip, slot) -> hidden`; `skip` is None unless i is in `pops`.
        paths: block indices of each path (expert), in order; one path for most networks.
        pops: blocks before which the latest long skip is popped and handed in.
        pushes: blocks after which the hidden state is pushed as a long skip.
        carries: block to name: after it (run, bypassed or reused) the hidden state is also kept as `cond[name]`, which
            later blocks and readouts see.
        boundaries: of networks whose paths are stages of the noise level: the ratios sigma / alpha at which stages end,
            ascending, the last stage left out; stage 0 is next to the data. Empty where rows are not routed so.
        augment_dim: numbers per image that say how it was augmented (`embed_augmented`); 0 where the network knows
            nothing of augmentations.
        in_channels, out_channels, image_size: images are [n, in_channels, image_size, image_size].
        cond_kind: "none", "class" (int64 labels [n]) or "text" (float [n, L, D]).
        num_classes: labels are 0..num_classes-1; None unless `cond_kind` is "class".
        has_uncertainty: whether `uncertainty` is defined.
        takes_exit_rules: whether rows can leave within a call as they are seen, and not by plan alone.
    """

    blocks: Any  # nn.ModuleList, or a property giving modules that are registered under other names
    paths: tuple[tuple[int, ...], ...]
    pops: frozenset[int] = frozenset()
    pushes: frozenset[int] = frozenset()
    carries: Mapping[int, str] = {}
    boundaries: tuple[float, ...] = ()
    augment_dim: int = 0
    in_channels: int
    out_channels: int
    image_size: int
    cond_kind: str = "none"
    num_classes: int | None = None
    has_uncertainty: bool = False
    takes_exit_rules: bool = True

    @property
    def name(self) -> str:
        return type(self).__name__

    def num_blocks(self, path: int = 0) -> int:
        """Length of a path: the greatest depth."""
        return len(self.paths[path])

    def exits(self, path: int = 0) -> tuple[int, ...]:
        """Depths (blocks run along the path) at which `readout` is defined, ascending; the last is the full depth."""
        return (self.num_blocks(path),)

    def readable(self, path: int = 0, *, own: bool = False) -> tuple[int, ...]:
        """Depths at which an exit can be set, ascending: by the backbone's readout, or (`own`) by a head of the exit's
        own, made of `readout_modules`. 0 is the state before the first block, which no `exits` name by themselves."""
        return self.exits(path)

    def check_depth(self, depth: int, path: int = 0) -> None:
        """Raises UsageError where `depth` is no exit of the path."""
        if depth not in self.exits(path):
            raise UsageError(f"depth {depth} is not an exit of {self.name}; its exits are {list(self.exits(path))}")

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        """Images [n, C, H, W], network-fed time [n] and conditioning, to the stream before the first block."""
        raise NotImplementedError

    def embed_augmented(self, x: Tensor, time: Tensor, cond: Tensor | None, augment: Tensor) -> Stream:
        """`embed` of images that were augmented as `augment` [n, augment_dim] says; zeros stand for the plain image.

        Raises:
            UsageError: the network knows nothing of augmentations (`augment_dim` is 0).
        """
        raise UsageError(f"{self.name} cannot be told of augmentations; train it without, or choose another backbone")

    def enter(self, stream: Stream, path: int) -> Stream:
        """Called once for the rows of a path before its first block, where paths share no block at their beginning.

        Networks whose paths have nothing in common embed here what `embed` only gathered.
        """
        return stream

    def bypass(self, block: int, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        """What remains of a block that is dropped; the identity unless the block merges a skip."""
        if skip is not None:
            raise NotImplementedError(f"{self.name} must say what remains of block {block}, which merges a long skip")
        return hidden

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        """Prediction [n, out_channels, H, W] from the hidden state after `depth` blocks."""
        raise NotImplementedError

    def readout_key(self, depth: int, path: int = 0) -> Hashable:
        """Depths and paths with equal keys have the very same readout, so rows from all of them may share one call."""
        return path, depth

    def readouts(
        self, hiddens: Sequence[Tensor], cond: dict[str, Tensor], depths: Sequence[int], path: int = 0
    ) -> list[Tensor]:
        """Predictions at several depths of the same rows; backbones with one shared head may batch them."""
        return [self.readout(h, cond, d, path) for h, d in zip(hiddens, depths, strict=True)]

    def readout_modules(self, depth: int, path: int = 0) -> nn.Module:
        """The modules of `readout` at this depth, to be copied as a head of their own; where the backbone has no
        readout (depths that are `readable` by heads of their own alone), new ones."""
        raise UsageError(f"{self.name} has no readout that could be copied for an exit at depth {depth}")

    def readout_with(
        self, head: nn.Module, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0
    ) -> Tensor:
        """`readout`, with a copy of `readout_modules` in place of the backbone's own."""
        raise NotImplementedError

    # What heads need to know of the hidden state; the defaults raise, a backbone with exits defines them.

    def tokens(self, hidden: Tensor, depth: int, path: int = 0) -> Tensor:
        """Image tokens [n, N, D] of the hidden state after `depth` blocks, row-major over the square grid."""
        raise NotImplementedError

    def width(self, depth: int, path: int = 0) -> int:
        """D of `tokens` at this depth."""
        raise NotImplementedError

    def patch(self, depth: int, path: int = 0) -> int:
        """Pixels per token side at this depth."""
        raise NotImplementedError

    def assemble(self, tokens: Tensor, channels: int, depth: int, path: int = 0) -> Tensor:
        """Tokens [n, N, p*p*channels] to an image [n, channels, H, W]; inside a token the order is (p1, p2, C)."""
        p = self.patch(depth, path)
        side = self.image_size // p
        grid = tokens.reshape(tokens.shape[0], side, side, p, p, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], channels, side * p, side * p)

    @property
    def time_width(self) -> int:
        """D of `time_features`."""
        raise NotImplementedError

    def time_features(self, time: Tensor) -> Tensor:
        """Embedding [n, time_width] of the network-fed time, for heads that concatenate it."""
        raise NotImplementedError

    def predicts_error(self, depth: int, path: int = 0) -> bool:
        """Whether `uncertainty` is defined at this depth."""
        return self.has_uncertainty

    def uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        """Predicted error in [0, 1] after `depth` blocks: a map [n, C, H, W], or one number per row [n]."""
        raise NotImplementedError

    def mean_uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        """Mean of `uncertainty` over channels and pixels, [n]: what exit rules ask for."""
        values = self.uncertainty(hidden, time, depth, path)
        return values.flatten(1).mean(1) if values.ndim > 1 else values

    def uncertainties(
        self, hiddens: Sequence[Tensor], time: Tensor, depths: Sequence[int], path: int = 0
    ) -> list[Tensor]:
        """`uncertainty` at several depths of the same rows."""
        return [self.uncertainty(h, time, d, path) for h, d in zip(hiddens, depths, strict=True)]

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        """Conditioning of the unconditional branch for `num_rows` rows.

        Raises:
            UsageError: the backbone has no null condition, so it cannot be guided.
        """
        raise UsageError(f"guidance needs a null condition, and {self.name} (cond_kind={self.cond_kind}) has none")

    def set_null_context(self, context: Tensor) -> None:
        """Text features [L, D] of the empty string: the null condition of a text-conditional network. They are no
        weights and are set when those are loaded.

        Raises:
            UsageError: the network takes no text, or text of another shape.
        """
        raise UsageError(f"a null context needs a text model, and {self.name} has cond_kind={self.cond_kind}")

    def example_cond(self, num_rows: int, device: torch.device | str = "meta") -> Tensor | None:
        """Conditioning of the right kind and shape, for counting and warm-up."""
        if self.cond_kind == "none":
            return None
        if self.cond_kind == "class":
            return torch.zeros(num_rows, dtype=torch.int64, device=device)
        raise NotImplementedError(f"{self.name} must give an example of its {self.cond_kind} conditioning")

    def route(self, log_snr: Tensor) -> Tensor:
        """Path of each row by its noise level: host float64 [n] to host int64 [n]."""
        return torch.zeros(log_snr.shape, dtype=torch.int64)

    def check_timesteps(self, count: int | None, first: float, process: str) -> None:
        """Raises UsageError where parts of the network follow timesteps that the process of this name does not have: it
        has `count` of them (None: it is continuous), from `first` on."""

    def build_info(self) -> dict[str, Any]:
        """Numbers worth printing: blocks, exits, parameters."""
        return {
            "backbone": self.name,
            "blocks": len(self.blocks),
            "exits": [list(self.exits(p)) for p in range(len(self.paths))],
            "params": sum(p.numel() for p in self.parameters()),
        }


def check_text(network: Backbone, shape: tuple[int, int] | None, what: str) -> None:
    """Raises UsageError unless text features of this shape [L, D] (None: there are none) are what the network takes."""
    if network.cond_kind != "text":
        if shape is None:
            return
        raise UsageError(f"{network.name} takes no text (cond_kind={network.cond_kind}), and there are {what}")
    if shape is None:
        raise UsageError(
            f"{network.name} is conditioned on text, and {what} has no captions with features; encode images that have "
            "captions (gearshift encode data=coco), then data=caption_latents, or choose another backbone"
        )
    example = network.example_cond(1)
    assert example is not None
    wanted = tuple(example.shape[1:])
    if wanted != shape:
        raise UsageError(
            f"{network.name} is conditioned on text features of {wanted[0]} x {wanted[1]}, and {what} has features of "
            f"{shape[0]} x {shape[1]}; use the text encoder that the network was made for, or set "
            f"backbone.context_tokens={shape[0]} and backbone.context_dim={shape[1]}"
        )
