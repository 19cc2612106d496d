"""Seconds, interleaved: methods take turns in one process, and ratios are formed inside each round.

Whatever slows the machine for a while slows both sides of a ratio, so the median over rounds holds on machines where
single times do not (evaluation practice: warm up, A B A B, medians, conditions recorded).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gearshift.evaluation.conditions import Quiet, synchronize

BUSY = 0.10
"""Share of the machine's CPU time in other hands from which a time is not to be trusted."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one method in every round."""

    seconds: tuple[float, ...]

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
    for _ in range(warmup):
        for name, method in methods.items():
            method()
            if on_run is not None:
                on_run(name)
    synchronize(device)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    watch = Quiet().start()
    for number in range(rounds):
        order: Sequence[str] = list(methods)
        for name in order if number % 2 == 0 else order[::-1]:
            synchronize(device)
            start = time.perf_counter()
            methods[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            if on_run is not None:
                on_run(name)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}, watch.others()
