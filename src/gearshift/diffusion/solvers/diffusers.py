"""The schedulers of the `diffusers` library as solvers: breadth behind one adapter.

A scheduler object changes as it steps. Here it is only a template: for each call a shallow copy takes up the state of
the run, steps once, and whatever attributes the step has changed are the new state. So a solver object holds no run,
two batches cannot leak into each other, and any run can be saved. Nothing in this depends on which attributes a class
has.

Noise levels come from the process, as a table of betas; entry i of the table is process time ``time_of_index(i)``,
which carries the +1 of latent U-ViT and the (i + 1) / 1000 of the continuous VP-SDE. Timesteps and sigmas stay on the
host, and the position is set, not searched, so a step asks nothing of the device (UniPC alone copies a few scalars to
it).
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers.base import Call, Solver, State
from gearshift.diffusion.solvers.grids import check_choice, check_steps, index_grid
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class Traits:
    """What the adapter must know of a scheduler class beyond its constructor.

    Attributes:
        sigma_frame: whether its x is x_0 + sigma eps (else alpha x_0 + sigma eps).
        custom_timesteps: whether ``set_timesteps`` takes a list of them, which spacing ``inclusive`` needs.
        noise_argument: how ``step`` is given the noise of its stochastic variants, if it has any.
    """

    sigma_frame: bool = False
    custom_timesteps: bool = True
    noise_argument: str | None = None


SCHEDULERS = {
    "DPMSolverMultistepScheduler": Traits(noise_argument="variance_noise"),
    "EulerDiscreteScheduler": Traits(sigma_frame=True),
    "UniPCMultistepScheduler": Traits(custom_timesteps=False),
}
SPACINGS = ("linspace", "trailing", "leading", "inclusive")
FROM_PROCESS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "variance_type",
    "timestep_spacing",
    "timestep_type",
    "steps_offset",
    "use_flow_sigmas",
}
"""Constructor arguments that are not options, because the process, the spacing or the ε-prediction settles them."""


@dataclass
class DiffusersConfig:
    """A scheduler class and how it is used.

    Attributes:
        scheduler: class name in ``diffusers.schedulers``.
        steps: number of steps.
        spacing: the class's own ``linspace``, ``trailing`` or ``leading`` (they differ between classes), or
            ``inclusive``: round(linspace(0, T-1, steps)), both ends visited, for classes that take a list of
            timesteps.
        options: further constructor arguments, such as ``solver_order`` or ``use_karras_sigmas``.
    """

    scheduler: str = "DPMSolverMultistepScheduler"
    steps: int = 25
    spacing: str = "linspace"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scheduler == "DDIMScheduler":
            raise UsageError(
                f"scheduler 'DDIMScheduler' (spacing {self.spacing!r}) is not offered: it derives each step from a "
                "constant stride and is wrong on a linspace grid; take solver=ddim, which is right on every grid"
            )
        check_choice("solver 'diffusers'", "scheduler", self.scheduler, tuple(SCHEDULERS))
        check_choice(f"scheduler {self.scheduler!r}", "spacing", self.spacing, SPACINGS)
        if self.spacing == "inclusive" and not SCHEDULERS[self.scheduler].custom_timesteps:
            raise UsageError(
                f"scheduler {self.scheduler!r} takes no list of timesteps, which spacing 'inclusive' needs; "
                "take spacing=linspace, trailing or leading"
            )


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
        self.options = dict(config.options)
        self.stochastic = str(self.options.get("algorithm_type", "")).startswith("sde-")
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
        sigmas = [float(s) for s in scheduler.sigmas]
        # The timestep is what the network is fed, fraction or not; the noise level is the scheduler's own sigma. The
        # two agree up to how the class interpolates between table entries.
        times = process.time_of_index(scheduler.timesteps.to(torch.float64))
        time, index = times.tolist(), process.training_index(times).tolist()
        levels = [_level(sigma) for sigma in sigmas]
        following: list[float | None] = [*time[1:], None]
        if sigmas[-1] > 0:
            following[-1] = process.time_of_log_snr(levels[-1][2]).item()
        order = int(self.options.get("solver_order", getattr(scheduler.config, "solver_order", 1)))
        return tuple(
            SchedulerCall(
                position=i,
                step=i,
                time=time[i],
                next_time=following[i],
                alpha=levels[i][0],
                sigma=levels[i][1],
                log_snr=levels[i][2],
                next_alpha=levels[i + 1][0],
                next_sigma=levels[i + 1][1],
                next_log_snr=levels[i + 1][2],
                training_index=index[i],
                needs_noise=self.stochastic and sigmas[i + 1] > 0,
                order=min(i + 1, order),
                process=process,
            )
            for i in range(len(time))
        )

    def begin(self, process: Process, noise: Tensor) -> State:
        self.check(process)
        scheduler = self._template(process)
        return State(x=noise.to(torch.float32) * float(scheduler.init_noise_sigma))

    def network_input(self, state: State, call: Call) -> Tensor:
        return state.x * call.alpha if self.traits.sigma_frame else state.x

    def result(self, state: State) -> Tensor:
        return state.x * float(state.history["alpha"]) if self.traits.sigma_frame else state.x

    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        assert isinstance(call, SchedulerCall)
        template = self._template(call.process)
        scheduler = _resumed(template, state.history.get("scheduler", {}))
        arguments: dict[str, Any] = {}
        if self.stochastic and self.traits.noise_argument is not None:
            arguments[self.traits.noise_argument] = torch.zeros_like(eps) if noise is None else noise
        timestep = scheduler.timesteps[call.position]
        scheduler.scale_model_input(state.x, timestep)  # some classes insist on it; network_input gives its value
        x = scheduler.step(eps, timestep, state.x, return_dict=False, **arguments)[0]
        # `alpha` is for `result`, which has no call to look at.
        return x, {"scheduler": _changes(template, scheduler), "alpha": call.next_alpha}

    def _template(self, process: Process) -> Any:
        """The scheduler for this process at its start, built once and never stepped."""
        if process not in self._templates:
            self._templates[process] = self._build(process)
        return self._templates[process]

    def _build(self, process: Process) -> Any:
        try:
            import diffusers.schedulers as library
        except ImportError as error:
            raise UsageError(
                f"solver {self.name!r} needs the package diffusers, but {error}; pip install it"
            ) from error
        kind = getattr(library, self.config.scheduler)
        known = set(inspect.signature(kind.__init__).parameters) - {"self"}
        offered = sorted(known - FROM_PROCESS)
        for option in self.options:
            if option not in offered:
                raise UsageError(f"solver {self.name!r} has no option {option!r}; known: {', '.join(offered)}")
        table = process.log_snr(process.time_of_index(torch.arange(process.num_steps)))
        log_alpha_bar = torch.nn.functional.logsigmoid(table)
        betas = -torch.expm1(torch.diff(log_alpha_bar, prepend=torch.zeros(1, dtype=torch.float64)))
        inclusive = self.config.spacing == "inclusive"
        try:
            with warnings.catch_warnings():
                # The library hands tensors to np.array, which numpy 2 wants a newer torch for; the values are right.
                warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
                scheduler = kind(
                    num_train_timesteps=process.num_steps,
                    trained_betas=betas.tolist(),
                    timestep_spacing="linspace" if inclusive else self.config.spacing,
                    **self.options,
                )
                if inclusive:
                    indices = index_grid(process.num_steps, "linspace", self.config.steps)
                    scheduler.set_timesteps(timesteps=indices.long().tolist())
                else:
                    scheduler.set_timesteps(self.config.steps)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise UsageError(f"solver {self.name!r}: diffusers refuses options {self.options}: {error}") from error
        scheduler.set_begin_index(0)
        sigmas = scheduler.sigmas
        if not bool(torch.isfinite(sigmas).all()) or bool((sigmas.diff() >= 0).any()):
            raise UsageError(
                f"solver {self.name!r} with steps={self.config.steps} and options {self.options} gives noise levels on "
                f"process {process.name!r} that do not fall at every step; change the options or the spacing"
            )
        return scheduler


def _level(sigma: float) -> tuple[float, float, float]:
    """alpha, sigma and log-SNR in the VP frame at noise-to-signal ratio ``sigma``."""
    alpha = 1 / math.sqrt(1 + sigma**2)
    return alpha, sigma * alpha, -2 * math.log(sigma) if sigma > 0 else math.inf


def _resumed(template: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of ``template`` that shares its tables, brought to where a run stands."""
    scheduler = copy.copy(template)
    for name, value in {**vars(template), **changes}.items():
        # Schedulers shift their lists of past outputs in place, so each copy needs its own.
        setattr(scheduler, name, list(value) if isinstance(value, list) else value)
    return scheduler


def _changes(template: Any, scheduler: Any) -> dict[str, Any]:
    """The attributes in which ``scheduler`` differs from its template."""
    start = vars(template)
    return {key: value for key, value in vars(scheduler).items() if key not in start or not _same(value, start[key])}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, int | float) and isinstance(b, int | float) and a == b)
