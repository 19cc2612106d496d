"""A skipped call is a longer step: runs with skips against loops over the grid of the computed calls alone.

With eps held, DDIM is straight in x / alpha and Euler in x_0 + s eps, so k calls that reuse it make one step over their
union (arXiv 2010.02502, eq. 13-14). What `dpmpp_2m` makes of it is in `tests/diffusion/solvers/test_dpmpp_2m.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
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
    EDMHeun,
    EDMHeunConfig,
    Solver,
    State,
)
from gearshift.diffusion.solvers.edm_heun import HeunCall
from gearshift.execution.plan import StepPlan
from gearshift.policies import Policy
from gearshift.runtime import keys
from gearshift.sampling.loop import Sampler, sample_chunk

from ..contract import build, cost_table

B, STEPS = 3, 18
PROCESS = Discrete(DiscreteConfig())
EULER = DiffusersSolver(DiffusersConfig("EulerDiscreteScheduler", STEPS))
MASKS = [0, 1, 2]


@dataclass(frozen=True)
class Mask(Policy):
    """Calls the network where the mask says so."""

    mask: tuple[bool, ...]

    def plan(self, state: Any, call: Call) -> StepPlan:
        return StepPlan(call=self.mask[call.position])


def random_mask(seed: int, count: int = STEPS) -> tuple[bool, ...]:
    """About half of the calls, the first among them."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    return (True, *drawn[1:].tolist())


def kept(mask: tuple[bool, ...]) -> list[int]:
    return [k for k, made in enumerate(mask) if made]


def coarse(levels: list[float], x: Tensor, eps: Callable[[Tensor, int], Tensor], mask: tuple[bool, ...]) -> Tensor:
    """Euler steps in the frame x_0 + s eps over the levels of the computed calls, the last one to the end."""
    points = kept(mask)
    for here, there in zip(points, [*points[1:], len(mask)], strict=True):
        x = x + (levels[there] - levels[here]) * eps(x, here)
    return x


def ratios(calls: tuple[Call, ...]) -> list[float]:
    return [*(call.sigma / call.alpha for call in calls), calls[-1].next_sigma / calls[-1].next_alpha]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# In float64, one step after the other ---------------------------------------------------------------------------------

MIX = torch.randn(2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def smooth(x: Tensor, s: float) -> Tensor:
    """A smooth eps of x in the frame x_0 + s eps."""
    return torch.tanh(torch.einsum("oc,bchw->bohw", MIX, x) / (1 + s)) + 0.5 * x * s / (1 + s**2)


def of_euler(call: Call) -> Call:
    """The call for the step of `edm_heun` that is Euler's: unlike the library's, it goes in float64."""
    fields = {name: value for name, value in asdict(call).items() if name != "process"} | {"order": 1, "substep": 0}
    return HeunCall(**fields, start=call.sigma / call.alpha, stop=call.next_sigma / call.next_alpha, spread=0.0)


@pytest.mark.parametrize("seed", MASKS)
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_skipping_is_the_thinned_grid_in_float64(name: str, seed: int) -> None:
    """`advance` hands eps on in fp32; the steps behind it are the ones of float64."""
    solver: Solver = DDIM(DDIMConfig(STEPS)) if name == "ddim" else EDMHeun(EDMHeunConfig())
    calls = solver.calls(PROCESS) if name == "ddim" else tuple(map(of_euler, EULER.calls(PROCESS)))
    mask, levels = random_mask(seed), ratios(calls)
    assert 5 < sum(mask) < 14
    start = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = calls[0].alpha if name == "ddim" else 1.0
    state, held = State(x=start * scale), start
    for call, made in zip(calls, mask, strict=True):
        alpha = 1.0 if solver.sigma_frame else call.alpha
        held = smooth(state.x / alpha, levels[call.position]) if made else held
        x, history = solver._step(state, call, held, None, None, made)
        state = State(x=x, position=call.position + 1, history=history)
    wanted = coarse(levels, start, lambda x, k: smooth(x, levels[k]), mask)
    assert state.x.dtype == torch.float64 and distance(state.x, wanted) < 1e-10
    assert distance(state.x, coarse(levels, start, lambda x, k: smooth(x, levels[k]), (True,) * STEPS)) > 1e-3


# Whole runs ----------------------------------------------------------------------------------------------------------


def network(denoiser: Denoiser, labels: Tensor, x: Tensor, call: Call) -> Tensor:
    """eps at x in the frame alpha x_0 + sigma eps, without a denoiser."""
    backbone = denoiser.network
    stream = backbone.embed(x, torch.full((len(x),), float(PROCESS.network_time(call.time))), labels)
    hidden = stream.hidden
    for block in backbone.blocks:
        hidden = block(hidden, stream.cond)
    return backbone.readout(hidden, stream.cond, len(backbone.blocks))


def sampler(solver: Solver, mask: tuple[bool, ...]) -> Sampler:
    return Sampler(Denoiser(build("isotropic"), PROCESS), solver, Mask(mask), chunk=B)


def start(s: Sampler) -> tuple[Tensor, Tensor]:
    index = torch.arange(B)
    return keys.normal(0, "init_noise", index, 0, (2, 8, 8)), keys.integers(0, "sample_label", index, 0, 3)


@torch.no_grad()
@pytest.mark.parametrize("seed", MASKS)
@pytest.mark.parametrize("solver", [DDIM(DDIMConfig(STEPS)), EULER], ids=lambda s: s.name)
def test_a_run_with_skips_is_the_thinned_grid(solver: Solver, seed: int) -> None:
    s = sampler(solver, random_mask(seed))
    chunk = sample_chunk(s, torch.arange(B), cost_table(s.denoiser.network))
    noise, labels = start(s)
    calls, levels = s.calls(), ratios(s.calls())

    def eps(x: Tensor, k: int) -> Tensor:
        return network(s.denoiser, labels, (x * calls[k].alpha).float(), calls[k]).double()

    first = solver.begin(PROCESS, noise).x.double() / (1.0 if solver.sigma_frame else calls[0].alpha)
    assert distance(chunk.images, coarse(levels, first, eps, random_mask(seed))) < 1e-5
    assert chunk.ledger.called[:, 0, 0].tolist() == list(random_mask(seed))
    assert distance(chunk.images, coarse(levels, first, eps, (True,) * STEPS)) > 1e-2


SOLVERS: list[Solver] = [
    DDIM(DDIMConfig(STEPS)),
    DDIM(DDIMConfig(STEPS, eta=0.7)),
    DDPM(DDPMConfig(STEPS)),
    DPMpp2M(DPMpp2MConfig(STEPS)),
    DPMpp2M(DPMpp2MConfig(STEPS, history="all")),
    EDMHeun(EDMHeunConfig(9)),
    EULER,
    DiffusersSolver(DiffusersConfig(steps=STEPS)),
    DiffusersSolver(DiffusersConfig("UniPCMultistepScheduler", STEPS)),
]
NAMES = ["ddim", "ddim-eta", "ddpm", "2m-computed", "2m-all", "heun", "euler", "diffusers-2m", "unipc"]


@torch.no_grad()
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_every_kth_call_is_the_loop_by_hand_bit_for_bit(solver: Solver, every: int) -> None:
    """All steps are made, with the last prediction where there is none of their own."""
    calls = solver.calls(PROCESS)
    mask = tuple(k % every == 0 for k in range(len(calls)))
    s = sampler(solver, mask)
    noise, labels = start(s)
    state, eps = solver.begin(PROCESS, noise), noise
    for call, made in zip(calls, mask, strict=True):
        if made:
            eps = network(s.denoiser, labels, solver.network_input(state, call), call)
        drawn = keys.normal(0, "step_noise", torch.arange(B), call.position, (2, 8, 8)) if call.needs_noise else None
        state = solver.advance(state, call, eps, noise=drawn, fresh=made)
    images = sample_chunk(s, torch.arange(B), cost_table(s.denoiser.network)).images
    assert torch.equal(images, solver.result(state))


def test_histories_of_2m_part_where_calls_are_skipped() -> None:
    """Computed points alone, or every point: the two are the same without skips, and only then."""
    images = {}
    for history in ("computed", "all"):
        for every in (1, 3):
            s = sampler(DPMpp2M(DPMpp2MConfig(STEPS, history=history)), tuple(k % every == 0 for k in range(STEPS)))
            images[history, every] = sample_chunk(s, torch.arange(B), cost_table(s.denoiser.network)).images
    assert torch.equal(images["computed", 1], images["all", 1])
    assert distance(images["computed", 3], images["all", 3]) > 1e-2
