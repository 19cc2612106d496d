"""Rows of a paper's table against the run folders: what is measured, and what the rest would take."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gearshift.evaluation.paper_text import Filled, Missing
from gearshift.evaluation.papers import (
    COSTS,
    Measured,
    PaperRow,
    PaperTable,
    differences,
    gives,
    measured,
    read_results,
    row_of,
)
from gearshift.evaluation.table import format_count, format_number
from gearshift.evaluation.weights import ALEXNET, INCEPTION, VGG16, Unavailable, WeightFile, locate
from gearshift.runtime import config
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.paths import conf_dir
from gearshift.verbs.paper_jobs import Job, Where, compose, job_of, line


@dataclass(frozen=True)
class State:
    """A row as it stands. `job` is None where nothing can be run; `helps`: running it may fill a missing figure."""

    filled: Filled
    job: Job | None
    helps: bool


def state_of(file: Path, table: PaperTable, row: PaperRow, where: Where) -> State:
    """What is measured of a row of the table in `file`, and what the rest would take.

    Raises UsageError, naming file and row, where an override or the name of a row is wrong.
    """
    try:
        return _state(file, table, row, where)
    except UsageError as error:
        raise UsageError(f"{file}: row {row.name!r}: {error}") from error


def _state(file: Path, table: PaperTable, row: PaperRow, where: Where) -> State:
    job = job_of(table, row, where) if row.overrides else None
    results, numbers, why = _numbers(file, row, job)
    found: dict[str, Measured] = {}
    if results is not None and numbers is not None:
        place = str(job.results if job is not None and not row.measured else row.measured)
        values = {figure: measured(figure, results, numbers, place) for figure in table.figures}
        found = {figure: value for figure, value in values.items() if value is not None}
    if job is not None and "params_m" in table.figures:
        counted = job.size().params / 1e6
        found["params_m"] = Measured(counted, None, None, 1, COSTS["params_m"].what, shlex.join(row.overrides))
    missing: dict[str, Missing] = {}
    helps = False
    for figure in row.published:
        cost = COSTS.get(figure)
        if figure in found:
            continue
        if cost is not None and cost.of is None:
            missing[figure] = Missing(cost.what)
        elif job is None or row.measured or (results is not None and numbers is None):
            missing[figure] = Missing(why)
        elif (never := _never(job, figure)) is not None:
            missing[figure] = never
        elif results is None:
            missing[figure], helps = _to_run(job, row, figure, why), True
        else:
            missing[figure], again = _to_evaluate(job, figure, results)
            helps = helps or again
    return State(Filled(row, found, missing), job, helps)


def _numbers(file: Path, row: PaperRow, job: Job | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """The evaluation of a row, its line there, and, where either is None or says nothing, why."""
    if row.measured:
        place = _place(row.measured, file)
        results = read_results(place)
        return results, row_of(results, row.row, place), f"{row.measured} does not have it"
    if job is None:
        return None, None, "there is no configuration for this row yet"
    found, why = _results(job, row.row)
    if found is None:
        return None, None, why
    try:
        return found, row_of(found, row.row, job.results), ""
    except UsageError as error:  # and evaluating again would not bring it
        return found, None, str(error)


def _place(name: str, file: Path) -> Path:
    for folder in (file.parent, Path(), conf_dir().parent):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(
        f"measured={name} is neither beside the table nor below the repository; take it out, or bring it back"
    )


# Has it been measured? -----------------------------------------------------------------------------------------------


def _results(job: Job, row: str) -> tuple[dict[str, Any] | None, str]:
    """The evaluation of a finished run where it is the one that is asked for; else None and what is there instead."""
    step, total = job.steps, job.trained.trainer.max_steps
    if not job.finished:
        if step is not None:
            return None, f"training is at step {step} of {total}"
        return None, "training was begun, with no checkpoint yet" if job.run.exists() else "not trained"
    trained = f"trained ({total} steps, {job.run})"
    if not job.results.is_file():
        return None, f"{trained}, not evaluated"
    if job.results.stat().st_mtime_ns < (job.run / "done.json").stat().st_mtime_ns:
        return None, f"{trained}, evaluated before the training was done"
    try:
        results = read_results(job.results)
    except RunError as error:
        return None, str(error)
    command = _evaluated(results)
    if command is None:
        counts = {line.get("num_images") for line in results["rows"]}
        asked = job.asked["evaluation"]["num_images"]
        found = [] if counts <= {None, asked} else [f"evaluation.num_images: {asked} asked, {counts} found"]
    else:
        found = differences(job.asked, command, row)
    return (results, "") if not found else (None, f"{trained}, evaluated otherwise ({'; '.join(found)})")


def _evaluated(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration an evaluation was made with, from its own command; None where that cannot be told."""
    try:
        parts = [part for part in shlex.split(str(results.get("command", ""))) if not part.startswith("-")]
        overrides = [part for part in parts if "=" in part or part.startswith("~")]
        return config.plain(compose("evaluate", overrides)) if any(o.startswith("run=") for o in overrides) else None
    except (UsageError, ValueError):
        return None


# What would it take? -------------------------------------------------------------------------------------------------


def _to_run(job: Job, row: PaperRow, figure: str, why: str) -> Missing:
    size, trainer = job.size(row.row), job.trained.trainer
    per_image = size.macs * size.calls * size.branches
    needs = [
        f"{format_count(size.params)} parameters",
        f"{format_number(size.macs / 1e9)} GMACs per call and {format_number(per_image / 1e9)} per image "
        f"at full compute ({size.calls} steps{', 2 branches' if size.branches == 2 else ''})",
        f"{format_count(job.asked['evaluation']['num_images'])} images to sample",
    ]
    commands = []
    weights = _absent_weights(figure, job)
    if weights is not None:
        needs.append(weights.reason)
        commands.append(weights.fetch_line)
    if not job.finished:
        images = format_count(trainer.max_steps * trainer.batch_size)
        needs.append(f"{trainer.max_steps} training steps of {trainer.batch_size} images ({images})")
        needs += [f"{key}={value} is not here" for key, value in _files(job.trained) if not _exists(value)]
        commands.append(line(job.train))
    return Missing(why, tuple(needs), (*commands, line(job.evaluate)))


def _never(job: Job, figure: str) -> Missing | None:
    """For a figure on a pretrained network that the evaluation is not asked for: neither weights nor a run bring it."""
    metrics = job.asked["evaluation"].get("metrics") or ()
    if weights_of(figure) is None or any(gives(metric, figure) for metric in metrics):
        return None
    return _not_asked(metrics)


def _not_asked(metrics: Sequence[str]) -> Missing:
    return Missing(
        f"the evaluation of this table does not give it; its metrics are {', '.join(metrics) or 'none'}: add it there"
    )


def _to_evaluate(job: Job, figure: str, results: Mapping[str, Any]) -> tuple[Missing, bool]:
    """What a figure takes that an evaluation as asked for did not give, and whether evaluating again may give it."""
    metrics = job.asked["evaluation"].get("metrics")
    weights = _absent_weights(figure, job)
    if weights is not None:
        return Missing("evaluated without it", (weights.reason,), (weights.fetch_line, line(job.evaluate))), False
    had = _evaluated(results)
    left_out = bool(results.get("unavailable")) and weights_of(figure) is not None
    if left_out or had is None or had["evaluation"].get("metrics") != metrics:
        return Missing("evaluated without it", (), (line(job.evaluate),)), True
    return _not_asked(metrics or ()), False


def weights_of(figure: str) -> tuple[str, WeightFile] | None:
    """The pretrained network a figure needs, by its name in `evaluation.weights`; None where it needs none."""
    if figure.startswith("lpips_vgg"):
        return "vgg16", VGG16
    if figure.startswith("lpips"):
        return "alexnet", ALEXNET
    if figure in ("fid", "kid", "sfid", "inception_score") or "_inception" in figure:
        return "inception", INCEPTION
    return ("vgg16", VGG16) if figure.endswith("_vgg16") else None


def _absent_weights(figure: str, job: Job) -> Unavailable | None:
    needed = weights_of(figure)
    if needed is None:
        return None
    name, weights = needed
    found = locate(weights, figure, (job.asked["evaluation"].get("weights") or {}).get(name))
    return found if isinstance(found, Unavailable) else None


def _files(cfg: DictConfig) -> list[tuple[str, str]]:
    """Settings of a training that name something on the disk."""
    named = [("init", cfg.get("init")), ("data.path", cfg.data.get("path") if cfg.get("data") else None)]
    return [(key, str(value)) for key, value in named if value is not None]


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists()
