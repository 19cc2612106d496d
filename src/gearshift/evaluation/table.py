"""Rows of an evaluation as text: an aligned table for terminals, a Markdown table for files.

A column appears when some row has a value for it; the order, heading, unit and the better direction of each are here
and nowhere else. Cells that were not measured show a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """How one key of the rows is shown. `better` is +1 when more is better, -1 when less is, 0 when neither."""

    key: str
    heading: str
    kind: Literal["text", "int", "macs", "percent", "times", "number"]
    better: int = 0

    def cell(self, row: Row) -> str:
        """The value of a row as text."""
        value = row.get(self.key)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "–"
        if self.kind == "text":
            return str(value)
        if self.kind == "int":
            return f"{value:g}" if isinstance(value, float) else str(value)
        if self.kind == "macs":
            return format_count(float(value))
        if self.kind == "percent":
            return f"{100 * float(value):.1f} %"
        if self.kind == "times":
            return f"{float(value):.2f}×"
        return format_number(float(value))


_COLUMNS = (
    Column("name", "run", "text"),
    Column("solver", "solver", "text"),
    Column("calls", "calls", "int"),
    Column("macs_per_image", "MACs/image", "macs"),
    Column("macs_saved", "MACs saved", "percent", +1),
    Column("images_per_s", "images/s", "number", +1),
    Column("speedup", "speed-up", "times", +1),
    Column("time_saved", "time saved", "percent", +1),
    Column("saving_realised", "of MACs saving", "percent", +1),
    Column("psnr_to_full", "PSNR to full", "number", +1),
    Column("ssim_to_full", "SSIM to full", "number", +1),
    Column("lpips_alex_to_full", "LPIPS to full", "number", -1),
    Column("label_agreement", "label agreement", "percent", +1),
)


def is_distance(key: str) -> bool:
    """Whether a key of a row is a Fréchet distance: `fid` or `fd_<extractor>`."""
    return key == "fid" or key.startswith("fd_")


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns to show: the known ones that some row has a value for, then the Fréchet distances in order of
    appearance."""
    known = [column for column in _COLUMNS if any(row.get(column.key) is not None for row in rows)]
    distances = dict.fromkeys(key for row in rows for key in row if is_distance(key) and row[key] is not None)
    return known + [Column(key, key, "number", -1) for key in distances]


def best_rows(rows: Sequence[Row], column: Column) -> set[int]:
    """Rows that share the best value of a column as it is printed; none where there is no better, or all are alike."""
    cells = {
        number: float(row[column.key])
        for number, row in enumerate(rows)
        if column.better and isinstance(row.get(column.key), int | float) and math.isfinite(row[column.key])
    }
    if len({column.cell(rows[number]) for number in cells}) < 2:
        return set()
    best = max(cells, key=lambda number: column.better * cells[number])
    return {number for number in cells if column.cell(rows[number]) == column.cell(rows[best])}


def format_table(rows: Sequence[Row], style: Literal["terminal", "markdown"] = "terminal") -> str:
    """The rows as an aligned text table (best values starred) or as Markdown (best values bold), without a final
    newline."""
    columns = columns_of(rows)
    best = [best_rows(rows, column) for column in columns]
    markdown = style == "markdown"

    def mark(text: str, number: int, row: int) -> str:
        if row not in best[number]:
            return text
        return f"**{text}**" if markdown else f"{text}*"

    body = [[mark(column.cell(row), k, r) for k, column in enumerate(columns)] for r, row in enumerate(rows)]
    heads = [column.heading for column in columns]
    if markdown:
        rule = ["---" if column.kind == "text" else "---:" for column in columns]
        lines = [[text.replace("|", "\\|") for text in line] for line in (heads, rule, *body)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    # Headings such as fd_random_vgg16_64[s0-s2] are wider than their numbers: two lines keep the table on a screen.
    split = [_halves(head) for head in heads]
    lines = [[first for first, _ in split], [second for _, second in split], *body]
    # A star must not push its number out of the column of digits.
    starred = [any(line[k].endswith("*") for line in body) for k in range(len(columns))]
    for line in body:
        for k, column in enumerate(columns):
            if column.kind != "text" and starred[k] and not line[k].endswith("*"):
                line[k] += " "
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]

    def join(line: Sequence[str]) -> str:
        padded = [
            text.ljust(width) if column.kind == "text" else text.rjust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule_line = "  ".join("─" * width for width in widths)
    head = [join(line) for line in lines[:2] if any(line)]
    foot = ["* best value of its column"] if any(starred) else []
    return "\n".join([*head, rule_line, *(join(line) for line in body), *foot])


def format_count(value: float) -> str:
    """A count with a metric prefix and three digits: 44255328 -> '44.3 M'."""
    for bound, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{format_number(value / bound)} {unit}"
    return format_number(value)


def format_number(value: float) -> str:
    """Three significant digits, without an exponent for anything that occurs here; whole from 1000 on."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - magnitude)}f}"


def _halves(head: str) -> tuple[str, str]:
    for separator in (" ", "["):
        first, found, rest = head.partition(separator)
        if found and len(head) > 8:
            return first, rest if separator == " " else separator + rest
    return "", head
