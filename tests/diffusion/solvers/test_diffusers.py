"""The adapter over the diffusers library: times, frames, state, options."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from gearshift.diffusion.solvers import DiffusersConfig, DiffusersSolver, State
from gearshift.runtime.errors import UsageError

SCHEDULERS = ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
each_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)
library_warns = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def predict(toy):  # type: ignore[no-untyped-def]
    return lambda x, call: toy(x, call.training_index)[0]


def test_library_is_imported_only_when_used() -> None:
    code = "import sys, gearshift.diffusion.solvers.diffusers; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@library_warns
@each_scheduler
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_equals_the_plain_library_loop(scheduler, spacing, processes, toy, noise, run) -> None:
    import diffusers.schedulers as library

    theirs = getattr(library, scheduler)(beta_schedule="linear", timestep_spacing=spacing)
    theirs.set_timesteps(20)
    x = noise * theirs.init_noise_sigma
    for t in theirs.timesteps:
        x = theirs.step(toy(theirs.scale_model_input(x, t), t.item())[0], t, x, return_dict=False)[0]
    ours = run(DiffusersSolver(DiffusersConfig(scheduler, 20, spacing)), processes["linear"], noise, predict(toy))
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=5e-5)


@each_scheduler
def test_network_times(scheduler, processes) -> None:
    solver = DiffusersSolver(DiffusersConfig(scheduler, 12))
    steps = solver._template(processes["linear"]).timesteps.double().tolist()
    fed = {name: [p.network_time(c.time).item() for c in solver.calls(p)] for name, p in processes.items()}
    np.testing.assert_allclose(fed["linear"], steps, rtol=1e-6)
    np.testing.assert_allclose(fed["scaled_linear"], [i + 1 for i in steps], rtol=1e-6)
    np.testing.assert_allclose(fed["vp_sde"], [999 * (i + 1) / 1000 for i in steps], rtol=1e-6)
    for name in processes:
        np.testing.assert_allclose([c.training_index for c in solver.calls(processes[name])], steps, rtol=1e-6)
    if scheduler == "EulerDiscreteScheduler":
        assert any(step != round(step) for step in steps)


@each_scheduler
def test_table_is_the_process(scheduler, processes) -> None:
    for process in processes.values():
        template = DiffusersSolver(DiffusersConfig(scheduler, 10))._template(process)
        table = process.alpha_bar(process.time_of_index(torch.arange(1000)))
        torch.testing.assert_close(template.alphas_cumprod.double(), table, rtol=1e-4, atol=2e-7)
        assert template.timesteps.device.type == "cpu" and template.begin_index == 0


@each_scheduler
def test_input_has_the_level_of_its_call(scheduler, processes, run) -> None:
    """With the exact noise of one image fed back, every input is alpha x0 + sigma noise, and the result is x0."""
    process = processes["scaled_linear"]
    draws = torch.Generator().manual_seed(5)
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=draws)
    solver = DiffusersSolver(DiffusersConfig(scheduler, 15))
    first = solver.calls(process)[0]
    start = solver.network_input(solver.begin(process, noise), first)
    eps = (start - first.alpha * x0) / first.sigma

    def check(x, call):  # type: ignore[no-untyped-def]
        torch.testing.assert_close(x, call.alpha * x0 + call.sigma * eps, rtol=1e-3, atol=1e-4)
        return eps

    torch.testing.assert_close(run(solver, process, noise, check), x0, rtol=1e-3, atol=1e-4)


def test_result_leaves_the_sigma_frame_at_a_noisy_end(processes, toy, noise, run) -> None:
    process = processes["linear"]
    options = {"final_sigmas_type": "sigma_min"}
    solver = DiffusersSolver(DiffusersConfig("EulerDiscreteScheduler", 10, "trailing", options))
    last = solver.calls(process)[-1]
    assert last.next_time == pytest.approx(0, abs=0.01) and last.next_sigma**2 == pytest.approx(1e-4, rel=0.01)
    states: list[State] = []
    result = run(solver, process, noise, predict(toy), states=states)
    torch.testing.assert_close(result, states[-1].x * last.next_alpha)
    assert (result - states[-1].x).abs().max() > 1e-4


def test_reuse_is_a_longer_euler_step(processes, toy, noise, run) -> None:
    process = processes["linear"]
    solver = DiffusersSolver(DiffusersConfig("EulerDiscreteScheduler", 20))
    computed = {0, 1, 5, 6, 11, 17}
    skipped = run(solver, process, noise, predict(toy), fresh=lambda call: call.position in computed)
    points = [call for call in solver.calls(process) if call.position in computed]
    x = solver.begin(process, noise).x.double()
    for k, call in enumerate(points):
        sigma = points[k + 1].sigma / points[k + 1].alpha if k + 1 < len(points) else 0.0
        eps = predict(toy)((x * call.alpha).float(), call).double()
        x = x + (sigma - call.sigma / call.alpha) * eps
    torch.testing.assert_close(skipped, x.float(), rtol=1e-5, atol=1e-4)


def test_stochastic_variant_takes_our_noise(processes, toy, noise, run) -> None:
    solver = DiffusersSolver(DiffusersConfig(steps=10, options={"algorithm_type": "sde-dpmsolver++"}))
    process = processes["vp_sde"]
    assert solver.stochastic
    assert [call.needs_noise for call in solver.calls(process)] == [True] * 9 + [False]
    state = torch.random.get_rng_state()
    samples = [run(solver, process, noise, predict(toy)) for _ in range(2)]
    assert torch.equal(*samples) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("config", "quoted"),
    [
        (DiffusersConfig(options={"solver_ordr": 2}), "DPMSolver.*'solver_ordr'; known: .*solver_order"),
        (DiffusersConfig(options={"beta_start": 0.1}), "'beta_start'"),
        (DiffusersConfig(options={"solver_type": "nonsense"}), "refuses.*nonsense"),
        (DiffusersConfig(options={"use_karras_sigmas": True, "use_exponential_sigmas": True}), "refuses.*Only one"),
        (DiffusersConfig(spacing="inclusive", options={"use_karras_sigmas": True}), "refuses.*use_karras_sigmas"),
        (DiffusersConfig(steps=1000), "steps=1000.*linear.*do not fall"),
    ],
)
def test_bad_options_are_one_line(config, quoted, processes) -> None:
    with pytest.raises(UsageError, match=quoted) as caught:
        DiffusersSolver(config).check(processes["linear"])
    assert "\n" not in str(caught.value)


def test_more_steps_than_the_table_of_a_continuous_process(processes) -> None:
    with pytest.raises(UsageError, match=r"steps=2000.*1000 noise levels.*vp_sde"):
        DiffusersSolver(DiffusersConfig(steps=2000)).check(processes["vp_sde"])
