"""What tests of the command line share: a folder of their own, an answer, a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gearshift import cli


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder per test, one cache for all, one thread. Acts in every module that imports it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    """Run a command that succeeds: the JSON on the last line of standard output."""
    code = cli.run(list(command))
    said = capsys.readouterr()
    assert code == 0, said.err
    found: dict[str, Any] = json.loads(said.out.splitlines()[-1])
    return found


def refusal(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Run a command that fails: the last line of standard error."""
    assert cli.run(list(command)) in (1, 2)
    return capsys.readouterr().err.strip().splitlines()[-1]
