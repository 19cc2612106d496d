"""Where figures go besides the run folder, whose files are always written and are the truth.

A training tells its logger lines of metrics.csv; an evaluation hands it everything at once (`report`).
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.progress import note
from gearshift.runtime.run import RunFolder

_ID_FILE = "wandb.json"


class MetricLogger(Protocol):
    """Used by the main process only; `finish` is called however the training ends. `report` stands alone."""

    def start(self, run: RunFolder, config: Mapping[str, Any], step: int) -> None: ...

    def log(self, step: int, row: Mapping[str, float]) -> None: ...

    def finish(self, exit_code: int) -> None: ...

    def report(
        self,
        run: RunFolder,
        config: Mapping[str, Any],
        name: str,
        results: Mapping[str, Any],
        figures: Mapping[str, Path],
    ) -> None: ...


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

    def report(
        self,
        run: RunFolder,
        config: Mapping[str, Any],
        name: str,
        results: Mapping[str, Any],
        figures: Mapping[str, Path],
    ) -> None:
        """Does nothing: metrics.json in the run folder is all there is."""


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
    """Weights & Biases. The id of its run is kept in the run folder, so everything that is done in the folder, resumed
    trainings and evaluations, is one run there."""

    Config: ClassVar[type[WandbConfig]] = WandbConfig

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self._run: Any = None

    def start(self, run: RunFolder, config: Mapping[str, Any], step: int) -> None:
        """Begins or goes on. Raises UsageError where the package is absent, RunError where it cannot start."""
        self._open(run, config)

    def _open(self, run: RunFolder, config: Mapping[str, Any], **settings: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError("logger=wandb needs the package wandb; `pip install wandb` or set logger=csv") from error
        identity, project = self._identity(run)
        try:
            self._run = wandb.init(
                project=project,
                entity=self.config.entity,
                name=self.config.name or "/".join(run.path.parts[-2:]),
                mode=cast(Any, self.config.mode),
                tags=list(self.config.tags),
                id=identity,
                resume="allow",
                dir=str(run.path),
                config=dict(config),
                reinit="finish_previous",  # jobs of a sweep share one process
                settings=wandb.Settings(silent=True, console="off", **settings),
            )
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"Weights & Biases could not start ({reason}); set logger.mode=offline or logger=csv"
            ) from error

    def _identity(self, run: RunFolder) -> tuple[str, str]:
        """Id and project of the folder's run, written down by the first that logs."""
        file = run.path / _ID_FILE
        if not file.exists():
            identity, project = uuid.uuid4().hex[:8], self.config.project
            atomic_write(file, json.dumps({"id": identity, "project": project}) + "\n")
            return identity, project
        try:
            kept = json.loads(file.read_text())
            identity, project = str(kept["id"]), str(kept["project"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} holds no id of a Weights & Biases run; remove it to begin a new one") from error
        if project != self.config.project:
            note(
                f"{run.path} is logged in project {project}, which is kept; logger.project={self.config.project} is not"
            )
        return identity, project

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """One line. Steps that a resumed training repeats are there already, with the same values, and are ignored."""
        self._run.log(dict(row), step=step)

    def finish(self, exit_code: int) -> None:
        """Closes the run, or the next job of a sweep would log into it."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None

    def report(
        self,
        run: RunFolder,
        config: Mapping[str, Any],
        name: str,
        results: Mapping[str, Any],
        figures: Mapping[str, Path],
    ) -> None:
        """An evaluation, into the run of the training: opens it, logs, closes it.

        `evaluation/<name>/<row>/<key>` is every number of `results["rows"]` (those of inner tables with a further
        slash), `evaluation/<name>/rows` the rows as a table, `evaluation/<name>/<figure>` every picture in `figures`.

        All of it is summary, not history. History has one counter of steps for everything: a line of an evaluation
        takes the step after the last one, and the line that a resumed training logs there is dropped; offline the
        counter does not even know the last step and starts at 0 again. The summary has no steps. A later report of the
        same name replaces the earlier one.

        Raises as `start` does.
        """
        # Load and memory of an evaluation are nothing to draw beside the training's.
        self._open(run, config, x_disable_stats=True)
        exit_code = 1
        try:
            import wandb

            summary: dict[str, Any] = {}
            rows = results["rows"]
            for row in rows:
                place = f"evaluation/{name}/{str(row['name']).replace('/', '-')}"
                summary.update({f"{place}/{key}": value for key, value in _numbers(row)})
            # Inner tables (deviations, percentiles) would not fit into a cell.
            columns = [k for k in dict.fromkeys(k for row in rows for k in row) if _flat(row.get(k) for row in rows)]
            table = wandb.Table(columns=columns, allow_mixed_types=True)
            for row in rows:
                table.add_data(*(_cell(row.get(key)) for key in columns))
            summary[f"evaluation/{name}/rows"] = table
            for title, file in figures.items():
                summary[f"evaluation/{name}/{title}"] = wandb.Image(str(file))
            self._run.summary.update(summary)
            exit_code = 0
        finally:
            self.finish(exit_code)


def _numbers(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) of every finite number in a tree of mappings and lists."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(position), value) for position, value in enumerate(tree)]
    else:
        if isinstance(tree, int | float) and not isinstance(tree, bool) and math.isfinite(tree):
            yield path, tree
        return
    for key, value in items:
        yield from _numbers(value, f"{path}/{key}" if path else key)


def _flat(values: Iterator[Any]) -> bool:
    return not any(isinstance(value, Mapping | list | tuple) for value in values)


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
