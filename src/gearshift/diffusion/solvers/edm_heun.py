"""Heun's method with churn, as EDM samples (Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2).

With s the ratio sigma / alpha and x in EDM's own frame x_0 + s eps, the slope dx/ds = (x - D) / s is eps itself, so
step i from level h_i to s_{i+1} is

    x'      = x + (s_{i+1} - h_i) eps(x; h_i),
    x_{i+1} = x + (s_{i+1} - h_i) (eps(x; h_i) + eps(x'; s_{i+1})) / 2,      the last step, to s_N = 0: x_{i+1} = x',

where churn has first raised x from s_i to h_i = (1 + gamma_i) s_i by fresh noise of standard deviation
S_noise sqrt(h_i^2 - s_i^2); gamma_i = min(S_churn / N, sqrt(2) - 1) where S_min <= s_i <= S_max, else 0. That noise is
drawn at the end of the step before, which therefore arrives at h_i; churn of the first step is part of the initial
noise (both are normal, so the distribution is the same).

N steps are 2 N - 1 calls. A call that is skipped hands in an eps from before: as the first of a step it is the slope to
begin with, as the second it leaves an Euler step. State, grid and slopes are float64, the network sees float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers.base import Call, Solver, State
from gearshift.diffusion.solvers.grids import check_steps, karras_levels, nearest_level
from gearshift.runtime.errors import UsageError

GREATEST_CHURN = math.sqrt(2) - 1
"""More would put in more noise than there is."""


@dataclass
class EDMHeunConfig:
    """Options of the solver.

    Attributes:
        steps: N; the network is called 2 N - 1 times.
        sigma_min, sigma_max, rho: of the grid; the ends are held within what the process visits.
        S_churn: how much noise is renewed over all steps, 0 is deterministic.
        S_min, S_max: ratios between which it is; S_max null is no limit.
        S_noise: standard deviation of the renewed noise.
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float | None = None
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            got = f"sigma_min={self.sigma_min} sigma_max={self.sigma_max}"
            raise UsageError(f"solver 'edm_heun' needs 0 < sigma_min < sigma_max, got {got}")
        if not self.rho > 0:
            raise UsageError(f"solver 'edm_heun' needs rho above 0, got rho={self.rho}")
        if not (self.S_churn >= 0 and self.S_noise >= 0):
            got = f"S_churn={self.S_churn} S_noise={self.S_noise}"
            raise UsageError(f"solver 'edm_heun' needs S_churn and S_noise of at least 0, got {got}")
        if self.S_max is not None and not self.S_min <= self.S_max:
            raise UsageError(f"solver 'edm_heun' needs S_min <= S_max, got S_min={self.S_min} S_max={self.S_max}")


@dataclass(frozen=True, kw_only=True)
class HeunCall(Call):
    """A call that also knows, as ratios, where its step begins and arrives, and the noise that follows it."""

    start: float
    stop: float
    spread: float


class EDMHeun(Solver):
    """Heun's method on the grid of EDM, on any process; ``State.x`` is float64 in the frame x_0 + s eps."""

    Config = EDMHeunConfig
    name = "edm_heun"
    sigma_frame = True

    def __init__(self, config: EDMHeunConfig) -> None:
        self.config = config
        self.stochastic = config.S_churn > 0

    def check(self, process: Process) -> None:
        check_steps(self.name, self.config.steps, process)
        low, high = (math.exp(-0.5 * process.log_snr(t).item()) for t in (process.t_min, process.t_max))
        if self.config.sigma_min >= high or self.config.sigma_max <= low:
            raise UsageError(
                f"solver {self.name!r} goes from sigma_max={self.config.sigma_max:g} to "
                f"sigma_min={self.config.sigma_min:g} but process {process.name!r} has sigma / alpha from {high:.4g} "
                f"to {low:.4g}; choose a range that meets it"
            )

    def calls(self, process: Process) -> tuple[Call, ...]:
        self.check(process)
        levels, raised = self._levels(process)
        # The level of each call, where its step begins and ends, and the level it leaves x at.
        visits: list[tuple[float, float, float, float]] = []
        for i, (start, stop) in enumerate(zip(raised, [*levels[1:], 0.0], strict=True)):
            visits.append((start, start, stop, stop))
            if stop > 0:
                visits.append((stop, start, stop, raised[i + 1]))
        ratios = [level for level, *_ in visits]
        times = process.time_of_log_snr(torch.tensor([_log_snr(ratio) for ratio in ratios], dtype=torch.float64))
        time, index = times.tolist(), process.training_index(times).tolist()
        following = [*time[1:], None]
        calls = []
        for k, (level, start, stop, left) in enumerate(visits):
            alpha, next_alpha = 1 / math.hypot(1.0, level), 1 / math.hypot(1.0, left)
            spread = self.config.S_noise * math.sqrt(max(left**2 - stop**2, 0.0))
            calls.append(
                HeunCall(
                    position=k,
                    step=k // 2,
                    substep=k % 2,
                    time=time[k],
                    next_time=following[k],
                    alpha=alpha,
                    sigma=level * alpha,
                    log_snr=_log_snr(level),
                    next_alpha=next_alpha,
                    next_sigma=left * next_alpha,
                    next_log_snr=_log_snr(left),
                    training_index=index[k],
                    needs_noise=spread > 0,
                    order=2 if stop > 0 else 1,
                    start=start,
                    stop=stop,
                    spread=spread,
                )
            )
        return tuple(calls)

    def _levels(self, process: Process) -> tuple[list[float], list[float]]:
        """The ratios of the grid, and where churn raises each of them to."""
        config = self.config
        levels = karras_levels(process, config.steps, config.rho, config.sigma_min, config.sigma_max)
        gamma = min(config.S_churn / config.steps, GREATEST_CHURN)
        limit = math.inf if config.S_max is None else config.S_max
        # Where training goes beyond the noisiest level that solvers visit (EDM), churn may too.
        beyond = process.cdf(process.t_max).item() < 1
        greatest = math.inf if beyond else math.exp(-0.5 * process.log_snr(process.t_max).item())
        raised = [
            nearest_level(process, min((1 + gamma) * level, greatest))
            if config.S_min <= level <= limit and gamma > 0
            else level
            for level in levels
        ]
        return levels, raised

    def begin(self, process: Process, noise: Tensor) -> State:
        self.check(process)
        levels, raised = self._levels(process)
        churned = self.config.S_noise**2 * max(raised[0] ** 2 - levels[0] ** 2, 0.0)
        return State(
            x=noise.to(torch.float64) * math.sqrt(levels[0] ** 2 + churned),
            history={"alpha": 1 / math.hypot(1.0, raised[0])},
        )

    def network_input(self, state: State, call: Call) -> Tensor:
        return (state.x * call.alpha).to(torch.float32)

    def result(self, state: State) -> Tensor:
        return (state.x * float(state.history["alpha"])).to(torch.float32)

    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        assert isinstance(call, HeunCall)
        slope, base = eps.to(torch.float64), state.x
        # `alpha` is for `result`, which has no call to look at.
        history: dict[str, Any] = {"alpha": call.next_alpha}
        if call.substep == 0:
            if call.order == 2:
                history |= {"base": base, "slope": slope}
        else:
            base, slope = state.history["base"], 0.5 * (state.history["slope"] + slope)
        x = torch.add(base, slope, alpha=call.stop - call.start)
        if noise is not None:
            x.add_(noise.to(torch.float64), alpha=call.spread)
        return x, history


def _log_snr(ratio: float) -> float:
    return -2 * math.log(ratio) if ratio > 0 else math.inf
