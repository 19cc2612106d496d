"""Euler-Maruyama on the reverse VP-SDE (Song et al. 2021, arXiv 2011.13456, eq. 6), as the pixel U-ViT samples.

Times are {0} and linspace(1e-3, 1, N): N + 1 points and N network calls. One step from t to s < t, with the
score -eps / sigma and D = t - s, is

    x_s = (1 + beta D / 2) x_t - (beta D / sigma) eps + sqrt(beta D) z,        z = 0 in the last step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gearshift.diffusion.process import VPSDE, Process
from gearshift.diffusion.solvers.base import Call, Solver, State, affine, make_calls
from gearshift.diffusion.solvers.grids import check_steps, time_grid
from gearshift.runtime.errors import UsageError


@dataclass
class EulerMaruyamaConfig:
    """``t_end`` is the time of the last network call; the step after it goes on to 0."""

    steps: int = 1000
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.t_end < 1:
            raise UsageError(f"solver 'euler_maruyama' needs t_end between 0 and 1, got t_end={self.t_end}")


@dataclass(frozen=True, kw_only=True)
class SDECall(Call):
    """A call that also knows beta (t - s): how much noise the forward SDE puts in between this time and the next."""

    diffusion: float


class EulerMaruyama(Solver):
    """Euler-Maruyama with ``steps`` calls; needs a VPSDE."""

    Config = EulerMaruyamaConfig
    name = "euler_maruyama"
    stochastic = True

    def __init__(self, config: EulerMaruyamaConfig) -> None:
        self.config = config

    def check(self, process: Process) -> None:
        if not isinstance(process, VPSDE):
            raise UsageError(
                f"solver {self.name!r} integrates the reverse VP-SDE but the process is {process.name!r}; "
                "take solver=ddpm, or process=vp_sde"
            )
        check_steps(self.name, self.config.steps, process)

    def calls(self, process: Process) -> tuple[Call, ...]:
        self.check(process)
        assert isinstance(process, VPSDE)
        times = time_grid(process, "linspace", self.config.steps, self.config.t_end)
        calls = make_calls(process, times, stochastic=True)
        return tuple(
            SDECall(**vars(call), diffusion=process.beta(call.time).item() * (call.time - (call.next_time or 0.0)))
            for call in calls
        )

    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        assert isinstance(call, SDECall)
        x = affine(state.x, 1 + 0.5 * call.diffusion, eps, -call.diffusion / call.sigma)
        if noise is not None:
            x.add_(noise, alpha=math.sqrt(call.diffusion))
        return x, {}
