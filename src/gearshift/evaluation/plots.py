"""Pictures of images (grids from the same noise, differences to full compute), and the style all figures share.

Drawn with matplotlib's Agg canvas through its object interface, so no window system is needed and no global state of
`pyplot` is touched. Every figure is handed back as the bytes of a PNG, 11 inches wide at most and read at half its
pixels. Colours are those of Okabe and Ito, which people who see fewer colours can tell apart; markers repeat them.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gearshift.evaluation.table import Row, format_count, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
MUTED = "#616e7c"
GRID = "#e4e7eb"
PLAIN = "#4b5563"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a3e9d")
MARKERS = ("s", "D", "^", "v", "P", "X", "*", "p")
_LINE, _WIDEST = 0.62, 2.7  # inches: height of a line of images, most that is written beside it
_FACTORS = (64, 32, 16, 8, 4, 2, 1)


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
    lines = []
    for row in rows:
        name = str(row["name"])
        if name in samples:
            saved = row.get("macs_saved")
            note = "" if saved is None else f"{100 * saved:.0f} % of MACs saved" if saved > 0.0005 else "full compute"
            if saved is not None and saved < -0.0005:
                note = f"{-100 * saved:.0f} % more MACs than full compute"
            lines.append((name, note, samples[name]))
    return _lines_of_images(lines, "same noise down every column", columns)


def difference_factor(differences: Sequence[np.ndarray]) -> int:
    """The largest power of two up to 64 that keeps 99.5 % of the absolute differences (0..255) within 255."""
    values = np.concatenate([difference.reshape(-1) for difference in differences])
    bound = float(np.percentile(values, 99.5)) if values.size else 0.0
    return next((factor for factor in _FACTORS if bound * factor <= 255), 1)


def difference_grid(
    samples: Mapping[str, np.ndarray], full_of: Mapping[str, str], columns: int = 12
) -> tuple[bytes, int] | None:
    """|row - full| of images from the same noise, all lines amplified by one factor, under the full images they are
    compared with. Returns the PNG and the factor; None where no row has another one to be compared with.

    samples: by row, uint8 [n, C, H, W]. full_of: by row, the row it is compared with.
    """
    by_full: dict[str, list[str]] = {}
    for name in samples:
        full = full_of.get(name, name)
        if full != name and full in samples:
            by_full.setdefault(full, []).append(name)
    if not by_full:
        return None
    differences: dict[str, np.ndarray] = {}
    for full, names in by_full.items():
        for name in names:
            count = min(len(samples[name]), len(samples[full]), columns)
            own, reference = samples[name][:count].astype(np.int16), samples[full][:count].astype(np.int16)
            differences[name] = np.abs(own - reference)
    factor = difference_factor(list(differences.values()))
    lines = []
    for full, names in by_full.items():
        lines.append((full, "the images themselves", samples[full]))
        for name in names:
            mean = float(differences[name].mean())
            note = f"mean {format_number(mean)} of 255" if mean else "identical"
            lines.append((f"|{name} − full|", note, np.minimum(differences[name] * factor, 255).astype(np.uint8)))
    title = f"absolute difference × {factor}, black where nothing changed; same noise down every column"
    return _lines_of_images(lines, title, columns), factor


def _lines_of_images(lines: Sequence[tuple[str, str, np.ndarray]], title: str, columns: int) -> bytes:
    """Lines of images, each with a name and a note on its left."""
    count = min(columns, *(len(images) for _, _, images in lines))
    beside = [((fit(name, _WIDEST, 9.0), 9.0, INK), (fit(note, _WIDEST, 7.5), 7.5, MUTED)) for name, note, _ in lines]
    labels = 0.25 + max(text_width(text, size) for pair in beside for text, size, _ in pair)
    # A single image still leaves room for the title above it.
    figure = new_figure(max(labels + 0.05 + _LINE * count, labels + text_width(title, 8.5)), _LINE * len(lines) + 0.3)
    wide, tall = figure.get_size_inches()
    axes = figure.add_axes((labels / wide, 0.0, _LINE * count / wide, 1 - 0.28 / tall))
    height, width = lines[0][2].shape[2:]
    gap = max(1, height // 8)
    canvas = np.full((len(lines) * (height + gap), count * (width + gap), 3), 255, dtype=np.uint8)
    for r, (_, _, images) in enumerate(lines):
        for k in range(count):
            top, left = r * (height + gap) + gap // 2, k * (width + gap) + gap // 2
            canvas[top : top + height, left : left + width] = _rgb(images[k])
    # Whole pixels while a picture is enlarged; reduced ones need smoothing.
    axes.imshow(canvas, interpolation="nearest" if height <= 80 else "antialiased", aspect="auto")
    axes.set_axis_off()
    for r, pair in enumerate(beside):
        y = 1 - (r + 0.5) / len(lines)
        ups = (0.16, -0.17) if pair[1][0] else (0.0, 0.0)
        for (text, size, colour), up in zip(pair, ups, strict=True):
            axes.annotate(
                text,
                (0, y + up / len(lines)),
                xycoords="axes fraction",
                xytext=(-7, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=size,
                color=colour,
            )
    axes.set_title(title, loc="left", fontsize=8.5, color=MUTED, pad=4)
    return to_png(figure)


def _rgb(image: np.ndarray) -> np.ndarray:
    """[C, H, W] -> [H, W, 3]."""
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


# Style ---------------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """No frame on top and right, quiet ticks, a faint grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5)
    axes.xaxis.label.set(color=INK, size=9.5)
    axes.yaxis.label.set(color=INK, size=9.5)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def text_width(text: str, size: float) -> float:
    """Width in inches of a line of text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
    return float(width) / 72.0


def fit(text: str, width: float, size: float) -> str:
    """Text for a figure, cut in its middle where it would be wider than `width` inches; dollars start no formula."""
    kept, count = text, len(text)
    while (own := text_width(kept, size)) > width and count > 3:
        # Nearly in one step: letters are about as wide as one another.
        count = max(3, min(count - 1, int(count * width / own) + 1))
        kept = text[: math.ceil((count - 1) / 2)] + "…" + text[-((count - 1) // 2) :]
    return kept.replace("$", r"\$")


def count_tick(value: float, _: int | None = None) -> str:
    """A tick of an axis of counts: 60000000 -> '60 M'."""
    text = format_count(value)
    number, __, unit = text.partition(" ")
    short = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{short} {unit}".strip()


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names in letters that the font lacks come out as boxes, which is not worth a line on the terminal.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def family(row: Row) -> str:
    """Runs that belong together: `family` where the row names one, else the policy's name up to its first number or
    bracket with a number ("uncertainty < 0.1" and "uncertainty < 0.2" are one family, "skip (error) < 0.1" another than
    "skip < 0.1"). Of compositions every part counts."""
    named = row.get("family")
    if named:
        return str(named)
    return " + ".join(_family(part) for part in str(row.get("policy", row["name"])).split(" + "))


def _family(policy: str) -> str:
    bracket = re.match(r"[^\d(\[<>=]*\([^\d()]*\)", policy)
    start = bracket.end() if bracket else 0
    cut = next((k for k, letter in enumerate(policy) if k >= start and (letter.isdigit() or letter in "([<>=")), None)
    return policy[:cut].strip() or policy


def is_baseline(row: Row) -> bool:
    """Whether a row is a trivial baseline: full compute, at all its steps or at fewer."""
    return family(row).lower() == "full" or str(row.get("policy", "")).lower() == "full"


def looks(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(colour, marker) of every row: of one family alike, trivial baselines grey discs. With rows of several
    evaluations colour says the evaluation and the marker the family."""
    families = list(dict.fromkeys(family(row) for row in rows if not is_baseline(row)))
    evaluations = list(dict.fromkeys(row.get("evaluation") for row in rows))
    several = len(evaluations) > 1
    found = []
    for row in rows:
        plain = is_baseline(row)
        which = 0 if plain else families.index(family(row))
        marker = "o" if plain else MARKERS[which % len(MARKERS)]
        colour = PLAIN if plain else COLOURS[which % len(COLOURS)]
        if several:
            colour = COLOURS[evaluations.index(row.get("evaluation")) % len(COLOURS)]
        found.append((colour, marker))
    return found
