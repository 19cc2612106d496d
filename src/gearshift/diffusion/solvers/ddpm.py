"""DDPM ancestral sampling (Ho et al. 2020, arXiv 2006.11239, eq. 6-7), on any grid.

On a thinned grid the betas are those between visited levels (Nichol & Dhariwal 2021, arXiv 2102.09672, section 4).
Where the network predicts variance channels v, log variance is interpolated between the two fixed choices, eq. 15
there, with v = -1 at the small and v = 1 at the large one.
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

VARIANCES = ("fixed_small", "fixed_large")


@dataclass
class DDPMConfig:
    """``variance`` holds where the network predicts none: fixed_small is the posterior's, fixed_large is beta.

    ``clip_x0`` holds data predictions in [-1, 1].
    """

    steps: int = 250
    variance: str = "fixed_small"
    spacing: str = "linspace"
    clip_x0: bool = False

    def __post_init__(self) -> None:
        check_choice("solver 'ddpm'", "spacing", self.spacing, SPACINGS)
        check_choice("solver 'ddpm'", "variance", self.variance, VARIANCES)


class DDPM(Solver):
    """Ancestral sampling with ``steps`` calls; the last step draws no noise and arrives at the data."""

    Config = DDPMConfig
    name = "ddpm"
    stochastic = True

    def __init__(self, config: DDPMConfig) -> None:
        self.config = config

    def check(self, process: Process) -> None:
        check_steps(self.name, self.config.steps, process)

    def calls(self, process: Process) -> tuple[Call, ...]:
        self.check(process)
        return make_calls(process, time_grid(process, self.config.spacing, self.config.steps), stochastic=True)

    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        ratio = call.alpha / call.next_alpha
        beta = 1 - ratio**2
        small = beta * (call.next_sigma / call.sigma) ** 2
        x0_scale = beta * call.next_alpha / call.sigma**2
        x_scale = ratio * (call.next_sigma / call.sigma) ** 2
        x = state.x
        if self.config.clip_x0:
            following = affine(x, x_scale, predict_x0(x, eps, call, clip=True), x0_scale)
        else:
            following = affine(x, x_scale + x0_scale / call.alpha, eps, -x0_scale * call.sigma / call.alpha)
        if noise is not None:
            if variance is not None:
                low, high = math.log(small), math.log(beta)
                half_log = 0.5 * (low + (variance + 1) * (0.5 * (high - low)))  # log of the standard deviation
                following = following.addcmul_(half_log.exp_(), noise)
            else:
                fixed = small if self.config.variance == "fixed_small" else beta
                following.add_(noise, alpha=math.sqrt(fixed))
        return following, {}
