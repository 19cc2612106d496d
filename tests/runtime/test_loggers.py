"""Loggers besides metrics.csv and metrics.json."""

from __future__ import annotations

import glob
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.loggers import CsvOnly, CsvOnlyConfig, Wandb, WandbConfig
from gearshift.runtime.run import RunFolder

RESULTS: dict[str, Any] = {
    "rows": [
        {"name": "full", "solver": "ddim", "fid": 3.5, "psnr_to_full": None, "label_agreement_per_class": [0.5, 1.0]},
        {
            "name": "exit u<0.1 @ a/b",
            "solver": "ddim",
            "fid": 4.5,
            "psnr_to_full": 31.0,
            "kid": math.nan,
            "identical": False,
            "sd": {"fid": 0.25},
        },
    ]
}


def test_an_unknown_mode() -> None:
    with pytest.raises(UsageError, match=r"logger\.mode='offlin' is not one of"):
        WandbConfig(mode="offlin")


def test_a_damaged_id_is_not_replaced_in_silence(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = RunFolder.create(tmp_path / "run", {"seed": 0})
    (run.path / "wandb.json").write_text("[]")
    with pytest.raises(RunError, match="holds no id of a Weights & Biases run"):
        Wandb(WandbConfig(mode="offline")).start(run, {}, 0)


def test_no_logger_reports_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"seed": 0})
    before = sorted(run.path.rglob("*"))
    CsvOnly(CsvOnlyConfig()).report(run, {}, "demo", RESULTS, {})
    assert sorted(run.path.rglob("*")) == before


@pytest.mark.slow
def test_wandb_is_imported_only_where_it_is_chosen(tmp_path: Path) -> None:
    code = "import sys, gearshift.training.train, gearshift.verbs.evaluate; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


_OFFLINE = """
import json, os, pathlib, sys
sys.path.insert(0, {tests!r})
import toy
from gearshift.runtime.loggers import Wandb, WandbConfig
from gearshift.runtime.run import RunFolder
from gearshift.training.signals import Stopped
import signal
from gearshift.objectives.simple import Simple, SimpleConfig

class StopAt6(Simple):
    def loss(self, denoiser, batch, draws):
        if batch.micro_batch == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(denoiser, batch, draws)

plain = SimpleConfig(label_dropout=0.2)
results = json.loads({results!r})

def train(**settings):
    try:
        toy.toy_train({run!r}, toy.toy_config(), logger=Wandb(WandbConfig(project="p")), **settings)
    except Stopped:
        pass

def evaluate(name):
    from PIL import Image
    folder = RunFolder.create({run!r}, {{"trainer": {{"lr": 0.01}}}})
    picture = pathlib.Path({run!r}, "grid.png")
    Image.new("L", (8, 8)).save(picture)
    # Another project is a setting that came too late: the run has its place.
    logger = Wandb(WandbConfig(project="elsewhere" if {begun!r} == "train" else "p"))
    logger.report(folder, {{"seed": 0}}, name, results, {{"grid": picture}})

import wandb
for step in {steps!r}:
    train(objective=StopAt6(plain)) if step == "stopped" else train() if step == "train" else evaluate(step)
    assert wandb.run is None
"""


def offline_records(file: str) -> list[Any]:
    """The records in a file of an offline run: a log of LevelDB's format behind seven bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, place, record, found = Path(file).read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the end of a block that no header fits into
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
    return found


def history(file: str) -> list[dict[str, Any]]:
    """The logged lines."""
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in offline_records(file)
        if record.WhichOneof("record_type") == "history"
    ]


def summary(file: str) -> dict[str, Any]:
    """What the summary was told, the library's own entries left out."""
    items = [
        item
        for record in offline_records(file)
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    ]
    return {item.key: json.loads(item.value_json) for item in items if item.key.startswith("evaluation/")}


def offline(folder: Path, steps: list[str]) -> tuple[dict[str, str], list[str]]:
    """Trainings ("stopped", "train") and evaluations (by name) of one run, one after the other in one process without
    a network: what the id file says, and the files of W&B in order."""
    run = folder / "exp" / "run"
    tests = str(Path(__file__).parents[1] / "training")
    begun = "train" if steps[0] in ("train", "stopped") else "evaluate"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _OFFLINE.format(tests=tests, run=str(run), steps=steps, results=json.dumps(RESULTS), begun=begun),
        ],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    identity = json.loads((run / "wandb.json").read_text())
    files = glob.glob(f"{run}/wandb/offline-run-*/run-{identity['id']}.wandb")
    assert len(files) == len(glob.glob(f"{run}/wandb/offline-run-*")), "every piece bears the id"
    return identity, sorted(files, key=lambda file: Path(file).parent.stat().st_ctime_ns)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_offline_for_real(tmp_path: Path) -> None:
    """Two pieces of one training, evaluations between and after: one id, every line once, nothing on standard output,
    no network, and nothing of the evaluations among the lines."""
    identity, files = offline(tmp_path, ["stopped", "early", "train", "late", "late"])
    assert identity["project"] == "p"
    assert len(files) == 5
    lines = [history(file) for file in files]
    assert [[row["_step"] for row in rows] for rows in lines] == [[4], [], [8, 10], [], []]
    assert all({"loss", "lr", "images"} <= set(row) for rows in lines for row in rows)
    for file, name in ((files[1], "early"), (files[3], "late"), (files[4], "late")):
        found = summary(file)
        media = {key: found.pop(f"evaluation/{name}/{key}") for key in ("rows", "grid")}
        place = f"evaluation/{name}"
        assert found == {
            f"{place}/full/fid": 3.5,
            f"{place}/full/label_agreement_per_class/0": 0.5,
            f"{place}/full/label_agreement_per_class/1": 1.0,
            f"{place}/exit u<0.1 @ a-b/fid": 4.5,
            f"{place}/exit u<0.1 @ a-b/psnr_to_full": 31.0,
            f"{place}/exit u<0.1 @ a-b/sd/fid": 0.25,
        }
        table = json.loads((Path(file).parent / "files" / media["rows"]["path"]).read_text())
        assert table["columns"] == ["name", "solver", "fid", "psnr_to_full", "kid", "identical"]
        assert table["data"][0][:4] == ["full", "ddim", 3.5, None]
        assert table["data"][1] == ["exit u<0.1 @ a/b", "ddim", 4.5, 31.0, None, False]
        assert (Path(file).parent / "files" / media["grid"]["path"]).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_training_goes_on_in_the_run_that_an_evaluation_began(tmp_path: Path) -> None:
    _, files = offline(tmp_path, ["first", "train"])
    assert [[row["_step"] for row in history(file)] for file in files] == [[], [4, 8, 10]]
    assert summary(files[0])
