"""Sampling on EDM and VE, with solvers that call twice in a step: by hand, under policies, guided, over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.diffusion.bins import NoiseBins
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.edm import EDM, VE, EDMConfig, VEConfig
from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers import DPMSinglestep, DPMSinglestepConfig, EDMHeun, EDMHeunConfig, Solver
from gearshift.diffusion.solvers.base import Call
from gearshift.execution.cost import CostTable
from gearshift.execution.plan import StepPlan
from gearshift.policies import Compose, ExitSchedule, FixedDepth, Full, Policy, SkipEvery, UncertaintyExit
from gearshift.runtime import keys
from gearshift.sampling.loop import Sampler, sample, sample_chunk

from ..contract import build, cost_table
from ..toys import Isotropic

PROCESSES: dict[str, Process] = {"edm": EDM(EDMConfig()), "ve": VE(VEConfig())}
SOLVERS: dict[str, Solver] = {
    "heun": EDMHeun(EDMHeunConfig(4)),
    "heun_churn": EDMHeun(EDMHeunConfig(4, S_churn=1.0)),
    "singlestep": DPMSinglestep(DPMSinglestepConfig(7)),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@cache
def network() -> Backbone:
    return build("isotropic")


def sampler(
    solver: Solver, policy: Policy | None = None, process: Process = PROCESSES["edm"], **fields: Any
) -> Sampler:
    return Sampler(Denoiser(network(), process), solver, policy or Full(), chunk=4, **fields)


def images(s: Sampler, count: int = 4, **options: Any) -> Tensor:
    return torch.cat([chunk.images for chunk in sample(s, count, table=cost_table(s.denoiser.network), **options)])


def test_heun_is_the_loop_of_the_paper() -> None:
    """Written in EDM's own frame and in terms of D, with the preconditioning of its table."""
    s = sampler(SOLVERS["heun"], seed=5)
    net, index = network(), torch.arange(4)
    labels = keys.integers(5, "sample_label", index, 0, 3)

    def denoise(x: Tensor, level: float) -> Tensor:
        spread = math.sqrt(level**2 + 0.25)
        fed = torch.full((4,), math.log(level) / 4)
        stream = net.embed((x / spread).float(), fed, labels)
        hidden = stream.hidden
        for block in net.blocks:
            hidden = block(hidden, stream.cond)
        return 0.25 / spread**2 * x + 0.5 * level / spread * net.readout(hidden, stream.cond, 4)

    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    grid = [(high + i / 3 * (low - high)) ** 7 for i in range(4)] + [0.0]
    x = 80 * keys.normal(5, "init_noise", index, 0, (2, 8, 8)).double()
    for here, there in pairwise(grid):
        slope = (x - denoise(x, here)) / here
        moved = x + (there - here) * slope
        if there > 0:
            moved = x + (there - here) * (slope + (moved - denoise(moved, there)) / there) / 2
        x = moved
    torch.testing.assert_close(images(s).double(), x, rtol=1e-3, atol=1e-3)


@cache
def exits_and_costs() -> tuple[EarlyExit, CostTable]:
    torch.manual_seed(5)
    network = EarlyExit(ExitsConfig(), Isotropic())
    for parameter in network.uncertainty_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network.requires_grad_(False), CostTable.measure(network)


def with_heads(solver: Solver) -> tuple[Sampler, CostTable]:
    network, table = exits_and_costs()
    return Sampler(Denoiser(network, PROCESSES["edm"]), solver, Full(), chunk=4), table


POLICIES: list[Policy] = [
    FixedDepth(2),
    ExitSchedule(depths=[4, 2, 1]),
    ExitSchedule(depths=[4, 3, 1], domain="log_snr", edges=[4.0, -2.0]),
    SkipEvery(2),
    SkipEvery(3),
    Compose([SkipEvery(3), FixedDepth(3)]),
    UncertaintyExit(0.5),
]


@each_solver
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_every_policy_runs_and_does_not_depend_on_the_range(solver: Solver, policy: Policy) -> None:
    s, table = with_heads(solver)
    s = replace(s, policy=policy)
    first, second = sample(s, 7, table=table)
    assert first.images.dtype == torch.float32 and first.images.isfinite().all()
    assert torch.equal(next(sample(s, 2, start=5, table=table)).images, second.images[1:])
    ledger = first.ledger
    assert len(ledger.log_snr) == 7 and 0 < ledger.macs_saved < 1


def test_depth_schedules_read_the_level_of_each_call() -> None:
    policy = ExitSchedule(depths=[4, 3, 1], domain="log_snr", edges=[4.0, -2.0])
    s, table = with_heads(SOLVERS["heun"])
    ledger = next(sample(replace(s, policy=policy), 4, table=table)).ledger
    wanted = [4 if call.log_snr > 4 else 3 if call.log_snr > -2 else 1 for call in s.calls()]
    assert ledger.depth[:, 0, 0].tolist() == wanted and len(set(wanted)) == 3
    # Over the training index, which on EDM is the axis of its grid, equal bins are equal shares of the steps.
    solver, bins = EDMHeun(EDMHeunConfig(40)), NoiseBins(4, owner="test")
    found = [bins.of(call.training_index, call.log_snr) for call in solver.calls(PROCESSES["edm"]) if not call.substep]
    assert [found.count(k) for k in range(4)] == [10, 10, 10, 10]


@dataclass(frozen=True)
class Held(Policy):
    """Skips the calls at some positions."""

    skipped: tuple[int, ...] = ()

    def plan(self, state: Any, call: Call) -> StepPlan:
        return StepPlan(call=call.position not in self.skipped)


def test_skipping_every_second_call_of_a_step_is_euler() -> None:
    solver = SOLVERS["heun"]
    s = sampler(solver, Held((1, 3, 5)))
    index = torch.arange(4)
    labels = s.cond(index)
    x = 80 * keys.normal(0, "init_noise", index, 0, (2, 8, 8)).double()
    for call in (call for call in solver.calls(PROCESSES["edm"]) if call.substep == 0):
        eps = s.denoiser.predict((x * call.alpha).float(), call.time, labels).eps
        x = x + (call.stop - call.start) * eps  # type: ignore[attr-defined]
    torch.testing.assert_close(images(s).double(), x, rtol=1e-5, atol=1e-5)
    assert sample_chunk(s, index, cost_table(s.denoiser.network)).ledger.calls_per_image == 4


def test_a_sample_may_skip_where_its_neighbours_do_not() -> None:
    @dataclass(frozen=True)
    class Some(Held):
        def plan(self, state: Any, call: Call) -> StepPlan:
            mixed = torch.tensor([True, False, True, False])
            return StepPlan(call=mixed) if call.position in self.skipped else StepPlan()

    for skipped in ((1,), (2,), (1, 2), (4, 5)):
        mixed, never, always = (
            images(sampler(SOLVERS["heun"], policy)) for policy in (Some(skipped), Full(), Held(skipped))
        )
        torch.testing.assert_close(mixed[::2], never[::2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixed[1::2], always[1::2], rtol=1e-4, atol=1e-4)
        assert (never - always).abs().max() > 1e-3


@each_solver
@each_process
def test_guidance_and_intervals(solver: Solver, process: Process) -> None:
    s = sampler(solver, process=process, guidance=2.0)
    plain, guided = images(replace(s, guidance=1.0)), images(s)
    assert guided.isfinite().all() and (plain - guided).abs().max() > 1e-3
    never = replace(s, guidance_interval=(1e5, 2e5))
    torch.testing.assert_close(images(never), plain, rtol=1e-5, atol=1e-5)


@each_process
def test_churn_is_keyed_noise(process: Process) -> None:
    s = sampler(SOLVERS["heun_churn"], process=process, seed=1)
    assert torch.equal(images(s), images(s)) and not torch.allclose(images(s), images(replace(s, seed=2)))
    apart = images(replace(s, solver=SOLVERS["heun"]))
    assert (images(s) - apart).abs().max() > 1e-3
