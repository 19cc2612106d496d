"""Evaluations on disk: finding their files, reading them, and labels that tell them apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.runtime.errors import RunError, UsageError

FORMATS = (None, 2)
"""Values of `format` in metrics.json that can be read; the first files had none."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: its file, the label of its rows, and its content."""

    path: Path
    label: str
    results: dict[str, Any]


def find(path: str | Path) -> list[Path]:
    """The metrics.json files a path stands for: such a file, the folder of an evaluation, or a run folder with all its
    evaluations, by name. Raises UsageError where there is none."""
    place = Path(path)
    if place.is_file():
        return [place]
    if (place / "metrics.json").is_file():
        return [place / "metrics.json"]
    found = sorted(place.glob("evaluations/*/metrics.json"))
    if not found:
        have = (
            "no such file or folder"
            if not place.exists()
            else "it has no metrics.json and no evaluations/*/metrics.json"
        )
        raise UsageError(
            f"{path} is no evaluation: {have}; name a run folder that was evaluated, a folder of an evaluation or a "
            "metrics.json"
        )
    return found


def read(path: Path) -> dict[str, Any]:
    """The content of a metrics.json. Raises RunError where it cannot be read or has another format."""
    again = "run gearshift evaluate again"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror or error}); {again} or name another file") from error
    except ValueError as error:  # JSON and UTF-8 alike
        raise RunError(f"{path} is not JSON ({' '.join(str(error).split())}); {again}") from error
    form = results.get("format") if isinstance(results, dict) else None
    if form not in FORMATS:
        raise RunError(f"{path} has format {form!r}, and this version reads format {FORMATS[-1]}; {again}")
    rows = results.get("rows") if isinstance(results, dict) else None
    names = [row.get("name") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not rows or len(names) != len(rows) or not all(isinstance(name, str) for name in names):
        found = f"a list of {len(rows)}" if isinstance(rows, list) else type(rows).__name__
        raise RunError(
            f"{path} is no result of gearshift evaluate: `rows` should be a list of entries with a name, and is "
            f"{found}; {again}"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise RunError(f"{path} has several rows named {twice[0]!r}, and names tell rows apart; {again}")
    kinds = {"protocol": dict, "conditions": dict, "stages": dict, "training": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(results.get(key) or {}, kind)]
    if wrong:
        raise RunError(
            f"{path} has a {wrong[0]} of type {type(results[wrong[0]]).__name__}, expected an object; {again}"
        )
    return results


def load(paths: Sequence[str | Path], names: Sequence[str] | None = None) -> list[Evaluated]:
    """The evaluations that the paths stand for, with labels that tell them apart.

    names: one per path, else labels come from the folders: as few of experiment, run and evaluation as tell all apart.

    Raises UsageError for fewer than two evaluations, one evaluation named twice, or a wrong number of names; RunError
    for files that cannot be read.
    """
    if names is not None and len(names) != len(paths):
        raise UsageError(f"name= has {len(names)} names ({', '.join(names)}) for {len(paths)} paths; give one for each")
    files = [(file, number) for number, path in enumerate(paths) for file in find(path)]
    twice = [file for file, count in Counter(file.resolve() for file, _ in files).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]} is named twice; name every evaluation once")
    if len(files) < 2:
        have = f"only {files[0][0]}" if files else "none"
        raise UsageError(f"a comparison needs two evaluations or more, and {have} was named; name another one")
    if names is None:
        labels = _labels([file for file, _ in files])
    else:
        several = Counter(number for _, number in files)
        labels = [
            f"{names[number]} {file.resolve().parent.name}" if several[number] > 1 else names[number]
            for file, number in files
        ]
    if len(set(labels)) != len(labels):
        raise UsageError(f"names must tell evaluations apart, and {labels} do not; give every path another name")
    return [Evaluated(file, label, read(file)) for (file, _), label in zip(files, labels, strict=True)]


def _labels(files: Sequence[Path]) -> list[str]:
    """As few folders of .../EXPERIMENT/HASH/evaluations/NAME/metrics.json from the end as tell all files apart."""
    parts = [[part for part in file.resolve().parts[1:-1] if part != "evaluations"] or ["/"] for file in files]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(own[-depth:]) for own in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(file) for file in files]  # metrics.json and another file beside it
