"""Figures of a report: sample grids, quality against cost, and where samples leave over time.

Drawn with matplotlib's Agg canvas through its object interface, so no window system is needed and no global state of
`pyplot` is touched. Every function returns the bytes of a PNG.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gearshift.evaluation.table import Row, format_count, format_number, is_distance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#1f2933"
_MUTED = "#7b8794"
_GRID = "#e4e7eb"
_COLOURS = ("#334e68", "#d9480f", "#0b7285", "#862e9c", "#2b8a3e", "#c2255c", "#e67700", "#364fc7")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_HIGHER_IS_BETTER = ("psnr_to_full", "label_agreement", "ssim_to_full")
_LABELS = {
    "psnr_to_full": "PSNR to full compute [dB]",
    "ssim_to_full": "SSIM to full compute",
    "label_agreement": "agreement with the requested label",
}


def sample_grid(images: np.ndarray, columns: int = 10) -> bytes:
    """uint8 [n, C, H, W] as a bare grid, enlarged by whole pixels so that nothing is smoothed."""
    from PIL import Image

    n, _, height, width = images.shape
    columns = min(columns, n)
    scale = max(1, 64 // height)
    rows, gap = math.ceil(n / columns), 3
    tall, wide = height * scale, width * scale
    canvas = np.full((rows * (tall + gap) + gap, columns * (wide + gap) + gap, 3), 255, dtype=np.uint8)
    for k, image in enumerate(images):
        top, left = gap + (k // columns) * (tall + gap), gap + (k % columns) * (wide + gap)
        canvas[top : top + tall, left : left + wide] = _rgb(image).repeat(scale, axis=0).repeat(scale, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, format="PNG")
    return buffer.getvalue()


def comparison_grid(samples: Mapping[str, np.ndarray], rows: Sequence[Row], columns: int = 12) -> bytes:
    """One line of images per run, the same column from the same noise: what a policy changed is seen down a column."""
    names = [str(row["name"]) for row in rows if row["name"] in samples]
    by_name = {str(row["name"]): row for row in rows}
    count = min(columns, *(len(samples[name]) for name in names))
    line = 0.62
    figure = _figure(2.9 + line * count, line * len(names) + 0.3)
    axes = figure.add_axes(
        (2.8 / figure.get_figwidth(), 0.0, 1 - 2.85 / figure.get_figwidth(), 1 - 0.28 / figure.get_figheight())
    )
    height, width = samples[names[0]].shape[2:]
    gap = max(1, height // 8)
    canvas = np.full((len(names) * (height + gap), count * (width + gap), 3), 255, dtype=np.uint8)
    for r, name in enumerate(names):
        for k in range(count):
            top, left = r * (height + gap) + gap // 2, k * (width + gap) + gap // 2
            canvas[top : top + height, left : left + width] = _rgb(samples[name][k])
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for r, name in enumerate(names):
        saved = by_name[name].get("macs_saved")
        note = "" if saved is None else f"{100 * saved:.0f} % of MACs saved" if saved > 0.0005 else "full compute"
        y = 1 - (r + 0.5) / len(names)
        axes.text(
            -0.012,
            y + 0.16 / len(names),
            name,
            transform=axes.transAxes,
            ha="right",
            va="center",
            fontsize=9,
            color=_INK,
        )
        axes.text(
            -0.012,
            y - 0.17 / len(names),
            note,
            transform=axes.transAxes,
            ha="right",
            va="center",
            fontsize=7.5,
            color=_MUTED,
        )
    axes.set_title("same noise down every column", loc="left", fontsize=8.5, color=_MUTED, pad=4)
    return _png(figure)


def quality_key(rows: Sequence[Row]) -> str | None:
    """The measure to draw: FID, else a distance on trained features, else any distance, else agreement, else PSNR."""
    keys = [key for row in rows for key, value in row.items() if value is not None]
    order = ["fid", *(k for k in keys if k.startswith("fd_classifier")), *(k for k in keys if is_distance(k))]
    return next((key for key in [*order, "label_agreement", "psnr_to_full"] if key in keys), None)


def quality_against_cost(rows: Sequence[Row], key: str) -> bytes:
    """Two panels: the measure `key` over MACs per image and over measured time per image. Runs of one policy are
    joined."""
    from matplotlib.lines import Line2D

    figure = _figure(11.0, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    families = list(dict.fromkeys(_family(row) for row in rows))
    looks = {name: (_COLOURS[k % len(_COLOURS)], _MARKERS[k % len(_MARKERS)]) for k, name in enumerate(families)}
    better = "higher" if key in _HIGHER_IS_BETTER else "lower"
    panels: tuple[tuple[Axes, str, list[tuple[Row, float]]], ...] = (
        (left, "MACs per image", _points(rows, key, lambda row: row.get("macs_per_image"))),
        (right, "measured time per image [ms]", _points(rows, key, _milliseconds)),
    )
    for axes, label, points in panels:
        _tidy(axes)
        axes.set_xlabel(label)
        for family in families:
            colour, marker = looks[family]
            xy = sorted((x, float(row[key])) for row, x in points if _family(row) == family)
            if xy:
                axes.plot(*zip(*xy, strict=True), color=colour, marker=marker, markersize=7, linewidth=1.4, alpha=0.9)
        axes.margins(x=0.1, y=0.14)
        if not points:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_MUTED)
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    if is_distance(key) and min(values) > 0 and max(values) > 10 * min(values):
        # One bad row would press all the others onto a line.
        left.set_yscale("log")
        left.yaxis.set_major_formatter(lambda value, _: format_number(value))
    left.xaxis.set_major_formatter(lambda value, _: format_count(value))
    left.set_ylabel(f"{_LABELS.get(key, key)} ({better} is better)")
    drawn = {id(row) for _, _, points in panels for row, _ in points}
    handles = [
        Line2D([], [], color=looks[_family(row)][0], marker=looks[_family(row)][1], label=f"{number}  {row['name']}")
        for number, row in enumerate(rows, start=1)
        if id(row) in drawn
    ]
    lines = math.ceil(len(handles) / 4)
    figure.set_figheight(4.3 + 0.2 * lines)
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=8, labelcolor=_INK)
    figure.suptitle("Quality against cost", x=0.02, ha="left", fontsize=12, fontweight="bold", color=_INK)
    bottom, top = (0.68 + 0.2 * lines) / figure.get_figheight(), 1 - 0.45 / figure.get_figheight()
    figure.subplots_adjust(left=0.075, right=0.985, top=top, bottom=bottom, wspace=0.06)
    numbers = {id(row): str(number) for number, row in enumerate(rows, start=1)}
    for axes, _, points in panels:
        _label_points(axes, [(numbers[id(row)], x, float(row[key])) for row, x in points])
    return _png(figure)


def exits_over_time(depths: Mapping[str, np.ndarray]) -> bytes:
    """One panel per run: the share of samples that left at each depth (shade) at each call, their mean and 10th and
    90th percentiles.

    `depths[name]` holds integers [calls, samples]: blocks run, 0 where the network was not called.
    """
    columns = min(3, len(depths))
    lines = math.ceil(len(depths) / columns)
    figure = _figure(3.9 * columns + 0.8, 2.6 * lines + 0.7)
    deepest = max(1, *(int(depth.max()) for depth in depths.values()))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    shade = None
    for axes, (name, depth) in zip(grid.flat, depths.items(), strict=False):
        calls = np.arange(1, len(depth) + 1)
        share = np.stack([(depth == d).mean(axis=1) for d in range(deepest + 1)])
        _tidy(axes)
        axes.grid(False)
        shade = axes.pcolormesh(
            np.arange(len(depth) + 1) + 0.5,
            np.arange(deepest + 2) - 0.5,
            share,
            cmap="Blues",
            vmin=0,
            vmax=1,
            rasterized=True,
        )
        low, high = np.percentile(depth, [10, 90], axis=1)
        for edge in (low, high):
            axes.plot(calls, edge, color=_COLOURS[1], linewidth=0.9, linestyle=(0, (2, 1.5)), drawstyle="steps-mid")
        axes.plot(calls, depth.mean(axis=1), color=_COLOURS[1], linewidth=1.8, drawstyle="steps-mid")
        axes.set_title(name, fontsize=9, loc="left", color=_INK)
        axes.set_ylim(-0.5, deepest + 0.5)
        axes.set_xlim(0.5, len(depth) + 0.5)
    for axes in list(grid.flat)[len(depths) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("network call (noise → data)")
    for axes in grid[:, 0]:
        axes.set_ylabel("blocks run")
    figure.suptitle("Exits over time", x=0.02, ha="left", fontsize=12, fontweight="bold", color=_INK)
    bottom, top = 0.52 / figure.get_figheight(), 1 - 0.68 / figure.get_figheight()
    figure.subplots_adjust(
        left=0.62 / figure.get_figwidth(), right=1 - 0.85 / figure.get_figwidth(), bottom=bottom,
        top=top, hspace=0.45, wspace=0.1,
    )  # fmt: skip
    if shade is not None:
        strip = figure.add_axes((1 - 0.7 / figure.get_figwidth(), bottom, 0.12 / figure.get_figwidth(), top - bottom))
        figure.colorbar(shade, cax=strip, label="share of samples")
        strip.tick_params(colors=_MUTED, labelsize=8)
        strip.yaxis.label.set(color=_INK, size=9)
    return _png(figure)


# Offsets in points at which the number of a point may stand, the preferred first.
_SIDES = ((0.0, 9.0), (0.0, -9.0), (9.0, 0.0), (-9.0, 0.0), (8.0, 8.0), (-8.0, 8.0), (8.0, -8.0), (-8.0, -8.0))


def _label_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write a short text beside each point (text, x, y), on the side where it covers least of other points and texts.

    Works in pixels, so it comes last. Numbers rather than names: names of points that are close would hide each other.
    """
    # Asking for the limits settles them; the transform alone would still be the one from before the margins.
    axes.get_xlim(), axes.get_ylim()
    size, scale = 8.0, axes.figure.dpi / 72.0
    spots = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in spots]
    for (text, x, y), (px, py) in zip(points, spots, strict=True):
        width, height = 0.65 * size * len(text), 0.75 * size
        choices: list[tuple[float, int, tuple[float, float], tuple[float, float, float, float]]] = []
        for dx, dy in _SIDES:
            cx, cy = px + dx * scale, py + dy * scale
            half = (width / 2 * scale, height / 2 * scale)
            box = (cx - half[0], cy - half[1], cx + half[0], cy + half[1])
            choices.append((sum(_overlap(box, other) for other in taken), len(choices), (dx, dy), box))
        _, _, offset, chosen = min(choices)
        taken.append(chosen)
        axes.annotate(
            text, (x, y), xytext=offset, textcoords="offset points", fontsize=size, color=_INK, ha="center", va="center"
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes (left, low, right, high) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _family(row: Row) -> str:
    """Runs that belong on one line: `family` where the row names one, else the policy's name without its arguments."""
    named = row.get("family")
    return str(named) if named else str(row.get("policy", row["name"])).partition("(")[0].partition("[")[0].strip()


def _points(rows: Sequence[Row], key: str, cost: Any) -> list[tuple[Row, float]]:
    return [(row, float(cost(row))) for row in rows if row.get(key) is not None and cost(row) is not None]


def _milliseconds(row: Row) -> float | None:
    speed = row.get("images_per_s")
    return 1000.0 / float(speed) if speed else None


def _rgb(image: np.ndarray) -> np.ndarray:
    """[C, H, W] -> [H, W, 3]."""
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=8)
    axes.xaxis.label.set(color=_INK, size=9)
    axes.yaxis.label.set(color=_INK, size=9)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
