"""A run folder: what a run is, what it has, and who is using it.

    runs/<experiment>/<hash>/
        config.yaml     the composed configuration, as text
        checkpoints/    what training writes
        metrics.csv     one line per logged step
        done.json       the answer of a finished run
        lock            held by the process that works in the folder

The hash covers what changes the weights and nothing else, so the same command finds the same folder: run again means
resume, and a finished run answers with its JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gearshift.runtime import config
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write, remove_partial
from gearshift.runtime.output import jsonable

_HEADER = "# gearshift run, format 1\n"
_CONFIG, _CHECKPOINTS, _METRICS, _DONE, _LOCK = "config.yaml", "checkpoints", "metrics.csv", "done.json", "lock"
_held: set[int] = set()


class FolderInUse(RunError):
    """Another process works in the run folder."""


def _forget_locks() -> None:
    # A forked child would keep the folder locked after its parent was killed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _take(descriptor: int, patience: float = 1.0) -> None:
    """Locks the file. Raises BlockingIOError when somebody still holds it after `patience` seconds: a child that was
    forked just before its parent was killed needs a moment to let go."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def weights_hash(cfg: config.Node, irrelevant: Collection[str]) -> str:
    """Ten hexadecimal digits over what changes the weights of a run.

    Left out: the dotted paths in `irrelevant` with all below them, fields of a node with a `_target_` that equal the
    default of its schema, and keys without a value (null) elsewhere. So a new option orphans no old run as long as its
    default means what was done before. Values are compared as the schema reads them: 1, 1.0 and "1" are one float.
    """
    text = json.dumps(weights_settings(cfg, irrelevant), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def weights_settings(cfg: config.Node, irrelevant: Collection[str]) -> Any:
    """What `weights_hash` hashes, as plain values."""
    return _essential(config.plain(cfg), "", frozenset(irrelevant))


def _essential(tree: Any, path: str, irrelevant: frozenset[str]) -> Any:
    if isinstance(tree, dict) and config.TARGET in tree:
        target = config.locate(tree[config.TARGET], path)
        fields = {key: value for key, value in tree.items() if key != config.TARGET}
        settings: Any = config.parse(fields, config.schema_of(target), path=path, owner=target)
        # Dropped after parsing: a field may be needed to be valid and still not matter.
        kept = {name: value for name, value in _set(settings).items() if f"{path}.{name}" not in irrelevant}
        return {config.TARGET: tree[config.TARGET], **kept}
    if isinstance(tree, dict):
        places = {str(key): (f"{path}.{key}".strip("."), value) for key, value in tree.items()}
        inner = {
            k: _essential(value, place, irrelevant) for k, (place, value) in places.items() if place not in irrelevant
        }
        return {key: value for key, value in inner.items() if value is not None}
    if isinstance(tree, list):
        return [_essential(value, f"{path}.{position}", irrelevant) for position, value in enumerate(tree)]
    return tree


def _set(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass instance that are not at their default, as plain values."""
    out = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if not field.init or value == default:
            continue
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        out[field.name] = _set(value) if nested else _values(value)
    return out


def _values(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_values(item) for item in value]
    return value


class RunFolder:
    """One run on disk. `RunFolder.create` makes or finds it, `RunFolder.open` only finds it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | os.PathLike[str], cfg: config.Node) -> RunFolder:
        """The folder at `path`, made where it is absent. A folder that already is a run keeps its own configuration.

        Raises RunError when something else is there.
        """
        folder = cls(path)
        if folder.path.exists() and not folder.path.is_dir():
            raise RunError(f"{folder.path} is a file, not a run folder; move it away or choose another folder")
        # The configuration comes first: whatever else is found without one was put there by somebody else. Several
        # processes of one run may be here at the same time, so its absence is only believed after the listing.
        foreign = folder._foreign()
        if (folder.path / _CONFIG).exists():
            found = cls.open(path)
            folder._make(folder.checkpoints)
            return found
        if foreign:
            raise RunError(
                f"{folder.path} holds {foreign[0]} but no {_CONFIG}, so it is not a run folder; "
                "move it away or choose another folder"
            )
        folder._make(folder.path)
        text = OmegaConf.to_yaml(OmegaConf.create(config.plain(cfg)))
        atomic_write(folder.path / _CONFIG, _HEADER + text)
        folder._make(folder.checkpoints)
        return folder

    def _make(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"could not make the run folder {self.path} ({error.strerror}); choose another") from error

    def _foreign(self) -> list[str]:
        """What lies in the folder besides the lock and what a writer that was killed may have left."""
        try:
            return sorted(p.name for p in self.path.iterdir() if p.name != _LOCK and not p.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The run at `path`. Raises UsageError when nothing is there and RunError when it is not a sound run folder."""
        folder = cls(path)
        if not folder.path.exists():
            raise UsageError(f"run={path}: there is no such folder; give the path that `gearshift train` printed")
        if not (folder.path / _CONFIG).is_file():
            raise RunError(
                f"{path} is not a run folder: it has no {_CONFIG}; give the path that `gearshift train` printed"
            )
        _ = folder.config
        return folder

    @property
    def config(self) -> DictConfig:
        """The configuration the run was started with. Raises RunError when the file is foreign or damaged."""
        file = self.path / _CONFIG
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"could not read {file} ({error}); the run folder is damaged") from error
        if not text.startswith(_HEADER):
            first = text.splitlines()[0][:60] if text.strip() else ""
            raise RunError(f"{file} begins with {first!r} instead of {_HEADER.strip()!r}: not a run of this program")
        try:
            cfg = OmegaConf.create(text)
        except (YAMLError, OmegaConfBaseException, ValueError) as error:
            line = str(error).splitlines()[0]
            raise RunError(f"{file} is not readable as YAML ({line}); the run folder is damaged") from error
        if not isinstance(cfg, DictConfig) or not cfg:
            raise RunError(f"{file} holds no configuration; the run folder is damaged")
        return cfg

    @property
    def checkpoints(self) -> Path:
        return self.path / _CHECKPOINTS

    @property
    def metrics_path(self) -> Path:
        return self.path / _METRICS

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; the system lets go of it however the process ends.

        Raises FolderInUse when another process holds it. Leftovers of killed writers are removed on the way in.
        """
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        locked = False
        try:
            try:
                _take(descriptor)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").split()
                pid, host = holder if len(holder) == 2 else ("?", "?")
                raise FolderInUse(
                    f"run folder {self.path} is in use by pid {pid} on {host}; "
                    "wait for it or choose another seed or run"
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            locked = True
            _held.add(descriptor)
            remove_partial(self.path)
            # The file stays when the lock is let go: removing it would let two processes lock two files of one name.
            yield
        finally:
            # A forked child closed it at the fork, and its number may mean another file there by now.
            if descriptor in _held or not locked:
                _held.discard(descriptor)
                os.close(descriptor)

    @property
    def result(self) -> dict[str, Any] | None:
        """The answer of a finished run, or None. Raises RunError when the file is damaged."""
        file = self.path / _DONE
        try:
            answer = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{file} is not readable ({error}); remove it and run the same command again") from error
        if not isinstance(answer, dict):
            raise RunError(f"{file} holds no JSON object; remove it and run the same command again")
        return cast(dict[str, Any], answer)

    def finish(self, answer: Mapping[str, Any]) -> None:
        """Marks the run as finished: from now on it answers with `answer`."""
        atomic_write(self.path / _DONE, json.dumps(jsonable(answer), allow_nan=False, indent=1) + "\n")


def refuse_pipeline(cfg: DictConfig) -> None:
    """Raises UsageError where a run is an imported pipeline, whose networks are not made of our blocks."""
    if cfg.get("pipeline"):
        raise UsageError(
            f"the run is the pipeline {cfg.pipeline} of diffusers, and this is for networks of ours; a pipeline can be "
            "given to sample, evaluate and plan"
        )
