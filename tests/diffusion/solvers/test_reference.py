"""Samplers against references written out in plain float64 operations, as DiT's "N steps" and "ddimN" are defined.

Also holds what is known of the diffusers classes on the same grids, so that a change in that library is noticed.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from gearshift.diffusion.solvers import DDIM, DDPM, DDIMConfig, DDPMConfig, DiffusersConfig, DiffusersSolver

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
STEPS = [10, 50, 100, 250]
library_warns = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def every_nth(steps: int) -> list[int]:
    """DiT's "N": a running sum of the fractional stride, rounded."""
    stride, at, kept = 999 / (steps - 1), 0.0, []
    for _ in range(steps):
        kept.append(round(at))
        at += stride
    return kept


def ddim_stride(steps: int) -> list[int]:
    """DiT's "ddimN": the integer stride that gives N indices."""
    return next(list(range(0, 1000, i)) for i in range(1, 1000) if len(range(0, 1000, i)) == steps)


def reference_ddim(toy, x: Tensor, indices: list[int]) -> Tensor:  # type: ignore[no-untyped-def]
    x = x.double()
    for k in reversed(range(len(indices))):
        bar = ALPHA_BAR[indices[k]]
        bar_next = ALPHA_BAR[indices[k - 1]] if k else 1.0
        eps = toy(x.float(), indices[k])[0].double()
        x0 = (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
        x = np.sqrt(bar_next) * x0 + np.sqrt(1 - bar_next) * eps
    return x.float()


def reference_ddpm(toy, x: Tensor, indices: list[int], step_noise) -> Tensor:  # type: ignore[no-untyped-def]
    """Learned-range variance, on the betas of the thinned chain."""
    x = x.double()
    for position, k in enumerate(reversed(range(len(indices)))):
        bar = ALPHA_BAR[indices[k]]
        bar_next = ALPHA_BAR[indices[k - 1]] if k else 1.0
        beta = 1 - bar / bar_next
        eps, v = (y.double() for y in toy(x.float(), indices[k]))
        x0 = (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
        mean = beta * np.sqrt(bar_next) / (1 - bar) * x0 + (1 - bar_next) * np.sqrt(1 - beta) / (1 - bar) * x
        if k == 0:
            return mean.float()
        low, high = np.log((1 - bar_next) / (1 - bar) * beta), np.log(beta)
        log_variance = (v + 1) / 2 * high + (1 - (v + 1) / 2) * low
        x = mean + torch.exp(log_variance / 2) * step_noise(x.shape, position).double()
    raise AssertionError


def apart(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("steps", STEPS)
def test_ddim_on_a_linspace_grid_is_right(steps, processes, toy, noise, run) -> None:
    solver = DDIM(DDIMConfig(steps=steps, spacing="linspace"))
    assert [call.time for call in solver.calls(processes["linear"])] == every_nth(steps)[::-1]
    ours = run(solver, processes["linear"], noise, lambda x, call: toy(x, call.training_index)[0])
    assert apart(ours, reference_ddim(toy, noise, every_nth(steps))) < 4e-5


@pytest.mark.parametrize("steps", STEPS)
def test_ddim_on_a_leading_grid(steps, processes, toy, noise, run) -> None:
    solver = DDIM(DDIMConfig(steps=steps, spacing="leading"))
    ours = run(solver, processes["linear"], noise, lambda x, call: toy(x, call.training_index)[0])
    assert apart(ours, reference_ddim(toy, noise, ddim_stride(steps))) < 4e-5


@pytest.mark.parametrize("steps", STEPS)
def test_ddpm_with_learned_variance(steps, processes, toy, noise, run, step_noise) -> None:
    solver = DDPM(DDPMConfig(steps=steps))
    ours = run(solver, processes["linear"], noise, lambda x, call: toy(x, call.training_index))
    assert apart(ours, reference_ddpm(toy, noise, every_nth(steps), step_noise)) < 4e-5


@pytest.mark.parametrize("steps", [10, 50, 100])
@pytest.mark.parametrize(
    ("scheduler", "options"), [("DPMSolverMultistepScheduler", {"solver_order": 1}), ("EulerDiscreteScheduler", {})]
)
def test_first_order_schedulers_on_the_inclusive_grid_are_ddim(
    steps, scheduler, options, processes, toy, noise, run
) -> None:
    solver = DiffusersSolver(DiffusersConfig(scheduler, steps, "inclusive", options))
    ours = run(solver, processes["linear"], noise, lambda x, call: toy(x, call.training_index)[0])
    # Euler starts from sigma noise, which in the VP frame is a little less than the noise itself.
    start = solver.network_input(solver.begin(processes["linear"], noise), solver.calls(processes["linear"])[0])
    assert apart(ours, reference_ddim(toy, start, every_nth(steps))) < 4e-5


@library_warns
@pytest.mark.parametrize("steps", STEPS)
def test_library_ddim_is_wrong_on_linspace(steps, toy, noise) -> None:
    from diffusers.schedulers import DDIMScheduler

    def sample(spacing: str) -> Tensor:
        scheduler = DDIMScheduler(
            beta_schedule="linear", clip_sample=False, timestep_spacing=spacing, set_alpha_to_one=True
        )
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(toy(x, t.item())[0], t.item(), x, return_dict=False)[0]
        return x

    assert apart(sample("leading"), reference_ddim(toy, noise, ddim_stride(steps))) < 1e-4
    fault = apart(sample("linspace"), reference_ddim(toy, noise, every_nth(steps)))
    assert fault > 0.01, f"diffusers' DDIM is right on linspace now ({fault:.1e}): the adapter can offer it"


@library_warns
@pytest.mark.parametrize("steps", STEPS)
def test_library_ddpm_matches_on_linspace_only(steps, processes, toy, noise, step_noise, run, monkeypatch) -> None:
    from diffusers.schedulers import DDPMScheduler, scheduling_ddpm

    position = iter(range(10**6))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: step_noise(shape, next(position)))

    def sample(spacing: str) -> Tensor:
        scheduler = DDPMScheduler(
            beta_schedule="linear", clip_sample=False, timestep_spacing=spacing, variance_type="learned_range"
        )
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(torch.cat(toy(x, t.item()), 1), t.item(), x, return_dict=False)[0]
        return x

    reference = reference_ddpm(toy, noise, every_nth(steps), step_noise)
    theirs = sample("linspace")
    assert apart(theirs, reference) < 1e-4
    ours = run(DDPM(DDPMConfig(steps)), processes["linear"], noise, lambda x, call: toy(x, call.training_index))
    assert apart(theirs, ours) < 1e-4
    position = iter(range(10**6))
    assert apart(sample("leading"), reference) > 0.01
