"""DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2), whose history may differ from sample to sample.

With l half the log-SNR, D the data prediction at level b and P the one before it at level p, the step to level t is

    x_t = (sigma_t / sigma_b) x_b + alpha_t (1 - e^-h) (D + h / (2 (l_b - l_p)) (D - P)),    h = l_t - l_b.

A call that reuses an earlier prediction adds nothing that was computed. Under ``history="computed"`` such a step
therefore starts again from the last computed point b of its sample: what a sample has gone through is then exactly 2M
on the grid of its own computed points, with their true spacing (the first call always counts as computed). Under
``history="all"`` the reused noise is turned into a data prediction at the current point, which enters the history
like any other, as it happens when a scheduler is not told.

Where predictions come from changing depths, D - P also holds the difference between two networks. Under
``restart_at_switch`` the step of a call at a new depth leaves P out, as if the run began there: first order, and second
again from the next call on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers.base import Call, Solver, State, make_calls
from gearshift.diffusion.solvers.grids import SPACINGS, check_choice, check_steps, time_grid
from gearshift.runtime.errors import UsageError

HISTORIES = ("computed", "all")
FEW_STEPS = 15
"""Below this many steps ``lower_order_final`` acts, as in the official code."""

Level = float | Tensor
"""A number that is the same for all samples (host float), or one per sample (float64 [B] on the device)."""


@dataclass
class DPMpp2MConfig:
    """Options of the solver.

    Attributes:
        steps: network calls.
        spacing: ``log_snr`` (uniform in log-SNR), ``linspace`` (uniform in time) or ``trailing``.
        to_data: whether the last step goes to the data (always first order) or stops at ``t_end``, as the U-ViT code
            does.
        t_end: last noisy time of the log_snr and linspace grids, in process time; None is the process's own.
        lower_order_final: below 15 steps, make the last step first order.
        history: ``computed`` or ``all``, see the module.
        clip_x0: hold data predictions in [-1, 1].
        restart_at_switch: start the history again where the depth changes.
    """

    steps: int = 25
    spacing: str = "log_snr"
    to_data: bool = True
    t_end: float | None = None
    lower_order_final: bool = True
    history: str = "computed"
    clip_x0: bool = False
    restart_at_switch: bool = False

    def __post_init__(self) -> None:
        check_choice("solver 'dpmpp_2m'", "spacing", self.spacing, SPACINGS)
        check_choice("solver 'dpmpp_2m'", "history", self.history, HISTORIES)
        if self.spacing in ("trailing", "leading") and (self.t_end is not None or not self.to_data):
            raise UsageError(
                f"solver 'dpmpp_2m': spacing {self.spacing!r} has no t_end and always goes to the data; "
                "take spacing=log_snr or linspace, or leave t_end unset and to_data=true"
            )


class DPMpp2M(Solver):
    """Second-order multistep solver in data prediction with ``steps`` calls."""

    Config = DPMpp2MConfig
    name = "dpmpp_2m"

    def __init__(self, config: DPMpp2MConfig) -> None:
        self.config = config
        self.restart_at_switch = config.restart_at_switch

    def check(self, process: Process) -> None:
        check_steps(self.name, self.config.steps, process)
        end = self.config.t_end
        possible = end is None or (end > 0 if process.continuous else end >= process.t_min)
        if end is not None and not (possible and end < process.t_max):
            lowest = "above 0" if process.continuous else f"from {process.t_min:g}"
            raise UsageError(
                f"solver {self.name!r} would stop at t_end={end:g} but process {process.name!r} has times {lowest} "
                f"to {process.t_max:g}; choose t_end among them, or leave it unset"
            )

    def calls(self, process: Process) -> tuple[Call, ...]:
        self.check(process)
        config = self.config
        steps = config.steps
        times = time_grid(process, config.spacing, steps if config.to_data else steps + 1, config.t_end)
        end = None if config.to_data else times.pop()
        orders = [2] * steps
        orders[0] = 1  # nothing to look back to
        if config.to_data or (config.lower_order_final and steps < FEW_STEPS):
            orders[-1] = 1
        return make_calls(process, times, end, orders=orders)

    def _restarted(self, state: State, switched: bool | Tensor) -> State:
        if not state.history:
            return state
        # A sample that switched has a fresh prediction, so this level is only looked at as the one before: at -inf,
        # the slope counts for nothing.
        level = _choose(switched, -math.inf, state.history["level"])
        return replace(state, history={**state.history, "level": level})

    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        old = state.history
        x, level, before, before_level = state.x, 0.5 * call.log_snr, torch.zeros_like(state.x), -math.inf
        history: dict[str, Any]
        if not old:
            history = {"x": x, "level": level, "before": before, "before_level": before_level}
        else:
            if self.config.history == "all":
                fresh = True
            # A sample with a fresh prediction moves its base point here; one without stays where it was.
            history = {
                "x": _choose(fresh, x, old["x"]),
                "level": _choose(fresh, level, old["level"]),
                "before": _choose(fresh, old["x0"], old["before"]),
                "before_level": _choose(fresh, old["level"], old["before_level"]),
            }
        base, base_level = history["x"], history["level"]
        base_alpha, base_sigma = _amplitudes(base_level)
        x0 = (base - _rows(base_sigma, x) * eps) / _rows(base_alpha, x)
        if self.config.clip_x0:
            x0 = x0.clamp(-1, 1)
        history["x0"] = x0

        h = 0.5 * call.next_log_snr - base_level
        direction = x0
        if call.order > 1:
            # Before the second computed point `before_level` is -inf, so the slope counts for nothing.
            slope = 0.5 * h / (base_level - history["before_level"])
            direction = x0 + _rows(slope, x) * (x0 - history["before"])
        following = _rows(call.next_sigma / base_sigma, x) * base + _rows(-call.next_alpha * _expm1(-h), x) * direction
        return following, history


def _choose(fresh: bool | Tensor, new: Any, old: Any) -> Any:
    """``new`` where fresh, else ``old``: tensors [B, ...] or levels."""
    if isinstance(fresh, bool):
        return new if fresh else old
    if isinstance(new, Tensor) and new.ndim > 1:
        return torch.where(fresh.view(-1, *([1] * (new.ndim - 1))), new, old)
    # torch.full fills on the device; torch.tensor would copy from the host and wait.
    new, old = (
        v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=fresh.device) for v in (new, old)
    )
    return torch.where(fresh, new, old)


def _amplitudes(level: Level) -> tuple[Level, Level]:
    """alpha and sigma at lambda = ``level``."""
    if isinstance(level, Tensor):
        return torch.sigmoid(2 * level).sqrt(), torch.sigmoid(-2 * level).sqrt()
    return 1 / math.sqrt(1 + math.exp(-2 * level)), 1 / math.sqrt(1 + math.exp(2 * level))


def _expm1(value: Level) -> Level:
    return torch.expm1(value) if isinstance(value, Tensor) else math.expm1(value)


def _rows(value: Level, like: Tensor) -> Level:
    """A level as a factor of ``like`` [B, ...]."""
    return value.to(like.dtype).view(-1, *([1] * (like.ndim - 1))) if isinstance(value, Tensor) else value
