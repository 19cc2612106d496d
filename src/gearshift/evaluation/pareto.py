"""Quality against cost: every row over its MACs and over its measured time, with the front of rows nobody beats.

The trivial baselines (full compute, and full compute with fewer steps) are hollow: an adaptive method has to stand
before the line they draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gearshift.evaluation.placing import label_points
from gearshift.evaluation.plots import (
    INK,
    MUTED,
    count_tick,
    family,
    fit,
    is_baseline,
    looks,
    new_figure,
    text_width,
    tidy,
    to_png,
)
from gearshift.evaluation.table import Row, direction, is_distance, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FRONT, _BEATEN = "#e0a030", "#fdf6e7"
_NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "Inception Score",
    "psnr_to_full": "PSNR to full compute, global [dB]",
    "ssim_to_full": "SSIM to full compute",
    "label_agreement": "agreement with the requested label",
}
Point = tuple[int, float, float]  # number of the row, cost, quality


def quality_key(rows: Sequence[Row]) -> str | None:
    """The measure to draw: FID, else a distance on trained features, else any distance, else agreement, else PSNR,
    else whatever has a better side. None where no row has any."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if direction(key) and is_number(value)))
    if all(row.get("identical_to_full") == 1 for row in rows):  # full compute alone is as close to itself as can be
        keys = [key for key in keys if "_to_full" not in key]
    order = [
        "fid",
        *(key for key in keys if key.startswith("fd_classifier")),
        *(key for key in keys if key.startswith("fd_") and not key.startswith("fd_random")),
        *(key for key in keys if is_distance(key)),
        "label_agreement",
        "psnr_to_full",
        *keys,
    ]
    return next((key for key in order if key in keys), None)


def measure_name(key: str) -> str:
    """A measure as it stands on an axis."""
    return _NAMES.get(key, key)


def front(points: Sequence[tuple[float, float]], better: int) -> list[int]:
    """Numbers of the points (cost, quality) that no other beats, cheapest first.

    A point is beaten by one that costs no more and is no worse, and differs in one of the two. better: +1 or -1.
    """

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and better * b >= better * y and (a, b) != (x, y) for a, b in points)

    return sorted((k for k, (x, y) in enumerate(points) if not beaten(x, y)), key=lambda k: points[k][0])


def quality_against_cost(
    rows: Sequence[Row],
    key: str,
    *,
    quality_marks: Sequence[str] | None = None,
    time_marks: Sequence[str] | None = None,
) -> bytes:
    """Two panels: the measure `key` over MACs per image and over measured time per image, as a PNG.

    Rows of one policy family (and solver) are joined, the front is a staircase, bars are ± one standard deviation.
    quality_marks, time_marks: one mark per row where not all values or times are comparable; every mark has its own
    front. Rows without the measure or without a cost are not drawn.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator

    better = direction(key)
    styles = looks(rows)
    panels: list[tuple[str, list[Point], Sequence[str]]] = [
        (
            "MACs per image",
            _points(rows, key, lambda row: row.get("macs_per_image")),
            quality_marks or [""] * len(rows),
        ),
        (
            "measured time per image [ms]",
            _points(rows, key, _milliseconds),
            [
                f"{a}/{b}"
                for a, b in zip(quality_marks or [""] * len(rows), time_marks or [""] * len(rows), strict=True)
            ],
        ),
    ]
    drawn = sorted({number for _, points, _ in panels for number, _, _ in points})
    names = {number: f"{number + 1}  {rows[number]['name']}" for number in drawn}
    extra = 2 if any(is_baseline(rows[number]) for number in drawn) else 1
    widest = max([text_width(fit(text, 5.0, 8.5), 8.5) for text in names.values()] + [1.0])
    columns = max(1, min(4, len(drawn) + extra, int(10.6 / (widest + 0.55))))
    legend_lines = math.ceil(len(drawn) / columns)
    below = 0.9 + 0.2 * legend_lines
    figure = new_figure(11.0, 4.0 + below)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (label, points, _) in zip((left, right), panels, strict=True):
        tidy(axes)
        axes.set_xlabel(label)
        _draw_points(axes, rows, points, styles, key)
        axes.margins(x=0.1, y=0.14)
        if not points:
            axes.set_xticks([])
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=MUTED)
        costs = [x for _, x, _ in points]
        if costs and min(costs) > 0 and max(costs) > 12 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(count_tick))
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        if points and label.startswith("MACs"):
            axes.xaxis.set_major_formatter(FuncFormatter(count_tick))
    values = [y for _, points, _ in panels for _, _, y in points]
    if better < 0 and values and min(values) > 0 and max(values) > 10 * min(values):
        # One bad row would press all the others onto a line.
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        left.yaxis.set_major_formatter(FuncFormatter(count_tick))
        left.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    side = "higher" if better > 0 else "lower"
    left.set_ylabel(fit(f"{measure_name(key)} ({side} is better)", 3.6, 9.5))
    figure.suptitle(
        "Closeness to full compute against cost" if key.endswith("_to_full") else "Quality against cost",
        x=0.02,
        ha="left",
        fontsize=12,
        fontweight="bold",
        color=INK,
    )
    bottom, top = below / figure.get_figheight(), 1 - 0.45 / figure.get_figheight()
    figure.subplots_adjust(left=0.085, right=0.985, top=top, bottom=bottom, wspace=0.06)
    for axes, (_, points, marks) in zip((left, right), panels, strict=True):
        _draw_fronts(axes, points, marks, better)
    handles = [
        Line2D(
            [],
            [],
            color=styles[number][0],
            marker=styles[number][1],
            markerfacecolor="white" if is_baseline(rows[number]) else styles[number][0],
            linestyle="none",
            markersize=7,
            label=fit(names[number], 5.0, 8.5),
        )
        for number in drawn
    ]
    keys = [Line2D([], [], color=_FRONT, linewidth=2.4, label="front: no other row is as cheap and as good")]
    if extra == 2:
        keys.append(
            Line2D(
                [],
                [],
                color=MUTED,
                marker="o",
                markerfacecolor="white",
                linestyle=(0, (3, 2)),
                label="hollow: trivial baseline (full compute, fewer steps)",
            )
        )
    common: dict[str, Any] = dict(frameon=False, fontsize=8.5, labelcolor=INK, borderaxespad=0, borderpad=0)
    tall = figure.get_figheight()
    figure.legend(handles=keys, loc="upper center", ncols=2, bbox_to_anchor=(0.53, (below - 0.5) / tall), **common)
    figure.legend(handles=handles, loc="lower center", ncols=columns, bbox_to_anchor=(0.53, 0.08 / tall), **common)
    for axes, (_, points, _) in zip((left, right), panels, strict=True):
        sds = {number: sd for number, _, _ in points if (sd := _deviation(rows[number], key))}
        bars = [(x, y - sds[number], x, y + sds[number]) for number, x, y in points if number in sds]
        label_points(axes, [(str(number + 1), x, y) for number, x, y in points], bars)
    return to_png(figure)


def _draw_points(
    axes: Axes, rows: Sequence[Row], points: Sequence[Point], styles: Sequence[tuple[str, str]], key: str
) -> None:
    """Markers, lines through the rows of one family, and bars of one standard deviation."""
    joined: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        row = rows[point[0]]
        # Full compute is one line over its steps on one grid; a policy is one line over its thresholds at one number of
        # steps.
        steps = row.get("grid") if is_baseline(row) else row.get("steps")
        joined.setdefault((family(row), row.get("solver"), steps, row.get("evaluation")), []).append(point)
    for members in joined.values():
        members.sort(key=lambda point: point[1:])
        row, (colour, marker) = rows[members[0][0]], styles[members[0][0]]
        plain = is_baseline(row)
        axes.plot(
            [x for _, x, _ in members],
            [y for _, _, y in members],
            color=colour,
            marker=marker,
            markersize=7.5,
            markerfacecolor="white" if plain else colour,
            markeredgewidth=1.6 if plain else 1.0,
            linewidth=1.3,
            linestyle=(0, (3, 2)) if plain else "-",
            zorder=3,
        )
        for number, x, y in members:
            sd = _deviation(rows[number], key)
            if sd:
                axes.plot([x, x], [y - sd, y + sd], color=colour, linewidth=1.2, zorder=2.5, solid_capstyle="butt")


def _draw_fronts(axes: Axes, points: Sequence[Point], marks: Sequence[str], better: int) -> None:
    """The front of every mark as a staircase; what lies behind the only one is shaded."""
    limits_x, limits_y = axes.get_xlim(), axes.get_ylim()
    worst = limits_y[0] if better > 0 else limits_y[1]
    groups = list(dict.fromkeys(marks[number] for number, _, _ in points))
    alone = len(groups) == 1
    for mark in groups:
        own = [(x, y) for number, x, y in points if marks[number] == mark]
        steps = [own[k] for k in front(own, better)]
        xs = [steps[0][0], *(x for x, _ in steps), limits_x[1]]
        ys = [worst, *(y for _, y in steps), steps[-1][1]]
        axes.step(xs, ys, where="post", color=_FRONT, linewidth=2.4, alpha=0.8, zorder=1.5, solid_joinstyle="round")
        if alone:
            axes.fill_between(xs, ys, worst, step="post", color=_BEATEN, linewidth=0, zorder=0)
    axes.set_xlim(limits_x)
    axes.set_ylim(limits_y)


def _points(rows: Sequence[Row], key: str, cost: Any) -> list[Point]:
    found = []
    for number, row in enumerate(rows):
        x = cost(row)
        if is_number(row.get(key)) and is_number(x):
            found.append((number, float(x), float(row[key])))
    return found


def _deviation(row: Row, key: str) -> float:
    """Standard deviation of a measure over repeats; 0 where there is none."""
    sd = (row.get("sd") or {}).get(key)
    return float(sd) if sd is not None and is_number(sd) else 0.0


def _milliseconds(row: Row) -> float | None:
    speed = row.get("images_per_s")
    return 1000.0 / float(speed) if speed else None
