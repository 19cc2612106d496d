"""`gearshift bench steps=true`, from the command line and with clocks made by hand. Nothing here is timed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from gearshift import cli
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.evaluation.conditions import Quiet
from gearshift.evaluation.throughput import BUSY, Timing
from gearshift.policies import Full
from gearshift.sampling.loop import Sampler
from gearshift.verbs import bench_steps

TINY = ["steps=true", "batch=2", "repeats=2", "strata=2", "warmup=1", "solver.steps=8", "device=cpu", "shrink=true"]
SKIPS = ["held", "extrapolated", "by displacement_magnitude", "by third_difference", "by embedded_error"]
SKIPPED = [f"skipped, {how}" for how in SKIPS]
ATTENTION = ["attention map", "attention qk", "attention output"]
ROW = {"policy", "ms_per_step", "share", "macs_saved", "time_saved", "saving_realised", "spread"}
ROW |= {"kept_bytes_per_image", "verdict"}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run(["bench", *arguments]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


@pytest.mark.parametrize("guidance", [1, 2])
def test_every_kind_of_step_on_a_network_that_has_all_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, guidance: int
) -> None:
    monkeypatch.setattr(Quiet, "others", lambda self: 0.01)
    answer = said(capsys, *TINY, f"guidance={guidance}")
    rows = {row["policy"]: row for row in answer["rows"]}
    assert list(rows) == ["computed", *SKIPPED, *ATTENTION, "deep features, branch 0", "every block"]
    assert all(set(row) == ROW for row in rows.values())
    first = rows["computed"]
    assert (first["share"], first["macs_saved"], first["saving_realised"], first["verdict"]) == (1.0, 0.0, None, None)
    assert all(rows[name]["macs_saved"] == 1.0 for name in SKIPPED)
    for name in ("attention map", "deep features, branch 0", "every block"):
        assert rows[name]["verdict"] is None
    for name in (*SKIPPED, "attention qk", "attention output"):
        assert rows[name]["verdict"] in ("met", "missed")
    c = answer["conditions"]
    assert (c["batch"], c["rows"], c["steps"], c["calls"]) == (2, 2 * guidance, 8, [4, 6])
    assert (answer["target"], answer["skip_target"], answer["busy"]) == (0.85, 0.02, False)


@pytest.mark.usefixtures("capsys")
def test_what_is_reused_saves_what_the_parts_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against `gearshift profile`, which has the cost of every block in every mode."""
    scripted(monkeypatch, {})
    rows = {row["policy"]: row for row in said(capsys, *TINY)["rows"]}
    assert cli.run(["profile", "shrink=true", "backbone=uvit_digits", "exits=adadiff"]) == 0
    profile = json.loads(capsys.readouterr().out.splitlines()[-1])
    total = profile["exits"][-1]["gmacs"] * 1e9
    for operator in ("map", "qk", "output"):
        saved = sum(part["full"] - part[operator] for part in profile["parts"])
        assert rows[f"attention {operator}"]["macs_saved"] == pytest.approx(saved / total)
    whole = sum(part["full"] for part in profile["parts"])
    assert rows["every block"]["macs_saved"] == pytest.approx(whole / total)
    assert rows["attention output"]["macs_saved"] < rows["deep features, branch 0"]["macs_saved"] < whole / total
    kept = {name: row["kept_bytes_per_image"] for name, row in rows.items()}
    assert kept["attention qk"] == 2 * kept["attention output"] > kept["deep features, branch 0"] > 0
    assert kept["computed"] == kept[SKIPPED[0]] == 0


def scripted(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], others: float = 0.0) -> None:
    """Every step once, for what it does, and then so many seconds, 1 where nothing is said."""

    def fake(methods: Any, rounds: int, device: Any, *, warmup: int, on_run: Any) -> Any:
        for method in methods.values():
            method()
        return {name: Timing((seconds.get(name, 1.0),) * rounds) for name in methods}, others

    monkeypatch.setattr(bench_steps, "interleave", fake)


def test_verdicts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = dict(zip(SKIPPED, (0.019, 0.021, 0.02, 0.5, 0.001), strict=True)) | {"attention qk": 0.5}
    scripted(monkeypatch, seconds)
    rows = {row["policy"]: row for row in said(capsys, *TINY)["rows"]}
    assert [rows[name]["verdict"] for name in SKIPPED] == ["met", "missed", "met", "missed", "met"]
    assert [rows[name]["share"] for name in SKIPPED] == pytest.approx([0.019, 0.021, 0.02, 0.5, 0.001])
    assert rows["attention qk"]["verdict"] == "met" and rows["attention output"]["verdict"] == "missed"
    assert rows["attention qk"]["saving_realised"] == pytest.approx(0.5 / rows["attention qk"]["macs_saved"])
    assert rows["computed"]["ms_per_step"] == 1000.0


def test_a_busy_machine_gets_no_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {}, BUSY + 0.1)
    assert cli.run(["bench", *TINY]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out.splitlines()[-1])
    assert {row["verdict"] for row in answer["rows"]} == {None, "machine busy, no verdict"}
    assert "other processes used 20% of the CPU time; measure again on a quiet machine" in captured.err


@pytest.mark.parametrize(
    ("network", "steps"),
    [
        (["backbone=dit_digits", "exits=none"], ["computed", *SKIPPED, *ATTENTION, "every block"]),
        (
            ["backbone=uvit_mscoco", "exits=none", "solver.clip_x0=false"],
            ["computed", *SKIPPED, *ATTENTION, "deep features, branch 0", "every block"],
        ),
        (["solver=dpmpp_2m", "solver.steps=8"], None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_networks_are_stepped_as_far_as_they_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, network: list[str], steps: list[str] | None
) -> None:
    scripted(monkeypatch, {})
    rows = said(capsys, *TINY, *network, "strata=1")["rows"]
    assert steps is None or [row["policy"] for row in rows] == steps


def test_too_few_calls_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *TINY, "solver.steps=5"]) == 2
    said = capsys.readouterr().err
    assert (
        "calls that have 4 before them and one behind, and ddim makes 5; set solver.steps for 6 calls or more" in said
    )
    assert cli.run(["bench", *TINY, "stages=true"]) == 2
    assert "stages=true and steps=true measure different things; choose one" in capsys.readouterr().err


def test_steps_decide_and_leave_the_run_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every repeat starts from the same point: the ledger of each says the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UViT(UViTConfig(image_size=8, in_channels=1, patch_size=4, embed_dim=8, depth=4, num_heads=2))
    denoiser = Denoiser(network.eval().requires_grad_(False), VPSDE(VPSDEConfig()))
    sampler = Sampler(denoiser, DDIM(DDIMConfig(steps=8)), Full(), chunk=2)
    steps = bench_steps.steps_of(sampler.info(sampler.calls()))
    assert len({step.name for step in steps}) == len(steps)
    decided: list[bool] = []
    real = bench_steps.AdaptiveSkip.observe

    def observe(self: Any, *arguments: Any) -> Any:
        after = real(self, *arguments)
        decided.append(len(after.statistics) > len(arguments[0].statistics))
        return after

    monkeypatch.setattr(bench_steps.AdaptiveSkip, "observe", observe)
    found: dict[str, list[tuple[int, ...]]] = {}

    def fake(methods: Any, rounds: int, device: Any, *, warmup: int, on_run: Any) -> Any:
        for name, method in methods.items():
            for _ in range(2):
                data = method()
                found.setdefault(name, []).append((*data.depth.flatten(), *data.reused.flatten(), int(data.macs.sum())))
        return {name: Timing((1.0,)) for name in methods}, 0.0

    monkeypatch.setattr(bench_steps, "interleave", fake)
    settings = ["backbone=uvit_digits", "exits=none", "solver.steps=8", "strata=1", "batch=2", "steps=true"]
    assert cli.run(["bench", *settings, "shrink=true", "device=cpu"]) == 0
    assert all(first == second for first, second in found.values())
    assert all(found[name][0] == (0, 0, 0, 0, 0) for name in SKIPPED)
    assert found["every block"][0][:4] == (7, 7, 7, 7)
    assert all(decided), "the last call decides nothing, and is not timed"
