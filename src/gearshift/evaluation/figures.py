"""Figures over time and over samples: where samples leave at each call, and how the numbers spread over images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gearshift.evaluation.plots import COLOURS, INK, MUTED, count_tick, fit, looks, new_figure, tidy, to_png
from gearshift.evaluation.table import Row, format_count, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEAN, _SKIPPED, _REUSED = COLOURS[1], MUTED, COLOURS[4]


def exits_over_time(
    depths: Mapping[str, np.ndarray],
    reused: Mapping[str, np.ndarray] | None = None,
    called: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """One panel per run: the share of samples that left at each depth (shade) at each call, the mean depth of the
    samples for which the network ran, their 10th and 90th percentiles, the calls that were skipped, and how many blocks
    took something from memory (hatched).

    `depths[name]` holds integers [calls, samples]: blocks run, of which 0 is one (the embedding, read out);
    `reused[name]` how many of these reused; `called[name]` bools, where the network ran (runs that are left out were
    called every time).
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    columns = min(3, len(depths))
    lines = math.ceil(len(depths) / columns)
    wide, tall = max(5.2, 3.4 * columns + 0.8), 2.35 * lines + 0.95
    figure = new_figure(wide, tall)
    ran = {name: (called or {}).get(name, np.ones(depth.shape, dtype=bool)) for name, depth in depths.items()}
    deepest = max(1, *(int(depth.max()) for depth in depths.values()))
    least = 0 if any((depth[ran[name]] == 0).any() for name, depth in depths.items()) else 1
    skips = any(not one.all() for one in ran.values())
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    shade = None
    for axes, (name, depth) in zip(grid.flat, depths.items(), strict=False):
        tidy(axes)
        axes.grid(False)
        edges = np.arange(len(depth) + 1) + 0.5
        own = ran[name]
        share = np.stack([((depth == d) & own).mean(axis=1) for d in range(least, deepest + 1)])
        shade = axes.pcolormesh(
            edges, np.arange(least, deepest + 2) - 0.5, share, cmap="Blues", vmin=0, vmax=1, rasterized=True
        )
        if skips:
            axes.axhline(least - 0.5, color=MUTED, linewidth=0.6)
            _draw_skips(axes, (~own).mean(axis=1), least - 1)
        taken = (reused or {}).get(name)
        if taken is not None:
            _draw_reuse(axes, own, taken)
        _draw_depths(axes, depth, own)
        axes.set_title(fit(name, 3.0, 9.5), fontsize=9.5, loc="left", color=INK, pad=16)
        axes.text(0, 1.03, _summary(depth, own, taken), transform=axes.transAxes, fontsize=8, color=MUTED, va="bottom")
        axes.set_ylim(least - (1.5 if skips else 0.5), deepest + 0.5)
        axes.set_xlim(0.5, len(depth) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "skipped" if value < least else f"{value:g}"))
    for axes in list(grid.flat)[len(depths) :]:
        axes.set_axis_off()
    for position, axes in enumerate(list(grid.flat)[: len(depths)]):
        if position + columns >= len(depths):
            axes.set_xlabel("network call (noise → data)")
    for axes in grid[:, 0]:
        axes.set_ylabel("blocks run")
    figure.suptitle("Exits over time", x=0.16 / wide, ha="left", fontsize=12, fontweight="bold", color=INK)
    bottom, top = 0.55 / tall, 1 - 0.85 / tall
    left = 0.95 if skips else 0.65
    figure.subplots_adjust(left=left / wide, right=1 - 0.9 / wide, bottom=bottom, top=top, hspace=0.62, wspace=0.1)
    if shade is not None:
        strip = figure.add_axes((1 - 0.72 / wide, bottom, 0.12 / wide, top - bottom))
        figure.colorbar(shade, cax=strip, label="share of samples")
        strip.tick_params(colors=MUTED, labelsize=8.5)
        strip.yaxis.label.set(color=INK, size=9.5)
    return to_png(figure)


def _draw_skips(axes: Axes, share: np.ndarray, height: int) -> None:
    """Calls without the network, as grey blocks in a row of their own; paler where only some samples skipped."""
    for position, part in enumerate(share):
        if part > 0:
            alpha = 0.25 + 0.75 * float(part)
            axes.bar(position + 1, 0.7, bottom=height - 0.35, width=0.92, color=_SKIPPED, alpha=alpha)


def _draw_reuse(axes: Axes, called: np.ndarray, reused: np.ndarray) -> None:
    """Hatched from below: how many blocks took something from memory, the mean over samples for which the network ran.

    How many, not which: a block in the middle may be the one that reused.
    """
    for position, (ran, taken) in enumerate(zip(called, reused, strict=True)):
        height = float(taken[ran].mean()) if ran.any() else 0.0
        if height > 0:
            axes.bar(
                position + 1, height, bottom=0.5, width=1.0,
                facecolor="none", edgecolor=_REUSED, hatch="////", linewidth=0.0, alpha=0.8,
            )  # fmt: skip


def _draw_depths(axes: Axes, depth: np.ndarray, called: np.ndarray) -> None:
    """Mean and percentiles of the depth over the samples for which the network ran; gaps where it ran for none."""
    calls = np.arange(1, len(depth) + 1)
    ran = [line[own] for line, own in zip(depth, called, strict=True)]
    nan = float("nan")
    mean = [float(line.mean()) if line.size else nan for line in ran]
    ends = np.array([np.percentile(line, [10, 90]) if line.size else (nan, nan) for line in ran])
    if (ends[:, 0] != ends[:, 1]).any():
        for edge in ends.T:
            axes.plot(calls, edge, color=_MEAN, linewidth=0.9, linestyle=(0, (2, 1.5)), drawstyle="steps-mid")
    # One call between two skipped ones has no neighbour to draw a line to.
    axes.plot(calls, mean, color=_MEAN, linewidth=1.7, drawstyle="steps-mid", marker=".", markersize=4)


def _summary(depth: np.ndarray, called: np.ndarray, reused: np.ndarray | None = None) -> str:
    ran = depth[called]
    skipped = float((~called).mean())
    taken = 0.0 if reused is None else float(reused.sum(dtype=np.int64))
    parts = [f"mean depth {format_number(float(ran.mean()))}"] if ran.size else []
    if skipped:
        parts.append(f"{100 * skipped:.0f} % {'' if taken else 'of calls '}skipped")  # one line has to do
    if taken:
        share = 100 * taken / float(ran.sum(dtype=np.int64))
        parts.append(f"{share:.0f} % {'' if skipped else 'of blocks '}reuse")
    return ", ".join(parts)


_MEASURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("macs_per_image", "MACs per image", format_count),
    ("psnr_to_full", "PSNR to full compute, per image [dB]", format_number),
    ("mean_depth", "mean depth per image [blocks]", format_number),
)


def distributions(per_image: Mapping[str, Mapping[str, np.ndarray]], rows: Sequence[Row]) -> bytes | None:
    """Small multiples: one line per run, one column per measure (MACs, PSNR to full compute, mean depth), each the
    histogram over images with its median. Returns None where no measure has a finite value.

    per_image: row -> {"macs_per_image" [N], "psnr_to_full" [N] (nan where the images are identical), "mean_depth" [N]}.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    names = [str(row["name"]) for row in rows if str(row["name"]) in per_image]
    colours = {str(row["name"]): colour for row, (colour, _) in zip(rows, looks(rows), strict=True)}
    values = {
        (name, key): np.asarray(per_image[name][key], dtype=np.float64)
        for name in names
        for key, _, _ in _MEASURES
        if key in per_image[name]
    }
    shown = [m for m in _MEASURES if any(np.isfinite(v).any() for (_, key), v in values.items() if key == m[0])]
    if not shown:
        return None
    labels, line = 2.0, 0.52
    wide, tall = 11.0, line * len(names) + 1.25
    figure = new_figure(wide, tall)
    grid = figure.subplots(len(names), len(shown), squeeze=False, sharex="col")
    for column, (key, label, show) in enumerate(shown):
        finite = [v[np.isfinite(v)] for (_, k), v in values.items() if k == key]
        low, high = min(v.min() for v in finite if v.size), max(v.max() for v in finite if v.size)
        pad = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
        edges = np.linspace(low, high if high > low else low + pad, 49)
        for line_number, name in enumerate(names):
            axes = grid[line_number, column]
            tidy(axes)
            axes.spines["left"].set_visible(False)
            axes.set_yticks([])
            _draw_histogram(axes, values.get((name, key)), edges, colours[name], key, show)
            axes.set_ylim(0, 1.75)
            axes.set_xlim(low - pad, high + pad)
            axes.tick_params(labelbottom=line_number == len(names) - 1)
        last = grid[-1, column]
        last.xaxis.set_major_locator(MaxNLocator(5))
        last.xaxis.set_major_formatter(FuncFormatter(count_tick))
        last.set_xlabel(label)
    for line_number, name in enumerate(names):
        grid[line_number, 0].text(
            -0.03,
            0.3,
            fit(name, labels - 0.35, 9),
            transform=grid[line_number, 0].transAxes,
            ha="right",
            va="center",
            fontsize=9,
            color=INK,
        )
    figure.suptitle("Spread over images", x=0.16 / wide, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.subplots_adjust(
        left=labels / wide, right=1 - 0.2 / wide, bottom=0.6 / tall, top=1 - 0.5 / tall, hspace=0.12, wspace=0.07
    )
    return to_png(figure)


def _draw_histogram(
    axes: Axes, values: np.ndarray | None, edges: np.ndarray, colour: str, key: str, show: Callable[[float], str]
) -> None:
    """One histogram, scaled to its own peak, with its median; a line where all values are one."""
    finite = np.empty(0) if values is None else values[np.isfinite(values)]
    note: dict[str, Any] = dict(fontsize=7.5, color=MUTED, va="top")
    if values is None or not values.size or (not finite.size and key != "psnr_to_full"):
        axes.text(0.5, 0.6, "not measured", transform=axes.transAxes, ha="center", **note)
        return
    if not finite.size:
        axes.text(0.5, 0.6, "all images identical to full compute", transform=axes.transAxes, ha="center", **note)
        return
    median = float(np.median(finite))
    counts, _ = np.histogram(finite, edges)
    same = finite.max() == finite.min()
    if not same:
        axes.stairs(counts / counts.max(), edges, fill=True, color=colour, alpha=0.75)
    axes.plot([median, median], [0, 1.12], color=colour if same else INK, linewidth=3.0 if same else 1.3)
    text = f"{show(median)} for every image" if same else show(median)
    # The number stands where the panel has room for it: to the left of a median on the right side.
    low, high = edges[0], edges[-1]
    right = median > (low + high) / 2
    axes.annotate(
        text, (median, 1.12), xytext=(-3 if right else 3, 1), textcoords="offset points",
        ha="right" if right else "left", va="center", fontsize=7.5, color=INK,
    )  # fmt: skip
    if key == "psnr_to_full" and finite.size < values.size:
        share = f"{100 * (1 - finite.size / values.size):.2g} % identical"
        axes.text(0.0 if right else 1.0, 0.98, share, transform=axes.transAxes, ha="left" if right else "right", **note)
