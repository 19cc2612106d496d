"""Composition of policies."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest

from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers.base import Call
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.execution.plan import FULL, StepPlan, join
from gearshift.policies import Compose, ExitSchedule, FixedDepth, Full, Policy, RunInfo, SkipEvery, UncertaintyExit
from gearshift.runtime.config import build as build_config
from gearshift.runtime.errors import UsageError

from ..contract import build


@dataclass(frozen=True)
class Counting(Policy):
    """A policy with a state: it counts what it observed, and reuses a block it names itself."""

    static: ClassVar[bool] = False

    def begin(self, run: RunInfo) -> int:
        return 0

    def plan(self, state: int, call: Call) -> StepPlan:
        return StepPlan(call=state % 2 == 0)

    def observe(self, state: int, call: Call, before: Any, after: Any, prediction: Any) -> int:
        return state + 1

    def memory_keys(self, run: RunInfo) -> frozenset[tuple[int, str]]:
        return frozenset({(1, "map")})


@dataclass(frozen=True)
class Reusing(Policy):
    """Takes a map from memory at odd positions."""

    def plan(self, state: Any, call: Call) -> StepPlan:
        return StepPlan(reuse=frozenset({(0, "map")}) if call.position % 2 else frozenset())


def run(name: str = "isotropic") -> RunInfo:
    return RunInfo(DDIM(DDIMConfig(steps=6)).calls(Discrete(DiscreteConfig())), build(name), 2, 1)


def same(a: StepPlan, b: StepPlan) -> bool:
    return all(getattr(a, field.name) == getattr(b, field.name) for field in fields(StepPlan))


def test_a_composition_is_the_join_of_its_plans() -> None:
    parts = [SkipEvery(3), FixedDepth(3), ExitSchedule(depths=[4, 3, 2, 1])]
    info, composed = run(), Compose(parts)
    composed.check(info)
    state = composed.begin(info)
    for call in info.calls:
        assert same(composed.plan(state, call), join(part.plan(info, call) for part in parts))
    assert [composed.plan(state, call).depth for call in info.calls] == [1, 1, 2, 3, 3, 3]
    assert composed.static


def test_full_adds_nothing() -> None:
    info = run()
    for other in (SkipEvery(2), FixedDepth(2), Full(), Reusing()):
        composed = Compose([Full(), other])
        for call in info.calls:
            assert same(composed.plan(composed.begin(info), call), other.plan(other.begin(info), call))


def test_states_stay_apart() -> None:
    info, composed = run(), Compose([Counting(), FixedDepth(2), Counting()])
    assert not composed.static
    state = composed.begin(info)
    for position, call in enumerate(info.calls):
        plan = composed.plan(state, call)
        assert plan.call is (position % 2 == 0) and plan.depth == 2
        before = state
        state = composed.observe(state, call, None, None, None)  # type: ignore[arg-type]
        assert before[0] == position and state[0] == position + 1
    assert composed.begin(info)[0] == 0


def test_memory_keys_are_those_of_the_parts() -> None:
    info = run()
    assert Reusing().memory_keys(info) == {(0, "map")}
    assert Compose([Counting(), Reusing(), Full()]).memory_keys(info) == {(0, "map"), (1, "map")}


def test_two_exit_rules_are_refused_before_the_run() -> None:
    with pytest.raises(UsageError, match="two exit rules"):
        Compose([UncertaintyExit(0.1), UncertaintyExit(0.2)]).check(run("exits-isotropic"))


def test_parts_are_checked() -> None:
    with pytest.raises(UsageError, match="asks for depth 9"):
        Compose([Full(), FixedDepth(9)]).check(run())
    with pytest.raises(UsageError, match="no parts"):
        Compose([])
    with pytest.raises(UsageError, match="int is not a policy"):
        Compose([3])  # type: ignore[list-item]


def test_from_configuration() -> None:
    node = {
        "_target_": "gearshift.policies.Compose",
        "policies": [
            {"_target_": "gearshift.policies.SkipEvery", "k": 2},
            {"_target_": "gearshift.policies.FixedDepth", "depth": 3},
        ],
    }
    policy = build_config(node)
    assert policy.parts == (SkipEvery(2), FixedDepth(3)) and policy.name == "skip every 2 + depth 3"
    info = run()
    assert [policy.plan(policy.begin(info), call).depth for call in info.calls] == [3] * 6
    assert same(FULL, Compose([Full()]).plan((info,), info.calls[0]))
