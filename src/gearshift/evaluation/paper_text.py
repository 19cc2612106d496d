"""A paper's table in Markdown, LaTeX and JSON: what is published beside what was measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gearshift.evaluation.papers import STATUSES, Measured, PaperRow, PaperTable, Published
from gearshift.evaluation.protocols import letter
from gearshift.evaluation.table import format_number
from gearshift.evaluation.tabular import Table, escape_latex, escape_markdown, latex, markdown

# Verified figures are plain: they are the only ones to compare with.
MARKS: Mapping[str, str] = {"verified": "", "summary": "†", "recalled": "‡", "unknown": ""}
UNKNOWN, NOTHING = "?", "–"


@dataclass(frozen=True)
class Missing:
    """A figure that is not measured.

    Attributes:
        why: what is missing, in words.
        needs: what it would take: sizes, weights, words.
        commands: to be run in order; empty where running something does not help.
    """

    why: str
    needs: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    def line(self) -> str:
        """All of it on one line."""
        parts = ["; ".join((self.why, *self.needs))]
        if self.commands:
            parts.append("run " + " && ".join(f"`{command}`" for command in self.commands))
        return ". ".join(parts)


@dataclass(frozen=True)
class Filled:
    """A row with its measured figures and those that are missing, by figure."""

    row: PaperRow
    measured: Mapping[str, Measured] = field(default_factory=dict)
    missing: Mapping[str, Missing] = field(default_factory=dict)


def as_markdown(table: PaperTable, rows: Sequence[Filled]) -> str:
    """Heading, table, notes, and one line per missing figure."""
    body, notes = _body(table, rows)
    lines = [f"# {table.table}", "", f"{table.paper}. {escape_markdown(table.protocol)}", "", markdown(body)]
    if notes:
        lines += ["", *(f"- {mark}: {escape_markdown(text)}" for mark, text in notes)]
    missing = missing_lines(rows)
    if missing:
        # Commands stand in code spans, where nothing is escaped.
        lines += ["", "## Missing", "", *(f"- {line}" for line in missing)]
    return "\n".join(lines) + "\n"


def missing_lines(rows: Sequence[Filled]) -> list[str]:
    """What each missing figure would take, a line each."""
    return [f"{filled.row.name}, {figure}: {what.line()}" for filled in rows for figure, what in filled.missing.items()]


def as_latex(table: PaperTable, rows: Sequence[Filled]) -> str:
    """A `table` environment with the notes below; needs the package booktabs."""
    body, notes = _body(table, rows)
    out = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape_latex(f'{table.table} ({table.paper}). {table.protocol}')}}}",
        latex(body),
    ]
    if notes:
        out += ["", "\\smallskip\\footnotesize", *(f"{escape_latex(f'{mark}: {text}')}\\\\" for mark, text in notes)]
    return "\n".join([*out, "\\end{table}"]) + "\n"


def as_json(table: PaperTable, rows: Sequence[Filled]) -> dict[str, Any]:
    """The same as data. A published figure of status unknown has no value."""
    return {
        "paper": table.paper,
        "table": table.table,
        "protocol": table.protocol,
        "rows": [
            {
                "name": filled.row.name,
                "figures": {
                    figure: {
                        "published": asdict(filled.row.published[figure]) if figure in filled.row.published else None,
                        "measured": asdict(filled.measured[figure]) if figure in filled.measured else None,
                        "missing": asdict(filled.missing[figure]) if figure in filled.missing else None,
                    }
                    for figure in table.figures
                },
            }
            for filled in rows
        ],
    }


def _body(table: PaperTable, rows: Sequence[Filled]) -> tuple[Table, list[tuple[str, str]]]:
    """The table, and its notes by mark: statuses first, then protocols of what was measured."""
    statuses: dict[str, list[str]] = {}
    protocols: dict[str, str] = {}
    body = []
    for filled in rows:
        cells = [filled.row.name]
        for figure in table.figures:
            published = filled.row.published.get(figure)
            if published is not None and published.status != "verified":
                statuses.setdefault(published.status, []).append(_source(filled.row.name, figure, published))
            cells.append(_published(published))
            cells.append(_measured(filled.measured.get(figure), protocols))
        body.append(tuple(cells))
    heads = [f"{figure}, {who}" for figure in table.figures for who in ("published", "here")]
    notes = [
        (MARKS[status] or UNKNOWN, f"{STATUSES[status]} ({'; '.join(statuses[status])})")
        for status in STATUSES
        if status in statuses
    ]
    notes += [(f"[{mark}]", text) for text, mark in protocols.items()]
    table_ = Table(heads=("", *heads), left=(True, *(False for _ in heads)), body=tuple(body))
    return table_, notes


def _source(row: str, figure: str, published: Published) -> str:
    return f"{row}, {figure}" + (f": {published.source}" if published.source else "")


def _published(published: Published | None) -> str:
    if published is None:
        return ""
    if published.value is None:
        return UNKNOWN
    return f"{published.value:.10g}{MARKS[published.status]}"


def _measured(found: Measured | None, protocols: dict[str, str]) -> str:
    if found is None:
        return NOTHING
    mark = protocols.setdefault(f"{found.protocol}; {found.source}", letter(len(protocols)))
    text = format_number(found.value) + (f" ± {format_number(found.sd)}" if found.sd is not None else "")
    if found.count is not None:
        text += f" (n = {f'{found.repeats} × ' if found.repeats > 1 else ''}{found.count})"
    return f"{text} [{mark}]"
