"""`gearshift train` on a folder of images: the folder is part of what the run is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gearshift import cli

SETTINGS = [
    *("data=imagefolder", "data.size=8", "data.channels=1", "backbone.num_classes=2", "+debug=tiny"),
    *("trainer.accelerator=cpu", "trainer.batch_size=4", "trainer.log_every=1", "objective.label_dropout=0.1"),
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path / "cache"))


def folder(path: Path, seed: int) -> Path:
    """Two classes of six images for training and two for testing, 12 x 9 pixels of noise."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("left", "right"):
            (path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (9, 12), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{number}.png")
    return path


def train(data: Path) -> int:
    return cli.run(["train", *SETTINGS, f"data.path={data}"])


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_it_trains_and_another_folder_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = folder(tmp_path / "one", 1), folder(tmp_path / "two", 2)
    assert train(one) == 0
    first = answer(capsys)
    assert (first["steps"], first["images"]) == (2, 8)
    assert isinstance(first["loss"], float) and first["loss"] > 0
    run = Path(str(first["run"]))
    assert len((run / "metrics.csv").read_text().splitlines()) == 3
    assert train(one) == 0
    assert answer(capsys) == first, "the same folder is the same run, which is finished"
    assert train(two) == 0
    second = answer(capsys)
    assert second["run"] != first["run"]
    assert second["loss"] != first["loss"]
    assert cli.run(["sample", f"run={run}", "num_images=2", "solver.steps=2", "device=cpu"]) == 0
    assert answer(capsys)["num_images"] == 2


def test_data_that_changed_under_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupted run goes on where its images are the same, and only there."""
    data = folder(tmp_path / "images", 1)
    assert train(data) == 0
    first = answer(capsys)
    run = Path(str(first["run"]))
    (run / "done.json").unlink()  # as after a kill before the last file was written
    assert train(data) == 0
    again = answer(capsys)
    assert (again["run"], again["steps"]) == (first["run"], 2)
    (run / "done.json").unlink()
    Image.new("L", (8, 8), 200).save(data / "train" / "left" / "new.png")
    before = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    assert train(data) == 1
    said = capsys.readouterr()
    [line] = [line for line in said.err.splitlines() if line.startswith("gearshift: ")]
    assert "the images under data.path are not those" in line
    assert "data_digest" in line and " there, " in line and " here" in line
    assert "Traceback" not in said.err
    assert said.out.strip() == ""
    assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    assert not (run / "done.json").exists()
    (data / "train" / "left" / "new.png").unlink()  # set back, it goes on
    assert train(data) == 0


def test_classes_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "images", 1)
    assert cli.run(["train", *SETTINGS, f"data.path={data}", "backbone.num_classes=5"]) == 2
    assert "the data has 2 classes, but UViT is conditioned on 5; set backbone.num_classes" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
