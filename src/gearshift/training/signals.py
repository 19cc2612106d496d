"""Stopping between two steps when asked to, so that nothing is lost.

SIGTERM and SIGUSR1 (what schedulers send before they end a job) and Ctrl-C let the step in progress finish, save a
checkpoint and leave with exit code 128 + signal. A second Ctrl-C stops at once. A handler that something else put in
place (submitit, which requeues by itself) is left alone, and so is a signal that is ignored.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from gearshift.runtime.errors import RunError
from gearshift.runtime.progress import note

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_OWN = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(RunError):
    """Training was asked to stop and has saved what it did. Exit code 128 + signal, by convention."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Remembers which signal asked to stop. A context manager; outside it the handlers are what they were.

    Attributes:
        number: the signal, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for each in _SIGNALS:
                if (handler := signal.getsignal(each)) in _OWN:
                    self._before[each] = handler
                    signal.signal(each, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.number == signal.SIGINT:
                raise KeyboardInterrupt
            note("stopping after this step; Ctrl-C again stops at once")
        self.number = number
