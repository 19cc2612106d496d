"""What sets the scheduler classes apart: calls, grids, levels, outputs, and the ways in which they could go wrong."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers import DDIM, DDIMConfig, DiffusersConfig, DiffusersSolver, DPMpp2M, DPMpp2MConfig
from gearshift.diffusion.solvers.grids import index_grid
from gearshift.diffusion.solvers.scheduler_classes import SCHEDULERS
from gearshift.runtime.errors import UsageError

PLMS = {"skip_prk_steps": True}
EVERY = [(name, spacing, {}) for name, traits in SCHEDULERS.items() for spacing in traits.spacings]
EVERY += [("PNDMScheduler", spacing, PLMS) for spacing in ("leading", "trailing")]
EDM = [name for name in SCHEDULERS if name.startswith("EDM")]
EVERY += [(name, "class", {"sigma_schedule": "exponential"}) for name in EDM]
each_use = pytest.mark.parametrize(("scheduler", "spacing", "options"), EVERY, ids=lambda value: str(value))
TWO_CALLS = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler"}
library_warns = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def solver(scheduler: str, steps: int = 10, spacing: str = "linspace", **options: object) -> DiffusersSolver:
    return DiffusersSolver(DiffusersConfig(scheduler, steps, spacing, options))


def predict(toy):  # type: ignore[no-untyped-def]
    return lambda x, call: toy(x, call.training_index)[0]


def indices(made: DiffusersSolver, process: Process) -> list[float]:
    return [call.training_index for call in made.calls(process)]


@each_use
@pytest.mark.parametrize("steps", [10, 25, 50])
def test_calls_of_n_steps(scheduler, spacing, options, steps, processes) -> None:
    extra = {True: steps - 1, False: 0}[scheduler in TWO_CALLS]
    if scheduler == "PNDMScheduler":
        extra = 1 if options else 9
    for process in processes.values():
        calls = solver(scheduler, steps, spacing, **options).calls(process)
        assert len(calls) == steps + extra
        assert [call.position for call in calls] == list(range(len(calls)))
        assert max(call.step for call in calls) + 1 <= steps
        for call, following in pairwise(calls):
            assert (call.next_time, call.next_log_snr) == (following.time, following.log_snr)
            assert (following.step, following.substep) in ((call.step, call.substep + 1), (call.step + 1, 0))
            assert call.log_snr <= following.log_snr and call.time >= following.time
        starts = [call.log_snr for call in calls if call.substep == 0]
        assert all(low < high for low, high in pairwise(starts))
        assert all(1 <= call.order <= 4 and not call.needs_noise for call in calls)


@each_use
def test_every_input_is_at_the_level_of_its_call(scheduler, spacing, options, processes, run) -> None:
    """The exact noise of one image, fed back: every input is alpha x0 + sigma eps, whatever the class made of it."""
    draws = torch.Generator().manual_seed(5)
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=draws)
    for name in ("vp_sde", "linear", "scaled_linear"):
        process, made = processes[name], solver(scheduler, 10, spacing, **options)
        calls = made.calls(process)
        start = made.network_input(made.begin(process, noise), calls[0])
        # Some begin with sigma instead of sqrt(1 + sigma^2), in their frame.
        assert calls[0].sigma * (1 - 1e-4) < (start.std() / noise.std()).item() < 1 + 1e-4
        eps = (start - calls[0].alpha * x0) / calls[0].sigma

        def check(x, call, eps=eps):  # type: ignore[no-untyped-def]
            torch.testing.assert_close(x, call.alpha * x0 + call.sigma * eps, rtol=2e-4, atol=2e-4)
            return eps

        last = calls[-1]
        expected = last.next_alpha * x0 + last.next_sigma * eps
        torch.testing.assert_close(run(made, process, noise, check), expected, rtol=2e-4, atol=2e-4)
        assert (last.next_sigma == 0) == (scheduler != "DEISMultistepScheduler")
        for call in calls:
            assert call.log_snr == pytest.approx(process.log_snr(call.time).item(), abs=0.02)


@library_warns
@pytest.mark.parametrize(
    ("scheduler", "spacing", "options"),
    [use for use in EVERY if SCHEDULERS[use[0]].made_from == "betas" and use[1] != "inclusive"],
    ids=lambda value: str(value),
)
def test_equals_the_plain_library_loop(scheduler, spacing, options, processes, toy, noise, run) -> None:
    """Also shows that the betas of the process win over a class's own (Heun and KDPM2 have others)."""
    import diffusers.schedulers as library

    kind = getattr(library, scheduler)
    settings = {**SCHEDULERS[scheduler].defaults, **options, "beta_start": 1e-4, "beta_end": 0.02}
    if scheduler != "DPMSolverSinglestepScheduler":
        settings["timestep_spacing"] = spacing
    theirs = kind(**settings)
    theirs.set_timesteps(10)
    made = solver(scheduler, 10, spacing, **options)
    assert indices(made, processes["linear"]) == pytest.approx(theirs.timesteps.double().tolist(), rel=1e-6)
    x = noise * theirs.init_noise_sigma
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(0)
    for t in theirs.timesteps:
        x = theirs.step(toy(theirs.scale_model_input(x, t), t.item())[0], t, x, return_dict=False)[0]
    ours = run(made, processes["linear"], noise, predict(toy))
    torch.testing.assert_close(ours, x)  # the frames agree at the data, and DEIS never leaves the VP frame


# Grids ---------------------------------------------------------------------------------------------------------------


def test_pndm_visits_times_twice_and_half_way(processes) -> None:
    warm = [960, 940, 940, 920, 920, 900, 900, 880, 880, 860, 860, 840]
    found = solver("PNDMScheduler", 25, "leading").calls(processes["linear"])
    assert [call.training_index for call in found] == [*warm, *range(840, -1, -40)]
    assert [call.substep for call in found] == [0, 1, 2, 3] * 3 + [0] * 22 and found[-1].step == 24
    found = solver("PNDMScheduler", 25, "leading", **PLMS).calls(processes["linear"])
    assert [call.training_index for call in found] == [960, 920, *range(920, -1, -40)]
    assert [call.step for call in found] == [0, 0, *range(1, 25)]
    assert indices(solver("PNDMScheduler", 25, "trailing"), processes["linear"])[:2] == [999, 979]


def test_heun_visits_fractions_twice(processes) -> None:
    found = indices(solver("HeunDiscreteScheduler", 25), processes["linear"])
    assert found[0] == 999 and found[1::2] == found[2::2] and found[1] == 957.375
    assert found[1::2] == pytest.approx(np.linspace(0, 999, 25)[-2::-1], rel=1e-6)


def test_kdpm2_visits_points_half_way_in_log_sigma(processes) -> None:
    calls = solver("KDPM2DiscreteScheduler", 10).calls(processes["linear"])
    for before, half, after in zip(calls[0::2], calls[1::2], calls[2::2], strict=False):
        assert half.log_snr == pytest.approx((before.log_snr + after.log_snr) / 2, rel=1e-5)


@pytest.mark.parametrize("scheduler", [name for name, traits in SCHEDULERS.items() if "leading" in traits.spacings])
def test_leading_never_visits_the_noisiest_level(scheduler, processes) -> None:
    # Multistep classes count one more point, so their stride is 1000 // 51.
    first = 950 if scheduler.startswith(("DPM", "DEIS", "UniPC")) else 980
    assert max(indices(solver(scheduler, 50, "leading"), processes["linear"])) == first


def test_multistep_linspace_never_visits_the_last_level(processes) -> None:
    names = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
    for name in (*names, "DPMSolverSinglestepScheduler"):
        for steps in (10, 25, 50):
            found = indices(solver(name, steps), processes["linear"])
            assert found[0] == 999 and found[-1] == round(999 / steps)


def test_lu_lambdas_stay_longer_near_the_data(processes) -> None:
    plain = indices(solver("DPMSolverMultistepScheduler", 25), processes["linear"])
    lu = indices(solver("DPMSolverMultistepScheduler", 25, use_lu_lambdas=True), processes["linear"])
    assert sum(index < 100 for index in lu) == 9 and sum(index < 100 for index in plain) == 2


def test_edm_sigmas_are_the_karras_ramp_between_the_ends_of_the_process(processes) -> None:
    for process in processes.values():
        ends = [math.exp(-0.5 * process.log_snr(process.time_of_index(i)).item()) for i in (999, 0)]
        ramp = np.linspace(ends[0] ** (1 / 7), ends[1] ** (1 / 7), 10) ** 7
        for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
            calls = solver(name, 10, "class").calls(process)
            np.testing.assert_allclose([call.sigma / call.alpha for call in calls], ramp, rtol=1e-4)
            template = solver(name, 10, "class")._template(process)
            np.testing.assert_allclose(template.timesteps, np.log(ramp) / 4, rtol=1e-4, atol=1e-5)


def test_ipndm_is_put_on_the_grid_of_the_process(processes) -> None:
    for process in processes.values():
        for spacing in ("linspace", "trailing", "leading"):
            times = process.time_of_index(index_grid(1000, spacing, 10))
            calls = solver("IPNDMScheduler", 10, spacing).calls(process)
            assert [call.time for call in calls] == times.tolist()
            assert [call.alpha for call in calls] == pytest.approx(process.alpha(times).tolist(), rel=1e-12)


# Closed forms --------------------------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("process_name", ["linear", "scaled_linear"])
def test_edm_euler_with_an_eps_network_is_ddim(process_name, processes, toy, noise, run) -> None:
    process = processes[process_name]
    ours = run(DDIM(DDIMConfig(25)), process, noise, predict(toy))
    same(run(solver("EDMEulerScheduler", 25, "inclusive"), process, noise, predict(toy)), ours)


@pytest.mark.parametrize("process_name", ["linear", "vp_sde"])
def test_edm_dpmpp_with_an_eps_network_is_dpmpp_2m(process_name, processes, toy, noise, run) -> None:
    """Both are uniform in log-SNR between the same ends."""
    process = processes[process_name]
    ours = run(DPMpp2M(DPMpp2MConfig(20)), process, noise, predict(toy))
    theirs = solver("EDMDPMSolverMultistepScheduler", 20, "class", sigma_schedule="exponential")
    assert [call.log_snr for call in theirs.calls(process)] == pytest.approx(
        [call.log_snr for call in DPMpp2M(DPMpp2MConfig(20)).calls(process)], abs=1e-4
    )
    same(run(theirs, process, noise, predict(toy)), ours)


def test_ipndm_with_an_eps_network_is_adams_bashforth_in_eps(processes, toy, noise, run) -> None:
    process, made = processes["linear"], solver("IPNDMScheduler", 12)
    weights = {1: [1.0], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    x, past = noise.double(), []
    for call in made.calls(process):
        past.insert(0, toy(x.float(), call.training_index)[0].double())
        eps = sum(w * e for w, e in zip(weights[call.order], past, strict=False))
        x = call.next_alpha * (x - call.sigma * eps) / call.alpha + call.next_sigma * eps
    same(run(made, process, noise, predict(toy)), x.float())


def test_sde_dpmpp_of_order_one_is_ancestral_ddim(processes, toy, noise, run) -> None:
    process = processes["linear"]
    made = solver("DPMSolverMultistepScheduler", 20, "inclusive", algorithm_type="sde-dpmsolver++", solver_order=1)
    ours = run(DDIM(DDIMConfig(20, eta=1.0)), process, noise, predict(toy))
    same(run(made, process, noise, predict(toy)), ours)


@pytest.mark.parametrize("steps", [10, 50, 100])
def test_singlestep_of_order_one_is_ddim(steps, processes, toy, noise, run) -> None:
    made = solver("DPMSolverSinglestepScheduler", steps, "inclusive", solver_order=1)
    ours = run(DDIM(DDIMConfig(steps)), processes["linear"], noise, predict(toy))
    same(run(made, processes["linear"], noise, predict(toy)), ours)


def test_initial_scale(processes) -> None:
    process, noise = processes["linear"], torch.ones(1, 1, 1, 1)
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler"):
        assert solver(name, 50).begin(process, noise).x.item() == pytest.approx(157.4, abs=0.05)
        assert solver(name, 50, "leading").begin(process, noise).x.item() == pytest.approx(130.15, abs=0.01)
    for name in ("PNDMScheduler", "IPNDMScheduler"):
        assert solver(name, 50, "leading").begin(process, noise).x.item() == 1
    edm = solver("EDMEulerScheduler", 50, "class")
    assert edm.network_input(edm.begin(process, noise), edm.calls(process)[0]).item() == pytest.approx(1, abs=1e-5)


def test_history_does_not_grow(processes, toy, noise, run) -> None:
    for name in ("IPNDMScheduler", "LMSDiscreteScheduler", "PNDMScheduler"):
        states: list = []
        run(solver(name, 20, "leading"), processes["linear"], noise, predict(toy), states=states)
        lists = [value for value in states[-1].history["scheduler"].values() if isinstance(value, list)]
        assert lists and max(len(value) for value in lists) == 4


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (lambda: solver("DDPMScheduler"), "DDPMScheduler.*solver=ddpm"),
        (lambda: solver("PNDMScheduler", 25, "linspace"), "no spacing 'linspace'; take spacing=leading or trailing"),
        (lambda: solver("EDMEulerScheduler", 25), "no spacing 'linspace'; take spacing=class or inclusive"),
        (lambda: solver("DPMSolverSinglestepScheduler", 25, "trailing"), "spacing=linspace or inclusive"),
        (lambda: solver("HeunDiscreteScheduler", 25, "class"), "no spacing 'class'"),
        (
            lambda: solver("DPMSolverSinglestepScheduler", algorithm_type="sde-dpmsolver++"),
            "sde-dpmsolver.*by itself.*DPMSolverMultistepScheduler",
        ),
        (lambda: DiffusersConfig("HeunDiscreteScheduler", restart_at_switch=True), "no history.*UniPC"),
        (lambda: DiffusersConfig("PNDMScheduler", spacing="leading", restart_at_switch=True), "no history.*IPNDM"),
    ],
)
def test_impossible_requests(make, quoted) -> None:
    with pytest.raises(UsageError, match=quoted) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("made", "quoted"),
    [
        (solver("PNDMScheduler", 40, "leading"), "1000 // 40 = 25.*even stride.*skip_prk_steps"),
        (solver("PNDMScheduler", 3, "leading"), "at least 4 steps with its Runge-Kutta"),
        (solver("PNDMScheduler", 1, "leading", **PLMS), "at least 2 steps without"),
        (solver("PNDMScheduler", 30, "trailing", **PLMS), "steps=30 with spacing 'trailing'.*divides 1000"),
        (solver("PNDMScheduler", 25, "leading", set_alpha_to_one=False), "do not fall at every step"),
        (solver("EDMEulerScheduler", 10, "class", sigma_min=0.002), "visits sigma 157.* to 0.002.*157.4 to 0.01"),
        (solver("EDMDPMSolverMultistepScheduler", 10, "class", sigma_max=800.0), "sigma 800 to"),
        (solver("EDMEulerScheduler", 10, "inclusive", rho=5.0), "inclusive.*rho would do nothing"),
        (solver("EDMEulerScheduler", 10, "class", sigma_data=1.0), "no option 'sigma_data'"),
        (solver("DPMSolverSinglestepScheduler", variance_type="learned_range"), "no option 'variance_type'"),
        (solver("HeunDiscreteScheduler", beta_start=0.1), "no option 'beta_start'"),
        (solver("IPNDMScheduler", trained_betas=[0.1]), "no option 'trained_betas'"),
        (solver("DEISMultistepScheduler", use_karras_sigmas=True), "do not fall at every step"),
    ],
)
def test_what_would_go_wrong_is_refused(made, quoted, processes) -> None:
    with pytest.raises(UsageError, match=quoted) as caught:
        made.check(processes["linear"])
    assert "\n" not in str(caught.value)


def test_pndm_grids_that_fit_are_offered(processes) -> None:
    solver("PNDMScheduler", 40, "leading", **PLMS).check(processes["linear"])
    solver("PNDMScheduler", 30, "leading", **PLMS).check(processes["linear"])
    solver("PNDMScheduler", 4, "trailing").check(processes["linear"])
