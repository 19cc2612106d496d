"""Policies that depend on the call alone: which plan at which position."""

from __future__ import annotations

import pytest

from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers.base import Call
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.execution.plan import FULL
from gearshift.policies import FixedDepth, Full, RunInfo, SkipEvery
from gearshift.runtime.config import build as build_config
from gearshift.runtime.errors import UsageError

from ..contract import build

PROCESS = Discrete(DiscreteConfig())


def calls(steps: int = 10) -> tuple[Call, ...]:
    return DDIM(DDIMConfig(steps=steps)).calls(PROCESS)


def run(steps: int = 10, name: str = "isotropic") -> RunInfo:
    return RunInfo(calls(steps), build(name), batch=2, branches=2)


def test_full_and_fixed_depth() -> None:
    info = run()
    assert info.num_rows == 4
    assert all(Full().plan(info, call) is FULL for call in info.calls)
    policy = FixedDepth(2)
    policy.check(info)
    assert [policy.plan(info, call).depth for call in info.calls] == [2] * 10
    assert Full().memory_keys(info) == policy.memory_keys(info) == frozenset()
    assert Full().static and policy.static
    with pytest.raises(UsageError, match=r"FixedDepth\(depth=5\) asks for depth 5, but Isotropic .* \[1, 2, 3, 4\]"):
        FixedDepth(5).check(info)


def test_skip_every() -> None:
    info = run(10)
    plans = [SkipEvery(3).plan(info, call).call for call in info.calls]
    assert plans == [True, True, False, True, True, False, True, True, False, True]
    assert [SkipEvery(2).plan(info, call).call for call in info.calls] == [True, False] * 4 + [True, True]
    assert [SkipEvery(2, keep_last=False).plan(info, call).call for call in info.calls] == [True, False] * 5
    with pytest.raises(UsageError, match="at least 2"):
        SkipEvery(1)


def test_policies_are_their_own_schema() -> None:
    for target, fields in (
        ("Full", {}),
        ("FixedDepth", {"depth": 3}),
        ("ExitSchedule", {"depths": [1, 2], "edges": [500.0], "of": 4, "monotone": False}),
        ("BypassSchedule", {"dropped": [0, 2], "edges": [500.0], "of": 4}),
        ("SkipEvery", {"k": 4}),
        ("UncertaintyExit", {"threshold": 0.1, "joint": True, "depths": [1]}),
    ):
        policy = build_config({"_target_": f"gearshift.policies.{target}", **fields})
        assert type(policy).__name__ == target
        assert all(getattr(policy, name) == value for name, value in fields.items())
    with pytest.raises(UsageError, match="dept"):
        build_config({"_target_": "gearshift.policies.FixedDepth", "dept": 3})
