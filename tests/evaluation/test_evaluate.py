"""The evaluator over a small network in memory: which row counts as best, baselines, timing references, repeats."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gearshift.evaluation import evaluate
from gearshift.evaluation.results import pictures
from gearshift.evaluation.throughput import BUSY
from gearshift.runtime.errors import UsageError
from gearshift.sampling.costs import macs_of
from gearshift.sampling.loop import sample_chunk

from .evaluations import DEPTH, EIGHT, POLICIES, SKIP, Make, Stub, ddim, rows, told

# Best ----------------------------------------------------------------------------------------------------------------


def test_full_compute_comes_first_and_is_never_sampled_twice(evaluator: Make) -> None:
    e = evaluator(policies={**POLICIES, "plain": {"_target_": "gearshift.policies.Full"}})
    e.run()
    assert list(e.rows) == ["full", *POLICIES]
    found = rows(e)
    assert found["full"]["psnr_to_full"] is None
    assert found["full"]["identical_to_full"] == 1.0
    assert found["full"]["macs_saved"] == found["depth 5"]["macs_saved"] == 0.0
    saved = [found[name]["macs_saved"] for name in POLICIES]
    assert saved == sorted(saved, reverse=True) and saved[0] > 0.5
    assert [found[name]["mean_depth"] for name in POLICIES] == [1, 2, 3, 4, 5]


def test_without_labels_the_closest_images_are_best(evaluator: Make) -> None:
    e = evaluator()
    e.run()
    found = rows(e)
    closest = max((name for name in POLICIES if name != "depth 5"), key=lambda name: found[name]["psnr_to_full"])
    assert e.best(list(POLICIES), "full") == closest
    assert all("label_agreement" not in row for row in found.values())


def test_identical_images_come_before_every_psnr(evaluator: Make) -> None:
    """They have none: psnr_to_full is None, which must not count as the least."""
    e = evaluator(inert_end=True)
    e.run()
    found = rows(e)
    assert found["depth 4"]["psnr_to_full"] is None
    assert found["depth 4"]["identical_to_full"] == 1.0
    assert found["depth 4"]["macs_saved"] > 0
    assert all(found[f"depth {depth}"]["psnr_to_full"] is not None for depth in (1, 2, 3))
    assert e.best(list(POLICIES), "full") == "depth 4"
    assert e.best(list(reversed(POLICIES)), "full") == "depth 4"
    assert e.best(["depth 1", "depth 5"], "full") == "depth 1", "depth 5 is identical too, but saves nothing"


@pytest.mark.parametrize("labels", [False, True])
def test_rows_that_skip_calls_are_no_exits(evaluator: Make, labels: bool) -> None:
    """Held predictions save the most of all here and would win; fewer steps are what they should be set against."""
    e = evaluator(Stub() if labels else None, classes=labels, policies={"skip": SKIP, "depth 4": POLICIES["depth 4"]})
    e.run()
    found = rows(e)
    assert found["skip"]["macs_saved"] == pytest.approx(0.5)
    assert found["skip"]["calls"] == 2
    assert found["depth 4"]["macs_saved"] < 0.5
    assert e.best(["skip", "depth 4"], "full") == "depth 4"
    assert e.best(["skip"], "full") is None


def test_with_labels_the_cheapest_within_the_tolerance_is_best(evaluator: Make) -> None:
    shares = {0: 1.0, 1: 0.5, 2: 4 / 6, 3: 5 / 6, 4: 1.0, 5: 1.0}  # full, depth 1..5
    for tolerance, best in ((60.0, "depth 1"), (34.0, "depth 2"), (17.0, "depth 3"), (0.0, "depth 4")):
        e = evaluator(Stub(shares), classes=True, tolerance=tolerance)
        e.run()
        assert rows(e)["depth 2"]["label_agreement"] == pytest.approx(4 / 6)
        assert e.best(list(POLICIES), "full") == best


def test_where_no_row_is_within_the_tolerance_psnr_decides(evaluator: Make) -> None:
    e = evaluator(Stub({0: 1.0, **dict.fromkeys(range(1, 6), 0.0)}), classes=True, inert_end=True)
    e.run()
    assert e.best(list(POLICIES), "full") == "depth 4"


# Baselines -----------------------------------------------------------------------------------------------------------


def test_fewer_steps_at_the_macs_of_the_best_rows(evaluator: Make) -> None:
    policies = {"skip": {**SKIP, "k": 3}, "depth 3": POLICIES["depth 3"]}
    e = evaluator(policies=policies, solvers={"ddim": ddim(10)}, equal_macs=True, baselines=["fewer_steps"])
    e.run()
    found = rows(e)
    fewer = [row for row in found.values() if "equal_macs_to" in row]
    assert [row["equal_macs_to"] for row in fewer] == ["depth 3", "skip"]
    for row in fewer:
        assert row["steps"] == int(10 * (1 - found[row["equal_macs_to"]]["macs_saved"]) + 1e-9)
        assert row["name"] == f"full, {row['steps']} steps"
        assert row["macs_saved"] == pytest.approx(1 - row["steps"] / 10)
        assert row["psnr_to_full"] is not None, "compared with full compute at all steps"
        assert row["baseline"] == "fewer_steps"


def test_no_baseline_where_nothing_is_saved(evaluator: Make) -> None:
    e = evaluator(policies={"depth 5": POLICIES["depth 5"]}, equal_macs=True)
    e.run()
    assert list(e.rows) == ["full", "depth 5"]


@pytest.mark.parametrize("off", [{"equal_macs": False}, {"equal_macs": True, "baselines": []}])
def test_without_baselines_there_is_what_was_asked_for(evaluator: Make, off: dict[str, Any]) -> None:
    e = evaluator(policies={"skip": SKIP, "depth 3": POLICIES["depth 3"]}, **off)
    e.run()
    assert list(e.rows) == ["full", "skip", "depth 3"]
    assert not any({"equal_macs_to", "baseline", "note", "grid"} & set(row) for row in rows(e).values())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_baselines_cost_what_was_counted_and_what_they_are_set_against(evaluator: Make, guidance: float) -> None:
    """Counted from the plans before anything is sampled; the ledger agrees."""
    e = evaluator(
        policies={"skip": SKIP, "depth 4": POLICIES["depth 4"]},
        solvers={"ddim": ddim(10)},
        equal_macs=True,
        classes=True,
        guidance=guidance,
    )
    e.run()
    found = rows(e)
    added = {name: row for name, row in found.items() if "equal_macs_to" in row}
    assert {row["baseline"] for row in added.values()} == {
        "fewer_steps",
        "other_grid",
        "hurry",
        "deep_features",
        "fixed_depth",
    }
    for name, row in added.items():
        sampler = e.rows[name].row.sampler
        assert macs_of(sampler, sampler.policy, e.table) == row["macs_per_image"]
        target = found[row["equal_macs_to"]]
        if "saves less" in row.get("note", ""):
            assert row["macs_per_image"] > target["macs_per_image"]
        else:
            assert row["macs_per_image"] <= target["macs_per_image"] * 1.005
        assert row["macs_saved"] > 0
    [late] = [row for row in added.values() if row["baseline"] == "hurry"]
    assert late["blocks_reused"] == pytest.approx(0.9) and late["kept_bytes_per_image"] > 0
    assert "also against skip" in late["note"] and late["equal_macs_to"] == "depth 4"
    assert e.rows[late["name"]].row.sampler.policy.operator == "map"  # settled: the row says which


# Time ----------------------------------------------------------------------------------------------------------------


def test_two_entries_of_one_solver_have_a_reference_each(evaluator: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are called ddim: full compute at 2 steps must not be what 6 steps are held against."""
    ran: list[str] = []

    def fake(samplers: Any, reference_of: Any, table: Any, settings: Any, *, start: int, on_pass: Any) -> Any:
        """Seconds are calls times depth."""
        seconds = {}
        for name, sampler in samplers.items():
            ran.append(name)
            chunk = sample_chunk(sampler, torch.arange(settings.images), table[name])
            seconds[name] = float(chunk.ledger.depth[:, 0, 0].sum())
            on_pass(name)
        found = {
            name: {
                "images_per_s": settings.images / own,
                "speedup": seconds[reference_of[name]] / own,
                "time_saved": 1 - own / seconds[reference_of[name]],
            }
            for name, own in seconds.items()
        }
        return SimpleNamespace(rows=found, others=BUSY + 0.1)

    monkeypatch.setattr(evaluate, "measure_speed", fake)
    solvers = {"two": ddim(2), "six": ddim(6)}
    e = evaluator(
        policies={"depth 3": POLICIES["depth 3"]},
        solvers=solvers,
        timing_images=2,
        timing_rounds=3,
        equal_macs=True,
        baselines=["fewer_steps"],
    )
    e.run()
    found = rows(e)
    assert {row["solver"] for row in found.values()} == {"ddim"}
    steps = {name: row["steps"] for name, row in found.items()}
    fewer = [name for name in found if name.startswith("full, ") and name.endswith("@ six")]
    assert steps["full @ two"] == steps["depth 3 @ two"] == 2
    assert steps["full @ six"] == steps["depth 3 @ six"] == 6
    assert ran == list(found)
    for solver in ("two", "six"):
        full, exits = found[f"full @ {solver}"], found[f"depth 3 @ {solver}"]
        assert (full["speedup"], full["time_saved"], full["macs_saved"]) == (1.0, 0.0, 0.0)
        assert full["saving_realised"] is None
        assert exits["speedup"] == pytest.approx(DEPTH / 3)
        assert exits["time_saved"] == pytest.approx(1 - 3 / DEPTH)
        assert exits["saving_realised"] == pytest.approx(exits["time_saved"] / exits["macs_saved"])
    assert found["full @ two"]["images_per_s"] == pytest.approx(2 / (2 * DEPTH))
    assert found["full @ six"]["images_per_s"] == pytest.approx(2 / (6 * DEPTH))
    assert len(fewer) == 1
    assert found[fewer[0]]["speedup"] == pytest.approx(6 / steps[fewer[0]])
    assert found[fewer[0]]["equal_macs_to"] == "depth 3 @ six"
    answer = told(e)
    assert any("20% of the CPU time" in warning for warning in answer["timing_warnings"])
    assert answer["conditions"]["batch"] == 2


def test_each_solver_is_compared_with_its_own_full_run(evaluator: Make) -> None:
    e = evaluator(policies={"depth 5": POLICIES["depth 5"]}, solvers={"two": ddim(2), "six": ddim(6)})
    e.run()
    found = rows(e)
    assert not np.array_equal(e.rows["full @ two"].images, e.rows["full @ six"].images)
    for solver in ("two", "six"):
        assert found[f"depth 5 @ {solver}"]["identical_to_full"] == 1.0
        assert found[f"depth 5 @ {solver}"]["macs_saved"] == 0.0


def test_no_times_without_timing(evaluator: Make) -> None:
    e = evaluator(policies={})
    e.run()
    assert told(e)["conditions"] == {}
    assert "speedup" not in rows(e)["full"]


# What is shown and refused -------------------------------------------------------------------------------------------


def test_rows_are_the_images_of_the_sampler(evaluator: Make) -> None:
    from gearshift.data.pixels import to_u8
    from gearshift.sampling.loop import sample

    e = evaluator(num_images=5, chunk=2, start=3)
    e.run()
    wanted = torch.cat([to_u8(chunk.images) for chunk in sample(e.rows["full"].row.sampler, 5, start=3)])
    assert np.array_equal(e.rows["full"].images, wanted.numpy())
    shown = pictures(e)
    assert shown.samples["full"].shape == (5, 1, 8, 8)
    assert shown.depths["depth 2"].shape == (4, 5) and (shown.depths["depth 2"] == 2).all()


def test_what_is_shown_of_calls_is_what_was_asked_for(evaluator: Make) -> None:
    """Skipped calls are marked; a branch that guidance does not ask for outside its interval has skipped nothing."""
    e = evaluator(policies={"skip": SKIP}, classes=True, guidance=2.0, guidance_interval=[-100.0, 0.0])
    e.run()
    shown, ledger = pictures(e), e.rows["full"].ledger
    assert set(ledger.branches.tolist()) == {1, 2} and not ledger.called.all()
    assert shown.called["full"].shape == shown.depths["full"].shape == (4, 12) and shown.called["full"].all()
    assert (shown.depths["full"] == DEPTH).all()
    assert shown.called["skip"].all(axis=1).tolist() == [True, False, True, False]
    assert not shown.called["skip"][1::2].any() and (shown.depths["skip"][::2] == DEPTH).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solvers": {}}, "solvers is empty"),
        ({"num_images": 1}, "num_images=1 must be at least 2"),
        ({"timing_rounds": 0}, "timing_rounds=0 must be at least 1"),
        ({"metrics": ["label_agrement"]}, "label_agrement.*label_agreement.*lpips@vgg.*fid"),
        ({"metrics": ["lpips@squeeze"]}, "lpips@squeeze.*lpips@vgg"),
        ({"timing_sweep": [8, 0]}, r"timing_sweep=\[8, 0\]: every batch size must be at least 1"),
        ({"min_images": -5}, "min_images=-5 must be at least 2"),
        ({"name": "a/b"}, "name='a/b' is no name of a folder"),
        ({"name": ".."}, "name='..' is no name of a folder"),
        ({"name": ""}, "name='' is no name of a folder"),
        (
            {"weights": {"incepton": "x.pth"}},
            "weights.incepton=x.pth: no such network; there are inception, vgg16, alex",
        ),
        ({"keep_samples": "jpg"}, "keep_samples='jpg' is not one of none, npz, png"),
        ({"baselines": ["fewer_steps", "hurray"]}, "hurray'.*is not one of fewer_steps, other_grid, hurry, deep_feat"),
        ({"split": "val"}, "split='val' is neither train nor test"),
        ({"policies": {"a b": SKIP, "a-b": SKIP}}, "would share the file name 'a-b'"),
    ],
)
def test_settings_that_make_no_evaluation(evaluator: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluator(**settings)


@pytest.mark.parametrize("content", [None, b"other weights"])
def test_weights_that_were_named_are_read_or_refused(evaluator: Make, tmp_path: Path, content: bytes | None) -> None:
    """That FID was left out for a typo is else found after hours of sampling."""
    file = tmp_path / "weights.pth"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"weights.inception=.*weights.pth: .*weights-inception-2015.* 6726825d"):
        evaluator(weights={"inception": str(file)})
    evaluator(weights={"inception": None, "vgg16": None}, references={"inception": None})


@pytest.mark.parametrize(
    ("metrics", "on"), [(["fd@random_conv"], "random_conv"), (["lpips", "label_agreement"], "no network")]
)
def test_references_that_nobody_would_read_are_refused(evaluator: Make, metrics: list[str], on: str) -> None:
    with pytest.raises(UsageError, match=rf"references.inception=x.npz would not be read: .* on {on}"):
        evaluator(metrics=metrics, references={"inception": "x.npz"})


def test_everything_is_checked_before_the_first_image(evaluator: Make) -> None:
    with pytest.raises(UsageError, match="asks for depth 9"):
        evaluator(policies={**POLICIES, "deep": {"_target_": "gearshift.policies.FixedDepth", "depth": 9}})


# Processes, chunks, repeats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_any_number_of_processes_gives_the_same_bits(
    evaluator: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: int
) -> None:
    """Each process's share one after the other; real processes are in test_processes."""
    settings = {**EIGHT, "num_images": 10, "start": 2, "metrics": ["fd@random_conv", "kd@random_conv"]}
    alone = evaluator(**settings)
    alone.run()
    shutil.rmtree(tmp_path / "evaluation")
    together = evaluator(**settings)
    monkeypatch.setattr(evaluate, "world_size", lambda: processes)
    for rank in reversed(range(processes)):
        monkeypatch.setattr(evaluate, "rank", lambda rank=rank: rank)
        for row in together.planned:
            together._sample(row)
    together.run()
    assert told(alone) == told(together)


def test_between_chunk_sizes_kernels_round_differently_and_little(evaluator: Make) -> None:
    found = []
    for chunk in (3, 8):
        e = evaluator(**{**EIGHT, "chunk": chunk})
        e.run()
        found.append(rows(e))
    for name, row in found[0].items():
        for key in ("macs_per_image", "psnr_to_full", "ssim_to_full", "fd_random_conv_64[s0-s2]"):
            if row[key] is not None:
                assert row[key] == pytest.approx(found[1][name][key], rel=1e-5)


def test_repeats_are_disjoint_and_told_as_mean_and_sd(evaluator: Make) -> None:
    apart = []
    for start in (0, 8, 16):
        e = evaluator(**{**EIGHT, "start": start})
        e.run()
        apart.append(rows(e)["depth 2"])
    e = evaluator(**EIGHT, repeats=3)
    e.run()
    row = rows(e)["depth 2"]
    for key in ("psnr_to_full", "ssim_to_full", "fd_random_conv_64[s0-s2]"):
        values = [single[key] for single in apart]
        assert len(set(values)) == 3, "the same images again would be no repeat"
        assert row[key] == pytest.approx(np.mean(values))
        assert row["sd"][key] == pytest.approx(np.std(values, ddof=1))
    assert row["macs_per_image"] == pytest.approx(np.mean([single["macs_per_image"] for single in apart]))
    assert (row["num_images"], row["repeats"]) == (8, 3)
    assert "3 disjoint repeats of 8" in told(e)["protocol"]["images"]


def test_too_few_images_are_refused_before_any_is_made(evaluator: Make, sampled: list[tuple[str, int]]) -> None:
    with pytest.raises(UsageError, match=r"asks for at least 20 images and evaluation.num_images=8"):
        evaluator(**EIGHT, min_images=20)
    assert sampled == []
    e = evaluator(**EIGHT, min_images=8)
    e.run()
    assert any("min_images=8" in line for line in told(e)["warnings"])


@pytest.mark.parametrize("classes", [False, True])
def test_agreement_that_was_asked_for_is_there_or_said_to_be_left_out(evaluator: Make, classes: bool) -> None:
    e = evaluator(Stub({0: 0.5}), classes=classes, policies={})
    e.settings.metrics.append("label_agreement")
    e.run()
    found = told(e)
    left_out = [missing["reason"] for missing in found["unavailable"] if missing["name"] == "label_agreement"]
    assert ("label_agreement" in found["rows"][0], left_out) == (
        (True, []) if classes else (False, ["the network takes no labels to agree with"])
    )


def test_agreement_by_class_is_told(evaluator: Make) -> None:
    e = evaluator(Stub({0: 0.5}), classes=True, policies={})
    e.run()
    [row] = told(e)["rows"]
    assert row["label_agreement"] == 0.5 and row["label_agreement_per_class"] == [0.5, 0.5, 0.5]
