"""`gearshift bench stages=true`: what is timed, the ideals, and refusals. Nothing here is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.evaluation.throughput import BUSY, Timing
from gearshift.objectives.staged import Staged, StagedConfig
from gearshift.runtime.errors import UsageError
from gearshift.verbs import bench_stages
from gearshift.verbs.bench_stages import against_ideal, apportion, times_by_stage

from ..contract import build, cost_table

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shares", "total", "wanted"),
    [
        ((1 / 3, 1 / 3, 1 / 3), 128, [43, 43, 42]),
        ((0.9614, 0.0351, 0.0035), 128, [123, 4, 1]),
        ((0.5, 0.5), 3, [2, 1]),
        ((1.0, 0.0), 4, [3, 1]),
        ((0.98, 0.01, 0.01), 3, [1, 1, 1]),
    ],
)
def test_images_of_each_stage(shares: tuple[float, ...], total: int, wanted: list[int]) -> None:
    assert apportion(shares, total) == wanted


def test_times_are_those_of_their_stage() -> None:
    denoiser = Denoiser(build("separate"), VPSDE(VPSDEConfig()))
    low, high = times_by_stage(denoiser, 10)
    border = float(denoiser.process.time_of_log_snr(0.0))
    assert len(low) == len(high) == 10
    assert float(low.max()) <= border < float(high.min())
    assert float(high.max()) > 0.9 and float(low.min()) < 0.1, "spread over the stage"


def test_ideals_in_closed_form() -> None:
    """Two stages, 3 and 1 of 4 images; a whole batch takes 8 s and 4 s, and a mixed one 8.4 s."""
    timings = {"mixed": Timing((8.4,) * 3), "stage 0": Timing((8.0,) * 3), "stage 1": Timing((4.0,) * 3)}
    found = against_ideal(timings, [3, 1], [100, 20])
    assert found["over_ideal"] == pytest.approx(8.4 / (3 / 4 * 8 + 1 / 4 * 4))
    assert found["over_ideal_macs"] == pytest.approx(8.4 / (8 * (3 * 100 + 1 * 20) / (4 * 100)))
    assert found["ideal_ms"] == pytest.approx(7000)
    assert found["stage_ms"] == [8000, 4000]


def test_ratios_are_formed_within_rounds() -> None:
    """A machine that is slow in one round is slow for both sides."""
    slow = (1.0, 10.0, 1.0)
    timings = {"mixed": Timing(slow), "stage 0": Timing(slow), "stage 1": Timing(slow)}
    assert against_ideal(timings, [1, 1], [1, 1])["over_ideal"] == pytest.approx(1)


def run(
    monkeypatch: pytest.MonkeyPatch, name: str = "separate", others: float = 0.0, mixed: float = 1.0, batch: int = 6
) -> Any:
    """The verb with times that are made up; the passes are run once each."""

    def fake(methods: dict[str, Callable[[], None]], rounds: int, device: Any, *, warmup: int, on_run: Any) -> Any:
        for method in methods.values():
            method()
        return {name: Timing((mixed if name == "mixed" else 1.0,) * rounds) for name in methods}, others

    monkeypatch.setattr(bench_stages, "interleave", fake)
    network = build(name)
    cfg = OmegaConf.create({"batch": batch, "repeats": 2, "warmup": 1, "seed": 0, "run": None})
    try:
        denoiser = Denoiser(network, VPSDE(VPSDEConfig()))
        return bench_stages.run(denoiser, None, cfg, cost_table(network), CPU, torch.float32)
    finally:
        network.eval().requires_grad_(False)  # others use it too


@pytest.mark.parametrize(("mixed", "said"), [(1.05, "met"), (1.2, "missed")])
def test_forward_and_training_step(monkeypatch: pytest.MonkeyPatch, mixed: float, said: str) -> None:
    found = run(monkeypatch, mixed=mixed)
    for kind in ("forward", "training_step"):
        assert found[kind]["over_ideal"] == pytest.approx(mixed)
        assert found[kind]["verdict"] == said
        assert len(found[kind]["stage_ms"]) == 2
    assert found["mix"] == {"of": "every stage alike", "shares": [0.5, 0.5], "images": [3, 3]}
    assert (found["limit"], found["conditions"]["weights"], found["conditions"]["batch"]) == (1.1, "random", 6)


def test_a_busy_machine_gets_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, others=BUSY + 0.1)
    assert found["busy"] and found["forward"]["verdict"] == "machine busy, no verdict"


def test_the_mix_is_that_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("separate")
    seen: list[tuple[int, list[int]]] = []
    real = Denoiser.rows

    def spy(self: Denoiser, x: Any, time: Any, cond: Any, plan: Any) -> Any:
        seen.append((len(x), plan.expert.tolist()))
        return real(self, x, time, cond, plan)

    monkeypatch.setattr(Denoiser, "rows", spy)
    objective = Staged(StagedConfig(choice="custom", shares=[0.7, 0.3]))

    def fake(methods: dict[str, Callable[[], None]], rounds: int, device: Any, **_: Any) -> Any:
        for method in methods.values():
            method()
        return {name: Timing((1.0,) * rounds) for name in methods}, 0.0

    monkeypatch.setattr(bench_stages, "interleave", fake)
    cfg = OmegaConf.create({"batch": 10, "repeats": 1, "warmup": 1, "seed": 0, "run": None})
    try:
        denoiser = Denoiser(network, VPSDE(VPSDEConfig()))
        found = bench_stages.run(denoiser, objective, cfg, cost_table(network), CPU, torch.float32)
    finally:
        network.eval().requires_grad_(False)
    assert found["mix"]["images"] == [7, 3]
    assert all(count == 10 for count, _ in seen) and len(seen) == 6
    forward, step = seen[0][1], seen[3][1]
    assert sorted(forward) == step == [0] * 7 + [1] * 3 and forward != step, "scattered, and in order"
    assert [set(stages) for _, stages in (seen[1], seen[2], seen[4], seen[5])] == [{0}, {1}, {0}, {1}]


def test_what_cannot_be_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="UViT has one path; choose a backbone with stages"):
        run(monkeypatch, "uvit-class")
    with pytest.raises(UsageError, match="batch=1 cannot hold the 2 stages"):
        run(monkeypatch, batch=1)
