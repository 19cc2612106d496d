"""The calls of a scheduler of `diffusers` as policies see them: where each stands between noise and data."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gearshift.diffusion.solvers.base import Call
from gearshift.diffusion.solvers.scheduler_classes import SCHEDULERS
from gearshift.runtime.errors import UsageError

SIGMA_FRAME = ("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler")
"""Classes that step in x_0 + s eps and that `SCHEDULERS` does not describe."""
HELD = {"epsilon": "eps", "v_prediction": "v", "flow_prediction": "velocity", "sample": "x0"}
SMALLEST = 1e-12


@dataclass(frozen=True)
class Timeline:
    """The calls of a run, and what their numbers mean; the fields are those of `policies.base.RunInfo`."""

    calls: tuple[Call, ...]
    sigma_frame: bool
    held: str


def timeline(scheduler: Any, first: int = 0) -> Timeline:
    """The calls of a scheduler whose timesteps are set, from position `first` on.

    Raises:
        UsageError: the class says nothing of its noise levels that is understood.
    """
    scheduler = _on_host(scheduler)
    times: list[float] = scheduler.timesteps.double().tolist()
    flow = is_flow(scheduler)
    amplitudes = [_of_flow(s) if flow else _of_ratio(s) for s in _levels(scheduler, len(times))]
    size = float(scheduler.config.get("num_train_timesteps", 1000))
    calls = []
    for position in range(first, len(times)):
        (alpha, sigma, log_snr), (next_alpha, next_sigma, next_log_snr) = amplitudes[position : position + 2]
        calls.append(
            Call(
                position=position - first,
                step=position - first,
                time=times[position],
                next_time=times[position + 1] if position + 1 < len(times) else None,
                alpha=alpha,
                sigma=sigma,
                log_snr=log_snr,
                next_alpha=next_alpha,
                next_sigma=next_sigma,
                next_log_snr=next_log_snr,
                training_index=times[position] * 999 / max(size - 1, 1),
                needs_noise=False,
            )
        )
    return Timeline(tuple(calls), *meaning(scheduler))


def meaning(scheduler: Any) -> tuple[bool, str]:
    """In which frame a scheduler steps, and what its model predicts: `sigma_frame` and `held` of a `RunInfo`."""
    if is_flow(scheduler):
        return False, "velocity"
    name = type(scheduler).__name__
    known = SCHEDULERS.get(name)
    held = HELD.get(scheduler.config.get("prediction_type", "epsilon"), "eps")
    return known.sigma_frame if known else name in SIGMA_FRAME, held


def is_flow(scheduler: Any) -> bool:
    """Whether its model predicts the velocity of (1 - sigma) x_0 + sigma eps."""
    config = scheduler.config
    named = "FlowMatch" in type(scheduler).__name__
    return named or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"


def _on_host(scheduler: Any) -> Any:
    """A view of a scheduler whose tensors lie on the host: its timesteps may lie on a device, its tables do not."""
    view = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            setattr(view, name, value.cpu())
    return view


def _levels(scheduler: Any, count: int) -> list[float]:
    """Sigma of flow matching, elsewhere sigma / alpha, at each call and after the last."""
    name = type(scheduler).__name__
    if name in SCHEDULERS and not is_flow(scheduler):
        return SCHEDULERS[name].levels(scheduler)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == count + 1:
        return [float(sigma) for sigma in sigmas]
    table = getattr(scheduler, "alphas_cumprod", None)
    steps = getattr(scheduler, "num_inference_steps", None)
    if table is None or not steps:
        raise UsageError(
            f"scheduler {name} has neither sigmas nor a table of alphas for its {count} timesteps, so nothing says at "
            "which noise levels its calls are; take another scheduler (DDIM, Euler, DPM-Solver++, flow matching)"
        )
    bars = [float(table[int(time)]) for time in scheduler.timesteps]
    last = int(scheduler.timesteps[-1]) - len(table) // int(steps)
    end = float(table[last]) if last >= 0 else float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return [math.sqrt(max(1 - bar, 0.0) / max(bar, SMALLEST)) for bar in (*bars, end)]


def _of_ratio(ratio: float) -> tuple[float, float, float]:
    alpha = 1 / math.hypot(1.0, ratio)
    return alpha, ratio * alpha, -2 * math.log(ratio) if ratio > 0 else math.inf


def _of_flow(sigma: float) -> tuple[float, float, float]:
    alpha = 1 - sigma
    if sigma <= 0:
        return 1.0, 0.0, math.inf
    return alpha, sigma, 2 * math.log(alpha / sigma) if alpha > 0 else -math.inf
