"""The schedulers of the `diffusers` library as solvers: breadth behind one adapter.

A scheduler object changes as it steps. Here it is only a template: for each call a shallow copy takes up the state of
the run, steps once, and whatever attributes the step has changed are the new state. So a solver object holds no run,
two batches cannot leak into each other, and any run can be saved. What sets the classes apart is in
``scheduler_classes``, and ``scheduler_build`` makes the template.

Noise levels come from the process, mostly as a table of betas; entry i of the table is process time
``time_of_index(i)``, which carries the +1 of latent U-ViT and the (i + 1) / 1000 of the continuous VP-SDE. A class may
call its times what it likes: every call says its noise level and its training index, and the network is fed the process
time that belongs to them. Timesteps and sigmas stay on the host, and the position is set, not searched, so a step asks
nothing of the device (UniPC alone copies a few scalars to it).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers.base import Call, Solver, State
from gearshift.diffusion.solvers.grids import check_steps
from gearshift.diffusion.solvers.scheduler_build import DiffusersConfig, build_scheduler, own_grid, quiet
from gearshift.diffusion.solvers.scheduler_classes import SCHEDULERS
from gearshift.runtime.errors import UsageError

LONGEST_HISTORY = 4
"""No class looks further back than this many outputs, but one keeps them all."""


@dataclass(frozen=True, kw_only=True)
class SchedulerCall(Call):
    """A call that also knows the process whose table its scheduler was built from."""

    process: Process = field(repr=False, compare=False)


class DiffusersSolver(Solver):
    """A `diffusers` scheduler under ε-prediction, in this project's terms."""

    Config = DiffusersConfig

    def __init__(self, config: DiffusersConfig) -> None:
        self.config = config
        self.name = f"diffusers:{config.scheduler}"
        self.traits = SCHEDULERS[config.scheduler]
        self.sigma_frame = self.traits.sigma_frame
        self.options = dict(config.options)
        self.stochastic = str(self.options.get("algorithm_type", "")).startswith("sde-")
        self.restart_at_switch = config.restart_at_switch
        self._templates: dict[Process, Any] = {}

    def check(self, process: Process) -> None:
        check_steps(self.name, self.config.steps, process)
        if self.config.steps > process.num_steps:
            raise UsageError(
                f"solver {self.name!r} asks for steps={self.config.steps} but works on a table of {process.num_steps} "
                f"noise levels made from process {process.name!r}; set steps to at most {process.num_steps}"
            )
        self._template(process)

    def calls(self, process: Process) -> tuple[Call, ...]:
        self.check(process)
        scheduler = self._template(process)
        # The timestep is what the network is fed, fraction or not; the noise level is the scheduler's own sigma. The
        # two agree up to how the class interpolates between table entries.
        levels = self.traits.levels(scheduler)
        times = self._times(process, scheduler, levels)
        time, index = times.tolist(), process.training_index(times).tolist()
        amplitudes = [_level(sigma) for sigma in levels]
        following: list[float | None] = [*time[1:], None]
        if levels[-1] > 0:
            following[-1] = process.time_of_log_snr(amplitudes[-1][2]).item()
        return tuple(
            SchedulerCall(
                position=i,
                step=step,
                substep=substep,
                time=time[i],
                next_time=following[i],
                alpha=amplitudes[i][0],
                sigma=amplitudes[i][1],
                log_snr=amplitudes[i][2],
                next_alpha=amplitudes[i + 1][0],
                next_sigma=amplitudes[i + 1][1],
                next_log_snr=amplitudes[i + 1][2],
                training_index=index[i],
                needs_noise=self.stochastic and levels[i + 1] > 0,
                order=order,
                process=process,
            )
            for i, (step, substep, order) in enumerate(self.traits.steps(scheduler))
        )

    def begin(self, process: Process, noise: Tensor) -> State:
        self.check(process)
        scheduler = self._template(process)
        return State(x=noise.to(torch.float32) * float(scheduler.init_noise_sigma))

    def network_input(self, state: State, call: Call) -> Tensor:
        return state.x * call.alpha if self.traits.sigma_frame else state.x

    def result(self, state: State) -> Tensor:
        return state.x * float(state.history["alpha"]) if self.traits.sigma_frame else state.x

    def _restarted(self, state: State, switched: bool | Tensor) -> State:
        if isinstance(switched, Tensor):
            raise UsageError(
                f"solver {self.name!r} keeps one history for all samples, but only some of them switched depth; "
                "restart_at_switch needs a policy that switches them together, or solver=dpmpp_2m"
            )
        if not switched or not state.history:
            return state
        # What the state does not name is as in the template, that is, as before the first call.
        kept = {key: value for key, value in state.history["scheduler"].items() if key not in self.traits.memory}
        return replace(state, history={**state.history, "scheduler": kept})

    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        assert isinstance(call, SchedulerCall)
        template = self._template(call.process)
        scheduler = _resumed(template, state.history.get("scheduler", {}), self.traits.grown_in_place)
        arguments: dict[str, Any] = {}
        if self.stochastic and self.traits.noise_argument is not None:
            arguments[self.traits.noise_argument] = torch.zeros_like(eps) if noise is None else noise
        output = eps
        if self.traits.output is not None:
            of_x, of_eps = self.traits.output(scheduler, call.sigma, call.alpha)
            output = (state.x * of_x).add_(eps, alpha=of_eps)
        timestep = scheduler.timesteps[call.position]
        scheduler.scale_model_input(state.x, timestep)  # some classes insist on it; network_input gives its value
        with quiet() if self.traits.warns else nullcontext():
            x = scheduler.step(output, timestep, state.x, return_dict=False, **arguments)[0]
        # `alpha` is for `result`, which has no call to look at.
        return x, {"scheduler": _changes(template, scheduler), "alpha": call.next_alpha}

    def _times(self, process: Process, scheduler: Any, levels: list[float]) -> Tensor:
        """Process times of the calls, float64."""
        if self.traits.made_from == "betas":
            return process.time_of_index(scheduler.timesteps.to(torch.float64))
        if self.config.spacing == "class":
            log_snr = [_level(sigma)[2] for sigma in levels[:-1]]
            return process.time_of_log_snr(torch.tensor(log_snr, dtype=torch.float64))
        return own_grid(self.config, process)

    def _template(self, process: Process) -> Any:
        """The scheduler for this process at its start, built once and never stepped."""
        if process not in self._templates:
            self._templates[process] = build_scheduler(self.config, process)
        return self._templates[process]


def _level(sigma: float) -> tuple[float, float, float]:
    """alpha, sigma and log-SNR in the VP frame at noise-to-signal ratio ``sigma``."""
    alpha = 1 / math.sqrt(1 + sigma**2)
    return alpha, sigma * alpha, -2 * math.log(sigma) if sigma > 0 else math.inf


def _resumed(template: Any, changes: Mapping[str, Any], grown_in_place: tuple[str, ...]) -> Any:
    """A copy of ``template`` that shares its tables, brought to where a run stands."""
    scheduler = copy.copy(template)
    for name, value in {**vars(template), **changes}.items():
        # Schedulers shift their lists of past outputs in place, so each copy needs its own.
        if isinstance(value, list):
            value = list(value)
        elif name in grown_in_place and isinstance(value, Tensor):
            value = value.clone()
        setattr(scheduler, name, value)
    return scheduler


def _changes(template: Any, scheduler: Any) -> dict[str, Any]:
    """The attributes in which ``scheduler`` differs from its template."""
    start = vars(template)
    return {
        key: value[-LONGEST_HISTORY:] if isinstance(value, list) else value
        for key, value in vars(scheduler).items()
        if key not in start or not _same(value, start[key])
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, int | float) and isinstance(b, int | float) and a == b)
