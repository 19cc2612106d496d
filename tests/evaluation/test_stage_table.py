"""The entries `stages` and `training` of an evaluation: where they come from, the report, and comparisons with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.evaluation.compare import as_json, compare, write_comparison
from gearshift.evaluation.report import Pictures, write_report
from gearshift.evaluation.results import costs
from gearshift.evaluation.stage_table import cost_blocks
from gearshift.evaluation.stored import Evaluated, read
from gearshift.evaluation.training_costs import TrainedBy
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.objectives.staged import Staged, StagedConfig
from gearshift.policies import Full
from gearshift.runtime.errors import RunError
from gearshift.sampling.loop import Sampler
from gearshift.verbs import compare as verb
from gearshift.verbs import evaluate as evaluate_verb

from ..contract import build, cost_table

PROCESS = VPSDE(VPSDEConfig())


def evaluator(name: str, *steps: int) -> Any:
    """As much of an `Evaluator` as its costs are read from: one row of full compute per number of steps."""
    network = build(name)
    rows = {}
    for count in steps:
        sampler = Sampler(Denoiser(network, PROCESS), DDIM(DDIMConfig(steps=count)), Full())
        row = SimpleNamespace(sampler=sampler, solver=f"ddim{count}", is_full=True)
        rows[f"full {count}"] = SimpleNamespace(row=row)
    rows["exit"] = SimpleNamespace(row=SimpleNamespace(sampler=sampler, solver=f"ddim{steps[-1]}", is_full=False))
    return SimpleNamespace(rows=rows, table=cost_table(network))


def entries(name: str = "separate", images: int | None = 640_000, choice: str = "uniform") -> dict[str, Any]:
    return costs(evaluator(name, 10), TrainedBy(Staged(StagedConfig(choice=choice)), images))


def test_entries_of_a_staged_network() -> None:
    found = entries()
    assert set(found) == {"stages", "training"}
    network, table = build("separate"), cost_table(build("separate"))
    each = [table.full(network, path).macs / 1e9 for path in (0, 1)]
    averages = found["stages"]["averages"]
    assert set(averages) == {"uniform", "mass", "interval_length", "training", "solver_calls"}
    assert averages["training"]["gmacs"] == pytest.approx(sum(each) / 2)
    levels = torch.tensor([call.log_snr for call in DDIM(DDIMConfig(steps=10)).calls(PROCESS)])
    low = int((levels >= 0).sum())
    assert averages["solver_calls"]["gmacs"] == pytest.approx((low * each[0] + (10 - low) * each[1]) / 10)
    assert f"{low} / {10 - low} of 10" in averages["solver_calls"]["of"]
    training = found["training"]
    assert training["gmacs_forward"] == pytest.approx(sum(each) / 2)
    assert training["gmacs"] == pytest.approx(3 * sum(each) / 2)
    assert training["pmacs"] == pytest.approx(640_000 * training["gmacs"] / 1e6)
    assert training["stages"]["shares"] == [0.5, 0.5]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_every_solver_has_an_average() -> None:
    found = costs(evaluator("separate", 10, 4), None)
    assert {"solver_calls: ddim10", "solver_calls: ddim4"} <= set(found["stages"]["averages"])
    assert "training" not in found and "training" not in found["stages"]["averages"]


def test_one_path_has_a_training_and_no_stages() -> None:
    found = costs(evaluator("uvit-class", 10), TrainedBy(Simple(SimpleConfig()), None))
    assert set(found) == {"training"}
    assert (found["training"]["images"], found["training"]["pmacs"]) == (None, None)
    assert costs(evaluator("uvit-class", 10), None) == {}


def test_images_of_finished_unfinished_and_imported_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the answer of a finished run, else from its newest checkpoint; imported weights have no training."""
    from gearshift.training import checkpoint

    def images(result: dict[str, Any] | None, **cfg: Any) -> int | None:
        folder = SimpleNamespace(result=result)
        return evaluate_verb._images(SimpleNamespace(folder=folder, config=OmegaConf.create(cfg)))  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "latest", lambda run: tmp_path / "last.ckpt")
    monkeypatch.setattr(checkpoint, "read", lambda path: {checkpoint.KEY: {"step": 30}})
    assert images({"images": 640}, trainer={"batch_size": 16}) == 640
    assert images(None, trainer={"batch_size": 16}) == 480
    assert images(None) is None
    assert images({"imported": "file.pth"}) is None


# The report -----------------------------------------------------------------------------------------------------------


def results(name: str, macs: float, **more: Any) -> dict[str, Any]:
    row = {"name": "full", "policy": "Full", "solver": "ddim", "calls": 10, "macs_per_image": macs}
    return {"format": 2, "run": f"runs/{name}", "rows": [row], "protocol": {"seed": 0}, "conditions": {}, **more}


def test_report_shows_both_tables(tmp_path: Path) -> None:
    found = entries()
    write_report(tmp_path, results("a", 1e9, **found), Pictures())
    text = (tmp_path / "report.md").read_text()
    for expected in ("## Stages", "## Cost of the training", "| 0 to 1 |", "| above 1 |", "50 % / 50 %", "640,000",
                     "backward = 2 x forward MACs", "objective Staged, choice=uniform", "interval_length"):  # fmt: skip
        assert expected in text, expected
    page = (tmp_path / "report.html").read_text()
    assert "Cost of the training" in page and "above 1" in page
    assert read(tmp_path / "metrics.json")["training"] == found["training"]


def test_report_without_entries_says_nothing_of_them(tmp_path: Path) -> None:
    assert cost_blocks({}) == []
    write_report(tmp_path, results("a", 1e9), Pictures())
    text = (tmp_path / "report.md").read_text()
    assert "Stages" not in text and "Cost of the training" not in text


def test_what_is_not_known_and_what_came_before_is_said(tmp_path: Path) -> None:
    found = entries(images=None)
    found["training"]["before"] = "digits"
    write_report(tmp_path, results("a", 1e9, **found), Pictures())
    text = (tmp_path / "report.md").read_text()
    assert text.count("not known") == 2
    assert "The training it starts from (digits) is not counted." in text


def test_entries_that_are_no_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(results("a", 1e9, training=[1])))
    with pytest.raises(RunError, match="has a training of type list, expected an object"):
        read(tmp_path / "metrics.json")


# Comparisons ----------------------------------------------------------------------------------------------------------


def test_a_comparison_says_what_is_saved(tmp_path: Path) -> None:
    cheap, dear = entries("separate", 1000), entries("separate", 4000)
    contents = {"A": results("a", 1e9, **dear), "B": results("b", 2e9, **cheap)}
    comparison = compare([Evaluated(tmp_path, label, content) for label, content in contents.items()])
    [line] = comparison.savings
    assert line.startswith("B saves training, not sampling against A: ") and "(-75.0 %)" in line
    write_comparison(tmp_path, comparison)
    text = (tmp_path / "comparison.md").read_text()
    assert "## Saved or not, in MACs alone" in text and "B saves training, not sampling against A" in text
    stored = as_json(comparison)
    assert stored["savings"] == [line]
    assert stored["evaluations"][1]["training"] == cheap["training"]


def test_the_verb_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, images in (("a", 4000), ("b", 1000)):
        (tmp_path / name).mkdir()
        content = results(name, 1e9, **entries("separate", images))
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    cfg = {"paths": [str(tmp_path / "a"), str(tmp_path / "b")], "name": ["A", "B"], "out": str(tmp_path / "out")}
    answer = verb.run(OmegaConf.create(cfg))
    [line] = answer["savings"]
    assert line.startswith("B saves training, not sampling against A: ") and line in capsys.readouterr().err


def test_results_of_before_compare_as_they_did(tmp_path: Path) -> None:
    old = results("a", 1e9)
    comparison = compare([Evaluated(tmp_path, "A", old), Evaluated(tmp_path, "B", copy.deepcopy(old))])
    assert comparison.warnings == ()
    [line] = comparison.savings
    assert line.startswith("B saves no sampling against A: ") and line.endswith("training is not known of both")
