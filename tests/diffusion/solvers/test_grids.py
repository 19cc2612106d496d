"""Which times are visited, how many calls that takes, and what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from gearshift.diffusion.solvers import (
    DDIM,
    DDPM,
    DDIMConfig,
    DDPMConfig,
    DiffusersConfig,
    DiffusersSolver,
    DPMpp2M,
    DPMpp2MConfig,
    EulerMaruyama,
    EulerMaruyamaConfig,
)
from gearshift.diffusion.solvers.grids import SPACINGS, time_grid
from gearshift.runtime.errors import UsageError

MAKERS = {
    "ddim": lambda n: DDIM(DDIMConfig(n)),
    "ddpm": lambda n: DDPM(DDPMConfig(n)),
    "euler_maruyama": lambda n: EulerMaruyama(EulerMaruyamaConfig(n)),
    "dpmpp_2m": lambda n: DPMpp2M(DPMpp2MConfig(n)),
    "dpmpp_2m_to_end": lambda n: DPMpp2M(DPMpp2MConfig(n, to_data=False)),
    "diffusers_dpmpp": lambda n: DiffusersSolver(DiffusersConfig("DPMSolverMultistepScheduler", n)),
    "diffusers_euler": lambda n: DiffusersSolver(DiffusersConfig("EulerDiscreteScheduler", n)),
    "diffusers_unipc": lambda n: DiffusersSolver(DiffusersConfig("UniPCMultistepScheduler", n)),
    "diffusers_single": lambda n: DiffusersSolver(DiffusersConfig("DPMSolverSinglestepScheduler", n)),
    "diffusers_lms": lambda n: DiffusersSolver(DiffusersConfig("LMSDiscreteScheduler", n)),
    "diffusers_edm_euler": lambda n: DiffusersSolver(DiffusersConfig("EDMEulerScheduler", n, "class")),
    "diffusers_edm_dpmpp": lambda n: DiffusersSolver(DiffusersConfig("EDMDPMSolverMultistepScheduler", n, "class")),
    "diffusers_ipndm": lambda n: DiffusersSolver(DiffusersConfig("IPNDMScheduler", n)),
}


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50])
@pytest.mark.parametrize("name", MAKERS)
def test_calls_are_n_and_chain(name, steps, processes) -> None:
    for process in processes.values():
        solver = MAKERS[name](steps)
        if name == "euler_maruyama" and process.name != "vp_sde":
            continue
        calls = solver.calls(process)
        assert len(calls) == steps
        assert [call.position for call in calls] == list(range(steps))
        for call, following in pairwise(calls):
            assert (call.next_time, call.next_alpha, call.next_sigma) == (
                following.time,
                following.alpha,
                following.sigma,
            )
        for call in calls:
            assert call.log_snr < call.next_log_snr and call.alpha < call.next_alpha and 0 <= call.training_index <= 999
            assert call.alpha**2 + call.sigma**2 == pytest.approx(1, abs=1e-12)
            assert call.log_snr == pytest.approx(2 * math.log(call.alpha / call.sigma), abs=1e-9)
            assert call.training_index == pytest.approx(process.training_index(call.time).item())
        last = calls[-1]
        assert (last.next_time is None) == (last.next_sigma == 0) == (name != "dpmpp_2m_to_end")
        assert not last.needs_noise and solver.calls(process) == calls
        assert any(call.needs_noise for call in calls) == (solver.stochastic and steps > 1)


@pytest.mark.parametrize("name", [name for name in MAKERS if name.startswith("diffusers")])
def test_scheduler_levels_are_the_process_levels(name, processes) -> None:
    for process in processes.values():
        for call in MAKERS[name](25).calls(process):
            # Euler interpolates sigma, not log sigma, between entries: apart only where the table is steep.
            slack = 0.02 if call.time != round(call.time) else 2e-3
            assert call.log_snr == pytest.approx(process.log_snr(call.time).item(), abs=slack), (process, call)


def test_named_spacings_on_a_table(processes) -> None:
    for steps in (1, 2, 7, 50, 250, 999, 1000):
        linspace = np.linspace(0, 999, steps).round()[::-1] if steps > 1 else [999]
        expected = {
            "linspace": linspace,
            "trailing": np.round(1000 - np.arange(steps) * 1000 / steps) - 1,
            "leading": np.arange(steps)[::-1] * (1000 // steps),
        }
        for spacing, index in expected.items():
            assert time_grid(processes["linear"], spacing, steps) == list(index), (spacing, steps)
            assert time_grid(processes["scaled_linear"], spacing, steps) == [i + 1 for i in index]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 10, 333, 1000])
def test_every_grid_falls_and_stays_inside(spacing, steps, processes) -> None:
    for process in processes.values():
        grid = torch.tensor(time_grid(process, spacing, steps), dtype=torch.float64)
        assert len(grid) == steps and (grid.diff() < 0).all()
        assert process.t_min - 1e-9 <= grid[-1] and grid[0] <= process.t_max + 1e-9
        if spacing in ("linspace", "log_snr", "trailing"):
            assert grid[0].item() == pytest.approx(process.t_max)
        if spacing == "log_snr":
            steps_in_level = process.log_snr(grid).diff()
            torch.testing.assert_close(
                steps_in_level, steps_in_level.mean().expand_as(steps_in_level), rtol=1e-6, atol=0
            )


def test_vp_sde_grids_agree_with_the_table_at_1000_steps(processes) -> None:
    table = [(i + 1) / 1000 for i in reversed(range(1000))]
    for spacing in ("linspace", "trailing", "leading"):
        assert time_grid(processes["vp_sde"], spacing, 1000) == pytest.approx(table, abs=1e-12)


def test_euler_maruyama_grid(processes) -> None:
    process = processes["vp_sde"]
    calls = EulerMaruyama(EulerMaruyamaConfig()).calls(process)
    points = [call.time for call in calls] + [0.0]
    assert len(points) == 1001
    np.testing.assert_allclose(points[::-1], np.append(0.0, np.linspace(1e-3, 1, 1000)), atol=1e-12)
    fed = [process.network_time(call.time).item() for call in (calls[0], calls[-1])]
    assert fed == pytest.approx([999.0, 0.999])
    assert all(call.needs_noise for call in calls[:-1]) and not calls[-1].needs_noise


@pytest.mark.parametrize("name", MAKERS)
def test_refusals_quote_solver_and_process(name, processes) -> None:
    process = processes["vp_sde" if name == "euler_maruyama" else "linear"]
    for steps in (0, -3) if name == "euler_maruyama" else (0, -3, 1001):
        solver = MAKERS[name](steps)
        for attempt in (solver.check, solver.calls, lambda p, s=solver: s.begin(p, torch.zeros(1, 1, 2, 2))):
            with pytest.raises(
                UsageError, match=rf"{solver.name}.*steps={steps}.*linear|{solver.name}.*{process.name}"
            ):
                attempt(process)


def test_euler_maruyama_needs_the_vp_sde(processes) -> None:
    with pytest.raises(UsageError, match=r"euler_maruyama.*scaled_linear"):
        EulerMaruyama(EulerMaruyamaConfig()).check(processes["scaled_linear"])


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (lambda: DDIMConfig(spacing="uniform"), "'uniform'; known: linspace"),
        (lambda: DDIMConfig(eta=1.5), "eta=1.5"),
        (lambda: DDPMConfig(variance="learned"), "'learned'; known: fixed_small"),
        (lambda: DPMpp2MConfig(history="some"), "'some'; known: computed"),
        (lambda: DPMpp2MConfig(spacing="trailing", to_data=False), "trailing"),
        (lambda: EulerMaruyamaConfig(t_end=0.0), "t_end=0.0"),
        (lambda: DiffusersConfig("NoScheduler"), "'NoScheduler'; known: .*DPMSolver"),
        (lambda: DiffusersConfig("DDIMScheduler", spacing="linspace"), "linspace.*solver=ddim"),
        (lambda: DiffusersConfig("UniPCMultistepScheduler", spacing="inclusive"), "UniPC.*inclusive"),
    ],
)
def test_impossible_options_are_refused(make, quoted) -> None:
    with pytest.raises(UsageError, match=quoted):
        make()


@pytest.mark.parametrize(
    ("process_name", "t_end"), [("linear", -1.0), ("linear", 999.0), ("vp_sde", 0.0), ("vp_sde", 1.0)]
)
def test_dpmpp_end_must_be_a_time_of_the_process(process_name, t_end, processes) -> None:
    with pytest.raises(UsageError, match=f"t_end={t_end:g}.*{process_name}"):
        DPMpp2M(DPMpp2MConfig(t_end=t_end)).check(processes[process_name])
