"""Gaussian data: the best noise prediction and the solution of the probability-flow ODE are known in closed form."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.solvers import (
    DDIM,
    DDPM,
    Call,
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

MEAN, STD = 0.3, 0.5


def marginal_std(alpha: float, sigma: float) -> float:
    return math.sqrt(alpha**2 * STD**2 + sigma**2)


def exact_eps(x: Tensor, call: Call) -> Tensor:
    return call.sigma * (x - call.alpha * MEAN) / marginal_std(call.alpha, call.sigma) ** 2


def exact_end(solver: Solver, process, noise: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Where the ODE through the first input is after the last call; a step to the data is one data prediction."""
    calls = solver.calls(process)
    first, last = calls[0], calls[-1]
    start = solver.network_input(solver.begin(process, noise), first)
    rank = (start - first.alpha * MEAN) / marginal_std(first.alpha, first.sigma)
    if last.next_time is not None:
        return last.next_alpha * MEAN + rank * marginal_std(last.next_alpha, last.next_sigma)
    x = last.alpha * MEAN + rank * marginal_std(last.alpha, last.sigma)
    return (x - last.sigma * exact_eps(x, last)) / last.alpha


FIRST, SECOND = (0.8, 1.3), (1.7, 2.6)
ORDERS = {
    "ddim": (lambda n: DDIM(DDIMConfig(n, spacing="log_snr")), FIRST),
    "ddim_time": (lambda n: DDIM(DDIMConfig(n * 4)), FIRST),
    "dpmpp_2m": (lambda n: DPMpp2M(DPMpp2MConfig(n)), SECOND),
    "dpmpp_2m_to_end": (lambda n: DPMpp2M(DPMpp2MConfig(n, to_data=False, lower_order_final=False)), SECOND),
    "euler": (
        lambda n: DiffusersSolver(
            DiffusersConfig("EulerDiscreteScheduler", n, options={"use_exponential_sigmas": True})
        ),
        FIRST,
    ),
    "diffusers_dpmpp": (lambda n: DiffusersSolver(DiffusersConfig(steps=n, options={"use_lu_lambdas": True})), SECOND),
    "unipc": (
        lambda n: DiffusersSolver(
            DiffusersConfig("UniPCMultistepScheduler", n, options={"use_exponential_sigmas": True, "solver_order": 2})
        ),
        (1.7, 3.6),  # the corrector raises the order by up to one
    ),
    "heun": (
        lambda n: DiffusersSolver(
            DiffusersConfig("HeunDiscreteScheduler", n, options={"use_exponential_sigmas": True})
        ),
        SECOND,
    ),
    "kdpm2": (
        lambda n: DiffusersSolver(
            DiffusersConfig("KDPM2DiscreteScheduler", n, options={"use_exponential_sigmas": True})
        ),
        SECOND,
    ),
    "dpm_single": (
        lambda n: DiffusersSolver(
            DiffusersConfig("DPMSolverSinglestepScheduler", n, options={"use_exponential_sigmas": True})
        ),
        SECOND,
    ),
    "edm_euler": (
        lambda n: DiffusersSolver(DiffusersConfig("EDMEulerScheduler", n, "class", {"sigma_schedule": "exponential"})),
        FIRST,
    ),
    "edm_euler_karras": (lambda n: DiffusersSolver(DiffusersConfig("EDMEulerScheduler", n, "class")), FIRST),
    "edm_dpmpp": (
        lambda n: DiffusersSolver(
            DiffusersConfig("EDMDPMSolverMultistepScheduler", n, "class", {"sigma_schedule": "exponential"})
        ),
        SECOND,
    ),
    "edm_dpmpp_karras": (
        lambda n: DiffusersSolver(DiffusersConfig("EDMDPMSolverMultistepScheduler", n, "class")),
        SECOND,
    ),
    # Its only grids are uneven in log-SNR, so at these sizes it is not yet second order.
    "deis": (lambda n: DiffusersSolver(DiffusersConfig("DEISMultistepScheduler", n)), (1.3, 2.6)),
    "ipndm": (lambda n: DiffusersSolver(DiffusersConfig("IPNDMScheduler", n)), (1, 5)),
    "lms": (
        lambda n: DiffusersSolver(DiffusersConfig("LMSDiscreteScheduler", n, options={"use_exponential_sigmas": True})),
        (1, 5),
    ),
}


@pytest.mark.parametrize("process_name", ["vp_sde", "linear"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, process_name, processes, run) -> None:
    make, (low, high) = ORDERS[name]
    process = processes[process_name]
    noise = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    errors = []
    for steps in (16, 32, 64):
        solver = make(steps)
        errors.append((run(solver, process, noise, exact_eps) - exact_end(solver, process, noise)).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert low < orders[-1] < high, (errors, orders)


@pytest.mark.parametrize(
    "solver",
    [DDPM(DDPMConfig(1000)), DDIM(DDIMConfig(1000, eta=1.0)), EulerMaruyama(EulerMaruyamaConfig(1000))],
    ids=lambda solver: solver.name,
)
def test_stochastic_solvers_reach_the_data_distribution(solver, processes, run) -> None:
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    samples = run(solver, processes["vp_sde"], noise, exact_eps)
    # Four standard errors of 4000 draws, and the discretisation of 1000 steps, which is near 1 %.
    assert samples.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(4000) + 0.005)
    assert samples.std().item() == pytest.approx(STD, rel=4 / math.sqrt(8000) + 0.015)
