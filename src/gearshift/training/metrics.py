"""metrics.csv: one line per logged step, without gaps or doubles whatever happened in between.

Every line reaches the system when it is written, and the disk before a checkpoint of its step does. A resumed run drops
the lines after its checkpoint (and half of a line, where the process was killed while writing) and goes on from there.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path

from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write


class MetricsFile:
    """Appends lines to a CSV file whose first column is `step`. Not for more than one process at a time.

    Args:
        path: of the file.
        step: lines up to this step are kept, the later ones dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._columns, kept = read(path)
        kept = [row for row in kept if int(row["step"]) <= step]
        self.last: dict[str, str] = kept[-1] if kept else {}
        if path.exists():
            self._rewrite(kept)

    def write(self, row: Mapping[str, float | int]) -> None:
        """One line. Raises RunError when the system refuses."""
        if not set(row) <= set(self._columns):
            _, kept = read(self.path)
            self._columns = [*self._columns, *(name for name in row if name not in self._columns)]
            self._rewrite(kept)
        self.last = {name: _text(row.get(name)) for name in self._columns}
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            self._file.write(_line(self.last.values()))
        except OSError as error:
            raise self._refused(error) from error

    def sync(self) -> None:
        """Makes sure that what was written is on the disk."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.close()
        lines = [self._columns] if self._columns else []
        lines += [[row.get(name, "") for name in self._columns] for row in rows]
        atomic_write(self.path, b"".join(map(_line, lines)))

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"could not write {self.path} ({error.strerror or error}): make room and run the same command again; "
            "the last checkpoint is intact"
        )


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole lines of a metrics file; nothing where there is none.

    Raises RunError when the file is not one of this program's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return [], []
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"could not read {path} ({error}); move it away and run the same command again") from error
    text = text[: text.rfind("\n") + 1]  # a line without an end was being written when the process was killed
    lines = list(csv.reader(io.StringIO(text)))
    if not lines:
        return [], []
    columns = lines[0]
    whole = all(len(line) == len(columns) and line[0].isdigit() for line in lines[1:])
    if columns[:1] != ["step"] or not whole:
        raise RunError(
            f"{path} begins with {text[:40].splitlines()[0]!r} and is not a metrics file of this program "
            "(first column step, a number in each line); move it away and run the same command again"
        )
    return columns, [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def _line(values: Iterable[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def _text(value: float | int | None) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
