"""The last predictions of every row, before guidance, and what a call that is skipped makes of them.

Held, a prediction makes one long step of DDIM or Euler; extrapolated over sigma / alpha, the variable in which both are
straight (arXiv 2010.02502, eq. 14), it makes the step of the two-step Adams-Bashforth method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gearshift.execution.stream import to_device


@dataclass(frozen=True, slots=True)
class Held:
    """The last prediction of every row, before guidance.

    Attributes:
        eps: [R, C, H, W].
        variance: [R, C, H, W], or None where the network predicts none.
        valid: which rows have one, host bool [R].
        ratio: sigma / alpha each was computed at, host float64 [R].
        earlier: the predictions before these; None unless they are kept.
    """

    eps: Tensor
    variance: Tensor | None
    valid: Tensor
    ratio: Tensor
    earlier: Held | None = None

    def two(self) -> Tensor:
        """Which rows hold two predictions of different levels, host bool [R]: those that can be extrapolated."""
        if self.earlier is None:
            return torch.zeros_like(self.valid)
        return self.valid & self.earlier.valid & (self.ratio != self.earlier.ratio)


def renewed(
    held: Held | None, eps: Tensor, variance: Tensor | None, called: Tensor, ratio: float, keep_earlier: bool
) -> Held:
    """What is held after a call that evaluated the rows `called` (host bool [R]), whose eps [n, C, H, W] is given."""
    every = bool(called.all())
    index = None if every else called.nonzero().flatten()
    at = torch.full((len(called),), ratio, dtype=torch.float64)
    now = _merged(held, Held(eps, variance, called, at), index)
    if not keep_earlier or held is None:
        return now
    last = replace(held, earlier=None, variance=None)
    if every:
        return replace(now, earlier=last)
    assert index is not None
    device_index = to_device(index, eps.device)
    picked = Held(last.eps.index_select(0, device_index), None, called & last.valid, last.ratio)
    return replace(now, earlier=_merged(held.earlier, picked, index, replaces=called))


def forecast(held: Held, rows: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """eps [R, C, H, W] with those of `rows` (host bool [R]) extrapolated to `ratio`, and which of them were: those that
    hold two predictions of different levels. The others keep their last one."""
    before = held.earlier
    if before is None:
        return held.eps, torch.zeros_like(rows)
    apart = held.ratio - before.ratio
    able = rows & held.two()
    if not bool(able.any()):
        return held.eps, able
    weight = torch.where(able, (ratio - held.ratio) / torch.where(apart == 0, 1.0, apart), 0.0)
    moved = held.eps - before.eps
    if bool(able.all()) and bool((weight == weight[0]).all()):
        return torch.add(held.eps, moved, alpha=float(weight[0])), able
    factor = to_device(weight.to(held.eps.dtype), held.eps.device).view(-1, *[1] * (held.eps.ndim - 1))
    # Rows without two predictions may hold anything under `earlier`.
    mask = to_device(able, held.eps.device).view(factor.shape)
    return torch.where(mask, held.eps + factor * moved, held.eps), able


def _merged(held: Held | None, fresh: Held, index: Tensor | None, replaces: Tensor | None = None) -> Held:
    """Put fresh rows among the held ones; `fresh` has flags over all R rows, and tensors over those in `index`."""
    if index is None:
        return fresh
    total = len(fresh.valid)
    device_index = to_device(index, fresh.eps.device)

    def put(new: Tensor, old: Tensor | None) -> Tensor:
        base = new.new_zeros((total, *new.shape[1:])) if old is None else old
        return base.index_copy(0, device_index, new)

    variance = None if fresh.variance is None else put(fresh.variance, None if held is None else held.variance)
    eps = put(fresh.eps, None if held is None else held.eps)
    if held is None:
        return Held(eps, variance, fresh.valid, fresh.ratio)
    taken = fresh.valid if replaces is None else replaces
    valid = torch.where(taken, fresh.valid, held.valid)
    return Held(eps, variance, valid, torch.where(taken, fresh.ratio, held.ratio), held.earlier)
