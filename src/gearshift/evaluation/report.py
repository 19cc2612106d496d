"""The report of an evaluation: `metrics.json`, `report.md`, `report.html` (one file, images inside) and its figures.

Everything is generated from one dict that JSON can write, so the table, the figures and the numbers cannot disagree.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.evaluation import plots
from gearshift.evaluation.table import Row, best_rows, columns_of, format_table
from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write

_HOW_TO_READ = (
    "Every row draws its images from the same noise and the same labels, so rows differ only by what was computed.",
    "MACs are multiply-accumulates of the network over all calls, with guidance, exit heads and confidence heads; "
    "FLOPs would be twice that. Time was measured under the conditions below.",
    "PSNR and SSIM say how close the images are to those of the full computation; a dash under PSNR means that they "
    "are equal bit for bit.",
    "Fréchet distances (lower is better) hold between rows of this table. Only the one called fid is on the network of "
    "published FIDs; the others stand in where its weights are absent and cannot be held against published numbers.",
)


def write_report(
    folder: str | Path,
    results: Mapping[str, Any],
    samples: Mapping[str, np.ndarray],
    depths: Mapping[str, np.ndarray],
) -> Path:
    """Write the report into `folder` (made where it is missing) and return the path of `report.html`.

    results: `run`, `rows` (dicts with `name`, `policy`, `solver`, `calls`, `macs_per_image`, ... and metrics by their
        names; None where not measured), and optionally `protocol`, `conditions` (flat dicts), `warnings` (lines) and
        `unavailable` (dicts of `name`, `reason`, `fetch`).
    samples: by row name, uint8 [n, C, H, W] from the same noise. depths: by row name, integers [calls, samples],
    blocks run. Non-finite numbers are written as null. Raises ValueError for names that no row has, RunError when the
    disk refuses.
    """
    folder = Path(folder)
    rows: list[Row] = list(results["rows"])
    names = [str(row["name"]) for row in rows]
    unknown = sorted({*samples, *depths} - set(names))
    if unknown or len(set(names)) != len(names):
        raise ValueError(
            f"row names must be unique and cover samples and depths: rows {names}, without a row {unknown}"
        )
    figures = _figures(rows, samples, depths)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder} ({error.strerror or error}); name another folder") from error
    for file_name, (_, content) in figures.items():
        atomic_write(folder / file_name, content)
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(folder / "metrics.json", text + "\n")
    atomic_write(folder / "report.md", _markdown(results, rows, figures))
    atomic_write(folder / "report.html", _html(results, rows, figures))
    return folder / "report.html"


def _figures(
    rows: Sequence[Row], samples: Mapping[str, np.ndarray], depths: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, bytes]]:
    """File name -> (caption, PNG), in the order of the report."""
    figures: dict[str, tuple[str, bytes]] = {}
    if samples:
        caption = "Samples of every run; one column is one noise and one label."
        figures["comparison.png"] = (caption, plots.comparison_grid(samples, rows))
    key = plots.quality_key(rows)
    if key is not None:
        caption = f"Quality ({key}) against MACs and against measured time."
        figures["quality_cost.png"] = (caption, plots.quality_against_cost(rows, key))
    if depths:
        caption = (
            "Blocks run at each call: shade is the share of samples, the line their mean, dashes the 10th and 90th "
            "percentile; 0 is a call that was skipped."
        )
        figures["exits.png"] = (caption, plots.exits_over_time(depths))
    for number, row in enumerate(rows):
        if row["name"] in samples:
            grid = plots.sample_grid(samples[row["name"]])
            figures[f"samples_{number:02d}_{_slug(str(row['name']))}.png"] = (f"Samples: {row['name']}", grid)
    return figures


def _notes(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    titles = (("Protocol", "protocol"), ("Conditions of the timing", "conditions"))
    return [(title, results[key]) for title, key in titles if results.get(key)]


def _markdown(results: Mapping[str, Any], rows: Sequence[Row], figures: Mapping[str, tuple[str, bytes]]) -> str:
    parts = [f"# Evaluation of {results['run']}", format_table(rows, "markdown"), "Best values of a column are bold."]
    if results.get("warnings"):
        parts.append("\n".join(f"> {line}" for line in results["warnings"]))
    shown = [(name, caption) for name, (caption, _) in figures.items() if not name.startswith("samples_")]
    parts += [f"![{caption}]({name})\n\n*{caption}*" for name, caption in shown]
    parts.append("## How to read this\n\n" + "\n".join(f"- {line}" for line in _HOW_TO_READ))
    for title, entries in _notes(results):
        parts.append(f"## {title}\n\n" + "\n".join(f"- **{key}**: {_plain(value)}" for key, value in entries.items()))
    if results.get("unavailable"):
        lines = [f"- **{item['name']}**: {item['reason']}. Fetch: `{item['fetch']}`" for item in results["unavailable"]]
        parts.append("## Not measured\n\n" + "\n".join(lines))
    grids = [(name, caption) for name, (caption, _) in figures.items() if name.startswith("samples_")]
    if grids:
        parts.append("## Samples\n\n" + "\n\n".join(f"{caption}\n\n![{caption}]({name})" for name, caption in grids))
    return "\n\n".join(parts) + "\n"


_STYLE = """
:root{--ink:#1f2933;--muted:#616e7c;--line:#e4e7eb;--card:#fff;--page:#f5f7fa;--best:#0b7285;--soft:#e6f4f6}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--muted:#9aa5b1;--line:#323f4b;--card:#1f2933;--page:#141a20;
--best:#66d9e8;--soft:#153d45}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.1rem;margin:2.2rem 0 .7rem}p.lead{color:var(--muted);margin:0 0 1.6rem;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem 1.2rem;margin:0 0 1.2rem}
.scroll{overflow-x:auto;padding:0}table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.55rem .8rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--muted);font-weight:600;white-space:normal;vertical-align:bottom}tr:last-child td{border-bottom:0}
.text{text-align:left}td:first-child{font-weight:600}.best{color:var(--best);background:var(--soft);font-weight:700}
figure{margin:0}figure img{max-width:100%;height:auto;display:block;margin:0 auto;background:#fff;border-radius:8px}
figcaption{color:var(--muted);font-size:.85rem;margin-top:.6rem}ul{margin:0;padding-left:1.1rem}li{margin:.3rem 0}
dl{display:grid;grid-template-columns:minmax(8rem,auto) 1fr;gap:.35rem 1.2rem;margin:0;font-size:.9rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}code{font-size:.85em;overflow-wrap:anywhere}
.warn{border-left:4px solid #e67700}
.grids{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:1.2rem}
img.pixel{image-rendering:pixelated}
"""


def _html(results: Mapping[str, Any], rows: Sequence[Row], figures: Mapping[str, tuple[str, bytes]]) -> str:
    run = html.escape(str(results["run"]))
    parts = [f"<h1>Evaluation</h1><p class=lead>{run}</p>", f'<div class="card scroll">{_html_table(rows)}</div>']
    if results.get("warnings"):
        parts.append('<div class="card warn"><ul>' + _items(results["warnings"]) + "</ul></div>")
    grids: list[str] = []
    for name, (caption, content) in figures.items():
        source = "data:image/png;base64," + base64.b64encode(content).decode()
        text = html.escape(caption)
        is_grid = name.startswith("samples_")
        pixel = " class=pixel" if is_grid else ""
        figure = f'<figure class=card><img{pixel} alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
        (grids if is_grid else parts).append(figure)
    parts.append("<h2>How to read this</h2><div class=card><ul>" + _items(_HOW_TO_READ) + "</ul></div>")
    for title, entries in _notes(results):
        pairs = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(_plain(v))}</dd>" for k, v in entries.items())
        parts.append(f"<h2>{title}</h2><div class=card><dl>{pairs}</dl></div>")
    if results.get("unavailable"):
        lines = "".join(
            f"<li><b>{html.escape(item['name'])}</b>: {html.escape(item['reason'])}. "
            f"Fetch: <code>{html.escape(item['fetch'])}</code></li>"
            for item in results["unavailable"]
        )
        parts.append(f"<h2>Not measured</h2><div class=card><ul>{lines}</ul></div>")
    if grids:
        parts.append(f"<h2>Samples</h2><div class=grids>{''.join(grids)}</div>")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>gearshift: {run}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _html_table(rows: Sequence[Row]) -> str:
    columns = columns_of(rows)
    best = [best_rows(rows, column) for column in columns]
    side = [" class=text" if column.kind == "text" else "" for column in columns]
    head = "".join(f"<th{s}>{html.escape(c.heading)}</th>" for c, s in zip(columns, side, strict=True))
    lines = []
    for r, row in enumerate(rows):
        classes = [" class=best" if r in best[k] else side[k] for k in range(len(columns))]
        cells = "".join(
            f"<td{c}>{html.escape(column.cell(row))}</td>" for column, c in zip(columns, classes, strict=True)
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _items(lines: Sequence[str]) -> str:
    return "".join(f"<li>{html.escape(line)}</li>" for line in lines)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(inner) for inner in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """The same structure with non-finite floats as None and NumPy numbers as Python's: what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _slug(name: str) -> str:
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return "-".join(part for part in kept.split("-") if part)
