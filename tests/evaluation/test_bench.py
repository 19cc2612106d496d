"""`gearshift bench` of whole generations and of features, from the command line. Nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift import cli
from gearshift.evaluation import speed
from gearshift.evaluation.conditions import Quiet
from gearshift.evaluation.throughput import BUSY, Timing
from gearshift.runtime.errors import RunError
from gearshift.sampling.loop import Sampler
from gearshift.verbs import bench_features

CPU = torch.device("cpu")
TINY = ["batch=4", "repeats=2", "strata=2", "warmup=1", "solver.steps=3", "device=cpu", "shrink=true"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run(list(arguments)) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quiet, "others", lambda self: 0.01)


# gearshift bench sampling=true ---------------------------------------------------------------------------------------

WHOLE = ["sampling=true", "batch=4", "rounds=2", "warmup=1", "latency_repeats=3", "solver.steps=3", "device=cpu"]
WHOLE_ROW = {"policy", "batch", "images_per_s", "speedup", "spread", "peak_memory_bytes"}
WHOLE_ROW |= {"macs_saved", "time_saved", "saving_realised", "verdict"}


@pytest.mark.usefixtures("quiet")
def test_bench_of_whole_generations(capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, "bench", *WHOLE, "batches=[2,4,1]", "shrink=true")
    assert set(answer) == {"rows", "policies", "target", "other_processes", "busy", "conditions", "versions"}
    names = ["Full", "depth 4", "per-row exits, drawn"]
    assert [(row["policy"], row["batch"]) for row in answer["rows"]] == [(n, b) for n in names for b in (1, 2, 4)]
    for row in answer["rows"]:
        assert set(row) == WHOLE_ROW
        assert row["images_per_s"] > 0
        assert row["peak_memory_bytes"] is None
        assert row["time_saved"] == pytest.approx(1 - 1 / row["speedup"])
        if row["policy"] == "Full":
            assert (row["speedup"], row["macs_saved"], row["saving_realised"], row["verdict"]) == (1, 0, None, None)
        else:
            assert row["saving_realised"] == pytest.approx(row["time_saved"] / row["macs_saved"])
            assert row["verdict"] == ("met" if row["saving_realised"] >= 0.85 else "missed")
    assert [policy["policy"] for policy in answer["policies"]] == names
    for policy in answer["policies"]:
        assert policy["first_pass_s"] > 0
        assert set(policy["latency_ms"]) == {"p50", "p90", "p95", "p99", "min", "mean", "repeats"}
        assert policy["latency_ms"]["repeats"] == 3
        assert policy["latency_ms"]["min"] <= policy["latency_ms"]["p50"] <= policy["latency_ms"]["p99"]
    c = answer["conditions"]
    assert (c["batch"], c["solver"], c["steps"], c["rounds"], c["warmup"]) == (4, "ddim", 3, 2, 1)
    assert (c["weights"], c["guidance"], c["image_size"], c["processes"]) == ("random", 1.0, 8, 1)
    assert answer["versions"]["torch"]


@pytest.mark.usefixtures("quiet")
def test_bench_of_a_policy_saves_the_macs_that_profile_says(capsys: pytest.CaptureFixture[str]) -> None:
    policy = ["policy=skip_every", "policy.k=2", "shrink=true", "solver.steps=4"]
    answer = said(capsys, "bench", *WHOLE, *policy, "batches=[1]", "latency_repeats=0", "guidance=2")
    saved = said(capsys, "profile", *policy, "guidance=2")["policy"]["macs_saved"]
    assert saved == pytest.approx(1 / 4)
    assert [row["macs_saved"] for row in answer["rows"][2:]] == pytest.approx([saved, saved])
    assert [policy["latency_ms"] for policy in answer["policies"]] == [None, None]


def whole_timings(monkeypatch: pytest.MonkeyPatch, share: float, others: float, room: int = 100) -> None:
    """Every policy takes `share` of what full compute takes, and more than `room` images do not fit."""

    def fake(methods: Any, rounds: int, device: Any, *, warmup: int, on_run: Any) -> Any:
        for method in methods.values():
            method()
        return {key: Timing((1.0 if key == "full" else share,) * rounds, 2.0, 7 << 20) for key in methods}, others

    real = Sampler.generate

    def limited(sampler: Any, index: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        if len(index) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. Advice.")
        return real(sampler, index, *arguments, **settings)

    monkeypatch.setattr(speed, "interleave", fake)
    monkeypatch.setattr(Sampler, "generate", limited)


@pytest.mark.parametrize(("share", "verdict"), [(0.6, "met"), (0.95, "missed")])
def test_the_verdict_on_whole_generations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, share: float, verdict: str
) -> None:
    whole_timings(monkeypatch, share, 0.0)
    depth = ["policy=fixed_depth", "policy.depth=4", "shrink=true", "batches=[]"]
    [_, row] = said(capsys, "bench", *WHOLE, *depth)["rows"]
    assert row["verdict"] == verdict
    assert row["saving_realised"] == pytest.approx((1 - share) / row["macs_saved"])
    assert (row["images_per_s"], row["peak_memory_bytes"]) == (pytest.approx(4 / share), 7 << 20)


def test_a_busy_machine_gets_no_verdict_on_whole_generations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_timings(monkeypatch, 0.6, BUSY + 0.2)
    assert cli.run(["bench", *WHOLE, "batches=[]", "shrink=true"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out.splitlines()[-1])
    assert answer["busy"] is True
    assert [row["verdict"] for row in answer["rows"]] == [None, *["machine busy, no verdict"] * 2]
    assert "other processes used 30% of the CPU time; measure again on a quiet machine" in captured.err


def test_a_batch_that_does_not_fit_ends_the_sweep_and_not_the_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_timings(monkeypatch, 0.6, 0.0, room=4)
    assert cli.run(["bench", *WHOLE, "batches=[2,8,16]", "policy=fixed_depth", "policy.depth=4", "shrink=true"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out.splitlines()[-1])["rows"]
    assert [row["batch"] for row in rows] == [2, 4, 8] * 2
    reason = "full ran out of memory: CUDA out of memory. Tried to allocate 9 GiB"
    for row in (rows[2], rows[5]):
        assert {key for key, value in row.items() if value is not None} == {"policy", "batch", "reason"}
        assert row["reason"] == reason
    assert reason in captured.err


@pytest.mark.usefixtures("quiet")
def test_a_network_that_reads_text_is_given_some(capsys: pytest.CaptureFixture[str]) -> None:
    text = ["backbone=uvit_mscoco", "exits=none", "shrink=true", "solver.clip_x0=false", "batch=2", "batches=[]"]
    rows = said(capsys, "bench", *WHOLE, *text, "latency_repeats=1", "solver.steps=2", "rounds=1")["rows"]
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["sampling=true", "batches=[4,0]"], "timing over batch sizes [4, 0]: every one must be at least 1"),
        (["sampling=true", "warmup=0"], "timing of warmup=0: it must be at least 1"),
        (["sampling=true", "training=true"], "training=true and sampling=true measure different things; choose one"),
        (["features=true", "batch=1"], "features=true needs batch=2 or more for a covariance, got batch=1"),
        (["features=true", "backbone=uvit_imagenet256_l", "exits=none"], "makes 4 (latents)"),
        (["features=true", "inception=/nowhere.pth"], "leave it out to time random weights"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str], settings: list[str], line: str) -> None:
    assert cli.run(["bench", *TINY, *settings]) == 2
    assert line in capsys.readouterr().err


# gearshift bench features=true ---------------------------------------------------------------------------------------

FEATURES = ["features=true", "batch=4", "rounds=2", "warmup=1", "solver.steps=3", "device=cpu", "shrink=true"]


class Reader:
    """Stands for Inception: what it is shown."""

    name, protocol = "inception_2015_12_05", "a protocol"

    def __init__(self) -> None:
        self.shown: list[torch.Tensor] = []

    def read(self, images: torch.Tensor, taps: Any) -> dict[str, torch.Tensor]:
        self.shown.append(images)
        return {"features": images.flatten(1).float()}


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    found = Reader()
    monkeypatch.setattr(bench_features, "build_extractor", lambda *_, **__: [found])
    monkeypatch.setattr(bench_features, "DIM", 6)
    return found


def test_bench_of_features(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reader: Reader) -> None:
    order: list[str] = []

    def fake(methods: Any, rounds: int, device: Any, *, warmup: int, on_run: Any) -> Any:
        assert (rounds, warmup) == (2, 1)
        for name, method in methods.items():
            order.append(f"{name} {len(reader.shown)}")
            method()
        return {"sampling": Timing((1.0, 4.0)), "with features": Timing((1.05, 4.4))}, 0.0

    monkeypatch.setattr(bench_features, "interleave", fake)
    answer = said(capsys, "bench", *FEATURES)
    assert order == ["sampling 0", "with features 0"]
    [images] = reader.shown
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (4, 1, 8, 8))
    assert answer["added"] == pytest.approx(0.075)  # the median of 5 % and 10 %
    assert (answer["extractor"], answer["metric"], answer["limit"]) == ("inception_2015_12_05", True, 0.10)
    assert answer["verdict"] == "not measured on a GPU, no verdict"
    assert (answer["sampling_ms"], answer["with_features_ms"]) == (2500.0, pytest.approx(2725.0))
    assert answer["formula"]["dim"] == 6 and answer["formula"]["seconds"] > 0
    c = answer["conditions"]
    assert (c["batch"], c["policy"], c["features"], c["weights"]) == (4, "Full", "a protocol", "random")


@pytest.mark.usefixtures("quiet")
def test_features_are_read_from_what_the_policy_samples(capsys: pytest.CaptureFixture[str], reader: Reader) -> None:
    plain = said(capsys, "bench", *FEATURES)
    skipping = said(capsys, "bench", *FEATURES, "policy=skip_every", "policy.k=2")
    assert plain["added"] > -1 and plain["busy"] is False
    assert (plain["conditions"]["policy"], skipping["conditions"]["policy"]) == ("Full", "skip every 2")
    once, other = reader.shown[:3], reader.shown[3:]  # one to warm up, two rounds
    assert all(torch.equal(images, once[0]) for images in once)
    assert all(torch.equal(images, other[0]) for images in other)
    assert not torch.equal(once[0], other[0])


def test_the_formula_is_timed_on_two_different_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[torch.Tensor, ...]] = []
    real = bench_features.frechet_distance

    def distance(*moments: torch.Tensor) -> float:
        given.append(moments)
        return real(*moments)

    monkeypatch.setattr(bench_features, "frechet_distance", distance)
    assert bench_features.formula_seconds(5, seed=0, repeats=2) > 0
    (mean1, cov1, _, cov2), _ = given
    assert mean1.dtype == cov1.dtype == torch.float64
    assert [tuple(t.shape) for t in given[0]] == [(5,), (5, 5)] * 2
    assert torch.linalg.matrix_rank(cov1) == torch.linalg.matrix_rank(cov2) == 5
    assert not torch.allclose(cov1, cov2)
    monkeypatch.setattr(bench_features, "frechet_distance", lambda *_: float("nan"))
    with pytest.raises(RunError, match="came out as"):
        bench_features.formula_seconds(5, seed=0, repeats=1)


@pytest.mark.slow
def test_random_weights_never_bear_the_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("GEARSHIFT_INCEPTION", raising=False)
    monkeypatch.setattr(bench_features, "DIM", 6)
    answer = said(capsys, "bench", *FEATURES, "batch=2", "rounds=1")
    assert (answer["extractor"], answer["metric"]) == ("inception_random_weights", False)
    assert "random weights" in answer["conditions"]["features"]
    assert answer["with_features_ms"] > 0
    one, same = (bench_features.random_inception(seed, CPU) for seed in (0, 0))
    images = torch.arange(2 * 64).reshape(2, 1, 8, 8).to(torch.uint8)
    features = one.read(images)["features"]
    assert tuple(features.shape) == (2, 2048)
    assert torch.isfinite(features).all() and 1e-3 < float(features.std()) < 1e3
    assert torch.equal(features, same.read(images)["features"])


# gearshift bench training=true ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
def test_bench_of_a_training_step_over_every_exit(capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, "bench", *TINY, "training=true")
    assert answer["plain_ms"] > 0 and answer["every_exit_ms"] > 0 and answer["added_by_exits"] > -1
    assert "ratio" not in answer and not answer["busy"]


@pytest.mark.usefixtures("quiet")
def test_bench_of_a_training_step_under_a_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    dit = ["backbone=dit_digits", "exits=none", "policy=exit_schedule"]
    answer = said(capsys, "bench", *TINY, "training=true", *dit, "policy.depths=[3]")
    assert answer["blocks_run"] == pytest.approx(3 / 7)
    assert answer["ratio"] > 0 and answer["schedule_ms"] > 0
    half = said(capsys, "bench", *TINY, "training=true", *dit, "policy.depths=[7,1]", "batch=64", "repeats=4")
    assert half["blocks_run"] == pytest.approx(4 / 7, abs=0.12), "every repeat draws other times"
