"""A document of a few kinds of blocks, written as Markdown beside its pictures and as one HTML file that needs nothing.

What a report says is put together once, as blocks; both forms say the same.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gearshift.evaluation.tabular import Table, escape_markdown, html_table, markdown


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph. Quiet ones are notes to what stands above them."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of lines; `warn` brings it out."""

    lines: Sequence[str]
    warn: bool = False


@dataclass(frozen=True)
class Pairs:
    """Names and what belongs to them; values may be nested."""

    entries: Mapping[str, Any]


@dataclass(frozen=True)
class Commands:
    """Commands to be copied, each with a line of explanation ("" for none)."""

    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Tabled:
    table: Table


@dataclass(frozen=True)
class Figure:
    """A picture: file beside the Markdown, short name, caption, PNG. Charts may be recoloured in a dark page, images
    must not; samples stand side by side."""

    file: str
    name: str
    caption: str
    png: bytes
    kind: Literal["chart", "images", "samples"] = "chart"


Block = Heading | Text | Bullets | Pairs | Commands | Tabled | Figure


def plain(value: Any) -> str:
    """A nested value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(inner) for inner in value)
    if value is None:
        return "not known"
    return f"{value:g}" if isinstance(value, float) else str(value)


def strict(value: Any) -> Any:
    """The same structure with non-finite floats as None and NumPy numbers as Python's: what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Markdown ------------------------------------------------------------------------------------------------------------


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The document as Markdown; figures are named, not held."""
    return "\n\n".join([f"# {escape_markdown(title)}", *map(_markdown, blocks)]) + "\n"


def _markdown(block: Block) -> str:
    text = escape_markdown
    match block:
        case Heading():
            return f"## {text(block.text)}"
        case Text():
            return text(block.text)
        case Bullets():
            mark = "> - " if block.warn else "- "
            return "\n".join(mark + text(line) for line in block.lines)
        case Pairs():
            return "\n".join(f"- **{text(key)}**: {text(plain(value))}" for key, value in block.entries.items())
        case Commands():
            return "\n\n".join(
                (f"{text(line)}\n\n" if line else "") + f"```sh\n{command}\n```" for command, line in block.entries
            )
        case Tabled():
            return markdown(block.table)
        case Figure():
            return f"![{text(block.name)}]({block.file})\n\n*{text(block.caption)}*"


# HTML ----------------------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2933;--muted:#52606d;--line:#e4e7eb;--card:#fff;--page:#f5f7fa;--best:#0b6a7d;
--soft:#e6f4f6;--warn:#b45309;--code:#f0f2f5}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--muted:#a3aeba;--line:#35424f;--card:#1f2933;--page:#141a20;
--best:#7fe0ee;--soft:#153d45;--warn:#f0a43c;--code:#141a20}
figure.chart img{filter:invert(.88) hue-rotate(180deg)}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:2.4rem 0 .8rem}p{margin:0 0 1rem}
p.lead{color:var(--muted);margin:0 0 1.6rem;overflow-wrap:anywhere}
p.quiet{color:var(--muted);font-size:.85rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem 1.2rem;margin:0 0 1.2rem}
.scroll{overflow-x:auto;padding:0;width:max-content;min-width:100%;max-width:calc(100vw - 3rem);
position:relative;left:50%;transform:translateX(-50%)}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .55rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--muted);font-weight:600;vertical-align:bottom}
thead td,th.group{padding-bottom:.1rem;border-bottom:0}th.group{text-align:left;color:var(--ink)}
.first,th.group{border-left:1px solid var(--line)}tbody tr:last-child td{border-bottom:0}.text{text-align:left}
tbody td.text:first-child{font-weight:600}tr>:first-child{position:sticky;left:0;background:var(--card);z-index:1}
td.best{color:var(--best);background:var(--soft);font-weight:700}
figure{margin:0}figure img{max-width:100%;height:auto;display:block;margin:0 auto;border-radius:6px}
figure.images img{background:#fff}figcaption{color:var(--muted);font-size:.85rem;margin-top:.7rem}
ul{margin:0;padding-left:1.1rem}li{margin:.3rem 0;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(7rem,17rem) 1fr;gap:.4rem 1.2rem;margin:0;font-size:.9rem}
dt{color:var(--muted);overflow-wrap:anywhere}dd{margin:0;overflow-wrap:anywhere}
pre{margin:.35rem 0 .9rem;padding:.6rem .8rem;background:var(--code);border-radius:8px;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.8rem}pre:last-child{margin-bottom:0}.card>p{margin:0}
.warn{border-left:4px solid var(--warn)}
.grids{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:1.2rem}.grids .card{margin:0}
.samples img{image-rendering:pixelated}
@media(max-width:640px){dl{grid-template-columns:1fr;gap:.1rem}dd{margin-bottom:.6rem}}
"""


def to_html(title: str, lead: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML file: style and pictures inside, no script, nothing fetched, light and dark."""
    parts: list[str] = []
    samples: list[str] = []
    for block in blocks:
        if isinstance(block, Figure) and block.kind == "samples":
            samples.append(_html(block))
            continue
        if samples:
            parts.append(f"<div class=grids>{''.join(samples)}</div>")
            samples = []
        parts.append(_html(block))
    if samples:
        parts.append(f"<div class=grids>{''.join(samples)}</div>")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>gearshift: {html.escape(lead)}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p>{''.join(parts)}</main>"
        "</body></html>\n"
    )


def _html(block: Block) -> str:
    text = html.escape
    match block:
        case Heading():
            return f"<h2>{text(block.text)}</h2>"
        case Text():
            return f"<p{' class=quiet' if block.quiet else ''}>{text(block.text)}</p>"
        case Bullets():
            items = "".join(f"<li>{text(line)}</li>" for line in block.lines)
            return f'<div class="card{" warn" if block.warn else ""}"><ul>{items}</ul></div>'
        case Pairs():
            pairs = "".join(
                f"<dt>{text(key)}</dt><dd>{text(plain(value))}</dd>" for key, value in block.entries.items()
            )
            return f"<div class=card><dl>{pairs}</dl></div>"
        case Commands():
            lines = "".join(
                f"{f'<p>{text(line)}</p>' if line else ''}<pre>{text(command)}</pre>" for command, line in block.entries
            )
            return f"<div class=card>{lines}</div>"
        case Tabled():
            return f'<div class="card scroll">{html_table(block.table)}</div>'
        case Figure():
            source = "data:image/png;base64," + base64.b64encode(block.png).decode()
            return (
                f'<figure class="card {block.kind}"><img alt="{text(block.name)}" src="{source}">'
                f"<figcaption>{text(block.caption)}</figcaption></figure>"
            )
