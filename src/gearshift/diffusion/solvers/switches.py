"""How visible a switch of depth is in a run: multistep solvers extrapolate over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.diffusion.solvers.base import Call


@dataclass(frozen=True)
class Switch:
    """A call at another depth than the one before it.

    Attributes:
        position: of the call at the new depth.
        before, after: the two depths.
        jump: how fast the data prediction changes into this call, relative to how fast it changes between its nearest
            neighbours on both sides that have one depth: 1 is invisible. NaN without such neighbours.
    """

    position: int
    before: int
    after: int
    jump: float


def switches(calls: Sequence[Call], x0: Sequence[Tensor], depths: Sequence[int]) -> list[Switch]:
    """Switches of a recorded run.

    The rate of change into a call is the root mean square of the difference of the two data predictions, over the
    difference of their log-SNRs; calls at one level (the stages of a step) have none.

    Args:
        calls: of the run.
        x0: data prediction of each call, [B, C, H, W].
        depths: blocks run at each call; 0 where it was not computed, which switches nothing.

    Raises:
        ValueError: the three do not have one entry per call.
    """
    if not len(calls) == len(x0) == len(depths):
        raise ValueError(f"{len(calls)} calls, {len(x0)} predictions and {len(depths)} depths; one per call is needed")
    effective: list[int] = []
    for depth in depths:
        effective.append(depth or (effective[-1] if effective else 0))
    rates, switched = [math.nan], [False]
    for k in range(1, len(calls)):
        apart = abs(calls[k].log_snr - calls[k - 1].log_snr)
        change = torch.sub(x0[k], x0[k - 1]).double().square().mean().sqrt().item()
        rates.append(change / apart if apart > 0 else math.nan)
        switched.append(effective[k] != effective[k - 1])
    plain = [k for k, rate in enumerate(rates) if not switched[k] and not math.isnan(rate)]
    found = []
    for k in range(1, len(calls)):
        if switched[k]:
            sides = [[j for j in plain if j < k][-1:], [j for j in plain if j > k][:1]]
            around = [rates[j] for side in sides for j in side]
            usual = sum(around) / len(around) if around else math.nan
            jump = rates[k] / usual if usual else math.inf
            found.append(Switch(k, effective[k - 1], effective[k], jump))
    return found
