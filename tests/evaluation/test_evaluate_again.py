"""An evaluation goes on from what is there: what is sampled anew, what is not, and what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gearshift.evaluation.results import results

from .evaluations import EIGHT, POLICIES, Make, ddim, told


def test_a_second_run_samples_nothing_and_says_the_same(evaluator: Make, sampled: list[tuple[str, int]]) -> None:
    first = evaluator(**EIGHT)
    first.run()
    assert len(sampled) == 6
    sampled.clear()
    second = evaluator(**EIGHT)
    second.run()
    assert sampled == []
    assert told(first) == told(second)


def test_only_what_is_missing_or_broken_is_made_again(evaluator: Make, sampled: list[tuple[str, int]]) -> None:
    first = evaluator(**EIGHT)
    first.run()
    row = next(row for row in first.planned if row.name == "depth 2")
    path = first.shards(row).path(1)
    path.write_bytes(path.read_bytes()[:100])
    sampled.clear()
    again = evaluator(**EIGHT)
    again.run()
    assert sampled == [(row.sampler.policy.name, 4)]
    assert told(first) == told(again)


def test_more_images_and_more_rows_go_on_from_what_is_there(evaluator: Make, sampled: list[tuple[str, int]]) -> None:
    evaluator(**EIGHT).run()
    sampled.clear()
    evaluator(**{**EIGHT, "num_images": 12}).run()
    assert sorted(first for _, first in sampled) == [8, 8, 8]
    sampled.clear()
    policies = {**EIGHT["policies"], "depth 3": POLICIES["depth 3"]}  # type: ignore[dict-item]
    evaluator(**{**EIGHT, "policies": policies}).run()
    assert {first for _, first in sampled} == {0, 4} and len({name for name, _ in sampled}) == 1


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"guidance": 2.0}, {"labels": "uniform"}, {"solvers": {"ddim": ddim(5)}}]
)
def test_what_decides_the_images_makes_them_anew(
    evaluator: Make, sampled: list[tuple[str, int]], change: dict[str, Any]
) -> None:
    evaluator(classes=True, **EIGHT).run()
    sampled.clear()
    evaluator(classes=True, **{**EIGHT, **change}).run()
    assert len(sampled) == 6


def test_other_weights_are_other_work(evaluator: Make, sampled: list[tuple[str, int]]) -> None:
    evaluator(**EIGHT).run()
    sampled.clear()
    evaluator(inert_end=True, **EIGHT).run()
    assert len(sampled) == 6


def test_the_report_says_which_weights_it_is_of(evaluator: Make) -> None:
    e = evaluator(**EIGHT)
    e.run()
    first, raw = told(e)["protocol"], results(e, "runs/x", torch.float32, None, ema=False)["protocol"]
    assert (first["ema"], raw["ema"]) == (True, False)
    e = evaluator(**EIGHT, inert_end=True)
    e.run()
    assert told(e)["protocol"]["weights"] != first["weights"]
    assert first["weights"].startswith("sha256 ")


def test_shards_are_removed_on_request_and_samples_kept(evaluator: Make, tmp_path: Path) -> None:
    e = evaluator(**EIGHT, classes=True, keep_shards=False, keep_samples="npz")
    e.run()
    folder = tmp_path / "evaluation"
    assert not (folder / "shards").exists()
    with np.load(folder / "samples" / "depth-2.npz") as kept:
        assert np.array_equal(kept["arr_0"], e.rows["depth 2"].images.transpose(0, 2, 3, 1))
        assert kept["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_samples_as_pictures(evaluator: Make, tmp_path: Path) -> None:
    from PIL import Image

    e = evaluator(**{**EIGHT, "start": 3}, keep_samples="png")
    e.run()
    files = sorted((tmp_path / "evaluation" / "samples" / "full").iterdir())
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(3, 11)]
    assert np.array_equal(np.asarray(Image.open(files[5])), e.rows["full"].images[5, 0])


def test_a_folder_of_pictures_holds_this_evaluation_and_nothing_else(evaluator: Make, tmp_path: Path) -> None:
    """Images of an earlier, larger evaluation among them would give another FID."""
    folder = tmp_path / "evaluation" / "samples" / "full"
    evaluator(**{**EIGHT, "num_images": 12}, keep_samples="png").run()
    assert len(list(folder.iterdir())) == 12
    (folder / "notes.txt").write_text("mine")
    evaluator(**{**EIGHT, "start": 3}, keep_samples="png").run()
    assert sorted(file.name for file in folder.iterdir()) == [*(f"{k:06d}.png" for k in range(3, 11)), "notes.txt"]
