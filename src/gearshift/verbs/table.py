"""`gearshift table`: a paper's tables, what is published beside what was measured here, and what the rest would take.

With run=missing it also trains and evaluates what is missing, each as a command of its own, which resumes what is half
done.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gearshift.evaluation.paper_text import as_json, as_latex, as_markdown
from gearshift.evaluation.papers import PaperTable, load_table
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.launch import world_size
from gearshift.runtime.output import emit_json
from gearshift.runtime.progress import note
from gearshift.verbs.paper_jobs import Job, Where, line
from gearshift.verbs.paper_rows import State, state_of

# How many jobs each launcher is given at once: a machine has room for one, a cluster finds room.
_TOGETHER = {None: 1, "local": 1, "slurm": 1000}


def run(cfg: DictConfig) -> dict[str, Any] | None:
    if not cfg.paths:
        raise UsageError("no table; name at least one, such as experiments/uvit/fid.yaml")
    if cfg.run not in (None, "missing"):
        raise UsageError(f"run={cfg.run} is neither missing nor left out")
    if world_size() > 1:
        raise UsageError(f"table works on one process and {world_size()} were started; devices belong to its commands")
    launcher = _launcher()
    if launcher not in _TOGETHER:
        raise UsageError(f"launcher={launcher} is not one of local, slurm")
    tables = {Path(path): load_table(path) for path in cfg.paths}
    where = Where(cfg.runs_dir, tuple(cfg.train), tuple(cfg.evaluate))
    out = _folders(tables, Path(cfg.out) if cfg.out is not None else Path(cfg.runs_dir) / "tables")
    states = _states(tables, where)
    failed: list[dict[str, Any]] = []
    if cfg.run == "missing":
        failed = _run_missing(states, launcher)
        states = _states(tables, where)
    answers = [_render(file, table, states[file], out[file]) for file, table in tables.items()]
    answer = {"tables": answers, "failed": failed}
    if not failed:
        return answer
    emit_json(answer)
    told = "; ".join(f"{failure['row']}: {failure['verb']} {failure['why']}" for failure in failed)
    raise RunError(f"{len(failed)} of the jobs failed ({told}); the same command goes on with what is missing")


def _launcher() -> str | None:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get().runtime.choices.get("launcher") if HydraConfig.initialized() else None


def _folders(tables: dict[Path, PaperTable], out: Path) -> dict[Path, Path]:
    """Where each table's files go, without their endings."""
    places = {file: out / file.resolve().parent.name / file.stem for file in tables}
    for place in places.values():
        same = [other for other in places if places[other] == place]
        if len(same) > 1:
            raise UsageError(f"{same[0]} and {same[1]} would both be written to {place}.md; render them with two out=")
    return places


def _states(tables: dict[Path, PaperTable], where: Where) -> dict[Path, list[State]]:
    found = {file: [state_of(file, table, row, where) for row in table.rows] for file, table in tables.items()}
    jobs: dict[Path, tuple[Job, str]] = {}
    for file, states in found.items():
        for state in states:
            if state.job is None:
                continue
            name = f"{file}: row {state.filled.row.name!r}"
            other, first = jobs.setdefault(state.job.results, (state.job, name))
            if other.asked != state.job.asked:
                raise UsageError(
                    f"{first} and {name} are evaluated with different settings into one folder, "
                    f"{state.job.results.parent}; give one of them another evaluation.name"
                )
    return found


def _render(file: Path, table: PaperTable, states: Sequence[State], place: Path) -> dict[str, Any]:
    rows = [state.filled for state in states]
    place.parent.mkdir(parents=True, exist_ok=True)
    written = {ending: place.with_name(f"{place.name}.{ending}") for ending in ("md", "tex", "json")}
    text = as_markdown(table, rows)
    atomic_write(written["md"], text)
    atomic_write(written["tex"], as_latex(table, rows))
    atomic_write(written["json"], json.dumps(as_json(table, rows), indent=1, allow_nan=False) + "\n")
    print(text, file=sys.stderr)
    return {
        "path": str(file),
        "rows": len(rows),
        "measured": sum(len(filled.measured) for filled in rows),
        "missing": sum(len(filled.missing) for filled in rows),
        **{ending: str(path) for ending, path in written.items()},
    }


# Running what is missing ---------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """One training and the evaluations that follow it, with the row each of them was first asked for by."""

    row: str
    job: Job
    evaluations: dict[Path, tuple[str, Job]] = field(default_factory=dict)


def _run_missing(states: dict[Path, list[State]], launcher: str | None) -> list[dict[str, Any]]:
    """Runs the jobs that fill something and returns those that failed. Rows of one run share its training."""
    works: dict[Path, _Work] = {}
    for state in (state for found in states.values() for state in found):
        if state.job is not None and state.helps:
            work = works.setdefault(state.job.run, _Work(state.filled.row.name, state.job))
            work.evaluations.setdefault(state.job.results, (state.filled.row.name, state.job))
    if not works:
        note("nothing is missing that a run would bring")
        return []
    failed: list[dict[str, Any]] = []
    with _stopping(), ThreadPoolExecutor(min(len(works), _TOGETHER[launcher])) as pool:
        try:
            for failures in list(pool.map(lambda work: _run_work(work, launcher), works.values())):
                failed += failures
        except BaseException:
            _children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _run_work(work: _Work, launcher: str | None) -> list[dict[str, Any]]:
    if not work.job.finished:
        why = _run_one(work.row, work.job.train, launcher, work.job.run / "done.json")
        if why is not None:
            return [_failure(work.row, work.job.train, why)]
    failed = []
    for row, job in work.evaluations.values():
        why = _run_one(row, job.evaluate, launcher, job.results)
        if why is not None:
            failed.append(_failure(row, job.evaluate, why))
    return failed


def _failure(row: str, arguments: Sequence[str], why: str) -> dict[str, Any]:
    return {"row": row, "verb": arguments[0], "why": why, "command": line(arguments)}


def _run_one(row: str, arguments: Sequence[str], launcher: str | None, result: Path) -> str | None:
    """Runs a command and says why it failed; None where it did not. A command that leaves no `result` failed."""
    verb, *rest = arguments
    if launcher is not None:
        rest = ["-m", f"launcher={launcher}", *rest]
    note(f"{row}: {line([verb, *rest])}")
    code = run_command([verb, *rest])
    if code != 0:
        return f"was killed by signal {-code}" if code < 0 else f"left with exit code {code}"
    return None if result.is_file() else f"left no {result}"


def run_command(arguments: Sequence[str]) -> int:
    """Runs `gearshift ARGUMENTS` as a process of its own and returns its exit code. What it says to people goes where
    this process says it; its answer goes nowhere, for the last line of standard output is the table's."""
    return _children.run([sys.executable, "-m", "gearshift.cli", *arguments])


class _Children:
    """Processes at work, so that they can be stopped with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def run(self, command: Sequence[str]) -> int:
        if self._stopped:  # what would have come next
            return -signal.SIGTERM
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            with self._lock:
                self._processes.append(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._processes.remove(process)

    def stop(self) -> None:
        """Asks all of them to stop; a training then saves what it has."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()


_children = _Children()


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM inside ends this process by an exception, so that its children are stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
