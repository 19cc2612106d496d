"""Where a run reaches into a model: hooks before blocks, which compute, keep, give back or pass by as they are told.

Everything is decided outside, before the model is called; a port only looks at its mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gearshift.integrations.diffusers import trees
from gearshift.integrations.diffusers.compat import Hook, Passed

Shapes = dict[tuple[int, ...], tuple[int, Any]]
"""Outputs of a module on the meta device, by the shape of what it was given without its first dimension, which is told
beside them: outputs of fewer rows are shorter in proportion."""
RUN, KEEP, GIVE, IDLE, PASS = range(5)
"""Compute; compute and keep the output; give back what was kept; give anything of the right shape, which nobody reads;
return what was given."""


class Port(Hook):
    """Before one module.

    Attributes:
        mode: what the next call does.
        kept: output of the last call that was told to keep it.
        given: tensors of an output to give back.
        shapes: of the outputs that were computed.
        learns: take down `shapes`.
        copies: what is kept and given are tensors of their own, because what follows may write into them.
    """

    def __init__(self, shapes: Shapes, passed: Passed | None = None, copies: bool = True) -> None:
        super().__init__()
        self.mode = RUN
        self.kept: Any = None
        self.given: tuple[Tensor, ...] = ()
        self.shapes = shapes
        self.learns = False
        self.copies = copies
        self._passed = passed

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.mode == PASS:
            assert self._passed is not None  # only such ports are told to
            return self._passed(args, kwargs)
        first = next(trees.tensors([*args, kwargs]))
        length, like = self.shapes.get(tuple(first.shape[1:]), (0, None))
        if self.mode == GIVE and length:
            return trees.refilled(like, iter([t.clone() for t in self.given] if self.copies else self.given))
        if self.mode == IDLE and length:
            share = first.shape[0] / length
            return trees.mapped(like, lambda one: filler(one, first.device, round(one.shape[0] * share)))
        output = self.inner(*args, **kwargs)
        if self.mode == KEEP:
            self.kept = trees.copied(output) if self.copies else output
        if self.learns or self.mode == KEEP:
            self.shapes[tuple(first.shape[1:])] = first.shape[0], trees.describing(output)
        return output


def filler(like: Tensor, device: torch.device, length: int | None = None) -> Tensor:
    """A tensor that nobody reads, of another length in its first dimension if one is given."""
    shape = like.shape if length is None else (length, *like.shape[1:])
    return torch.empty(shape, dtype=like.dtype, device=device)
