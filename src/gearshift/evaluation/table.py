"""The rows of an evaluation as one table of cost, speed and quality.

A column appears when some row has a value for it; the order, heading, unit and the better direction of each are here
and nowhere else. A cell without a value says "not measured", or "identical" for the PSNR of images that are equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gearshift.evaluation.tabular import Table, latex, markdown, terminal

Row = Mapping[str, Any]
NOT_MEASURED = "not measured"
IDENTICAL = "identical"

_LOWER = ("fid", "sfid", "kid", "fd_", "kd_", "lpips_")
_HIGHER = ("inception_score", "label_agreement", "psnr", "ssim", "precision_", "recall_", "density_", "coverage_")


def direction(key: str) -> int:
    """+1 where more of a measure is better, -1 where less is, 0 for keys that name no measure of quality."""

    def named(name: str) -> bool:
        whole = name in ("fid", "sfid", "kid", "inception_score", "label_agreement")
        return key == name if whole else key.startswith(name)

    return -1 if any(map(named, _LOWER)) else 1 if any(map(named, _HIGHER)) else 0


@dataclass(frozen=True)
class Column:
    """How one key of the rows is shown. `better` is +1 when more is better, -1 when less is, 0 when neither; `rare`
    keys are shown where some row has more than nothing of them."""

    key: str
    heading: str
    kind: Literal["text", "int", "macs", "bytes", "percent", "times", "number"]
    better: int = 0
    group: str = ""
    rare: bool = False

    @property
    def title(self) -> str:
        """The heading with an arrow to the better side."""
        return self.heading + {1: " ↑", 0: "", -1: " ↓"}[self.better]

    def cell(self, row: Row) -> str:
        """The value of a row as text, with "± sd" where the row carries one."""
        value = row.get(self.key)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return self._without(row)
        if self.kind == "text":
            return str(value)
        sd = (row.get("sd") or {}).get(self.key)
        if sd is not None and math.isfinite(sd):
            return self._with_sd(float(value), float(sd))
        if self.kind == "int":
            return f"{value:g}" if isinstance(value, float) else str(value)
        if self.kind == "macs":
            return format_count(float(value))
        if self.kind == "bytes":
            return format_bytes(float(value))
        if self.kind == "percent":
            return f"{100 * float(value):.1f} %"
        if self.kind == "times":
            return f"{float(value):.2f}×"
        return format_number(float(value))

    def _without(self, row: Row) -> str:
        if self.key.startswith("psnr_to_full") and self.key in row and row.get("identical_to_full", 1.0) == 1.0:
            return IDENTICAL
        if self.key == "saving_realised" and row.get("time_saved") is not None:
            return "–"  # a share of no saving
        return NOT_MEASURED

    def _with_sd(self, value: float, sd: float) -> str:
        factor, unit = 1.0, {"percent": " %", "times": "×"}.get(self.kind, "")
        if self.kind == "percent":
            factor = 100.0
        elif self.kind == "macs":
            bound, unit = _prefix(value)
            factor = 1 / bound
        least = {"percent": 1, "times": 2}.get(self.kind, 0)
        return f"{_pair(value * factor, sd * factor, least)}{unit}"


_COST, _SPEED, _CLOSE, _QUALITY = "cost", "speed", "against full compute", "quality"
_GROUPS = ("", _COST, _QUALITY, _CLOSE, _SPEED)
_COLUMNS = (
    Column("name", "run", "text"),
    Column("solver", "solver", "text"),
    Column("calls", "network calls", "int", 0, _COST),
    Column("full_equivalents", "full-network equivalents", "number", 0, _COST),
    Column("macs_per_image", "MACs/image", "macs", 0, _COST),
    Column("flops_per_image", "FLOPs/image", "macs", 0, _COST),
    Column("macs_saved", "MACs saved", "percent", +1, _COST),
    Column("blocks_reused", "blocks that reuse", "percent", 0, _COST, rare=True),
    Column("kept_bytes_per_image", "kept/image", "bytes", 0, _COST, rare=True),
    Column("label_agreement", "label agreement", "percent", +1, _QUALITY),
    Column("psnr_to_full", "PSNR to full (global)", "number", +1, _CLOSE),
    Column("psnr_to_full_per_image", "PSNR to full (per image)", "number", +1, _CLOSE),
    Column("ssim_to_full", "SSIM to full", "number", +1, _CLOSE),
    Column("lpips_alex_to_full", "LPIPS to full", "number", -1, _CLOSE),
    Column("images_per_s", "images/s", "number", +1, _SPEED),
    Column("speedup", "speed-up", "times", +1, _SPEED),
    Column("time_saved", "time saved", "percent", +1, _SPEED),
    Column("saving_realised", "of MACs saving", "percent", +1, _SPEED),
)
_HEADINGS = {"fid": "FID", "sfid": "sFID", "kid": "KID", "inception_score": "Inception Score"}
# Trained networks before random ones, distances before shares.
_ORDER = (
    "fid",
    "sfid",
    "inception_score",
    "kid",
    "fd_classifier",
    "fd_(?!random)",
    "fd_",
    "kd_(?!random)",
    "kd_",
    "precision_",
    "recall_",
    "density_",
    "coverage_",
    "",
)


def is_distance(key: str) -> bool:
    """Whether a key of a row is a Fréchet distance: `fid` or `fd_<extractor>`."""
    return key == "fid" or key.startswith("fd_")


def is_number(value: Any) -> bool:
    """Whether a value of a row is a finite number (True and False are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns to show, group by group: the known ones that some row has a value for, then the other measures in a
    fixed order (that of appearance among measures of one kind)."""
    named = {column.key for column in _COLUMNS}
    found = dict.fromkeys(k for row in rows for k, v in row.items() if k not in named and direction(k) and is_number(v))
    ordered = sorted(found, key=lambda key: next(n for n, prefix in enumerate(_ORDER) if re.match(prefix, key)))
    own = {
        key: Column(
            key, _HEADINGS.get(key, key), "number", direction(key), _CLOSE if key.endswith("_to_full") else _QUALITY
        )
        for key in ordered
    }
    known = [column for column in _COLUMNS if any(_shows(row, column) for row in rows)]
    # Columns of one group stand together: sorting is stable.
    return sorted([*known, *own.values()], key=lambda column: _GROUPS.index(column.group))


def _shows(row: Row, column: Column) -> bool:
    value = row.get(column.key)
    return value is not None and (not column.rare or (is_number(value) and value > 0))


def best_rows(rows: Sequence[Row], column: Column) -> set[int]:
    """Rows that share the best value of a column as it is printed; none where there is no better, or all are alike.

    Rows whose images equal those they are compared with are left out of comparisons with full compute.
    """
    cells = {
        number: float(row[column.key])
        for number, row in enumerate(rows)
        if column.better
        and is_number(row.get(column.key))
        and not (column.group == _CLOSE and row.get("identical_to_full") == 1.0)
    }
    if len({column.cell(rows[number]) for number in cells}) < 2:
        return set()
    best = max(cells, key=lambda number: column.better * cells[number])
    return {number for number in cells if column.cell(rows[number]) == column.cell(rows[best])}


def results_table(rows: Sequence[Row], marks: Mapping[str, Sequence[str]] | None = None) -> Table:
    """The rows as a table, best values marked.

    marks: for keys whose values are not all comparable, a short mark for every row ("a", "b", ...). It stands behind
        the value, and the best value is sought among rows of one mark.
    """
    columns = columns_of(rows)
    best: set[tuple[int, int]] = set()
    body = [[column.cell(row) for column in columns] for row in rows]
    for k, column in enumerate(columns):
        own = (marks or {}).get(column.key)
        if own is None:
            best |= {(r, k) for r in best_rows(rows, column)}
            continue
        for mark in dict.fromkeys(own):
            members = [r for r in range(len(rows)) if own[r] == mark]
            best |= {(members[r], k) for r in best_rows([rows[r] for r in members], column)}
        for r, row in enumerate(rows):
            if row.get(column.key) is not None:
                body[r][k] += f" [{own[r]}]"
    return Table(
        heads=tuple(column.title for column in columns),
        left=tuple(column.kind == "text" for column in columns),
        body=tuple(map(tuple, body)),
        best=frozenset(best),
        groups=tuple(column.group for column in columns),
    )


def format_table(
    rows: Sequence[Row], style: Literal["terminal", "markdown", "latex"] = "terminal", width: int | None = None
) -> str:
    """The rows as an aligned text table (best values starred, cut into blocks of at most `width` characters), as
    Markdown or as a booktabs tabular (best values bold), without a final newline."""
    table = results_table(rows)
    if style == "terminal":
        return terminal(table, width)
    return markdown(table) if style == "markdown" else latex(table)


# Numbers -------------------------------------------------------------------------------------------------------------


def format_count(value: float) -> str:
    """A count with a metric prefix and three digits: 44255328 -> '44.3 M'."""
    bound, unit = _prefix(value)
    return f"{format_number(value / bound)}{unit}"


def format_bytes(value: float) -> str:
    """Bytes in powers of 1024 with three digits: 1572864 -> '1.50 MiB'."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{format_number(value / 1024**power)} {unit}"
    return f"{value:.0f} B"


def format_number(value: float) -> str:
    """Three significant digits, without an exponent for anything that occurs here; whole from 1000 on."""
    if value == 0:
        return "0"
    if math.floor(math.log10(abs(value))) < -4:
        return f"{value:.1e}"
    return f"{value:.{_decimals(value, 3)}f}"


def _decimals(value: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of a value that is not 0."""
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def _pair(value: float, sd: float, least: int) -> str:
    """'27.31 ± 0.04': the same decimals on both, as many as the first digit of the deviation needs."""
    if (value and abs(value) < 1e-4) or (sd and sd < 1e-6):
        return f"{value:.1e} ± {sd:.1e}"
    decimals = max(least, _decimals(value, 3) if value and not least else 0, _decimals(sd, 1) if sd else 0)
    return f"{value:.{decimals}f} ± {sd:.{decimals}f}"


def _prefix(value: float) -> tuple[float, str]:
    for bound, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= bound:
            return bound, unit
    return 1.0, ""
