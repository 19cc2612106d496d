"""Singlestep DPM-Solver of orders 1 to 3 in noise prediction (Lu et al. 2022, arXiv 2206.00927, algorithms 1 and 2).

With l half the log-SNR, a step of length h = l_t - l_s calls the network at l_s + r h for r = 0, r_1, ..., where r_1 is
1/2 in order 2, and r_1, r_2 are 1/3, 2/3 in order 3. With e_0, e_1, ... the noise predictions there, the point at r is

    u(r) = (alpha_r / alpha_s) x_s - sigma_r (e^{r h} - 1) e_0 - sigma_r c (e_j - e_0),

where e_j is the latest prediction, c = 0 without one, c = (r / r_j) ((e^{r h} - 1) / (r h) - 1) in order 3, and
c = (e^h - 1) / (2 r_1) in order 2. Every network call is a call of its own with its own level, so N calls are N network
evaluations; each step begins anew from its x, and no history goes from step to step.

Orders of the steps of N calls, K = N // 3 + 1 (order 3): N mod 3 = 0: 3 x (K - 2), 2, 1; 1: 3 x (K - 1), 1; 2:
3 x (K - 1), 2. Order 2: 2 x (N // 2), and 1 where N is odd. These are the lists of section 3.4 there; the last orders
are not lowered any further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.diffusion.process import VPSDE, Process
from gearshift.diffusion.solvers.base import Call, Solver, State, affine, predict_x0
from gearshift.diffusion.solvers.grids import check_choice, check_steps
from gearshift.runtime.errors import UsageError

SPACINGS = ("log_snr", "time", "time_quadratic")
NODES = {1: (0.0,), 2: (0.0, 1 / 2), 3: (0.0, 1 / 3, 2 / 3)}
"""Where a step of each order calls the network, as parts of its length in log-SNR."""

FEW_CALLS = 15
"""Up to this many calls, the default end on a VP-SDE is further from the data, as the authors advise."""


@dataclass
class DPMSinglestepConfig:
    """Options of the solver.

    Attributes:
        steps: network calls (NFE), without the one of ``denoise``.
        order: highest order, 1 to 3.
        spacing: of the steps: ``log_snr`` (equal steps), or ``time`` (uniform in time) and ``time_quadratic`` (uniform
            in its square root), where a step of order k spans k of N parts. On processes that are not evenly timed, and
            on tables, "time" is the index, counted from 1.
        t_end: process time at which the solver ends. None is 1e-3 up to 15 calls and 1e-4 above on a VP-SDE, but not
            below its ``t_min``; elsewhere ``t_min``.
        denoise: one call more, at ``t_end``, whose data prediction is the result.
    """

    steps: int = 20
    order: int = 3
    spacing: str = "log_snr"
    t_end: float | None = None
    denoise: bool = False

    def __post_init__(self) -> None:
        check_choice("solver 'dpm_singlestep'", "spacing", self.spacing, SPACINGS)
        if self.order not in NODES:
            raise UsageError(f"solver 'dpm_singlestep' has orders 1, 2 and 3, got order={self.order}")


def step_orders(calls: int, order: int) -> list[int]:
    """Order of each step such that they make ``calls`` (at least 1) network calls."""
    whole, rest = divmod(calls, order)
    if order == 3 and rest == 0:
        return [3] * (whole - 1) + [2, 1]
    return [order] * whole + ([rest] if rest else [])


@dataclass(frozen=True, kw_only=True)
class SinglestepCall(Call):
    """A call that also knows half the log-SNRs between which its step goes."""

    start: float
    stop: float


class DPMSinglestep(Solver):
    """Singlestep DPM-Solver with ``steps`` calls; ends at ``t_end`` with its noise left, unless ``denoise``."""

    Config = DPMSinglestepConfig
    name = "dpm_singlestep"

    def __init__(self, config: DPMSinglestepConfig) -> None:
        self.config = config

    def check(self, process: Process) -> None:
        check_steps(self.name, self.config.steps, process)
        end = self.config.t_end
        lowest = 0.0 if process.continuous else process.t_min
        if end is not None and not (lowest <= end < process.t_max and math.isfinite(process.log_snr(end).item())):
            said = "above 0" if process.continuous else f"from {lowest:g}"
            raise UsageError(
                f"solver {self.name!r} would stop at t_end={end:g} but process {process.name!r} has times {said} "
                f"to {process.t_max:g}; choose t_end among them, or leave it unset"
            )

    def calls(self, process: Process) -> tuple[Call, ...]:
        self.check(process)
        orders = step_orders(self.config.steps, self.config.order)
        ends = self._ends(process, orders)
        nodes = [
            (step, substep, order, start + part * (stop - start), start, stop)
            for step, (order, start, stop) in enumerate(zip(orders, ends, ends[1:], strict=False))
            for substep, part in enumerate(NODES[order])
        ]
        if self.config.denoise:
            nodes.append((len(orders), 0, 1, ends[-1], ends[-1], math.inf))
        levels = [level for _, _, _, level, _, _ in nodes]
        following = [*levels[1:], nodes[-1][-1]]
        times = process.time_of_log_snr(2 * torch.tensor([*levels, ends[-1]], dtype=torch.float64))
        time, index = times.tolist(), process.training_index(times).tolist()
        calls = []
        for k, (step, substep, order, level, start, stop) in enumerate(nodes):
            alpha, sigma = _amplitudes(level)
            next_alpha, next_sigma = _amplitudes(following[k])
            calls.append(
                SinglestepCall(
                    position=k,
                    step=step,
                    substep=substep,
                    time=time[k],
                    next_time=None if following[k] == math.inf else time[k + 1],
                    alpha=alpha,
                    sigma=sigma,
                    log_snr=2 * level,
                    next_alpha=next_alpha,
                    next_sigma=next_sigma,
                    next_log_snr=2 * following[k],
                    training_index=index[k],
                    needs_noise=False,
                    order=order,
                    start=start,
                    stop=stop,
                )
            )
        return tuple(calls)

    def t_end(self, process: Process) -> float:
        """Process time at which the solver ends."""
        if self.config.t_end is not None:
            return self.config.t_end
        if isinstance(process, VPSDE):
            return max(1e-3 if self.config.steps <= FEW_CALLS else 1e-4, process.t_min)
        return process.t_min

    def _ends(self, process: Process, orders: list[int]) -> list[float]:
        """Half the log-SNR at the ends of the steps, noisiest first."""
        end, spacing = self.t_end(process), self.config.spacing
        if spacing == "log_snr":
            first, last = (0.5 * process.log_snr(t).item() for t in (process.t_max, end))
            return [first + (last - first) * k / len(orders) for k in range(len(orders) + 1)]
        by_time = process.continuous and process.evenly_timed
        first, last = (t if by_time else process.index_of_time(t).item() + 1 for t in (process.t_max, end))
        power = 2 if spacing == "time_quadratic" else 1
        high, low = first ** (1 / power), last ** (1 / power)
        passed = torch.tensor([sum(orders[:k]) for k in range(len(orders) + 1)], dtype=torch.float64) / sum(orders)
        points = (high + (low - high) * passed) ** power
        halves: list[float] = (0.5 * process.log_snr(points if by_time else process.time_of_index(points - 1))).tolist()
        return halves

    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        assert isinstance(call, SinglestepCall)
        if call.next_time is None:
            return predict_x0(state.x, eps, call), {}
        base, first = (state.x, eps) if call.substep == 0 else (state.history["base"], state.history["first"])
        parts = (*NODES[call.order], 1.0)
        here, there = parts[call.substep], parts[call.substep + 1]
        h = call.stop - call.start
        alpha, _ = _amplitudes(call.start)
        x = affine(base, call.next_alpha / alpha, first, -call.next_sigma * math.expm1(there * h))
        if call.substep > 0:
            if call.order == 2:
                weight = math.expm1(h) / (2 * here)
            else:
                weight = there / here * (math.expm1(there * h) / (there * h) - 1)
            x.add_(eps - first, alpha=-call.next_sigma * weight)
        return x, {} if call.substep + 1 == call.order else {"base": base, "first": first}


def _amplitudes(level: float) -> tuple[float, float]:
    """alpha and sigma at half the log-SNR ``level``, each with all its digits."""
    if level == math.inf:
        return 1.0, 0.0
    return 1 / math.hypot(1.0, math.exp(-level)), 1 / math.hypot(1.0, math.exp(level))
