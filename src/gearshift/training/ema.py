"""Exponential moving average of a network's weights, kept in fp32.

    shadow <- shadow + (1 - d) (weights - shadow),   d = decay, or min(decay, (1 + n) / (10 + n)) with warm-up,
                                                     or 2^(-batch / half-life) (EDM, arXiv 2206.00364)

Only the network is averaged, never what helps to train it. The shadow starts as the weights (official U-ViT).

A parameter of a stage that few steps train changes in those steps only. Its average goes by the steps all the same, or
by its own clock (`own_clocks`): it then moves with each step in which the parameter got a gradient, and n and the
images of a half-life count those steps alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HalfLife:
    """A memory in images: d = 2^(-batch / min(images, ramp * images seen)), those before the step being seen.

    Attributes:
        images: half-life.
        batch: images of a step, over all processes.
        ramp: share of the images seen that the half-life is held to at the beginning; None: it is `images` at once.
    """

    images: float
    batch: int
    ramp: float | None = None

    def decay(self, updates: int) -> float:
        """d of the update after so many updates; 0 at the very first under a ramp, so the average is the weights."""
        images = self.images if self.ramp is None else min(self.images, self.ramp * updates * self.batch)
        return 0.5 ** (self.batch / images) if images > 0 else 0.0


class Ema:
    """The average of one network. It follows the device the network is on when it is made.

    Args:
        network: its parameters that learn are averaged; the others, and buffers, are as they are in the network.
        decay: in [0, 1), or from a half-life.
        warmup: a shorter memory at the beginning, so that short runs do not remember their first weights.
        own_clocks: an update moves the parameters that have a gradient, and counts for these alone.
    """

    def __init__(
        self, network: nn.Module, decay: float | HalfLife, *, warmup: bool = False, own_clocks: bool = False
    ) -> None:
        self.network, self.decay, self.warmup = network, decay, warmup
        self.updates = 0
        learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._names = list(learning)
        self._weights = list(learning.values())
        self._shadow = [p.detach().float().clone() for p in self._weights]
        self._raw: list[Tensor] | None = None  # the weights, while the network holds the average
        self._clocks = [0] * len(self._weights) if own_clocks else None

    def current_decay(self, updates: int | None = None) -> float:
        """d of the next update, or of the one after so many updates."""
        n = self.updates if updates is None else updates
        if isinstance(self.decay, HalfLife):
            return self.decay.decay(n)
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights; once after every optimiser step, before gradients are cleared."""
        if self._raw is not None:
            raise RuntimeError("the average cannot move while the network holds it")
        if self._clocks is None:
            self._move(self._shadow, self._weights, self.current_decay())
        else:
            together: dict[int, list[int]] = {}  # parameters by what their clocks say
            for number, weight in enumerate(self._weights):
                if weight.grad is not None:
                    together.setdefault(self._clocks[number], []).append(number)
                    self._clocks[number] += 1
            for updates, numbers in together.items():
                shadow, weights = ([tensors[k] for k in numbers] for tensors in (self._shadow, self._weights))
                self._move(shadow, weights, self.current_decay(updates))
        self.updates += 1

    @staticmethod
    def _move(shadow: list[Tensor], weights: Sequence[Tensor], decay: float) -> None:
        values = [w.detach() if w.dtype == torch.float32 else w.detach().float() for w in weights]
        torch._foreach_lerp_(shadow, values, 1 - decay)

    @contextlib.contextmanager
    def swap(self) -> Iterator[None]:
        """Within it the network computes with the average; `weights` and `average` stay what they are."""
        if self._raw is not None:
            raise RuntimeError("the network already holds the average")
        self._raw = [w.data for w in self._weights]
        for weight, shadow in zip(self._weights, self._shadow, strict=True):
            weight.data = shadow.to(weight.dtype)
        try:
            yield
        finally:
            for weight, raw in zip(self._weights, self._raw, strict=True):
                weight.data = raw
            self._raw = None

    def tensors(self) -> list[Tensor]:
        """The averaged tensors themselves, fp32."""
        return list(self._shadow)

    def weights(self) -> dict[str, Tensor]:
        """The network's own state dict, whichever weights it holds at the moment."""
        return self._state([w.data for w in self._weights] if self._raw is None else self._raw)

    def average(self) -> dict[str, Tensor]:
        """The state dict of the network with averaged weights in place of its own."""
        return self._state(self._shadow)

    def clocks(self) -> dict[str, int] | None:
        """Updates of each parameter, where they have clocks of their own."""
        return None if self._clocks is None else dict(zip(self._names, self._clocks, strict=True))

    def load(self, average: Mapping[str, Tensor], updates: int, clocks: Mapping[str, int] | None = None) -> None:
        """Takes up an average that `average` gave after `updates` updates, and what `clocks` gave."""
        for name, shadow in zip(self._names, self._shadow, strict=True):
            shadow.copy_(average[name])
        self.updates = updates
        if self._clocks is not None and clocks is not None:
            self._clocks = [clocks[name] for name in self._names]

    def _state(self, values: list[Tensor]) -> dict[str, Tensor]:
        # By identity, because a tied parameter has several names in a state dict and one in `named_parameters`.
        replaced = {id(weight): value for weight, value in zip(self._weights, values, strict=True)}
        state = self.network.state_dict(keep_vars=True)
        return {name: replaced.get(id(value), value.detach()) for name, value in state.items()}
