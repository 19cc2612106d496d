"""Exit schedules: depths along a run, the shipped ones, and the networks they are meant for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.diffusion.solvers import DDIM, Call, DDIMConfig, EulerMaruyama, EulerMaruyamaConfig
from gearshift.policies import ExitSchedule, RunInfo
from gearshift.runtime.config import build as build_config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir

from ..contract import build
from .depths import of_depth

PROCESS = Discrete(DiscreteConfig())
DEMO = [28, 28, 24, 24, 20, 20, 16, 16, 12, 12]


def calls(steps: int = 10) -> tuple[Call, ...]:
    return DDIM(DDIMConfig(steps=steps)).calls(PROCESS)


def run(steps: int = 10, name: str = "isotropic") -> RunInfo:
    return RunInfo(calls(steps), build(name), batch=2, branches=2)


def test_a_schedule_along_a_run() -> None:
    """From noise to data, so the depths come in reverse."""
    info = run(8)
    policy = ExitSchedule(depths=[4, 3, 2, 1])
    policy.check(info)
    assert [policy.plan(info, call).depth for call in info.calls] == [1, 1, 2, 2, 3, 3, 4, 4]
    solver = EulerMaruyama(EulerMaruyamaConfig(steps=8))
    depths = [policy.plan(info, call).depth for call in solver.calls(VPSDE(VPSDEConfig()))]
    assert depths == sorted(depths) and set(depths) == {1, 2, 3, 4}


def test_published_edges() -> None:
    policy, info = ExitSchedule(depths=DEMO), of_depth(28, calls())
    policy.check(info)

    def depth(index: float) -> object:
        return policy.plan(info, replace(calls()[0], training_index=index)).depth

    edges = (0, 99, 99.9, 100, 199, 200, 899, 900, 999)
    assert [depth(index) for index in edges] == [28, 28, 28, 28, 28, 24, 12, 12, 12]
    assert [depth(100 * k) for k in range(10)] == DEMO


@pytest.mark.parametrize(
    ("name", "depths", "mean"),
    [
        ("ase_demo", DEMO, 20.0),
        ("ase_mean22", [28, 28, 26, 26, 22, 22, 18, 18, 16, 16], 22.0),
        ("ase_mean18_4", [28, 28, 24, 22, 18, 16, 14, 12, 12, 10], 18.4),
    ],
)
def test_shipped_schedules(name: str, depths: list[int], mean: float) -> None:
    file = Path(conf_dir()) / "policy" / f"{name}.yaml"
    policy = build_config(OmegaConf.load(file))  # type: ignore[arg-type]
    assert policy.depths_on(of_depth(28, ()).network) == policy.depths == depths
    assert sum(depths) / 10 == pytest.approx(mean)
    assert policy.name == f"schedule (mean depth {mean:.1f} of 28)" and policy.of == 28
    if name != "ase_demo":
        assert "Ours, not the paper's" in file.read_text().splitlines()[0]


def test_stated_for_another_depth() -> None:
    """Fractions of the depth, halves rounded up, at least one block."""
    policy = ExitSchedule(depths=DEMO, of=28)
    wanted = {
        28: DEMO,
        14: [14, 14, 12, 12, 10, 10, 8, 8, 6, 6],
        7: [7, 7, 6, 6, 5, 5, 4, 4, 3, 3],
        12: [12, 12, 10, 10, 9, 9, 7, 7, 5, 5],
        3: [3, 3, 3, 3, 2, 2, 2, 2, 1, 1],
        1: [1] * 10,
    }
    for blocks, depths in wanted.items():
        info = of_depth(blocks, calls())
        policy.check(info)
        assert policy.depths_on(info.network) == depths
        assert [policy.plan(info, call).depth for call in reversed(calls())] == depths
    assert ExitSchedule(depths=[1, 4], of=28).depths_on(of_depth(2, ()).network) == [1, 1]
    assert ExitSchedule(depths=[28, 12]).depths_on(of_depth(7, ()).network) == [28, 12]  # of unset: as they are


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "has no depths"),
        (dict(depths=[1, 2], edges=[1.0, 2.0]), "policy ExitSchedule: 2 bins need 1 edges"),
        (dict(depths=[1, 2], domain="log_snr"), "give edges for log_snr"),
        (dict(depths=[3, 2], of=2), r"depths \[3, 2\] are stated for a network of 2 blocks"),
        (dict(depths=[0, 2], of=2), "each must be 1..2"),
        (dict(depths=[4, 2, 3], monotone=True), r"depths \[4, 2, 3\] grow towards noise somewhere"),
    ],
)
def test_schedules_that_make_no_sense(arguments, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        ExitSchedule(**arguments)


def test_depths_must_be_exits() -> None:
    with pytest.raises(UsageError, match=r"policy ExitSchedule asks for depth 9, but Isotropic .* \[1, 2, 3, 4\]"):
        ExitSchedule(depths=[1, 9]).check(run())
    with pytest.raises(UsageError, match="asks for depth 0"):
        ExitSchedule(depths=[4, 0]).check(run())
    ExitSchedule(depths=[2, 4, 3]).check(run())  # the direction is checked only where asked for
    ExitSchedule(depths=[4, 3, 3], monotone=True).check(run())
