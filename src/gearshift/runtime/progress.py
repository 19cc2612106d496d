"""How far a long piece of work is, for people, on standard error: a live bar on a terminal, plain lines elsewhere.

Standard output is left alone: its last line belongs to programs (see `output`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from gearshift.runtime.launch import is_main

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

# Nested pieces of work (images within an evaluation) share one live display, which a terminal can only have once.
_bars: Bars | None = None
_depth = 0


class Progress:
    """Progress of `total` units of work, as a context manager.

        with Progress(steps, "train", unit="steps") as progress:
            for step in range(steps):
                ...
                progress.update(1, loss=value)

    Only the main process shows anything. Off a terminal a line is written at the start, at the end and at most every
    `interval` seconds between. `start` is how much was done before (a resumed run); it does not count towards the rate.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        unit: str = "steps",
        start: int = 0,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label, self.unit, self.done = total, label, unit, start
        self._start, self._interval, self._clock = start, interval, clock
        self._values: dict[str, float | str] = {}
        self._task: int | None = None
        self._shown = is_main()
        self._began = self._spoke = 0.0

    def __enter__(self) -> Progress:
        self._began = self._spoke = self._clock()
        if self._shown and sys.stderr.isatty():
            self._open_bar()
        elif self._shown:
            self._say()
        return self

    def update(self, count: int = 1, **values: float | str) -> None:
        """Counts `count` more units as done and shows `values` (a loss, the name of what is at work) beside them."""
        self.done += count
        self._values.update(values)
        if self._task is not None and _bars is not None:
            from rich.progress import TaskID

            _bars.update(TaskID(self._task), completed=self.done, values=self._described())
        elif self._shown and self._clock() - self._spoke >= self._interval:
            self._say()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._close_bar()
        elif self._shown:
            self._say()

    def line(self) -> str:
        """What a plain line says: counts, share, rate, time left, values."""
        elapsed = self._clock() - self._began
        fresh = self.done - self._start
        parts = [f"{self.label}: {self.done}/{self.total} {self.unit}"]
        if self.total:
            parts.append(f"({100 * self.done // self.total}%)")
        if fresh and elapsed > 0:
            rate = fresh / elapsed
            parts.append(f"{rate:.3g} {self.unit}/s")
            parts.append(f"eta {_clock_face((self.total - self.done) / rate)}")
        return "  ".join([" ".join(parts), self._described()]).strip()

    def _described(self) -> str:
        return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self._values.items())

    def _say(self) -> None:
        self._spoke = self._clock()
        print(self.line(), file=sys.stderr, flush=True)

    def _open_bar(self) -> None:
        global _bars, _depth
        if _bars is None:
            _bars = _make_bars()
            _bars.start()
        _depth += 1
        self._task = _bars.add_task(
            self.label, total=self.total, completed=self.done, unit=self.unit, values=self._described()
        )

    def _close_bar(self) -> None:
        global _bars, _depth
        from rich.progress import TaskID

        assert _bars is not None and self._task is not None
        _depth -= 1
        if _depth:
            _bars.remove_task(TaskID(self._task))  # only the outermost bar stays on the screen
        else:
            _bars.stop()
            _bars = None
        self._task = None


def note(text: str) -> None:
    """One line for people on standard error, above a live bar where there is one. Main process only."""
    if not is_main():
        return
    if _bars is not None:
        _bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


def _make_bars() -> Bars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}", markup=False),
        console=Console(stderr=True),
        # Tests and libraries look at what goes to standard output; the display must not stand in between.
        redirect_stdout=False,
    )


def _clock_face(seconds: float) -> str:
    whole = round(max(seconds, 0.0))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
