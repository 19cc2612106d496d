"""Tables of text, and the four ways they are written: for a terminal, in Markdown, in LaTeX (booktabs), in HTML.

What stands in a cell, and which cells are best, is decided elsewhere (`table`, `speed_table`); here it is only set.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        heads: heading of every column.
        left: whether a column is text, set to the left; numbers are set to the right.
        body: rows of cells.
        best: (row, column) of the cells to bring out.
        groups: name of the group of every column, "" for none; neighbours of one group share a heading.
    """

    heads: tuple[str, ...]
    left: tuple[bool, ...]
    body: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        widths = {len(self.heads), len(self.left), len(self.groups or self.heads), *map(len, self.body)}
        if len(widths) != 1:
            raise ValueError(f"a table needs lines of one length, not of {sorted(widths)} cells")

    def spans(self) -> list[tuple[str, int, int]]:
        """(group, first column, number of columns), left to right; empty where no column is in a group."""
        if not any(self.groups):
            return []
        runs = [(name, [k for k, _ in found]) for name, found in groupby(enumerate(self.groups), key=lambda kv: kv[1])]
        return [(name, columns[0], len(columns)) for name, columns in runs]


def terminal(table: Table, width: int | None = None) -> str:
    """Aligned columns under two lines of headings, best cells starred; no final newline.

    A table wider than `width` characters is cut into blocks one below the other, each with the first column.
    """
    starred = {column for _, column in table.best}
    head = list(zip(*map(halves, table.heads), strict=True))
    body = []
    for r, row in enumerate(table.body):
        # A star must not push its number out of the column of digits.
        pads = [" " if k in starred and not table.left[k] else "" for k in range(len(row))]
        body.append([cell + ("*" if (r, k) in table.best else pads[k]) for k, cell in enumerate(row)])
    widths = [max(len(line[k]) for line in (*head, *body)) for k in range(len(table.heads))]
    blocks = []
    for columns in _blocks(widths, width):

        def join(line: Sequence[str], columns: Sequence[int] = columns) -> str:
            cells = (line[k].ljust(widths[k]) if table.left[k] else line[k].rjust(widths[k]) for k in columns)
            return "  ".join(cells).rstrip()

        rule = "  ".join("─" * widths[k] for k in columns)
        tops = [text for line in head if (text := join(line))]
        blocks.append("\n".join([*tops, rule, *map(join, body)]))
    foot = "\n* best value of its column" if table.best else ""
    return "\n\n".join(blocks) + foot


def _blocks(widths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Columns of every block: as many as fit beside the first one, at least one."""
    blocks = [[0]]
    used = widths[0] if widths else 0
    for k in range(1, len(widths)):
        if limit is not None and used + 2 + widths[k] > limit and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(k)
        used += 2 + widths[k]
    return blocks


def halves(head: str) -> tuple[str, str]:
    """A heading on two lines as even as may be: headings such as fd_random_vgg16_64[s0-s2] are wider than their
    numbers. An arrow at the end stays with its word."""
    cuts = [found.start() for found in re.finditer(r" (?![↑↓])|\[|_", head)]
    if len(head) <= 8 or not cuts:
        return "", head
    cut = min(cuts, key=lambda at: max(at, len(head) - at))
    return head[:cut], head[cut:].strip()


def markdown(table: Table) -> str:
    """A pipe table, best cells bold; no final newline."""
    rule = ["---" if left else "---:" for left in table.left]
    body = [
        [
            f"**{escape_markdown(cell)}**" if (r, k) in table.best else escape_markdown(cell)
            for k, cell in enumerate(row)
        ]
        for r, row in enumerate(table.body)
    ]
    lines = [[escape_markdown(head) for head in table.heads], rule, *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def escape_markdown(text: str) -> str:
    """Text in which `<` opens no HTML tag; the bars of table cells are escaped by `markdown`."""
    return text.replace("<", "\\<")


def latex(table: Table) -> str:
    """A booktabs `tabular`, best cells bold, to be put into a table environment by the paper; no final newline."""
    sides = "".join("l" if left else "r" for left in table.left)
    out = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule"]
    spans = table.spans()
    if spans:
        out.append(
            " & ".join(
                rf"\multicolumn{{{count}}}{{c}}{{{escape_latex(name)}}}" if name else " & ".join([""] * count)
                for name, _, count in spans
            )
            + r" \\"
        )
        out.append(" ".join(rf"\cmidrule(lr){{{at + 1}-{at + count}}}" for name, at, count in spans if name))
    for line in zip(*map(halves, table.heads), strict=True):
        if any(line):
            out.append(" & ".join(map(escape_latex, line)) + r" \\")
    out.append(r"\midrule")
    for r, row in enumerate(table.body):
        cells = [
            rf"\textbf{{{escape_latex(cell)}}}" if (r, k) in table.best else escape_latex(cell)
            for k, cell in enumerate(row)
        ]
        out.append(" & ".join(cells) + r" \\")
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}"])


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "–": "--",
    # An opening bracket after \\ would be read as its optional argument.
    "[": "{[}",
    "]": "{]}",
}


def escape_latex(text: str) -> str:
    """Text as LaTeX sets it; a leading minus becomes a minus sign."""
    minus = re.match(r"-(?=[\d.])", text)
    return ("$-$" if minus else "") + "".join(_LATEX.get(letter, letter) for letter in text[1 if minus else 0 :])


def html_table(table: Table) -> str:
    """A `<table>` with the classes `text`, `best` and `group`."""
    spans = table.spans()
    first = {at for name, at, _ in spans if name}
    top = ""
    if spans:
        cells = "".join(
            f"<th class=group colspan={count}>{html.escape(name)}</th>" if name else f"<td colspan={count}></td>"
            for name, _, count in spans
        )
        top = f"<tr>{cells}</tr>"

    def classes(column: int, best: bool = False) -> str:
        names = [("text", table.left[column]), ("first", column in first), ("best", best)]
        return " ".join(name for name, holds in names if holds)

    def attribute(value: str) -> str:
        return f' class="{value}"' if value else ""

    head = "".join(f"<th{attribute(classes(k))}>{_html_head(text)}</th>" for k, text in enumerate(table.heads))
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{attribute(classes(k, (r, k) in table.best))}>{html.escape(cell)}</td>" for k, cell in enumerate(row)
        )
        + "</tr>"
        for r, row in enumerate(table.body)
    )
    return f"<table><thead>{top}<tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _html_head(head: str) -> str:
    first, second = map(html.escape, halves(head))
    return f"{first}<br>{second}" if first else second
