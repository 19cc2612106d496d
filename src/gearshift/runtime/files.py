"""Files that are either the old one or the new one, never half of either."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from gearshift.runtime.errors import RunError

_SUFFIX = ".partial"


def atomic_write(path: str | os.PathLike[str], content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Writes `content` (bytes, text as UTF-8, or a function that writes to an open binary file) to `path`, atomically.

    The bytes go to a hidden file beside `path`, reach the disk, and take the name in one step; a process killed at any
    moment leaves the previous file. Raises RunError when the system refuses (a full disk, a missing permission); the
    hidden file is then removed. Whatever else the function raises passes through, with the same cleaning up.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}{_SUFFIX}")
    handle: _Handle | None = None
    try:
        handle = _Handle(partial, "w")
        if callable(content):
            content(handle)
        else:
            handle.write(content.encode() if isinstance(content, str) else content)
        os.fsync(handle.fileno())
        handle.close()
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if handle is not None:
            handle.abandon()
        partial.unlink(missing_ok=True)
        # Writers such as torch.save turn the system's error into one of their own, so the handle remembers it.
        cause = error if isinstance(error, OSError) else handle.failure if handle is not None else None
        if cause is None or not isinstance(error, Exception):
            raise
        left = "the previous file is intact" if path.exists() else "nothing was left behind"
        reason = cause.strerror or str(cause)
        raise RunError(f"could not write {path} ({reason}): make room or choose another place; {left}") from error


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Removes what killed writers left in `folder` and below. Only for the one process that owns the folder."""
    for partial in Path(folder).rglob(f".*{_SUFFIX}"):
        partial.unlink(missing_ok=True)


def slug(name: str) -> str:
    """A name as part of a file name: lower-case letters, digits and hyphens."""
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return "-".join(part for part in kept.split("-") if part)


class _Handle(io.FileIO):
    """A file that writes everything it is given and remembers why it could not."""

    failure: OSError | None = None

    def write(self, data, /) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.failure = self.failure or error
            raise
        return done

    def abandon(self) -> None:
        try:
            self.close()
        except OSError as error:
            # Some file systems report a full disk only here.
            self.failure = self.failure or error


def _sync_folder(folder: Path) -> None:
    # Without this the new name itself may be lost when the machine (not the process) dies.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
