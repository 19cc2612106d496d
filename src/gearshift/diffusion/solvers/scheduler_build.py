"""How a scheduler of the `diffusers` library is asked for, and how one is built on the noise levels of a process."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers.grids import check_choice, index_grid
from gearshift.diffusion.solvers.scheduler_classes import FROM_PROCESS, OWN, SCHEDULERS, Step
from gearshift.runtime.errors import UsageError

SIGMA_OPTIONS = {"sigma_min", "sigma_max", "sigma_schedule", "rho"}
SPACINGS = ("linspace", "trailing", "leading", "inclusive", "class")


@dataclass
class DiffusersConfig:
    """A scheduler class and how it is used.

    Attributes:
        scheduler: class name in ``diffusers.schedulers``.
        steps: number of steps; some classes make more calls than that.
        spacing: the class's own ``linspace``, ``trailing`` or ``leading`` (they differ between classes);
            ``inclusive``: round(linspace(0, T-1, steps)), both ends visited; or ``class``: the sigmas the EDM classes
            make between the ends of the process. What a class does not have is refused.
        options: further constructor arguments, such as ``solver_order`` or ``use_karras_sigmas``.
        restart_at_switch: start the history again where the depth changes; for multistep classes whose history can be
            lost between any two calls.
    """

    scheduler: str = "DPMSolverMultistepScheduler"
    steps: int = 25
    spacing: str = "linspace"
    options: dict[str, Any] = field(default_factory=dict)
    restart_at_switch: bool = False

    def __post_init__(self) -> None:
        if self.scheduler in OWN:
            wrong = " and is wrong on a linspace grid" if self.scheduler == "DDIMScheduler" else ""
            raise UsageError(
                f"scheduler {self.scheduler!r} (spacing {self.spacing!r}) is not offered: it derives steps from "
                f"spacings of its own{wrong}; take solver={OWN[self.scheduler]}, which is right on every grid"
            )
        check_choice("solver 'diffusers'", "scheduler", self.scheduler, tuple(SCHEDULERS))
        check_choice(f"scheduler {self.scheduler!r}", "spacing", self.spacing, SPACINGS)
        traits = SCHEDULERS[self.scheduler]
        if self.spacing not in traits.spacings:
            known = " or ".join(traits.spacings)
            raise UsageError(f"scheduler {self.scheduler!r} has no spacing {self.spacing!r}; take spacing={known}")
        if str(self.options.get("algorithm_type", "")).startswith("sde-") and traits.noise_argument is None:
            raise UsageError(
                f"scheduler {self.scheduler!r} draws the noise of algorithm_type={self.options['algorithm_type']!r} by "
                "itself, so its images could not be made again; take scheduler=DPMSolverMultistepScheduler"
            )
        if self.restart_at_switch and not traits.memory:
            able = [name for name, other in SCHEDULERS.items() if other.memory]
            raise UsageError(
                f"scheduler {self.scheduler!r} has no history that could start again at a switch of depth; "
                f"restart_at_switch works with {', '.join(able)}"
            )


def build_scheduler(config: DiffusersConfig, process: Process) -> Any:
    """The scheduler for a process, at its start. Raises UsageError where it cannot be built or would go wrong."""
    name, traits = f"diffusers:{config.scheduler}", SCHEDULERS[config.scheduler]
    try:
        import diffusers.schedulers as library
    except ImportError as error:
        raise UsageError(f"solver {name!r} needs the package diffusers, but {error}; pip install it") from error
    kind = getattr(library, config.scheduler)
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    offered = sorted(known - FROM_PROCESS)
    for option in config.options:
        if option not in offered:
            raise UsageError(f"solver {name!r} has no option {option!r}; known: {', '.join(offered)}")
    options = {**traits.defaults, **config.options}
    traits.check(options, process.num_steps, config.spacing, config.steps)
    inclusive = config.spacing == "inclusive"
    idle = sorted(SIGMA_OPTIONS & set(config.options))
    if inclusive and traits.made_from == "sigmas" and idle:
        raise UsageError(
            f"solver {name!r}: spacing 'inclusive' settles the sigmas, so options {', '.join(idle)} would do nothing; "
            "leave them out, or take spacing=class"
        )
    settled = {"num_train_timesteps": process.num_steps, **_levels_for(config, process)}
    if "timestep_spacing" in known:
        settled["timestep_spacing"] = "linspace" if inclusive else config.spacing
    try:
        with quiet():
            scheduler = kind(**{**settled, **options})
            if inclusive and traits.made_from == "betas":
                indices = index_grid(process.num_steps, "linspace", config.steps)
                scheduler.set_timesteps(timesteps=indices.long().tolist())
            else:
                scheduler.set_timesteps(config.steps)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UsageError(f"solver {name!r}: diffusers refuses options {config.options}: {error}") from error
    _put_levels(config, process, scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    _check_levels(config, process, traits.levels(scheduler), traits.steps(scheduler))
    return scheduler


def _levels_for(config: DiffusersConfig, process: Process) -> dict[str, Any]:
    """Constructor arguments that give a class the levels of the process."""
    times = process.time_of_index(torch.arange(process.num_steps))
    if SCHEDULERS[config.scheduler].made_from == "sigmas":
        least, greatest = _ratio(process, times[[0, -1]]).tolist()
        return {"sigma_min": least, "sigma_max": greatest}
    if SCHEDULERS[config.scheduler].made_from == "amplitudes":
        return {"trained_betas": [*process.sigma(own_grid(config, process)).tolist(), 0.0]}
    log_alpha_bar = torch.nn.functional.logsigmoid(process.log_snr(times))
    betas = -torch.expm1(torch.diff(log_alpha_bar, prepend=torch.zeros(1, dtype=torch.float64)))
    return {"trained_betas": betas.tolist()}


def _put_levels(config: DiffusersConfig, process: Process, scheduler: Any) -> None:
    """Give the levels of a grid of ours to a class that has no argument for them, or only a coarse one."""
    if SCHEDULERS[config.scheduler].made_from == "amplitudes":
        # The class would take alpha from sigma in fp32, which loses half its digits where sigma is almost 1.
        end = torch.tensor([0.0, 1.0], dtype=torch.float64)
        times = own_grid(config, process)
        scheduler.betas = torch.cat([process.sigma(times), end[:1]])
        scheduler.alphas = torch.cat([process.alpha(times), end[1:]])
    elif SCHEDULERS[config.scheduler].made_from == "sigmas" and config.spacing == "inclusive":
        sigmas = _ratio(process, own_grid(config, process)).float()
        scheduler.sigmas = torch.cat([sigmas, scheduler.sigmas[-1:]])
        scheduler.timesteps = scheduler.precondition_noise(sigmas)


def _check_levels(config: DiffusersConfig, process: Process, levels: list[float], steps: list[Step]) -> None:
    """Raise UsageError unless noise falls at every step, and stays where the process knows it."""
    settings = f"solver 'diffusers:{config.scheduler}' with steps={config.steps} and options {config.options}"
    starts = [level for level, (_, substep, _) in zip(levels, steps, strict=False) if substep == 0] + levels[-1:]
    falls = all(low < high for low, high in zip(starts[1:], starts, strict=False))
    if not falls or not all(math.isfinite(level) for level in levels):
        raise UsageError(
            f"{settings} gives noise levels on process {process.name!r} that do not fall at every step; change the "
            "options or the spacing"
        )
    if config.spacing == "class":
        least, greatest = _ratio(process, process.time_of_index(torch.tensor([0, process.num_steps - 1]))).tolist()
        slack = 1 + 1e-4  # sigmas are fp32
        if levels[0] > greatest * slack or levels[-2] * slack < least:
            raise UsageError(
                f"{settings} visits sigma {levels[0]:.4g} to {levels[-2]:.4g}, but process {process.name!r} has "
                f"sigma / alpha from {greatest:.4g} to {least:.4g}; leave sigma_max and sigma_min "
                "unset, or choose them within"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """The library hands tensors to numpy, and numpy 2 wants a newer torch for that; the values are right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array", category=DeprecationWarning)
        yield


def own_grid(config: DiffusersConfig, process: Process) -> Tensor:
    """Times of a named spacing as this project defines it, for classes that are told their levels one by one."""
    spacing = "linspace" if config.spacing == "inclusive" else config.spacing
    return process.time_of_index(index_grid(process.num_steps, spacing, config.steps))


def _ratio(process: Process, times: Tensor) -> Tensor:
    """Noise-to-signal ratio sigma / alpha, float64."""
    return torch.exp(-0.5 * process.log_snr(times))
