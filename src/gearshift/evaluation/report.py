"""The report of an evaluation: `metrics.json`, `report.md`, `report.html` (one file, images inside), tables for papers
(`table.tex`, `table.md`) and its figures.

Everything is generated from one dict that JSON can write, so the tables, the figures and the numbers cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.evaluation import figures, pareto, plots
from gearshift.evaluation.calibration_plots import FILES as CALIBRATION
from gearshift.evaluation.calibration_plots import calibration_blocks, calibration_figures
from gearshift.evaluation.document import (
    Block,
    Bullets,
    Commands,
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
from gearshift.evaluation.savings import contests
from gearshift.evaluation.speed_table import classes_table, latency_table, scaling_table, spread_table, throughput_table
from gearshift.evaluation.stage_table import cost_blocks
from gearshift.evaluation.table import IDENTICAL, NOT_MEASURED, Row, is_distance, is_number, results_table
from gearshift.evaluation.tabular import Table, latex, markdown
from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write, slug

_FIGURES = (
    "quality_cost.png",
    "fidelity_cost.png",
    "comparison.png",
    "differences.png",
    "exits.png",
    "distributions.png",
    "samples_[0-9][0-9]_*.png",
    *CALIBRATION,
)
"""Every file that a figure may be in."""


@dataclass(frozen=True)
class Pictures:
    """What the figures of a report are drawn from; everything is by row name and may be left out.

    Attributes:
        samples: uint8 [n <= 100, C, H, W], the same noise and label at one position of every row.
        depths: integers [calls, branches * samples], blocks run; 0 where the embedding alone was read out.
        called: bools beside them, where the network ran; rows that are left out were called every time.
        reused: of the blocks run, those that took something from memory.
        per_image: {"macs_per_image": [N], "psnr_to_full": [N] (nan where the images are identical), "mean_depth": [N]}.
        full_of: the row of full compute it is compared with.
    """

    samples: Mapping[str, np.ndarray] = field(default_factory=dict)
    depths: Mapping[str, np.ndarray] = field(default_factory=dict)
    called: Mapping[str, np.ndarray] = field(default_factory=dict)
    reused: Mapping[str, np.ndarray] = field(default_factory=dict)
    per_image: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    full_of: Mapping[str, str] = field(default_factory=dict)


def write_report(folder: str | Path, results: Mapping[str, Any], pictures: Pictures) -> Path:
    """Write the report into `folder` (made where it is missing) and return the path of `report.html`.

    results: `run` and `rows` (dicts with `name` and whatever was measured; None where not), and optionally `protocol`,
        `conditions`, `versions` (flat dicts), `scaling`, `stages`, `training`, `calibration`, `command`, `warnings` and
        `timing_warnings` (lines) and `unavailable` (dicts of `name`, `reason`, `fetch`). Non-finite numbers are written
        as null.

    Raises ValueError for row names that are not unique and for pictures of names that no row has, RunError when the
    disk refuses.
    """
    folder = Path(folder)
    rows: list[Row] = list(results["rows"])
    names = [str(row["name"]) for row in rows]
    named = (pictures.samples, pictures.depths, pictures.called, pictures.reused, pictures.per_image, pictures.full_of)
    pictured = {name for one in named for name in one}
    unknown = sorted({*pictured, *pictures.full_of.values()} - set(names))
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"row names must be unique and cover the pictures: rows {names}, without a row {unknown}")
    results = strict(results)
    rows = list(results["rows"])
    table = results_table(rows)
    drawn = _figures(rows, pictures)
    heads = calibration_figures(results["calibration"]) if results.get("calibration") else []
    blocks = _blocks(results, rows, table, drawn, heads)
    drawn += heads
    run, name = str(results["run"]), results.get("name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder} ({error.strerror or error}); name another folder") from error
    for file in _FIGURES:
        for left in folder.glob(file):  # of an earlier report
            if left.name not in {figure.file for figure in drawn}:
                left.unlink(missing_ok=True)
    for figure in drawn:
        atomic_write(folder / figure.file, figure.png)
    atomic_write(folder / "metrics.json", json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write(folder / "table.tex", paper_table(table, results))
    atomic_write(folder / "table.md", markdown(table) + "\n")
    atomic_write(folder / "report.md", to_markdown(f"Evaluation of {run}", blocks))
    atomic_write(folder / "report.html", to_html(f"Evaluation {name}" if name else "Evaluation", run, blocks))
    return folder / "report.html"


def paper_table(table: Table, results: Mapping[str, Any]) -> str:
    """A LaTeX table for a paper, with the protocol of its numbers as comments."""
    notes = {"evaluation of": results.get("run"), "command": results.get("command"), **(results.get("protocol") or {})}
    comments = [f"% {key}: {' '.join(plain(value).split())}" for key, value in notes.items() if value is not None]
    return "\n".join(["% needs \\usepackage{booktabs}; best values are bold", *comments, latex(table)]) + "\n"


# Figures -------------------------------------------------------------------------------------------------------------


def _figures(rows: Sequence[Row], pictures: Pictures) -> list[Figure]:
    """In the order of the report; sample grids last."""
    found: list[Figure] = []
    key = pareto.quality_key(rows)
    if key is not None:
        found.append(cost_figure("quality_cost.png", rows, key))
    if key != "psnr_to_full" and sum(is_number(row.get("psnr_to_full")) for row in rows) > 1:
        found.append(cost_figure("fidelity_cost.png", rows, "psnr_to_full"))
    if pictures.samples:
        caption = "Samples of every run; one column is one noise and one label."
        grid = plots.comparison_grid(pictures.samples, rows)
        found.append(Figure("comparison.png", "Samples side by side", caption, grid, "images"))
        differences = plots.difference_grid(pictures.samples, pictures.full_of)
        if differences is not None:
            png, factor = differences
            caption = (
                f"Absolute difference to full compute from the same noise, amplified {factor}-fold and cut at white; "
                "means are over the images shown, before amplification."
            )
            found.append(Figure("differences.png", "Differences to full compute", caption, png, "images"))
    if pictures.depths:
        caption = (
            "Blocks run at each call: shade is the share of samples, the line the mean of those for which the network "
            "ran, dashes their 10th and 90th percentile. Grey blocks are skipped calls (pale: skipped by some samples)."
        )
        if any(reused.any() for reused in pictures.reused.values()):
            caption += " Hatched from below: so many of the blocks took something from memory, on average."
        exits = figures.exits_over_time(pictures.depths, pictures.reused, pictures.called)
        found.append(Figure("exits.png", "Exits over time", caption, exits))
    spread = figures.distributions(pictures.per_image, rows) if pictures.per_image else None
    if spread is not None:
        caption = "Histograms over images, each scaled to its own peak; the upright line and the number are the median."
        found.append(Figure("distributions.png", "Spread over images", caption, spread))
    for number, row in enumerate(rows):
        name = str(row["name"])
        if name in pictures.samples:
            file = f"samples_{number:02d}_{slug(name)}.png"
            found.append(Figure(file, f"Samples: {name}", name, plots.sample_grid(pictures.samples[name]), "samples"))
    return found


def cost_figure(file: str, rows: Sequence[Row], key: str, **marks: Sequence[str] | None) -> Figure:
    """`key` against MACs and against measured time."""
    caption = (
        f"{pareto.measure_name(key)} against MACs and against measured time. What lies in the shaded part is not on "
        "the front: some row is as cheap and as good. Hollow points are full compute at all its steps and at fewer, "
        "one dashed line per grid."
    )
    missing = [str(row["name"]) for row in rows if not is_number(row.get(key))]
    if missing:
        why = (
            "are equal to full compute (no finite PSNR) or were not measured" if "psnr" in key else "were not measured"
        )
        caption += f" Not drawn, because they {why}: {', '.join(missing)}."
    return Figure(file, f"{key} against cost", caption, pareto.quality_against_cost(rows, key, **marks))


# Text ----------------------------------------------------------------------------------------------------------------


def _blocks(
    results: Mapping[str, Any], rows: Sequence[Row], table: Table, drawn: Sequence[Figure], heads: Sequence[Figure]
) -> list[Block]:
    blocks: list[Block] = [Tabled(table), Text(legend(rows), quiet=True)]
    added = baseline_lines(rows)
    blocks += [Text("Added as baselines, at the MACs of what each is set against:"), Bullets(added)] if added else []
    judged = contests(rows)
    blocks += [Text("Whether what they are set against beats them:"), Bullets(judged)] if judged else []
    for key in ("warnings", "timing_warnings"):
        if results.get(key):
            blocks.append(Bullets(results[key], warn=True))
    blocks += [figure for figure in drawn if figure.kind != "samples"]
    blocks += calibration_blocks(results["calibration"], heads) if heads else []
    blocks += _details(results, rows)
    blocks += [Heading("How to read this"), Bullets(how_to_read(rows))]
    if results.get("protocol"):
        blocks += [Heading("Protocol of every number"), Pairs(results["protocol"])]
    blocks.append(Heading("Conditions of the timing"))
    blocks.append(Pairs(results["conditions"]) if results.get("conditions") else Text("Times were not measured."))
    if results.get("command"):
        blocks += [Heading("Command"), Commands([(str(results["command"]), "")])]
    if results.get("versions"):
        blocks += [Heading("Versions"), Pairs(results["versions"])]
    if results.get("unavailable"):
        missing = [(str(m.get("fetch", "")), f"{m['name']}: {m.get('reason', '')}") for m in results["unavailable"]]
        blocks += [Heading("Not measured")]
        blocks += [Commands([entry for entry in missing if entry[0]])] if any(fetch for fetch, _ in missing) else []
        blocks += [Bullets([line for fetch, line in missing if not fetch])] if not all(f for f, _ in missing) else []
    grids = [figure for figure in drawn if figure.kind == "samples"]
    return [*blocks, Heading("Samples"), *grids] if grids else blocks


def _details(results: Mapping[str, Any], rows: Sequence[Row]) -> list[Block]:
    """The small tables. What nobody measured says so."""
    blocks: list[Block] = [Heading("Speed in detail")]
    entries = (
        ("Images per second by batch size (speed-up against full compute)", throughput_table(rows)),
        ("Latency at batch 1, first pass (not in any other time) and peak memory", latency_table(rows)),
        ("Scaling over devices and nodes", scaling_table(results.get("scaling"))),
    )
    for title, table in entries:
        blocks += [Text(f"{title}:"), Tabled(table)] if table else [Text(f"{title}: {NOT_MEASURED}.")]
    for title, table in (("Spread over images", spread_table(rows)), ("Label agreement by class", classes_table(rows))):
        if table:
            blocks += [Heading(title), Tabled(table)]
    return blocks + cost_blocks(results)


def legend(rows: Sequence[Row]) -> str:
    """What the marks in the table mean."""
    parts = ["Best values of a column are brought out; arrows point to the better side."]
    repeats = sorted({int(row["repeats"]) for row in rows if row.get("sd") and is_number(row.get("repeats"))})
    if any(row.get("sd") for row in rows):
        number = f"{', '.join(map(str, repeats))} " if repeats else ""
        parts.append(f"± is one standard deviation over {number}repeats with disjoint images.")
    parts.append("MACs are multiply-accumulates of the network; FLOPs = 2 MACs.")
    if any("psnr_to_full" in row for row in rows):
        parts.append(f'"{IDENTICAL}": equal to full compute bit for bit; such rows cannot be best there.')
    if any(row.get("time_saved") is not None and row.get("saving_realised") is None for row in rows):
        parts.append("– where no MACs are saved, of which time could be a share.")
    return " ".join(parts)


def baseline_lines(rows: Sequence[Row]) -> list[str]:
    """What each baseline is, and whose MACs it has."""
    what = {
        "fewer_steps": "full compute with fewer steps",
        "other_grid": "full compute with fewer steps on another grid",
        "hurry": "attention taken from memory at the last calls",
        "deep_features": "deep features taken from memory between computed calls",
        "fixed_depth": "one exit at every call, nothing asked",
        "duodiff": "a smaller network trained from scratch at the first calls",
        "small_network": "a smaller network trained from scratch at every call, at its own MACs",
    }
    lines = []
    for row in rows:
        if row.get("equal_macs_to") is not None:
            kind = what.get(str(row.get("baseline")), what["fewer_steps"])
            note = f" ({row['note']})" if row.get("note") else ""
            lines.append(f"{row['name']}: {kind}, against {row['equal_macs_to']}{note}")
    return lines


def how_to_read(rows: Sequence[Row]) -> list[str]:
    """What the numbers of these rows are, and what they are not."""
    keys = {key for row in rows for key, value in row.items() if value is not None}
    lines = [
        "Rows of one solver draw their images from the same noise and the same labels, so they differ only by what was "
        "computed.",
        "MACs count the network over all calls, with both branches of guidance, exit heads and confidence heads. "
        "Full-network equivalents are these MACs over those of one evaluation of the plain network.",
        "Savings, speed-ups and closeness to full are against full compute with the same solver at all its steps.",
    ]
    if "equal_macs_to" in keys:
        lines.append(
            "Baselines are what the MACs of the best rows buy without the method: of the best row that leaves early, "
            "and of the best that skips calls or reuses. Steps are whole, so they rather cost a little less than more. "
            "A method that does not beat them has saved nothing that fewer steps, a fixed schedule or a smaller "
            "network would not."
        )
    if "kept_bytes_per_image" in keys and any(row.get("kept_bytes_per_image") for row in rows):
        lines.append(
            "Kept per image is the most that lies in memory for later calls at a time, both branches of guidance "
            "together; the held prediction of skipped calls is not in it."
        )
    if "images_per_s" in keys:
        lines.append(
            "MACs saved are not time saved: times were measured, under the conditions below, and hold for those."
        )
    if "psnr_to_full" in keys or "ssim_to_full" in keys:
        lines.append(
            "PSNR (in dB) and SSIM say how close images are to those of full compute, not how good they are. Global "
            "PSNR is that of the mean squared error over all images, per-image PSNR a mean over images."
        )
    if any(is_distance(key) or key.startswith("kd_") for key in keys):
        lines.append(
            "Only what is called FID, sFID, KID or Inception Score is on the network of published values. Distances "
            "named fd_ or kd_ hold between rows measured alike; they cannot be held against published numbers."
        )
    if any(is_distance(key) for key in keys):
        lines.append("Fréchet distances are biased upwards at few images: compare them at the same number only.")
    return lines
