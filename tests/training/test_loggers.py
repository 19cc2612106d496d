"""Loggers besides metrics.csv."""

from __future__ import annotations

import glob
import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.run import RunFolder
from gearshift.training.loggers import CsvOnly, CsvOnlyConfig, Wandb, WandbConfig


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


def test_an_unknown_mode() -> None:
    with pytest.raises(UsageError, match=r"logger\.mode='offlin' is not one of"):
        WandbConfig(mode="offlin")


def test_a_damaged_id_is_not_replaced_in_silence(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = RunFolder.create(tmp_path / "run", {"seed": 0})
    (run.path / "wandb.json").write_text("[]")
    with pytest.raises(RunError, match="holds no id of a Weights & Biases run"):
        Wandb(WandbConfig(mode="offline")).start(run, {}, 0)


@pytest.mark.slow
def test_wandb_is_imported_only_where_it_is_chosen(tmp_path: Path) -> None:
    code = "import sys, gearshift.training.train, gearshift.training.loggers; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


_OFFLINE = """
import json, os, sys
sys.path.insert(0, {tests!r})
import toy
from gearshift.training.loggers import Wandb, WandbConfig
from gearshift.training.signals import Stopped
import signal
from gearshift.objectives.simple import Simple, SimpleConfig

class StopAt6(Simple):
    def loss(self, denoiser, batch, draws):
        if batch.micro_batch == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(denoiser, batch, draws)

plain = SimpleConfig(label_dropout=0.2)
try:
    toy.toy_train({run!r}, toy.toy_config(), logger=Wandb(WandbConfig(project="p")), objective=StopAt6(plain))
except Stopped:
    pass
import wandb
assert wandb.run is None
toy.toy_train({run!r}, toy.toy_config(), logger=Wandb(WandbConfig(project="p")))
assert wandb.run is None
"""


def offline_rows(file: str) -> list[dict[str, Any]]:
    """The logged lines in a file of an offline run: a log of LevelDB's format behind seven bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, place, record, rows = Path(file).read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the end of a block that no header fits into
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            parsed = wandb_internal_pb2.Record.FromString(record)
            if parsed.WhichOneof("record_type") == "history":
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in parsed.history.item})
            record = b""
    return rows


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_offline_for_real(tmp_path: Path) -> None:
    """Two pieces of one training: one id, every line once, nothing on standard output, no network."""
    run = tmp_path / "exp" / "run"
    code = _OFFLINE.format(tests=str(Path(__file__).parent), run=str(run))
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    identity = json.loads((run / "wandb.json").read_text())
    files = sorted(glob.glob(f"{run}/wandb/offline-run-*/run-{identity['id']}.wandb"))
    assert len(files) == 2 and identity["project"] == "p"
    rows = [row for file in files for row in offline_rows(file)]
    assert [row["_step"] for row in rows] == [4, 8, 10]
    assert all({"loss", "lr", "images"} <= set(row) for row in rows)
