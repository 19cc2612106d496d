"""One schedule under every solver: the depths of whole runs, whatever a solver calls its times."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
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
    Solver,
)
from gearshift.diffusion.solvers.scheduler_classes import SCHEDULERS
from gearshift.policies import ExitSchedule

from .depths import of_depth

DEMO = ExitSchedule(depths=[28, 28, 24, 24, 20, 20, 16, 16, 12, 12], of=28)
LINEAR = Discrete(DiscreteConfig())
PROCESSES: list[Process] = [
    LINEAR,
    VPSDE(VPSDEConfig()),
    Discrete(DiscreteConfig("scaled_linear", 1000, 8.5e-4, 0.012, first_index=1)),
]


def depths(solver: Solver, process: Process = LINEAR, policy: ExitSchedule = DEMO) -> list[int]:
    info = of_depth(28, solver.calls(process))
    policy.check(info)
    state = policy.begin(info)
    return [policy.plan(state, call).depth for call in info.calls]  # type: ignore[misc]


def adapted(scheduler: str, steps: int, spacing: str = "linspace", **options: object) -> DiffusersSolver:
    return DiffusersSolver(DiffusersConfig(scheduler, steps, spacing, options))


DPM = "DPMSolverMultistepScheduler"
MEANS = [
    ("ddim-25", DDIM(DDIMConfig(25)), 25, 500),
    ("ddim-50", DDIM(DDIMConfig(50)), 50, 1000),
    ("ddim-25-leading", DDIM(DDIMConfig(25, spacing="leading")), 25, 500),
    ("ddim-50-trailing", DDIM(DDIMConfig(50, spacing="trailing")), 50, 1000),
    ("ddpm-250", DDPM(DDPMConfig(250)), 250, 5000),
    ("dpmpp-25", adapted(DPM, 25), 25, 492),
    ("unipc-25", adapted("UniPCMultistepScheduler", 25), 25, 492),
    ("deis-25", adapted("DEISMultistepScheduler", 25), 25, 492),
    ("dpm-single-25", adapted("DPMSolverSinglestepScheduler", 25), 25, 492),
    ("sde-dpmpp-25", adapted(DPM, 25, algorithm_type="sde-dpmsolver++"), 25, 492),
    ("lu-25", adapted(DPM, 25, use_lu_lambdas=True), 25, 544),
    ("pndm-25", adapted("PNDMScheduler", 25, "leading"), 34, 608),
    ("plms-25", adapted("PNDMScheduler", 25, "leading", skip_prk_steps=True), 26, 512),
    ("heun-25", adapted("HeunDiscreteScheduler", 25), 49, 988),
    ("em-1000", EulerMaruyama(EulerMaruyamaConfig()), 1000, 20000),
]


@pytest.mark.parametrize(("solver", "calls", "blocks"), [row[1:] for row in MEANS], ids=[row[0] for row in MEANS])
def test_blocks_of_a_run_under_demo(solver: Solver, calls: int, blocks: int) -> None:
    found = depths(solver, PROCESSES[1] if solver.name == "euler_maruyama" else LINEAR)
    assert (len(found), sum(found)) == (calls, blocks)


def test_mean_depths_as_they_are_quoted() -> None:
    quoted = {
        "ddim-25": 20.00,
        "ddim-50": 20.00,
        "ddpm-250": 20.00,
        "dpmpp-25": 19.68,
        "unipc-25": 19.68,
        "lu-25": 21.76,
        "pndm-25": 17.88,
        "heun-25": 20.16,
    }
    means = {name: Fraction(blocks, calls) for name, _, calls, blocks in MEANS}
    assert {name: round(float(means[name]), 2) for name in quoted} == quoted


SAME_GRID = {
    "index": DDIM(DDIMConfig(25)),
    "sigma": adapted("EulerDiscreteScheduler", 25, "inclusive"),
    "c_noise": adapted("EDMEulerScheduler", 25, "inclusive"),
    "[0, 1]": adapted("IPNDMScheduler", 25, "linspace"),
}


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
@pytest.mark.parametrize("name", SAME_GRID)
def test_one_sampler_in_four_time_conventions(name: str, process: Process) -> None:
    """Raw times are indices, sigmas, ln(sigma) / 4, or an angle in [0, 1]; the levels, and so the depths, are equal."""
    if name == "index" and process.continuous:
        pytest.skip("on a continuous process our own grid does not round to table entries")
    common = SAME_GRID["sigma" if process.continuous else "index"]
    reference = common.calls(process)
    calls = SAME_GRID[name].calls(process)
    for ours, theirs in zip(calls, reference, strict=True):
        assert ours.training_index == theirs.training_index and ours.time == theirs.time
        # Euler interpolates its sigmas from betas in fp32.
        assert ours.log_snr == pytest.approx(theirs.log_snr, abs=2e-3)
    edges = [float(process.log_snr(process.time_of_training_index(100 * k))) for k in range(1, 10)]
    by_level = ExitSchedule(depths=DEMO.depths, domain="log_snr", edges=edges, of=28)
    found = depths(SAME_GRID[name], process)
    assert found == depths(common, process) == sorted(found) and sum(found) == 500
    assert depths(SAME_GRID[name], process, by_level) == found


def test_raw_times_would_have_given_full_depth() -> None:
    """What the two conventions look like to a schedule that reads timesteps as indices."""
    for name, least, most in (("c_noise", -1.2, 1.3), ("[0, 1]", 0.0, 1.0)):
        solver = SAME_GRID[name]
        assert isinstance(solver, DiffusersSolver)
        raw = solver._template(LINEAR).timesteps.tolist()
        assert least < min(raw) and max(raw) < most
        for time, call in zip(raw, solver.calls(LINEAR), strict=True):
            log_snr = -8 * time if name == "c_noise" else -2 * math.log(math.tan(0.5 * math.pi * time))
            assert call.log_snr == pytest.approx(log_snr, rel=1e-3, abs=0.02)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_depth_is_the_schedule_at_the_mapped_index(scheduler: str) -> None:
    """For every class, by position, so twice where a level is visited twice, and for fractions too."""
    traits = SCHEDULERS[scheduler]
    for process in PROCESSES:
        for spacing in traits.spacings:
            solver = adapted(scheduler, 10, spacing)
            levels = torch.tensor([call.log_snr for call in solver.calls(process)], dtype=torch.float64)
            # Levels that come out of fp32 tables may lie a little before a whole index.
            index = process.index_of_time(process.time_of_log_snr(levels)) + 0.02
            wanted = [DEMO.depths[int(i // 100)] for i in index.clamp(max=999)]
            found = depths(solver, process)
            assert found == wanted, (process, spacing)
            assert found[0] == 12 and found[-1] in (24, 28)


def test_own_multistep_solver_visits_fractions() -> None:
    solver = DPMpp2M(DPMpp2MConfig(25))
    assert any(call.training_index != round(call.training_index) for call in solver.calls(LINEAR))
    assert depths(solver) == depths(solver, PROCESSES[1]) or sum(depths(solver)) > 500
