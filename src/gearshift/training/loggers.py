"""Where metrics go besides metrics.csv, which is always written and is the truth."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.run import RunFolder

_ID_FILE = "wandb.json"


class MetricLogger(Protocol):
    """Used by the main process only; `finish` is called however the training ends."""

    def start(self, run: RunFolder, config: Mapping[str, Any], step: int) -> None: ...

    def log(self, step: int, row: Mapping[str, float]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


@dataclass(frozen=True)
class CsvOnlyConfig:
    """Nothing to set."""


class CsvOnly:
    """No logger besides metrics.csv."""

    Config: ClassVar[type[CsvOnlyConfig]] = CsvOnlyConfig

    def __init__(self, config: CsvOnlyConfig) -> None:
        self.config = config

    def start(self, run: RunFolder, config: Mapping[str, Any], step: int) -> None:
        """Does nothing."""

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Does nothing."""

    def finish(self, exit_code: int) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class WandbConfig:
    """Schema of `Wandb`. mode: online, offline, disabled, or null for WANDB_MODE's; name: null for the run folder's."""

    project: str = "gearshift"
    entity: str | None = None
    name: str | None = None
    mode: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in (None, "online", "offline", "disabled"):
            raise UsageError(f"logger.mode={self.mode!r} is not one of ['online', 'offline', 'disabled', null]")


class Wandb:
    """Weights & Biases. The id of its run is kept in the run folder, so a resumed training continues the same curve."""

    Config: ClassVar[type[WandbConfig]] = WandbConfig

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self._run: Any = None

    def start(self, run: RunFolder, config: Mapping[str, Any], step: int) -> None:
        """Begins or goes on. Raises UsageError where the package is absent, RunError where it cannot start."""
        try:
            import wandb
        except ImportError as error:
            raise UsageError("logger=wandb needs the package wandb; `pip install wandb` or set logger=csv") from error
        file = run.path / _ID_FILE
        try:
            identity = json.loads(file.read_text())["id"] if file.exists() else uuid.uuid4().hex[:8]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} holds no id of a Weights & Biases run; remove it to begin a new one") from error
        atomic_write(file, json.dumps({"id": identity, "project": self.config.project}) + "\n")
        try:
            self._run = wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                name=self.config.name or "/".join(run.path.parts[-2:]),
                mode=cast(Any, self.config.mode),
                tags=list(self.config.tags),
                id=identity,
                resume="allow",
                dir=str(run.path),
                config=dict(config),
                reinit="finish_previous",  # jobs of a sweep share one process
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"Weights & Biases could not start ({reason}); set logger.mode=offline or logger=csv"
            ) from error

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """One line. Steps that a resumed training repeats are there already, with the same values, and are ignored."""
        self._run.log(dict(row), step=step)

    def finish(self, exit_code: int) -> None:
        """Closes the run, or the next job of a sweep would log into it."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None
