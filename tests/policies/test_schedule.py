"""Policies that depend on the call alone: which plan at which position."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.diffusion.solvers.base import Call
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.diffusion.solvers.euler_maruyama import EulerMaruyama, EulerMaruyamaConfig
from gearshift.execution.plan import FULL
from gearshift.policies import ExitSchedule, FixedDepth, Full, RunInfo, SkipEvery
from gearshift.runtime.config import build as build_config
from gearshift.runtime.errors import UsageError

from ..contract import build

PROCESS = Discrete(DiscreteConfig())


def calls(steps: int = 10) -> tuple[Call, ...]:
    return DDIM(DDIMConfig(steps=steps)).calls(PROCESS)


def run(steps: int = 10, name: str = "isotropic") -> RunInfo:
    return RunInfo(calls(steps), build(name), batch=2, branches=2)


def at(index: float) -> Call:
    time = PROCESS.time_of_training_index(index)
    return replace(calls()[0], training_index=index, log_snr=float(PROCESS.log_snr(time)))


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


@pytest.mark.parametrize("bins", [1, 3, 4, 10])
def test_equal_bins_floor(bins: int) -> None:
    policy = ExitSchedule(depths=list(range(1, bins + 1)))
    for index in range(1000):
        assert policy.depth_at(at(index)) == index * bins // 1000 + 1
    # The bin border itself belongs to the noisier bin; fractions floor.
    if bins > 1:
        border = 1000 / bins
        assert policy.depth_at(at(border)) == 2
        assert policy.depth_at(at(border - 1e-6)) == 1


def test_indices_beyond_the_axis_fall_into_the_nearest_bin() -> None:
    policy = ExitSchedule(depths=[1, 2, 3, 4])
    assert policy.depth_at(at(-0.7)) == 1
    assert policy.depth_at(replace(at(0), training_index=1000.5)) == 4
    edges = ExitSchedule(depths=[1, 2], edges=[10.0])
    assert edges.depth_at(at(-3.0)) == 1 and edges.depth_at(replace(at(0), training_index=1e4)) == 2


def test_both_domains_agree_where_the_edges_are_converted() -> None:
    generator = torch.Generator().manual_seed(0)
    for process in (PROCESS, VPSDE(VPSDEConfig()), Discrete(DiscreteConfig(schedule="cosine"))):
        for _ in range(20):
            edges = sorted((torch.rand(3, generator=generator) * 900 + 50).tolist())
            levels = [float(process.log_snr(process.time_of_training_index(edge))) for edge in edges]
            by_index = ExitSchedule(depths=[1, 2, 3, 4], edges=edges)
            by_level = ExitSchedule(depths=[1, 2, 3, 4], domain="log_snr", edges=levels)
            for index in (torch.rand(50, generator=generator) * 999).tolist():
                level = float(process.log_snr(process.time_of_training_index(index)))
                call = replace(at(0), training_index=index, log_snr=level)
                assert by_index.depth_at(call) == by_level.depth_at(call)
            on_edge = replace(at(0), training_index=edges[1], log_snr=levels[1])
            assert by_index.depth_at(on_edge) == by_level.depth_at(on_edge) == 3


def test_a_schedule_along_a_run() -> None:
    """From noise to data, so the depths come in reverse."""
    info = run(8)
    policy = ExitSchedule(depths=[4, 3, 2, 1])
    policy.check(info)
    assert [policy.plan(info, call).depth for call in info.calls] == [1, 1, 2, 2, 3, 3, 4, 4]
    solver = EulerMaruyama(EulerMaruyamaConfig(steps=8))
    depths = [policy.depth_at(call) for call in solver.calls(VPSDE(VPSDEConfig()))]
    assert depths == sorted(depths) and set(depths) == {1, 2, 3, 4}


def test_schedules_that_make_no_sense() -> None:
    for arguments, message in (
        (dict(), "has no depths"),
        (dict(depths=[1, 2], edges=[1.0, 2.0]), "2 depths need 1 edges"),
        (dict(depths=[1, 2, 3], edges=[5.0, 2.0]), "ordered from data to noise"),
        (dict(depths=[1, 2, 3], domain="log_snr", edges=[-1.0, 2.0]), "ordered from data to noise"),
        (dict(depths=[1, 2], domain="log_snr"), "give edges for log_snr"),
        (dict(depths=[1], domain="sigma"), "'sigma' is neither"),
    ):
        with pytest.raises(UsageError, match=message):
            ExitSchedule(**arguments)
    with pytest.raises(UsageError, match="asks for depth 9"):
        ExitSchedule(depths=[1, 9]).check(run())


def test_policies_are_their_own_schema() -> None:
    for target, fields in (
        ("Full", {}),
        ("FixedDepth", {"depth": 3}),
        ("ExitSchedule", {"depths": [1, 2], "edges": [500.0]}),
        ("SkipEvery", {"k": 4}),
        ("UncertaintyExit", {"threshold": 0.1, "joint": True, "depths": [1]}),
    ):
        policy = build_config({"_target_": f"gearshift.policies.{target}", **fields})
        assert type(policy).__name__ == target
        assert all(getattr(policy, name) == value for name, value in fields.items())
    with pytest.raises(UsageError, match="dept"):
        build_config({"_target_": "gearshift.policies.FixedDepth", "dept": 3})
