"""What the adapter must know of each scheduler class of the `diffusers` library beyond its constructor.

The classes differ in what their numbers mean, and `Traits` says it for each: in which frame x lives, from what the
noise levels are made, which levels the calls see, how calls group into steps, and what the network's output must be
turned into. The adapter itself knows no class by name.

Three ways to give a class the noise levels of a process:

* ``betas``: its table, entry by entry. Timesteps are indices into it, possibly fractions.
* ``sigmas`` (the EDM classes): the least and greatest sigma / alpha; their timesteps are ln(sigma) / 4.
* ``amplitudes`` (IPNDM): sigma at each visited level, with timesteps in [0, 1] that say the same as an angle. Left
  alone it would begin where the signal is exactly 0 and end nearer the data than any process was trained for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gearshift.runtime.errors import UsageError

Step = tuple[int, int, int]
"""Of a call: the step it belongs to, which call of the step it is, and the order of the step."""


def _sigmas(scheduler: Any) -> list[float]:
    return [float(sigma) for sigma in scheduler.sigmas]


def _table_levels(scheduler: Any) -> list[float]:
    """PNDM keeps no sigmas: each call is at the level of its timestep, the last step goes one stride further."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    table = scheduler.alphas_cumprod.double()
    last = int(scheduler.timesteps[-1]) - stride
    ends = table[last] if last >= 0 else torch.as_tensor(scheduler.final_alpha_cumprod).double()
    visited = [*table[scheduler.timesteps].tolist(), float(ends)]
    return [math.sqrt((1 - alpha_bar) / alpha_bar) for alpha_bar in visited]


def _amplitude_levels(scheduler: Any) -> list[float]:
    return [float(sigma / alpha) for sigma, alpha in zip(scheduler.betas, scheduler.alphas, strict=True)]


def _midpoint_levels(scheduler: Any) -> list[float]:
    """KDPM2: every second call is half way, in log sigma, between two levels."""
    last = len(scheduler.timesteps)
    return [
        float((scheduler.sigmas_interpol if call % 2 and call < last else scheduler.sigmas)[call])
        for call in range(last + 1)
    ]


def _multistep(scheduler: Any) -> list[Step]:
    order = int(scheduler.config.get("solver_order", 1))
    return [(step, 0, min(step + 1, order)) for step in range(len(scheduler.timesteps))]


def _adams(scheduler: Any) -> list[Step]:
    return [(step, 0, min(step + 1, 4)) for step in range(len(scheduler.timesteps))]


def _pairs(scheduler: Any) -> list[Step]:
    """Two calls to a step; only the last, which goes to the data, has one."""
    last = len(scheduler.timesteps) - 1
    return [(call // 2, call % 2, 2 if call < last else 1) for call in range(last + 1)]


def _singlestep(scheduler: Any) -> list[Step]:
    """Each call of order 1 begins a step anew from its own x."""
    steps: list[Step] = []
    for order in scheduler.order_list:
        steps.append((steps[-1][0], order - 1, order) if order > 1 else (steps[-1][0] + 1 if steps else 0, 0, 1))
    return steps


def _pndm_steps(scheduler: Any) -> list[Step]:
    """Three Runge-Kutta steps of four calls and then one call each, or a first step of two calls and then one each."""
    sizes, order = ([2], 2) if scheduler.config.skip_prk_steps else ([4] * 3, 4)
    sizes += [1] * (len(scheduler.timesteps) - sum(sizes))
    return [(step, substep, max(order, min(step + 1, 4))) for step, size in enumerate(sizes) for substep in range(size)]


def _check_pndm(scheduler_config: Mapping[str, Any], size: int, spacing: str, steps: int) -> None:
    """PNDM goes on by the constant stride size // steps, which must be the spacing of its grid."""
    warm_up = not scheduler_config.get("skip_prk_steps", False)
    stride = size // steps
    if steps < (4 if warm_up else 2):
        raise UsageError(
            f"scheduler 'PNDMScheduler' needs at least {4 if warm_up else 2} steps "
            f"{'with' if warm_up else 'without'} its Runge-Kutta warm-up, got steps={steps}"
        )
    if spacing == "trailing" and size % steps:
        raise UsageError(
            f"scheduler 'PNDMScheduler' goes on by a constant stride, and steps={steps} with spacing 'trailing' have "
            f"none in a table of {size}; take a number of steps that divides {size}, or spacing=leading"
        )
    if warm_up and stride % 2:
        raise UsageError(
            f"scheduler 'PNDMScheduler' halves its stride in the Runge-Kutta warm-up, but steps={steps} give stride "
            f"{size} // {steps} = {stride}; take a number of steps with an even stride, or "
            "options={skip_prk_steps: true}"
        )


def _to_edm(scheduler: Any, sigma: float, alpha: float) -> tuple[float, float]:
    """The raw network output F whose preconditioning (Karras et al. 2022, arXiv 2206.00364, eq. 7) gives x - s eps."""
    data, s = float(scheduler.config.sigma_data), sigma / alpha
    spread = math.hypot(s, data)
    return s / (data * spread), -spread / data


def _to_velocity(scheduler: Any, sigma: float, alpha: float) -> tuple[float, float]:
    """v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512), which this class turns back into eps."""
    return -sigma / alpha, 1 / alpha


def _unchecked(scheduler_config: Mapping[str, Any], size: int, spacing: str, steps: int) -> None:
    pass


@dataclass(frozen=True)
class Traits:
    """What the adapter must know of a scheduler class beyond its constructor.

    Attributes:
        made_from: how it is given the levels of a process, see the module.
        spacings: the spacings it offers.
        sigma_frame: whether its x is x_0 + sigma eps (else alpha x_0 + sigma eps).
        levels: sigma / alpha of x at each call, and after the last one.
        steps: how its calls group into steps.
        output: factors (a, b) such that it wants a x + b eps, with x in its own frame; None: it wants eps.
        defaults: options that differ from the constructor's defaults.
        check: raises UsageError where it would go wrong silently.
        noise_argument: how ``step`` is given the noise of its stochastic variants, if it has any.
        memory: attributes that hold earlier steps and may be lost between any two calls; empty if it has none such.
        grown_in_place: tensors that a step adds to in place.
        warns: whether its steps hand tensors to numpy, which answers with a DeprecationWarning.
    """

    made_from: str = "betas"
    spacings: tuple[str, ...] = ("linspace", "trailing", "leading")
    sigma_frame: bool = False
    levels: Callable[[Any], list[float]] = _sigmas
    steps: Callable[[Any], list[Step]] = _multistep
    output: Callable[[Any, float, float], tuple[float, float]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any], int, str, int], None] = _unchecked
    noise_argument: str | None = None
    memory: tuple[str, ...] = ()
    grown_in_place: tuple[str, ...] = ()
    warns: bool = False


_NAMED = ("linspace", "trailing", "leading")
_ANY = (*_NAMED, "inclusive")
_MULTISTEP = ("model_outputs", "lower_order_nums")

SCHEDULERS = {
    "DEISMultistepScheduler": Traits(memory=_MULTISTEP, warns=True),
    "DPMSolverMultistepScheduler": Traits(spacings=_ANY, noise_argument="variance_noise", memory=_MULTISTEP),
    # Without lower_order_final it would switch that on by itself, with a warning, for most numbers of steps.
    "DPMSolverSinglestepScheduler": Traits(
        spacings=("linspace", "inclusive"), steps=_singlestep, defaults={"lower_order_final": True}
    ),
    "EDMDPMSolverMultistepScheduler": Traits("sigmas", ("class",), sigma_frame=True, output=_to_edm, memory=_MULTISTEP),
    "EDMEulerScheduler": Traits("sigmas", ("class", "inclusive"), sigma_frame=True, output=_to_edm),
    "EulerDiscreteScheduler": Traits(spacings=_ANY, sigma_frame=True),
    "HeunDiscreteScheduler": Traits(spacings=_ANY, sigma_frame=True, steps=_pairs),
    "IPNDMScheduler": Traits(
        "amplitudes", levels=_amplitude_levels, steps=_adams, output=_to_velocity, memory=("ets",)
    ),
    "KDPM2DiscreteScheduler": Traits(sigma_frame=True, levels=_midpoint_levels, steps=_pairs),
    "LMSDiscreteScheduler": Traits(sigma_frame=True, steps=_adams),
    # set_alpha_to_one: without it the last step goes from level 0 to level 0, and its network call is for nothing.
    "PNDMScheduler": Traits(
        spacings=("leading", "trailing"),
        levels=_table_levels,
        steps=_pndm_steps,
        defaults={"set_alpha_to_one": True},
        check=_check_pndm,
        grown_in_place=("cur_model_output",),
    ),
    "UniPCMultistepScheduler": Traits(memory=(*_MULTISTEP, "timestep_list", "last_sample")),
}

OWN = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}
"""Classes that are not offered, because an own solver does the same, and does it right on every grid."""

FROM_PROCESS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "sigma_data",
    "variance_type",
    "timestep_spacing",
    "timestep_type",
    "steps_offset",
    "use_flow_sigmas",
}
"""Constructor arguments that are not options, because the process, the spacing or the ε-prediction settles them."""
