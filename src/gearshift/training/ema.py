"""Exponential moving average of a network's weights, kept in fp32.

    shadow <- shadow + (1 - d) (weights - shadow),   d = decay, or min(decay, (1 + n) / (10 + n)) with warm-up

Only the network is averaged, never what helps to train it. The shadow starts as the weights (official U-ViT).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """The average of one network. It follows the device the network is on when it is made.

    Args:
        network: its parameters that learn are averaged; the others, and buffers, are as they are in the network.
        decay: in [0, 1).
        warmup: a shorter memory at the beginning, so that short runs do not remember their first weights.
    """

    def __init__(self, network: nn.Module, decay: float, *, warmup: bool = False) -> None:
        self.network, self.decay, self.warmup = network, decay, warmup
        self.updates = 0
        learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._names = list(learning)
        self._weights = list(learning.values())
        self._shadow = [p.detach().float().clone() for p in self._weights]
        self._raw: list[Tensor] | None = None  # the weights, while the network holds the average

    def current_decay(self) -> float:
        """d of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights; once after every optimiser step."""
        if self._raw is not None:
            raise RuntimeError("the average cannot move while the network holds it")
        weights = [w.detach() if w.dtype == torch.float32 else w.detach().float() for w in self._weights]
        torch._foreach_lerp_(self._shadow, weights, 1 - self.current_decay())
        self.updates += 1

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

    def load(self, average: Mapping[str, Tensor], updates: int) -> None:
        """Takes up an average that `average` gave after `updates` updates."""
        for name, shadow in zip(self._names, self._shadow, strict=True):
            shadow.copy_(average[name])
        self.updates = updates

    def _state(self, values: list[Tensor]) -> dict[str, Tensor]:
        # By identity, because a tied parameter has several names in a state dict and one in `named_parameters`.
        replaced = {id(weight): value for weight, value in zip(self._weights, values, strict=True)}
        state = self.network.state_dict(keep_vars=True)
        return {name: replaced.get(id(value), value.detach()) for name, value in state.items()}
