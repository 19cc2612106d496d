"""metrics.csv."""

from __future__ import annotations

from pathlib import Path

import pytest

from gearshift.runtime.errors import RunError
from gearshift.training.metrics import MetricsFile, read


def written(path: Path, *steps: int, step: int = 0) -> MetricsFile:
    file = MetricsFile(path, step)
    for number in steps:
        file.write({"step": number, "loss": number / 3})
    file.close()
    return file


def test_numbers_come_back_exactly_and_each_line_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    file.write({"step": 10, "loss": 1 / 3})
    columns, rows = read(path)  # before it is closed
    assert columns == ["step", "loss"] and rows == [{"step": "10", "loss": repr(1 / 3)}]
    assert float(file.last["loss"]) == 1 / 3
    file.sync()
    file.close()


def test_a_resumed_run_drops_what_comes_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    written(path, 10, 20, 30)
    file = written(path, 30, 40, step=25)
    assert [row["step"] for row in read(path)[1]] == ["10", "20", "30", "40"]
    assert file.last["step"] == "40"
    assert path.read_text().count("step") == 1


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    written(path, 10, 20)
    written(path, 10, step=0)
    assert [row["step"] for row in read(path)[1]] == ["10"]


@pytest.mark.parametrize("cut", range(1, 8))
def test_half_a_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.csv"
    written(path, 10, 20)
    path.write_text(path.read_text()[:-cut])
    written(path, 20, step=10)
    assert [row["step"] for row in read(path)[1]] == ["10", "20"]


def test_half_a_header_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,lo")
    written(path, 10)
    assert read(path)[0] == ["step", "loss"]


def test_a_new_column_keeps_the_old_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    written(path, 10)
    file = MetricsFile(path, 10)
    file.write({"step": 20, "loss": 0.5, "grad_norm": 2.0})
    file.write({"step": 30, "loss": 0.25})
    file.close()
    assert read(path) == (
        ["step", "loss", "grad_norm"],
        [
            {"step": "10", "loss": repr(10 / 3), "grad_norm": ""},
            {"step": "20", "loss": "0.5", "grad_norm": "2.0"},
            {"step": "30", "loss": "0.25", "grad_norm": ""},
        ],
    )


@pytest.mark.parametrize("text", ["epoch,loss\n1,2\n", "step,loss\nten,2\n", "step,loss\n1,2,3\n"])
def test_a_foreign_file_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(RunError, match="is not a metrics file of this program"):
        MetricsFile(path, 0)
    assert path.read_text() == text


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv", 0)
    file.write({"step": 1})
    file.close()
    file.path = Path("/dev/full")
    with pytest.raises(RunError, match=r"No space left on device.*last checkpoint is intact"):
        file.write({"step": 2})
    file.close()
