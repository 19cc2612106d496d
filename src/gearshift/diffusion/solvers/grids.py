"""Which times a solver visits: grids over a process, from noise to data.

On a discrete process the named spacings are those of the reference code: ``linspace`` is round(linspace(0, T-1, N))
(what "N steps" means in DiT), ``leading`` is k (T // N) ("ddimN" there), ``trailing`` is round(T - k T/N) - 1 (Lin et
al. 2023, arXiv 2305.08891, table 2). On a continuous process they are the same without rounding, in time, or in index
where the process is not evenly timed (EDM, VE). ``log_snr`` is uniform in log-SNR (Lu et al. 2022, arXiv 2206.00927,
section 3.4), and visits fractional indices on a discrete process. :func:`karras_levels` is the grid of EDM.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.runtime.errors import UsageError

SPACINGS = ("linspace", "trailing", "leading", "log_snr")


def check_choice(owner: str, option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UsageError unless ``value`` is one of ``known``."""
    if value not in known:
        raise UsageError(f"{owner}: unknown {option} {value!r}; known: {', '.join(known)}")


def check_steps(solver: str, steps: int, process: Process) -> None:
    """Raise UsageError unless ``steps`` fits the process."""
    if steps < 1:
        raise UsageError(f"solver {solver!r} on process {process.name!r} needs at least 1 step, got steps={steps}")
    if not process.continuous and steps > process.num_steps:
        raise UsageError(
            f"solver {solver!r} asks for steps={steps} but process {process.name!r} has {process.num_steps} noise "
            f"levels; set steps to at most {process.num_steps}"
        )


def index_grid(size: int, spacing: str, steps: int, first: float = 0.0) -> Tensor:
    """``steps`` whole indices of a table of ``size`` levels, float64, noisiest first; linspace ends at ``first``."""
    k = torch.arange(steps, dtype=torch.float64)
    if spacing == "linspace":
        # Counted up from the data, as the reference does: half-way sums round to even, so they must be the same sums.
        index = (first + (size - 1 - first) / max(steps - 1, 1) * k).round().flip(0)
        index[0] = size - 1
        return index
    if spacing == "trailing":
        return (size - k * size / steps).round() - 1
    return k.flip(0) * (size // steps)


def time_grid(process: Process, spacing: str, steps: int, t_end: float | None = None) -> list[float]:
    """``steps`` process times, noisiest first, all with noise left.

    ``t_end`` (default ``process.t_min``) is the last time of the spacings that fix it, ``linspace`` and ``log_snr``.
    With one step, those visit the noisiest time only.
    """
    end = process.t_min if t_end is None else t_end
    k = torch.arange(steps, dtype=torch.float64)
    if spacing != "log_snr" and process.continuous and not process.evenly_timed:
        index = _indices(spacing, steps, process.num_steps - 1, process.index_of_time(end).item())
        spaced: list[float] = process.time_of_index(index).tolist()
        return spaced
    if spacing == "log_snr":
        first, last = process.log_snr(process.t_max), process.log_snr(end)
        times = process.time_of_log_snr(first + (last - first) * k / max(steps - 1, 1))
    elif not process.continuous:
        times = process.time_of_index(index_grid(process.num_steps, spacing, steps, process.index_of_time(end).item()))
    elif spacing == "linspace":
        times = process.t_max - (process.t_max - end) * k / max(steps - 1, 1)
    elif spacing == "trailing":
        times = process.t_max * (1 - k / steps)
    else:
        stride = min(process.t_max / steps, (process.t_max - end) / max(steps - 1, 1))
        times = end + stride * k.flip(0)
    grid: list[float] = times.tolist()
    return grid


def _indices(spacing: str, steps: int, noisiest: float, last: float) -> Tensor:
    """``steps`` fractional indices, noisiest first: the spacings of :func:`index_grid` without rounding."""
    k = torch.arange(steps, dtype=torch.float64)
    if spacing == "linspace":
        return noisiest - (noisiest - last) * k / max(steps - 1, 1)
    size = noisiest + 1
    if spacing == "trailing":
        return size - k * size / steps - 1
    return last + min(size / steps, (noisiest - last) / max(steps - 1, 1)) * k.flip(0)


def karras_levels(process: Process, steps: int, rho: float, sigma_min: float, sigma_max: float) -> list[float]:
    """``steps`` ratios sigma / alpha, noisiest first, uniform in ratio^(1 / rho) (arXiv 2206.00364, eq. 5).

    The ends are held within what the process visits by default; on a discrete process each is a level of its table
    (:func:`nearest_level`).
    """
    greatest, least = (math.exp(-0.5 * process.log_snr(t).item()) for t in (process.t_max, process.t_min))
    high, low = (min(max(s, least), greatest) ** (1 / rho) for s in (sigma_max, sigma_min))
    ratios = [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)]
    return [nearest_level(process, ratio) for ratio in ratios]


def nearest_level(process: Process, ratio: float) -> float:
    """The ratio sigma / alpha in the table of a discrete process that is nearest to ``ratio``; itself on another."""
    if process.continuous:
        return ratio
    entries = process.time_of_index(torch.arange(process.num_steps))
    table = torch.exp(-0.5 * process.log_snr(entries))
    return float(table[(table - ratio).abs().argmin()])
