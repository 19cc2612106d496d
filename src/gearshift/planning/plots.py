"""A plan as a picture: what runs when, and how its loss was predicted and measured.

Drawn through matplotlib's object interface, without a window system; imported only here and only when asked.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gearshift.execution.network import Network
from gearshift.execution.reach import unread
from gearshift.planning.choices import Choice, Schedule

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

INK, MUTED = "#1f2933", "#616e7c"
_COLOURS = {
    "computed": "#0072b2",
    "one branch": "#7fb8d8",
    "attention reused": "#e69f00",
    "taken from memory": "#f5d58a",
    "not run": "#e4e7eb",
}


def parts_of_call(network: Network, path: int, choice: Choice, branches: int) -> dict[int, str]:
    """For each block of a path, what happens to it in a call: a key of the colours."""
    blocks = network.paths[path]
    if not choice.branches:
        return dict.fromkeys(blocks, "not run")
    ran = blocks[: choice.depth or len(blocks)]
    taken = dict(sorted(choice.reuse))
    whole = {block for block in ran if taken.get(block) == "block"}
    embedded = sum(b in network.pops for b in blocks) - sum(b in network.pushes for b in blocks)
    left_out = unread(network, ran, whole, embedded)
    usual = "computed" if choice.branches == branches else "one branch"
    found = {}
    for block in blocks:
        if block not in ran:
            found[block] = "not run"
        elif block in whole or block in left_out:
            found[block] = "taken from memory"
        else:
            found[block] = "attention reused" if block in taken else usual
    return found


def plan_png(
    network: Network,
    paths: Sequence[int],
    schedule: Schedule,
    log_snr: Sequence[float],
    shares: Sequence[float],
    losses: Mapping[str, tuple[float, float | None]],
    title: str,
) -> bytes:
    """Two panels: blocks over calls by what happens to them, with what each call costs below; and the closeness to full
    compute of the plan and of what it has to beat.

    Args:
        paths: of every call.
        shares: what each call costs, over the cost of a full call.
        losses: by name, measured PSNR and, where there is one, the predicted PSNR [dB].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    total, branches = len(schedule), schedule[0].branches
    figure = Figure(figsize=(11.5, 4.6), dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(2.1, 1.0), height_ratios=(3.0, 1.0), hspace=0.12, wspace=0.5)
    top, bottom, right = (figure.add_subplot(place) for place in (grid[0, 0], grid[1, 0], grid[:, 1]))
    seen: list[str] = []
    for position, choice in enumerate(schedule):
        row = parts_of_call(network, paths[position], choice, branches)
        for height, (_, kind) in enumerate(row.items()):
            seen.append(kind)
            top.add_patch(Rectangle((position + 0.04, height + 0.06), 0.92, 0.88, color=_COLOURS[kind], linewidth=0))
        if choice.branches < branches and choice.forecast:
            top.plot(position + 0.5, len(row) + 0.35, marker="^", color=INK, markersize=4, clip_on=False)
    deepest = max(len(path) for path in network.paths)
    top.set(xlim=(0, total), ylim=(0, deepest + 0.7), ylabel="block")
    top.set_yticks([k + 0.5 for k in range(deepest)], [str(k) for k in range(deepest)])
    top.set_xticks([])
    bottom.bar([k + 0.5 for k in range(total)], shares, width=0.92, color=_COLOURS["computed"])
    bottom.set(xlim=(0, total), ylim=(0, 1.08), xlabel="call (log-SNR below)", ylabel="cost")
    ticks = sorted({0, total - 1, *range(0, total, max(1, total // 6))})
    bottom.set_xticks([k + 0.5 for k in ticks], [f"{k}\n{log_snr[k]:.1f}" for k in ticks])
    known = [kind for kind in _COLOURS if kind in seen]
    handles: list[Artist] = [Patch(color=_COLOURS[kind], label=kind) for kind in known]
    if any(choice.forecast and choice.branches < branches for choice in schedule):
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], marker="^", color=INK, linestyle="none", markersize=4, label="extrapolated"))
    top.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles), frameon=False, fontsize=8.5
    )
    _losses(right, losses)
    for axes in (top, bottom, right):
        axes.tick_params(colors=MUTED, labelsize=8.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.83, bottom=0.14)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _losses(axes: Axes, losses: Mapping[str, tuple[float, float | None]]) -> None:
    """PSNR as bars, predictions as marks."""
    finite = {name: pair for name, pair in losses.items() if math.isfinite(pair[0])}
    names = list(finite)[::-1]
    for place, name in enumerate(names):
        measured, predicted = finite[name]
        axes.barh(place, measured, height=0.62, color=_COLOURS["computed"] if name == "plan" else "#9aa5b1")
        axes.text(max(measured, 0.0), place, f" {measured:.1f}", va="center", fontsize=8.5, color=INK)
        if predicted is not None and math.isfinite(predicted):
            axes.plot(predicted, place, marker="|", markersize=16, markeredgewidth=2, color="#d55e00")
    if any(predicted is not None for _, predicted in finite.values()):
        axes.plot([], [], marker="|", linestyle="none", markersize=10, color="#d55e00", label="predicted")
        axes.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1.0))
    wrapped = [textwrap.shorten(name, 60, placeholder=" ...") for name in names]
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 22) for name in wrapped])
    values = [measured for measured, _ in finite.values()]
    if values:
        axes.set_xlim(0.0, 1.15 * max(values))  # bars stand on zero
    axes.set_xlabel("PSNR to full compute [dB]")
