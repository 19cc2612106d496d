"""Runs that are killed, or asked to stop, from outside."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Program = Callable[..., "subprocess.Popen[str]"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Every few steps a checkpoint, so that many kills come while one is being written.
FIELDS = {"max_steps": 150, "checkpoint_every_steps": 3, "log_every": 5}


def finish(program: Program, folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    process = program("train", str(folder), json.dumps(fields))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    found["gearshift"].pop("seconds")
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in csv.DictReader(file)]


def test_killed_again_and_again_it_ends_with_the_same_bits(
    program: Program, tmp_path: Path, assert_equal: Callable[[Any, Any], None]
) -> None:
    whole = finish(program, tmp_path / "whole", FIELDS)
    killer = program("kill", str(tmp_path / "parts"), json.dumps(FIELDS), "14", "0")
    out, err = killer.communicate(timeout=500)
    assert killer.returncode == 0, err
    killed_at = [json.loads(line)["killed_at"] for line in out.splitlines()]
    # The test is about something only if kills came at many places and the run was not through before.
    assert len(killed_at) == 14 and len(set(killed_at)) >= 5
    assert killed_at == sorted(killed_at) and killed_at[-1] < 150
    parts = finish(program, tmp_path / "parts", FIELDS)
    assert parts["loss"] == whole["loss"]
    assert_equal(state(tmp_path / "parts"), state(tmp_path / "whole"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert [int(row["step"]) for row in rows(tmp_path / "whole")] == list(range(5, 151, 5))
    assert not list((tmp_path / "parts").rglob("*.partial"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 128 + signal.SIGUSR1), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_stops(program: Program, tmp_path: Path, number: int, code: int) -> None:
    fields = FIELDS | {"max_steps": 100_000, "checkpoint_every_steps": None}
    process = program("train", str(tmp_path / "run"), json.dumps(fields))
    assert process.stderr is not None
    metrics = tmp_path / "run" / "metrics.csv"
    process.stderr.readline()  # progress: training has begun
    while not metrics.exists():
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    line = err.splitlines()[-1]
    assert line.startswith(f"stopped by {signal.Signals(number).name} after step ")
    assert line.endswith("run the same command again to go on")
    assert "Traceback" not in err
    step = state(tmp_path / "run")["global_step"]
    assert f"after step {step} of 100000" in line
    assert int(rows(tmp_path / "run")[-1]["step"]) == step - step % 5


def test_a_folder_in_use_by_another_process(program: Program, tmp_path: Path) -> None:
    fields = FIELDS | {"max_steps": 100_000}
    first = program("train", str(tmp_path / "run"), json.dumps(fields))
    assert first.stderr is not None
    first.stderr.readline()
    second = program("train", str(tmp_path / "run"), json.dumps(fields))
    _, err = second.communicate(timeout=120)
    assert second.returncode == 1 and f"is in use by pid {first.pid}" in err
    first.kill()
    first.communicate()
