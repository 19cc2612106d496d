"""DDPM, DDIM and Euler-Maruyama: one step against its formula, and how they relate to each other."""

import math
from dataclasses import replace

import pytest
import torch

from gearshift.diffusion.solvers import DDIM, DDPM, DDIMConfig, DDPMConfig, EulerMaruyama, EulerMaruyamaConfig

each_spacing = pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading", "log_snr"])


@each_spacing
@pytest.mark.parametrize("process_name", ["vp_sde", "linear", "cosine"])
def test_ddim_with_full_noise_is_ancestral_sampling(spacing, process_name, processes, toy, noise, run) -> None:
    process = processes[process_name]
    samples = [
        run(solver, process, noise, lambda x, call: toy(x, call.training_index)[0])
        for solver in (DDIM(DDIMConfig(20, eta=1.0, spacing=spacing)), DDPM(DDPMConfig(20, spacing=spacing)))
    ]
    torch.testing.assert_close(*samples, rtol=1e-5, atol=2e-5)


@each_spacing
def test_reusing_a_prediction_is_a_longer_ddim_step(spacing, processes, toy, noise, run) -> None:
    # With eps held, k steps compose to one: so skipping is the same solver on a thinned grid.
    computed = {0, 1, 4, 5, 11, 12, 20, 23}
    for process in processes.values():
        fine = DDIM(DDIMConfig(24, spacing=spacing))
        skipped = run(
            fine, process, noise, lambda x, c: toy(x, c.training_index)[0], fresh=lambda c: c.position in computed
        )
        calls = [call for call in fine.calls(process) if call.position in computed]
        x = noise
        for k, call in enumerate(calls):
            alpha, sigma = (calls[k + 1].alpha, calls[k + 1].sigma) if k + 1 < len(calls) else (1.0, 0.0)
            eps = toy(x, call.training_index)[0]
            x = alpha * (x - call.sigma * eps) / call.alpha + sigma * eps
        torch.testing.assert_close(skipped, x, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_variance_of_one_step(variance, processes) -> None:
    process = processes["linear"]
    solver = DDPM(DDPMConfig(1000, variance=variance))
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for call in solver.calls(process)[:-1:111]:
        # From x = 0 with eps = 0 the mean is 0, and unit noise comes out as the standard deviation.
        state = solver.begin(process, zero)
        moved = solver.advance(_at(state, call), call, zero, noise=one).x.item()
        beta = 1e-4 + (0.02 - 1e-4) * call.time / 999
        small = beta * (call.next_sigma / call.sigma) ** 2
        assert moved**2 == pytest.approx(small if variance == "fixed_small" else beta, rel=1e-5)


def test_learned_variance_ends_at_the_fixed_choices(processes, noise, step_noise) -> None:
    process = processes["vp_sde"]
    small, large = DDPM(DDPMConfig(50)), DDPM(DDPMConfig(50, variance="fixed_large"))
    call = small.calls(process)[20]
    state, eps, draw = _at(small.begin(process, noise), call), 0.5 * noise, step_noise(noise.shape, 20)

    def step(solver: DDPM, v: float | None) -> torch.Tensor:
        variance = None if v is None else torch.full_like(noise, v)
        return solver.advance(state, call, eps, variance=variance, noise=draw).x

    torch.testing.assert_close(step(small, -1.0), step(small, None))
    torch.testing.assert_close(step(small, 1.0), step(large, None))
    # From x = 0 with eps = 0, unit noise comes out as the standard deviation; half way is the geometric mean.
    zero, one = torch.zeros_like(noise), torch.ones_like(noise)
    start = _at(small.begin(process, zero), call)
    levels = [
        small.advance(start, call, zero, variance=v * one, noise=one).x.mean().item() ** 2
        for v in (-1, -0.5, 0, 0.5, 1)
    ]
    assert levels == sorted(levels)
    beta = 1 - (call.alpha / call.next_alpha) ** 2
    assert levels[2] == pytest.approx(beta * call.next_sigma / call.sigma, rel=1e-5)


@pytest.mark.parametrize(
    "make", [lambda clip: DDIM(DDIMConfig(10, clip_x0=clip)), lambda clip: DDPM(DDPMConfig(10, clip_x0=clip))]
)
def test_clipping_holds_the_data_prediction(make, processes, run) -> None:
    process = processes["linear"]
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def towards(target: float):  # type: ignore[no-untyped-def]
        return lambda x, call: (x - call.alpha * target) / call.sigma

    assert run(make(True), process, noise, towards(3.0)).max().item() == pytest.approx(1.0, abs=1e-6)
    assert run(make(False), process, noise, towards(3.0)).mean().item() == pytest.approx(3.0, abs=1e-4)
    inside = [run(make(clip), process, noise, towards(0.4)) for clip in (True, False)]
    torch.testing.assert_close(*inside, rtol=1e-4, atol=1e-4)


def test_euler_maruyama_step_is_its_formula(processes, noise, step_noise) -> None:
    process = processes["vp_sde"]
    solver = EulerMaruyama(EulerMaruyamaConfig(20))
    for call in (solver.calls(process)[i] for i in (0, 7, 19)):
        eps, draw = 0.3 * noise.flip(0), step_noise(noise.shape, call.position)
        t, s = call.time, call.next_time or 0.0
        beta = 0.1 + 19.9 * t
        drift = -0.5 * beta * noise + beta * eps / math.sqrt(1 - math.exp(-0.1 * t - 9.95 * t**2))
        expected = noise + drift * (s - t) + (math.sqrt(beta * (t - s)) * draw if s else 0)
        given = draw if call.needs_noise else None
        moved = solver.advance(_at(solver.begin(process, noise), call), call, eps, noise=given)
        torch.testing.assert_close(moved.x, expected, rtol=1e-5, atol=1e-5)


def _at(state, call):  # type: ignore[no-untyped-def]
    """The state as if it had come to this call."""
    return replace(state, position=call.position)
