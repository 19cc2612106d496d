"""Several evaluations joined: one table, one plot, and what sets their protocols apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.evaluation.document import (
    Block,
    Bullets,
    Figure,
    Heading,
    Pairs,
    Tabled,
    Text,
    plain,
    strict,
    to_html,
    to_markdown,
)
from gearshift.evaluation.pareto import measure_name, quality_against_cost, quality_key
from gearshift.evaluation.protocols import comparable, groups, letter, marks_of, warnings_of
from gearshift.evaluation.report import how_to_read, legend, paper_table
from gearshift.evaluation.savings import savings
from gearshift.evaluation.stored import Evaluated
from gearshift.evaluation.table import Row, direction, is_number, results_table
from gearshift.evaluation.tabular import Table
from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write, slug

FORMAT = "comparison 1"
"""What `format` says in comparison.json: no result of one evaluation, which reading would take it for."""


_KEPT = ("run", "name", "protocol", "conditions", "command", "versions", "stages", "training")
"""What comparison.json repeats of each evaluation; null where it has none."""


@dataclass(frozen=True)
class Comparison:
    """Evaluations side by side.

    Attributes:
        evaluations: in the order they were named.
        rows: of all, with names "LABEL: ROW" and the label as `evaluation`.
        marks: for every key whose values have more than one protocol (times: conditions), the mark of every row.
        warnings: what differs between protocols, conditions and settings.
        savings: whether each evaluation after the first saves training, sampling or neither against it, in MACs.
    """

    evaluations: tuple[Evaluated, ...]
    rows: tuple[Row, ...]
    marks: dict[str, list[str]]
    warnings: tuple[str, ...]
    savings: tuple[str, ...] = ()

    @property
    def table(self) -> Table:
        return results_table(self.rows, self.marks)


# Joining -------------------------------------------------------------------------------------------------------------


def compare(evaluations: Sequence[Evaluated]) -> Comparison:
    """All rows under labels, with marks where protocols differ. Values keep what their evaluation wrote."""
    results = [item.results for item in evaluations]
    labels = [item.label for item in evaluations]
    rows = [
        {**row, "name": f"{item.label}: {row['name']}", "evaluation": item.label}
        for item in evaluations
        for row in item.results["rows"]
    ]
    counts = [len(item.results["rows"]) for item in evaluations]
    marks = {
        key: [mark for mark, count in zip(own, counts, strict=True) for _ in range(count)]
        for key, own in marks_of(results).items()
    }
    warnings = warnings_of(results, labels)
    for item in evaluations:
        warnings += [
            f"{item.label}: {line}" for k in ("warnings", "timing_warnings") for line in item.results.get(k) or ()
        ]
    found = savings({item.label: item.results for item in evaluations})
    return Comparison(tuple(evaluations), tuple(rows), marks, tuple(warnings), tuple(found))


def drawn_key(comparison: Comparison) -> str | None:
    """The measure to draw: the first that two evaluations have under one protocol, else the first there is."""
    shared = comparable([item.results for item in comparison.evaluations])
    kept = [{k: v for k, v in row.items() if not direction(k) or shared(k)} for row in comparison.rows]
    return quality_key(kept) or quality_key(comparison.rows)


def default_folder(evaluations: Sequence[Evaluated]) -> Path:
    """./comparisons/<labels>-<hash of the files and labels>."""
    text = json.dumps([[str(item.path.resolve()), item.label] for item in evaluations])
    labels = slug("-".join(item.label for item in evaluations))[:60].strip("-")
    return Path("comparisons") / f"{labels}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".strip("-")


# Writing -------------------------------------------------------------------------------------------------------------


def write_comparison(folder: str | Path, comparison: Comparison) -> Path:
    """Leave comparison.json, .md, .tex, .html and .png in `folder` and return the path of comparison.html. Raises
    RunError when the disk refuses."""
    folder = Path(folder)
    table = comparison.table
    blocks: list[Block] = [Tabled(table), Text(_legend(comparison), quiet=True)]
    if comparison.warnings:
        blocks.append(Bullets(comparison.warnings, warn=True))
    if comparison.savings:
        blocks += [Heading("Saved or not, in MACs alone"), Bullets(comparison.savings)]
    figure = _figure(comparison)
    blocks += [figure] if figure is not None else []
    blocks += [Heading("How to read this"), Bullets(_how_to_read(comparison))]
    blocks += [Heading("Evaluations"), Pairs({item.label: _where(item) for item in comparison.evaluations})]
    for item in comparison.evaluations:
        if item.results.get("protocol"):
            blocks += [Heading(f"Protocol of {item.label}"), Pairs(item.results["protocol"])]
        if item.results.get("conditions"):
            blocks += [Heading(f"Conditions of the timing of {item.label}"), Pairs(item.results["conditions"])]
    labels = [item.label for item in comparison.evaluations]
    notes = {
        "run": " | ".join(labels),
        "protocol": {
            f"{item.label}, {key}": value
            for item in comparison.evaluations
            for key, value in (item.results.get("protocol") or {}).items()
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make the folder {folder} ({error.strerror or error}); name another one by out="
        ) from error
    if figure is not None:
        atomic_write(folder / figure.file, figure.png)
    text = json.dumps(as_json(comparison), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(folder / "comparison.json", text + "\n")
    atomic_write(folder / "comparison.tex", paper_table(table, notes))
    atomic_write(folder / "comparison.md", to_markdown(f"Comparison of {' and '.join(labels)}", blocks))
    atomic_write(folder / "comparison.html", to_html("Comparison", " · ".join(labels), blocks))
    return folder / "comparison.html"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The joined results: evaluations, protocols that differ (by key and mark), rows and warnings."""
    results = [item.results for item in comparison.evaluations]
    named = {
        key: {letter(k): [list(part) for part in protocol] for k, protocol in enumerate(groups(results, key))}
        for key in comparison.marks
    }
    rows = [
        {**row, "marks": {key: own[number] for key, own in comparison.marks.items() if row.get(key) is not None}}
        for number, row in enumerate(comparison.rows)
    ]
    out = {
        "format": FORMAT,
        "evaluations": [
            {
                "label": item.label,
                "path": str(item.path),
                **{k: item.results.get(k) for k in _KEPT},
            }
            for item in comparison.evaluations
        ],
        "protocols": named,
        "rows": rows,
        "warnings": list(comparison.warnings),
        "savings": list(comparison.savings),
    }
    found: dict[str, Any] = strict(out)
    return found


def _figure(comparison: Comparison) -> Figure | None:
    key = drawn_key(comparison)
    if key is None:
        return None
    quality, time = comparison.marks.get(key), comparison.marks.get("images_per_s")
    rows = comparison.rows
    caption = (
        f"{measure_name(key)} against MACs and against measured time; colour is the evaluation, the marker the kind of "
        "policy, hollow points are full compute at all its steps and at fewer."
    )
    if quality:
        caption += (
            " The values have different protocols: every protocol has a front of its own, and only points of one "
        )
        caption += "protocol are comparable."
    if time:
        caption += (
            " The times were taken under different conditions: on the right, fronts are drawn within one of them."
        )
    missing = [str(row["name"]) for row in rows if not is_number(row.get(key))]
    if missing:
        caption += f" Not drawn, because they have no finite value: {', '.join(missing)}."
    png = quality_against_cost(rows, key, quality_marks=quality, time_marks=time)
    return Figure("comparison.png", f"{key} against cost", caption, png)


def _legend(comparison: Comparison) -> str:
    text = legend(comparison.rows)
    if comparison.marks:
        text += (
            " Letters in brackets: values of different protocols (times: conditions), named below. Best values are "
            "sought among values of one letter."
        )
    return text


def _how_to_read(comparison: Comparison) -> list[str]:
    return [
        "Savings, speed-ups and closeness to full are against full compute of the row's own evaluation.",
        *(line for line in how_to_read(comparison.rows) if not line.startswith("Savings")),
    ]


def _where(item: Evaluated) -> str:
    parts = [str(item.path), f"run {item.results['run']}" if item.results.get("run") else ""]
    parts.append(plain(item.results["command"]) if item.results.get("command") else "")
    return "; ".join(part for part in parts if part)
