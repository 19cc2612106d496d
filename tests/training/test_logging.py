"""What a training tells its logger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.runtime.errors import RunError
from gearshift.runtime.loggers import CsvOnly, CsvOnlyConfig
from gearshift.runtime.run import RunFolder


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, run: RunFolder, config: Mapping[str, Any], step: int) -> None:
        self.calls.append(("start", config, step))

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self.calls.append(("log", step, sorted(row)))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


def test_it_is_started_told_and_finished(toy: ModuleType, tmp_path: Path) -> None:
    seen = Recorder()
    toy.toy_train(tmp_path / "run", toy.toy_config(), logger=seen)
    names = ["grad_norm", "images", "images_per_s", "loss", "lr", "seconds"]
    assert seen.calls == [
        ("start", {"trainer": {"lr": 0.01}}, 0),
        *(("log", step, names) for step in (4, 8, 10)),
        ("finish", 0),
    ]


def test_it_is_finished_after_an_error_too(toy: ModuleType, tmp_path: Path) -> None:
    class Broken(Simple):
        def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, torch.Tensor]:
            raise RunError("broken")

    seen = Recorder()
    with pytest.raises(RunError, match="broken"):
        toy.toy_train(tmp_path / "run", toy.toy_config(), logger=seen, objective=Broken(SimpleConfig()))
    assert seen.calls[-1] == ("finish", 1)


def test_no_logger_changes_nothing(toy: ModuleType, tmp_path: Path) -> None:
    a = toy.toy_train(tmp_path / "a", toy.toy_config())
    b = toy.toy_train(tmp_path / "b", toy.toy_config(), logger=CsvOnly(CsvOnlyConfig()))
    assert a["loss"] == b["loss"]
