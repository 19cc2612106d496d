"""The JSON line, the progress shown to people, and where the configuration groups are."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gearshift.runtime import output, paths, progress
from gearshift.runtime.errors import RunError
from gearshift.runtime.progress import Progress, note


def test_the_last_line_of_standard_output_is_strict_json(capsys):
    print("before")
    output.emit_json(
        {
            "run": Path("runs/a"),
            "psnr": float("inf"),
            "rows": [{"macs": np.float32(0.5), "n": np.int64(3), "t": torch.tensor([1.0, float("nan")])}, None, True],
        }
    )
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("\n")
    assert json.loads(out.splitlines()[-1], parse_constant=pytest.fail) == {
        "run": "runs/a",
        "psnr": None,
        "rows": [{"macs": 0.5, "n": 3, "t": [1.0, None]}, None, True],
    }
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        output.emit_json({"a": object()})


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_plain_lines_come_now_and_then_and_on_standard_error_only(capsys):
    clock = Clock()
    with Progress(200, "train", start=100, interval=5, clock=clock) as bar:
        for _ in range(20):
            clock.now += 1
            bar.update(5, loss=0.123456)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train: 100/200 steps (50%)",
        "train: 125/200 steps (62%) 5 steps/s eta 0:00:15  loss=0.1235",
        "train: 150/200 steps (75%) 5 steps/s eta 0:00:10  loss=0.1235",
        "train: 175/200 steps (87%) 5 steps/s eta 0:00:05  loss=0.1235",
        "train: 200/200 steps (100%) 5 steps/s eta 0:00:00  loss=0.1235",
        "train: 200/200 steps (100%) 5 steps/s eta 0:00:00  loss=0.1235",
    ]


def test_only_the_main_process_speaks(capsys, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with Progress(2, "train", interval=0) as bar:
        bar.update()
        note("hello")
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_live_display_for_nested_work(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with Progress(2, "evaluate", unit="policies") as outer:
        for name in ("full", "exit [0.5]"):
            with Progress(10, "sample", unit="images") as inner:
                inner.update(10)
                note(f"did {name}")
            outer.update(1, policy=name)
    assert progress._bars is None
    text = terminal.getvalue()
    assert "did exit [0.5]" in text
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", [line for line in text.splitlines() if "evaluate" in line][-1])
    assert "2/2 policies" in last
    assert "policy=exit [0.5]" in last
    assert "sample" in text
    assert capsys.readouterr().out == ""


def test_a_failure_inside_closes_the_display(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyError), Progress(2, "evaluate"), Progress(2, "sample"):
        raise KeyError
    assert progress._bars is None


def test_the_configuration_groups_are_found_packaged_first(tmp_path, monkeypatch):
    package = tmp_path / "src" / "gearshift"
    monkeypatch.setattr(paths, "_PACKAGE", package)
    with pytest.raises(RunError, match="install gearshift again"):
        paths.conf_dir()
    (tmp_path / "conf").mkdir()
    assert paths.conf_dir() == tmp_path / "conf"
    (package / "conf").mkdir(parents=True)
    assert paths.conf_dir() == package / "conf"


def test_the_configuration_groups_of_this_checkout_are_found():
    assert paths.conf_dir() == Path(__file__).resolve().parents[2] / "conf"
