"""Every shipped solver on EDM and VE: it converges to what the data say, or refuses in one line."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from gearshift.diffusion.edm import EDM, VE, EDMConfig, VEConfig
from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers import DDIM, Call, DDIMConfig, EulerMaruyama, EulerMaruyamaConfig, Solver
from gearshift.diffusion.solvers.grids import time_grid
from gearshift.runtime.config import build
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir

PROCESSES = {"edm": EDM(EDMConfig()), "ve": VE(VEConfig())}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
# `pipeline` is the scheduler of somebody else's loop, and steps no process of ours.
NAMES = sorted({file.stem for file in Path(conf_dir()).glob("solver/*.yaml")} - {"pipeline"})
STOCHASTIC = {"ddpm", "sde_dpmpp"}
REFUSED = {"euler_maruyama"}
MEAN, STD = 0.3, 0.5
library_warns = pytest.mark.filterwarnings("ignore:__array")


def gaussian(x: Tensor, call: Call) -> Tensor:
    return call.sigma * (x - call.alpha * MEAN) / ((call.alpha * STD) ** 2 + call.sigma**2)


def made(name: str, steps: int) -> Solver:
    node = OmegaConf.load(Path(conf_dir()) / "solver" / f"{name}.yaml")
    node["steps"] = steps  # type: ignore[index]
    if "clip_x0" in node:
        node["clip_x0"] = False  # type: ignore[index]
    solver: Solver = build(node)  # type: ignore[arg-type]
    return solver


def exact(solver: Solver, process: Process, noise: Tensor) -> Tensor:
    """Where the ODE through the first input ends; a step to the data is one data prediction."""
    calls = solver.calls(process)
    first, last = calls[0], calls[-1]
    start = solver.network_input(solver.begin(process, noise), first)
    rank = (start - first.alpha * MEAN) / math.hypot(first.alpha * STD, first.sigma)
    if last.next_time is not None:
        return last.next_alpha * MEAN + rank * math.hypot(last.next_alpha * STD, last.next_sigma)
    x = last.alpha * MEAN + rank * math.hypot(last.alpha * STD, last.sigma)
    return (x - last.sigma * gaussian(x, last)) / last.alpha


@library_warns
@each_process
@pytest.mark.parametrize("name", [name for name in NAMES if name not in STOCHASTIC | REFUSED])
def test_deterministic_solvers_converge_on_gaussian_data(name: str, process: Process, run) -> None:  # type: ignore[no-untyped-def]
    noise = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    errors = []
    for steps in (20, 50, 100):
        solver = made(name, steps)
        errors.append((run(solver, process, noise, gaussian) - exact(solver, process, noise)).abs().max().item())
    assert errors[-1] < 0.04 and (errors[0] > errors[1] > errors[2] or errors[1] < 1e-3), errors


@library_warns
@each_process
@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_stochastic_solvers_reach_the_data_distribution(name: str, process: Process, run) -> None:  # type: ignore[no-untyped-def]
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    samples = run(made(name, 500), process, noise, gaussian)
    assert samples.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(4000) + 0.005)
    assert samples.std().item() == pytest.approx(STD, rel=4 / math.sqrt(8000) + 0.03)


@library_warns
@each_process
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_a_point_mass_is_reached(name: str, process: Process, noise: Tensor, run) -> None:  # type: ignore[no-untyped-def]
    image = noise[:1].tanh()
    solver = made(name, 20)
    last = solver.calls(process)[-1]
    ended = run(solver, process, noise, lambda x, call: (x - call.alpha * image) / call.sigma)
    apart = (ended - last.next_alpha * image).abs().max().item()
    assert apart < 6 * last.next_sigma + 2e-3, apart


@library_warns
@each_process
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_calls_say_the_level_they_are_at(name: str, process: Process) -> None:
    for call in made(name, 20).calls(process):
        # Classes of the library keep 1 - sigma^2 in fp32, which leaves three digits at ratio 0.002.
        assert call.log_snr == pytest.approx(process.log_snr(call.time).item(), abs=0.03)
        assert call.training_index == pytest.approx(process.training_index(call.time).item())


@each_process
def test_the_vp_sde_has_no_place_here(process: Process) -> None:
    with pytest.raises(UsageError, match=f"euler_maruyama.*{process.name}"):
        EulerMaruyama(EulerMaruyamaConfig()).calls(process)


@each_process
@pytest.mark.parametrize("steps", [1, 2, 18, 50])
def test_grids_are_even_in_index(steps: int, process: Process) -> None:
    index = {
        spacing: process.index_of_time(torch.tensor(time_grid(process, spacing, steps), dtype=torch.float64))
        for spacing in ("linspace", "trailing", "leading")
    }
    for spacing, visited in index.items():
        assert len(visited) == steps and (visited.diff() < 0).all()
        assert torch.allclose(visited.diff(), visited.diff()[:1]), spacing
    assert index["linspace"][0].item() == pytest.approx(999) == pytest.approx(index["trailing"][0].item())
    if steps > 1:
        assert index["linspace"][-1].item() == pytest.approx(0, abs=1e-7)
        assert index["leading"][-1].item() == pytest.approx(0, abs=1e-7)
        assert index["trailing"][-1].item() == pytest.approx(1000 / steps - 1)


def test_linspace_on_edm_is_the_grid_of_edm() -> None:
    calls = DDIM(DDIMConfig(18)).calls(PROCESSES["edm"])
    ratios = [call.sigma / call.alpha for call in calls]
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert ratios == pytest.approx([(high + i / 17 * (low - high)) ** 7 for i in range(18)])
    levels = [call.log_snr for call in DDIM(DDIMConfig(18, spacing="log_snr")).calls(PROCESSES["edm"])]
    assert [b - a for a, b in pairwise(levels)] == pytest.approx([2 * math.log(40_000) / 17] * 17)
