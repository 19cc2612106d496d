"""What the loop tells a solver of switches of depth, and what that changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.solvers.dpmpp_2m import DPMpp2M, DPMpp2MConfig
from gearshift.execution.plan import StepPlan
from gearshift.policies import ExitSchedule, FixedDepth
from gearshift.sampling.loop import sample_chunk
from gearshift.sampling.switching import DepthWatch

from ..contract import Impatient, cost_table
from .test_loop import Script, images, sampler


class Telling(DPMpp2M):
    """Keeps what it was told."""

    def __init__(self, restart: bool, steps: int = 7) -> None:
        super().__init__(DPMpp2MConfig(steps=steps, restart_at_switch=restart))
        self.told: list[Any] = []

    def advance(self, *arguments: Any, **options: Any) -> Any:
        self.told.append(options["switched"])
        return super().advance(*arguments, **options)


def test_a_switch_is_told_at_the_first_call_of_another_depth() -> None:
    plans = [StepPlan(depth=4), StepPlan(depth=4), StepPlan(depth=2), StepPlan(depth=2), StepPlan(call=False)]
    plans += [StepPlan(depth=2), StepPlan(depth=3)]
    solver = Telling(True)
    images(sampler(solver=solver, policy=Script(tuple(plans)), guidance=2.0), 4)
    assert solver.told == [False, False, True, False, False, False, True]


def test_other_dropped_blocks_are_another_depth() -> None:
    plans = [StepPlan(bypass=frozenset({at} if at else ())) for at in (0, 0, 2, 2, 1, 1, 1)]
    solver = Telling(True)
    images(sampler(solver=solver, policy=Script(tuple(plans))), 4)
    assert solver.told == [False, False, True, False, True, False, False]


def test_another_network_of_the_same_depth_is_a_switch() -> None:
    def told(*experts: int | Tensor) -> list[bool | Tensor]:
        watch = DepthWatch(1, 2)
        prediction: Any = SimpleNamespace(called=torch.tensor([True, True]), depth=torch.tensor([3, 3]))
        return [watch.switched(StepPlan(expert=one), prediction, torch.device("cpu")) for one in experts]

    assert told(1, 1, 0, 0) == [False, False, True, False]
    mixed = told(torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert mixed[0] is False and torch.equal(torch.as_tensor(mixed[1]), torch.tensor([True, False]))


def test_samples_that_leave_on_their_own_are_told_apart() -> None:
    solver = Telling(True)
    s = sampler(solver=solver, policy=Script(tuple([StepPlan(exit=Impatient())] * 7)), guidance=2.0)
    depths: list[Tensor] = []
    sample_chunk(s, torch.arange(4), cost_table(s.denoiser.network), on_prediction=lambda _, p: depths.append(p.depth))
    assert any(isinstance(told, Tensor) for told in solver.told)
    for before, after, told in zip(depths, depths[1:], solver.told[1:], strict=False):
        changed = (before != after).reshape(2, 4).any(0)
        assert torch.equal(torch.as_tensor(told).expand(4), changed)


def test_the_embedding_is_a_depth_like_others() -> None:
    """Samples that were read from it switch when they go deeper; a sample that was never called switches nothing."""
    watch = DepthWatch(branches=2, batch=3)
    told: list[list[bool]] = []
    for depth, called in (([0, 0, 4], [True, True, False]), ([0, 4, 4], [True] * 3), ([2, 4, 0], [True] * 3)):
        seen: Any = SimpleNamespace(called=torch.tensor(called * 2), depth=torch.tensor(depth * 2))
        told.append(torch.as_tensor(watch.switched(StepPlan(), seen, torch.device("cpu"))).expand(3).tolist())
    assert told == [[False] * 3, [False, True, False], [True, False, True]]


def test_without_a_restart_nothing_is_followed() -> None:
    solver = Telling(False)
    images(sampler(solver=solver, policy=ExitSchedule(depths=[4, 2])), 4)
    assert solver.told == [False] * 7


@pytest.mark.parametrize("policy", [FixedDepth(2), ExitSchedule(depths=[4, 2])])
def test_a_restart_matters_where_there_is_a_switch(policy: Any) -> None:
    plain, restarted = (images(sampler(solver=Telling(restart), policy=policy), 4) for restart in (False, True))
    assert torch.equal(plain, restarted) == isinstance(policy, FixedDepth)
