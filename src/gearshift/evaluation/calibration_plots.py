"""What a report says of uncertainty heads: three figures, a table and a sentence, all from the entry `calibration`.

Times run from noise to data, as in every figure of an evaluation, one column per noise level: they are quantiles of the
training times, and their log-SNR stands below. Exits are ordered, so their colours are too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gearshift.evaluation.document import Block, Figure, Heading, Tabled, Text
from gearshift.evaluation.plots import INK, MUTED, new_figure, tidy, to_png
from gearshift.evaluation.table import format_number
from gearshift.evaluation.tabular import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

FILES = ("uncertainty.png", "calibration.png", "within_time.png")
# So many exits find room in a legend.
_LISTED = 24


def calibration_figures(calibration: Mapping[str, Any]) -> list[Figure]:
    """Predicted and true error per exit and time, the calibration curves, and what differs within a time."""
    cut, upright = (
        f" {lines} are the thresholds of the exit rules, as far as they cut." if calibration["thresholds"] else ""
        for lines in ("Contours", "Upright lines")
    )
    chance = 2 / np.sqrt(max(1, calibration["images"] - 1))
    return [
        Figure(
            FILES[0],
            "Predicted and true error",
            "Mean over images, per exit and noise level: what the uncertainty heads predict, the true error (mean of "
            f"tanh|eps_hat - eps| over the pixels), and predicted less true.{cut}",
            uncertainty_maps(calibration),
        ),
        Figure(
            FILES[1],
            "Calibration of the uncertainty",
            "True error of images and times with a like prediction, one line per exit; on the diagonal a head is right "
            f"on average, above it too sure. Every point holds equally many.{upright}",
            calibration_curves(calibration),
        ),
        Figure(
            FILES[2],
            "Uncertainty within a time",
            "Standard deviation over images at one noise level, of prediction and of true error, and the rank "
            "correlation of the two; a head that knows the time only has none of it. In the shaded part lie 95 % of "
            f"the correlations of what has nothing in common (0 ± {chance:.2f} with {calibration['images']} images).",
            within_times(calibration),
        ),
    ]


def calibration_blocks(calibration: Mapping[str, Any], figures: Sequence[Figure]) -> list[Block]:
    """The section of a report."""
    return [
        Heading("Uncertainty against the true error"),
        Text(sentence(calibration)),
        Tabled(calibration_table(calibration)),
        Text(
            f"{calibration['protocol']} ECE is the mean distance of prediction and true error over bins of the "
            "prediction, by time that over noise levels. Within times lies what tells images of one noise level apart; "
            "the rest of the variance a schedule over time would know, too.",
            quiet=True,
        ),
        *figures,
    ]


# Text ----------------------------------------------------------------------------------------------------------------


def sentence(calibration: Mapping[str, Any]) -> str:
    """What was found, in one sentence: within-time shares and rank correlations, least and most over the exits."""
    exits = calibration["exits"]
    share = _span(exits, "within_time_share", _percent)
    truth = _span(exits, "error_within_time_share", _percent)
    rank = _span(exits, "rank_correlation", lambda value: f"{value:.2f}".replace("-", "−"))
    first = (
        f"Of the variance of the predicted error {share} lies within times"
        if share
        else "The predicted error is the same for every image and time"
    )
    second = (
        f"the rank correlation of the two within times is {rank}"
        if rank
        else "within times the two do not both vary, so no image is told from another"
    )
    return f"{first}{f', of that of the true error {truth}' if truth else ''}; {second}."


def _span(exits: Sequence[Mapping[str, Any]], key: str, show: Callable[[float], str]) -> str:
    """'0.3 % (exit 1) to 12 % (exit 7)': the least and the greatest over the exits that have the number, or the one
    there is; '' without any."""
    known = [(float(one[key]), int(one["depth"])) for one in exits if one[key] is not None]
    ends = list(dict.fromkeys([min(known), max(known)])) if known else []
    return " to ".join(f"{show(value)} (exit {depth})" for value, depth in ends)


def _percent(share: float) -> str:
    return f"{format_number(100 * share)} %"


def calibration_table(calibration: Mapping[str, Any]) -> Table:
    """One row per exit."""
    heads = (
        "exit", "predicted", "true error", "bias", "ECE", "ECE by time",
        "variance of predicted within times", "of true error", "rank correlation",
    )  # fmt: skip
    numbers = ("uncertainty", "error", "bias", "ece", "ece_by_time")
    shares = ("within_time_share", "error_within_time_share")
    body = [
        (
            str(one["depth"]),
            *(format_number(one[key]) for key in numbers),
            *("–" if one[key] is None else _percent(one[key]) for key in shares),
            "–" if one["rank_correlation"] is None else f"{one['rank_correlation']:.2f}",
        )
        for one in calibration["exits"]
    ]
    return Table(heads, (False,) * len(heads), tuple(body))


# Figures -------------------------------------------------------------------------------------------------------------


def uncertainty_maps(calibration: Mapping[str, Any]) -> bytes:
    """Three maps, exits over times: predicted, true, and predicted less true."""
    from matplotlib.colors import TwoSlopeNorm

    predicted, true = (_over_times(calibration, key) for key in ("uncertainty", "error"))
    exits, times = predicted.shape
    wide, tall = 11.0, min(5.6, 1.6 + 0.24 * max(exits, 6))
    figure = _canvas(wide, tall, "Uncertainty per exit and time")
    grid = figure.subplots(1, 3, sharey=True)
    top = float(max(predicted.max(), true.max()))
    apart = float(np.abs(predicted - true).max()) or 1.0
    edges = np.arange(times + 1) - 0.5, np.arange(exits + 1) - 0.5
    maps = (("predicted", predicted), ("true error", true), ("predicted − true", predicted - true))
    for k, (axes, (title, values)) in enumerate(zip(grid, maps, strict=True)):
        tidy(axes)
        axes.grid(False)
        if k < 2:
            shade = axes.pcolormesh(*edges, values, cmap="Blues", vmin=0, vmax=top, rasterized=True)
            _contours(axes, values, calibration["thresholds"])
        else:
            norm = TwoSlopeNorm(0, -apart, apart)
            shade = axes.pcolormesh(*edges, values, cmap="RdBu_r", norm=norm, rasterized=True)
        if k > 0:
            bar = figure.colorbar(
                shade, ax=grid[:2] if k == 1 else axes, pad=0.02, fraction=0.05, aspect=(tall - 1.2) / 0.13
            )
            bar.ax.tick_params(colors=MUTED, labelsize=8.5)
            bar.outline.set_visible(False)
        axes.set_title(title, fontsize=9.5, loc="left", color=INK)
        _time_axis(axes, calibration)
    step = max(1, -(-exits // 14))
    grid[0].set_yticks(range(0, exits, step), [str(one["depth"]) for one in calibration["exits"]][::step])
    grid[0].set_ylabel("exit (blocks run)")
    return to_png(figure)


def _contours(axes: Axes, values: NDArray[np.float64], thresholds: Sequence[float]) -> None:
    """Where the thresholds cut a map."""
    levels = [level for level in thresholds if values.min() < level < values.max()]
    if levels and min(values.shape) > 1:
        drawn = axes.contour(values, levels=levels, colors=INK, linewidths=1.1)
        axes.clabel(drawn, fmt=lambda level: f"{level:g}", fontsize=8)


def calibration_curves(calibration: Mapping[str, Any]) -> bytes:
    """Mean true error against mean prediction, one line per exit, with the diagonal and the thresholds."""
    figure = _canvas(7.2, 5.6, "Calibration of the uncertainty")
    axes = figure.add_subplot()
    tidy(axes)
    curves = [(one["curve"]["uncertainty"], one["curve"]["error"]) for one in calibration["exits"]]
    ends = [value for pair in curves for values in pair for value in values]
    low, high = min(ends), max(ends)
    pad = 0.05 * (high - low) or 0.05
    low, high = max(0.0, low - pad), high + pad
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    for threshold in calibration["thresholds"]:
        if low < threshold < high:
            axes.axvline(threshold, color=INK, linewidth=1.0, zorder=1)
            axes.annotate(
                f"u < {threshold:g}", (threshold, 1.0), xycoords=("data", "axes fraction"), xytext=(-2, -3),
                textcoords="offset points", ha="right", va="top", rotation=90, fontsize=8, color=INK,
            )  # fmt: skip
    for (predicted, true), colour in zip(curves, _shades(len(curves)), strict=True):
        axes.plot(predicted, true, color=colour, linewidth=1.5, marker="o", markersize=3.2)
    axes.set(
        xlim=(low, high), ylim=(low, high), xlabel="predicted (mean of a bin)", ylabel="true error (mean of a bin)"
    )
    axes.set_aspect("equal")
    _exits_beside(axes, calibration)
    return to_png(figure)


def within_times(calibration: Mapping[str, Any]) -> bytes:
    """Three panels over time, one line per exit: standard deviation over images of prediction and of true error, and
    their rank correlation."""
    figure = _canvas(11.0, 3.7, "What tells images of one time apart")
    grid = figure.subplots(1, 3)
    panels = (
        ("uncertainty_sd", "predicted, sd over images"),
        ("error_sd", "true error, sd over images"),
        ("rank_correlation", "rank correlation of the two"),
    )
    for axes, (key, title) in zip(grid, panels, strict=True):
        tidy(axes)
        values = _over_times(calibration, key)
        for line, colour in zip(values, _shades(len(values)), strict=True):
            axes.plot(line, color=colour, linewidth=1.4, marker="o", markersize=2.6)
        axes.set_title(title, fontsize=9.5, loc="left", color=INK)
        _time_axis(axes, calibration)
    top = 1.06 * max(float(_over_times(calibration, key).max()) for key, _ in panels[:2])
    for axes in grid[:2]:
        axes.set_ylim(0, top or 1.0)
    grid[2].set_ylim(-1.05, 1.05)
    chance = 2 / np.sqrt(max(1, calibration["images"] - 1))
    grid[2].axhspan(-chance, chance, color=MUTED, alpha=0.16, linewidth=0)
    grid[2].axhline(0, color=MUTED, linewidth=0.8)
    _exits_beside(grid[2], calibration)
    return to_png(figure)


def _over_times(calibration: Mapping[str, Any], key: str) -> NDArray[np.float64]:
    """[exits, times], from noise to data; nan where a number is not defined."""
    rows = [[np.nan if value is None else value for value in one["by_time"][key]] for one in calibration["exits"]]
    return np.array(rows, dtype=np.float64)[:, ::-1]


def _time_axis(axes: Axes, calibration: Mapping[str, Any]) -> None:
    levels = calibration["log_snr"][::-1]
    ticks = np.unique(np.linspace(0, len(levels) - 1, min(6, len(levels))).round().astype(int))
    axes.set_xticks(ticks, [f"{levels[k]:.1f}".replace("-", "−") for k in ticks])
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.set_xlabel("log-SNR (noise → data)")


def _shades(count: int) -> list[Any]:
    """Colours of exits, from shallow to deep."""
    from matplotlib import colormaps

    return [colormaps["plasma"](x) for x in np.linspace(0.0, 0.9, count)]


def _exits_beside(axes: Axes, calibration: Mapping[str, Any]) -> None:
    """A legend of the exits to the right of the axes, deepest first; of many exits, of as many as fit."""
    from matplotlib.lines import Line2D

    depths = [one["depth"] for one in calibration["exits"]]
    step = max(1, -(-len(depths) // _LISTED))
    shown = list(zip(depths, _shades(len(depths)), strict=True))[::-step]
    handles = [Line2D([], [], color=colour, linewidth=2.2, label=str(depth)) for depth, colour in shown]
    legend = axes.legend(
        handles=handles, title="exit", loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False, fontsize=8.5,
        ncols=1 + (len(handles) > 12), handlelength=1.2, labelspacing=0.35,
    )  # fmt: skip
    legend.get_title().set(fontsize=8.5, color=MUTED)


def _canvas(width: float, height: float, title: str) -> Canvas:
    """An empty figure with a title, its panels laid out by what stands around them."""
    figure = new_figure(width, height)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    figure.suptitle(title, x=0.16 / width, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure
