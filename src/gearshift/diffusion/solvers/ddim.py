"""DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16), on any grid.

Each step goes from the level of its call to the level of the next call, whatever the spacing, so it is right on
linspace grids, where deriving the previous index from a constant stride is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers.base import Call, Solver, State, affine, make_calls, predict_x0
from gearshift.diffusion.solvers.grids import SPACINGS, check_choice, check_steps, time_grid
from gearshift.runtime.errors import UsageError


@dataclass
class DDIMConfig:
    """``eta``: 0 is deterministic, 1 has ancestral sampling's noise. ``clip_x0`` holds data predictions in [-1, 1]."""

    steps: int = 50
    eta: float = 0.0
    spacing: str = "linspace"
    clip_x0: bool = False

    def __post_init__(self) -> None:
        check_choice("solver 'ddim'", "spacing", self.spacing, SPACINGS)
        if not 0 <= self.eta <= 1:
            raise UsageError(f"solver 'ddim' needs eta between 0 and 1, got eta={self.eta}")


class DDIM(Solver):
    """DDIM with ``steps`` calls; the last step arrives at the data."""

    Config = DDIMConfig
    name = "ddim"

    def __init__(self, config: DDIMConfig) -> None:
        self.config = config
        self.stochastic = config.eta > 0

    def check(self, process: Process) -> None:
        check_steps(self.name, self.config.steps, process)

    def calls(self, process: Process) -> tuple[Call, ...]:
        self.check(process)
        times = time_grid(process, self.config.spacing, self.config.steps)
        return make_calls(process, times, stochastic=self.stochastic)

    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        ratio = call.alpha / call.next_alpha
        spread = self.config.eta * call.next_sigma / call.sigma * math.sqrt(max(1 - ratio**2, 0.0))
        direction = math.sqrt(max(call.next_sigma**2 - spread**2, 0.0))
        x = state.x
        if self.config.clip_x0:
            x0 = predict_x0(x, eps, call, clip=True)
            eps = (x - call.alpha * x0) / call.sigma  # the noise that belongs to the clipped prediction
            following = affine(x0, call.next_alpha, eps, direction)
        else:
            following = affine(x, 1 / ratio, eps, direction - call.sigma / ratio)
        if noise is not None:
            following.add_(noise, alpha=spread)
        return following, {}
