"""What an evaluation and its report make of uncertainty heads that were held against the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gearshift.data.dataset import ImageDataset
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.evaluation.calibration import calibrate
from gearshift.evaluation.calibration_numbers import Records
from gearshift.evaluation.calibration_plots import FILES, calibration_figures, sentence
from gearshift.evaluation.evaluate import Evaluator
from gearshift.evaluation.instruments import Instruments
from gearshift.evaluation.report import write_report
from gearshift.evaluation.results import pictures
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.policies import Policy
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Sampler

from .evaluations import POLICIES, dataset, ddim, network, told
from .scripted_heads import exits_of, grey, with_heads

# In an evaluation ----------------------------------------------------------------------------------------------------

HEADS = {"_target_": "gearshift.policies.UncertaintyExit", "threshold": 0.5}


def evaluation(folder: Path, *, heads: bool = True, data: ImageDataset | None = None, **settings: Any) -> Evaluator:
    denoiser = Denoiser(with_heads(True) if heads else network(True, False), VPSDE(VPSDEConfig()))

    def sampler(policy: Policy, solver: Any, **options: Any) -> Sampler:
        made = Sampler(denoiser, solver, policy, **options)
        made.check()
        return made

    rules = {"depth 2": POLICIES["depth 2"], **({"exit": HEADS} if heads else {})}
    chosen: dict[str, Any] = dict(
        policies=rules, solvers={"ddim": ddim(3)}, num_images=4, chunk=4, metrics=[], timing_images=0, equal_macs=False
    )
    config = EvaluationConfig(**{**chosen, **settings})
    instruments = Instruments.prepare(config, dataset(True), None, torch.device("cpu"))
    return Evaluator(config, sampler, instruments, dataset(True), torch.device("cpu"), folder / "e", held_out=data)


def test_a_report_says_what_was_found(tmp_path: Path) -> None:
    held = ImageDataset(**{**vars(dataset(True)), "split": "test"})
    e = evaluation(tmp_path, data=held, calibration_images=9, calibration_times=4)
    e.run()
    found = told(e)
    json.dumps(found, allow_nan=False)
    own = found["calibration"]
    assert (own["split"], own["images"], own["thresholds"]) == ("test", 9, [0.5])
    assert [one["depth"] for one in own["exits"]] == list(e.planned[0].sampler.denoiser.network.exits())
    assert own["log_snr"] == sorted(own["log_snr"], reverse=True) and len(own["log_snr"]) == 4
    assert found["unavailable"] == [] and not any("train split" in line for line in found["warnings"])
    write_report(tmp_path / "out", found, pictures(e))
    for name in FILES:
        content = (tmp_path / "out" / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Uncertainty against the true error" in text and sentence(own) in text
    assert all(f"]({name})" in text for name in FILES)
    assert "| 5 |" in text and "9 of the 16 test images of noise, with their labels" in text
    assert sentence(own) in (tmp_path / "out" / "report.html").read_text()


def test_without_it_everything_is_what_it_was(tmp_path: Path) -> None:
    """The same numbers and files, but for the section and its three figures, which go where a later report has none."""
    found, files = [], []
    for images in (6, 0):
        e = evaluation(tmp_path / str(images), calibration_images=images, calibration_times=2)
        e.run()
        found.append(told(e))
        write_report(tmp_path / "out", found[-1], pictures(e))
        files.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert "calibration" not in found[1]
    assert found[0].pop("calibration")["split"] == "train"
    [warning] = [line for line in found[0]["warnings"] if "train split" in line]
    found[0]["warnings"].remove(warning)
    assert found[0] == found[1]
    assert set(files[0]) - set(files[1]) == set(FILES) and set(files[1]) < set(files[0])
    assert {name for name in files[1] if files[0][name] != files[1][name]} == {
        "metrics.json", "report.md", "report.html",
    }  # fmt: skip


def test_without_heads_the_reason_is_given(tmp_path: Path) -> None:
    e = evaluation(tmp_path, heads=False, calibration_images=6)
    e.run()
    found = told(e)
    assert "calibration" not in found
    assert found["unavailable"] == [
        {"name": "calibration", "reason": "this UViT has no uncertainty heads", "fetch": ""}
    ]
    assert e.unavailable[0].name == "calibration", "known before anything is sampled"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"calibration_images": -1}, "calibration_images=-1 must be at least 0"),
        ({"calibration_images": 1}, "calibration_images=1 tells nothing apart"),
        ({"calibration_times": 0}, "calibration_times=0 must be at least 1"),
    ],
)
def test_settings_that_measure_nothing(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        EvaluationConfig(solvers={"ddim": ddim(2)}, **settings)


# Text and figures ----------------------------------------------------------------------------------------------------


def entry(*exits: dict[str, Any], images: int = 5, thresholds: tuple[float, ...] = ()) -> dict[str, Any]:
    times = len(exits[0]["by_time"]["error"])
    own = {"protocol": "p.", "split": "test", "images": images, "times": list(range(times))}
    return {
        **own, "log_snr": [float(-k) for k in range(times)], "thresholds": list(thresholds),
        "exits": [{**one, "depth": k + 1} for k, one in enumerate(exits)],
    }  # fmt: skip


def test_the_sentence_follows_the_numbers() -> None:
    def exit_of(share: float | None, truth: float | None, rank: float | None) -> dict[str, Any]:
        found = exits_of([[0.1, 0.2]], [[0.1, 0.2]])
        return {**found, "within_time_share": share, "error_within_time_share": truth, "rank_correlation": rank}

    assert sentence(entry(exit_of(0.02, 0.1, 0.314))) == (
        "Of the variance of the predicted error 2.00 % (exit 1) lies within times, of that of the true error 10.0 % "
        "(exit 1); the rank correlation of the two within times is 0.31 (exit 1)."
    )
    several = sentence(entry(exit_of(0.02, 0.1, 0.3), exit_of(0.5, 0.2, -0.1), exit_of(None, 0.15, None)))
    assert "2.00 % (exit 1) to 50.0 % (exit 2) lies within times" in several
    assert "true error 10.0 % (exit 1) to 20.0 % (exit 2)" in several
    assert several.endswith("within times is −0.10 (exit 2) to 0.30 (exit 1).")
    none = sentence(entry(exit_of(None, None, None)))
    assert "is the same for every image and time" in none and "no image is told from another" in none


@pytest.mark.parametrize(("exits", "times"), [(1, 1), (1, 6), (29, 6)])
def test_figures_of_any_size_are_pictures(exits: int, times: int) -> None:
    generator = np.random.default_rng(0)
    error = generator.uniform(0.05, 0.5, (times, exits, 12))
    uncertainty = error + 0.02 * generator.standard_normal(error.shape)
    uncertainty[:, 0] = 0.2  # of which nothing is correlated
    levels = np.arange(times, dtype=np.float64)
    records = Records(tuple(range(exits)), levels, -levels, uncertainty, error)
    found = calibrate(records, grey(), [0.1, 0.2, 0.9])
    drawn = calibration_figures(found)
    assert [figure.file for figure in drawn] == list(FILES)
    for figure in drawn:
        assert figure.png.startswith(b"\x89PNG") and len(figure.png) > 8_000
        assert "thresholds" in figure.caption or figure.file == FILES[2]
