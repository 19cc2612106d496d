"""Seconds, interleaved: methods take turns in one process, and ratios are formed inside each round.

Whatever slows the machine for a while slows both sides of a ratio, so the median over rounds holds on machines where
single times do not (evaluation practice: warm up, A B A B, medians, conditions recorded).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gearshift.evaluation.conditions import Quiet, forget_peak, peak_memory, synchronize

BUSY = 0.10
"""Share of the machine's CPU time in other hands from which a time is not to be trusted."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one method in every round.

    Attributes:
        seconds: one per round.
        first_s: of the very first pass, in the warm-up, which pays for compilation and for the choice of kernels; None
            without a warm-up.
        peak_memory_bytes: the largest peak of device memory in a round; None where it is not measured (CPU).
    """

    seconds: tuple[float, ...]
    first_s: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def ratio_of(self, reference: Timing) -> float:
        """Median over rounds of this method's seconds per second of the reference."""
        return statistics.median(own / ref for own, ref in zip(self.seconds, reference.seconds, strict=True))

    def percentile(self, percent: float) -> float:
        """Seconds that `percent` (0 to 100) of the rounds do not exceed, linear between neighbours in size.

        With n rounds nothing beyond 100 (n - 1) / n is seen: p99 of 20 rounds lies just below the slowest.
        """
        ordered = sorted(self.seconds)
        place = percent / 100 * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def seconds_of(method: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run of `method`, waited for on both sides."""
    synchronize(device)
    start = time.perf_counter()
    method()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    methods: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warmup: int = 1,
    on_run: Callable[[str], None] | None = None,
) -> tuple[dict[str, Timing], float | None]:
    """Time every method once per round, in turns, every second round backwards.

    Returns the timings, and the share of CPU time other processes took meanwhile (None where unknown).
    """
    first: dict[str, float] = {}
    for _ in range(warmup):
        for name, method in methods.items():
            taken = seconds_of(method, device)
            first.setdefault(name, taken)
            if on_run is not None:
                on_run(name)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    peaks: dict[str, int | None] = dict.fromkeys(methods)
    watch = Quiet().start()
    for number in range(rounds):
        order: Sequence[str] = list(methods)
        for name in order if number % 2 == 0 else order[::-1]:
            forget_peak(device)
            seconds[name].append(seconds_of(methods[name], device))
            peak = peak_memory(device)
            if peak is not None:
                peaks[name] = max(peak, peaks[name] or 0)
            if on_run is not None:
                on_run(name)
    others = watch.others()
    return {name: Timing(tuple(times), first.get(name), peaks[name]) for name, times in seconds.items()}, others
