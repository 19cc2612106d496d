"""What a split was made of, as a picture: two similarity curves, a matrix over noise levels, or log-SNR over the axis.

Drawn through matplotlib's object interface, without a window system; imported only here and only when asked.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gearshift.stages.axis import Axis
from gearshift.stages.finder import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEAR, _FAR, _CUT, _QUIET = "#0072b2", "#d55e00", "#1f2933", "#616e7c"
_BINS = 60


def curves_png(curves: Curves, axis: Axis, alpha: float, shares: Sequence[float], title: str) -> bytes:
    """Both similarities, averaged in bins and as running means, with alpha and the boundaries."""
    figure, axes = _figure(title)
    count = len(curves.share)
    bins = min(_BINS, max(5, count // 20))
    into = (curves.share * bins).long().clamp(max=bins - 1)
    held = torch.bincount(into, minlength=bins)
    middle = _position(axis, (torch.arange(bins, dtype=torch.float64) + 0.5) / bins)
    position = _position(axis, curves.share)
    step = max(1, count // 2000)
    for values, running, colour, name in (
        (curves.near, curves.running_near(), _NEAR, "S0, to the noise itself"),
        (curves.far, curves.running_far(), _FAR, "S1, to the end point"),
    ):
        binned = torch.bincount(into, weights=values, minlength=bins) / held.clamp(min=1)
        axes.plot(
            middle[held > 0].numpy(),
            binned[held > 0].numpy(),
            ".",
            color=colour,
            markersize=4,
            label=f"{name}, pointwise",
        )
        axes.plot(position[::step].numpy(), running[::step].numpy(), color=colour, label=f"{name}, mean from its end")
    axes.axhline(alpha, color=_QUIET, linewidth=1, linestyle=":", label=f"alpha = {alpha:g}")
    axes.set(ylim=(-0.02, 1.02), ylabel="similarity", xlabel=_label(axis))
    _cuts(axes, axis, shares)
    figure.legend(fontsize=7.5, frameon=False, loc="outside lower center", ncols=3)
    return _png(figure)


def matrix_png(matrix: Tensor, axis: Axis, shares: Sequence[float], title: str, what: str) -> bytes:
    """A matrix over the nodes of a grid, with the boundaries."""
    figure, axes = _figure(title)
    image = axes.imshow(matrix.numpy(), origin="lower", extent=(0, 1, 0, 1), aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=axes, label=what)
    for share in shares:
        axes.axvline(share, color="white", linewidth=1.2)
        axes.axhline(share, color="white", linewidth=1.2)
    ticks = torch.linspace(0, 1, 6, dtype=torch.float64)
    axes.set_xticks(ticks.tolist(), [f"{value:.3g}" for value in _position(axis, ticks).tolist()])
    axes.set_yticks(ticks.tolist(), [f"{value:.3g}" for value in _position(axis, ticks).tolist()])
    axes.set(xlabel=_label(axis), ylabel=_label(axis))
    return _png(figure)


def log_snr_png(axis: Axis, shares: Sequence[float], title: str) -> bytes:
    """log-SNR over the axis, with the boundaries."""
    figure, axes = _figure(title)
    share = torch.linspace(0, 1, 400, dtype=torch.float64)
    axes.plot(_position(axis, share).numpy(), axis.log_snr(share).numpy(), color=_NEAR)
    axes.set(xlabel=_label(axis), ylabel="log-SNR")
    _cuts(axes, axis, shares)
    return _png(figure)


def _position(axis: Axis, share: Tensor) -> Tensor:
    """Where a share is drawn: at its time, or at its log-SNR where times are ratios."""
    return axis.time(share) if axis.process.evenly_timed else axis.log_snr(share)


def _label(axis: Axis) -> str:
    return f"t of {axis.process.name}" if axis.process.evenly_timed else "log-SNR"


def _cuts(axes: Axes, axis: Axis, shares: Sequence[float]) -> None:
    for share in shares:
        at = float(_position(axis, torch.tensor(share, dtype=torch.float64)))
        axes.axvline(at, color=_CUT, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"{at:.3f}", (at, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points",
            fontsize=8, color=_CUT,
        )  # fmt: skip


def _figure(title: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title.replace("$", r"\$"), fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
