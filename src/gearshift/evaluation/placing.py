"""Texts beside points of a figure, placed so that none hides another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gearshift.evaluation.plots import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Offsets at which the number of a point may stand, the preferred first: above, below, aslant, beside; then further.
_SIDES = ((0.0, 1.0), (0.0, -1.0), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8), (1.0, 0.0), (-1.0, 0.0))
_DISTANCES = (10.5, 19.0, 28.0, 37.0)  # points


def label_points(
    axes: Axes, points: Sequence[tuple[str, float, float]], bars: Sequence[tuple[float, float, float, float]] = ()
) -> None:
    """Write a short text beside each point (text, x, y) where it covers no other point, text or bar (left, low, right,
    high), as near as that goes; a text that had to go further is tied to its point by a thin line.

    Works in pixels, so it comes last. Numbers rather than names: names of points that are close would hide each other.
    """
    from matplotlib.patheffects import withStroke

    # Asking for the limits settles them; the transform alone would still be the one from before the margins.
    axes.get_xlim(), axes.get_ylim()
    size, scale = 8.5, axes.figure.dpi / 72.0
    spots = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in spots]
    for x0, y0, x1, y1 in bars:
        low, high = axes.transData.transform((x0, y0)), axes.transData.transform((x1, y1))
        taken.append((low[0] - scale, low[1], high[0] + scale, high[1]))
    inside = axes.bbox.extents
    for (text, x, y), (px, py) in zip(points, spots, strict=True):
        half = ((0.33 * size * len(text) + 1) * scale, 0.42 * size * scale)
        choices: list[tuple[float, int, tuple[float, float], tuple[float, float, float, float], int]] = []
        for far, distance in enumerate(_DISTANCES):
            for dx, dy in _SIDES:
                offset = (dx * distance, dy * distance)
                cx, cy = px + offset[0] * scale, py + offset[1] * scale
                box = (cx - half[0], cy - half[1], cx + half[0], cy + half[1])
                covered = sum(_overlap(box, other) for other in taken)
                outside = box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]
                choices.append((covered + (1e6 if outside else 0.0), len(choices), offset, box, far))
        _, _, offset, chosen, far = min(choices)
        taken.append(chosen)
        tie = dict(arrowstyle="-", color=MUTED, linewidth=0.6, shrinkA=0, shrinkB=3) if far else None
        written = axes.annotate(
            text,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            fontsize=size,
            color=INK,
            ha="center",
            va="center",
            arrowprops=tie,
            zorder=4,
        )
        written.set_path_effects([withStroke(linewidth=2, foreground="white")])


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes (left, low, right, high) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
