"""Speed of whole generations: throughput over batch sizes, latency of one image, peak memory, several devices.

Every pass makes the same images under every row, from noise to the last step with the real decisions, its ledger
included; decoding latents, quantising and copies of images to the host are outside. Rows take turns, and what is
compared is compared within a round (see `throughput`).
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gearshift.evaluation.conditions import synchronize
from gearshift.evaluation.throughput import Timing, interleave, seconds_of
from gearshift.execution.cost import CostTable
from gearshift.runtime import peers
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.launch import is_main, world_size
from gearshift.sampling.loop import Sampler

CondOf = Callable[[Tensor], Tensor | None]
"""Conditioning of image indices int64 [B], where it is not the sampler's own."""


@dataclass(frozen=True)
class SpeedSettings:
    """How speed is measured.

    Attributes:
        images: of one pass; the row's own figures are those of this batch.
        rounds: interleaved rounds at every batch size.
        sweep: further batch sizes, in any order.
        latency_repeats: single images timed for the percentiles of the latency; 0 leaves them out.
        warmup: passes of every row before each batch size is timed.

    Raises:
        UsageError: a number is too small.
    """

    images: int = 256
    rounds: int = 5
    sweep: Sequence[int] = ()
    latency_repeats: int = 0
    warmup: int = 1

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("rounds", 1), ("latency_repeats", 0), ("warmup", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"timing of {name}={getattr(self, name)}: it must be at least {least}")
        for batch in self.sweep:
            if batch < 1:
                raise UsageError(f"timing over batch sizes {list(self.sweep)}: every one must be at least 1")

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes of the sweep in rising order, each once."""
        return tuple(sorted(set(self.sweep)))

    def passes(self, rows: int) -> int:
        """How often `on_pass` is called for so many rows where every batch fits."""
        sizes = len({self.images, *self.sweep})
        latency = self.warmup + self.latency_repeats if self.latency_repeats else 0
        return rows * (sizes * (self.warmup + self.rounds) + latency)


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        rows: by row, the timing fields of the results: images_per_s, speedup, time_saved, seconds_spread, speed.
        others: the largest share of CPU time that other processes took during any part; None where unknown.
        macs: by row and batch size, multiply-accumulates per image of the images that were timed.
    """

    rows: dict[str, dict[str, Any]]
    others: float | None
    macs: dict[str, dict[int, float]]


def saving_realised(time_saved: float, macs_saved: float) -> float | None:
    """Share of the saving in MACs that shows in time; None where hardly any (1 % or less) was saved."""
    return time_saved / macs_saved if macs_saved > 0.01 else None


def measure_speed(
    samplers: Mapping[str, Sampler],
    reference_of: Mapping[str, str],
    table: CostTable | Mapping[str, CostTable],
    settings: SpeedSettings,
    *,
    start: int = 0,
    cond: CondOf | None = None,
    on_pass: Callable[[str], None] | None = None,
) -> Speed:
    """Speed of every row, interleaved, on one device.

    The warm-up of a batch size is timed apart (`first_pass_s`, of the main batch: where anything is compiled, it is
    compiled there). Speedups are medians over rounds of ratios within a round. A batch size of the sweep that does not
    fit the device is reported with None for its numbers and the reason, and no larger one is tried.

    Args:
        samplers: by row name; they share the device. Their own `chunk` is replaced by the batch size.
        reference_of: by row name, the row it is compared with.
        table: costs of the network, for the ledger; by row name where rows run different ones.
        start: index of the first image; a batch makes images start..start+batch-1, and the r-th latency image is
            start + r under every row, so that percentiles cover images which take different depths.
        cond: conditioning, for networks whose conditioning is no label.
        on_pass: told the row after each pass (`SpeedSettings.passes` in all).

    Raises:
        RunError: the main batch does not fit the device.
    """
    tables = table if isinstance(table, Mapping) else dict.fromkeys(samplers, table)
    measure = _Measure(samplers, tables, settings, start, cond, on_pass)
    main = measure.batch(settings.images)
    if isinstance(main, str):
        raise RunError(f"speed cannot be measured with {settings.images} images at a time ({main}); time fewer")
    # Of the larger sizes none is tried after one that did not fit.
    swept: dict[int, dict[str, Timing] | str] = {}
    for batch in settings.batches:
        swept[batch] = main if batch == settings.images else measure.batch(batch)
        if isinstance(swept[batch], str):
            break
    latency = measure.latency() if settings.latency_repeats else {}
    rows = {}
    for name in samplers:
        own, reference = main[name], main[reference_of[name]]
        ratio = own.ratio_of(reference)
        rows[name] = {
            "images_per_s": settings.images / own.median,
            "speedup": 1 / ratio,
            "time_saved": 1 - ratio,
            "seconds_spread": own.spread,
            "speed": {
                "first_pass_s": own.first_s,
                "sweep": [_entry(batch, timings, name, reference_of[name]) for batch, timings in swept.items()],
                "latency_ms": _latency(latency[name]) if latency else None,
                "peak_memory_bytes": own.peak_memory_bytes,
            },
        }
    return Speed(rows, measure.others, measure.macs)


def _entry(batch: int, timings: dict[str, Timing] | str, name: str, reference: str) -> dict[str, Any]:
    if isinstance(timings, str):
        nothing = dict.fromkeys(("images_per_s", "speedup", "spread", "peak_memory_bytes"))
        return {"batch": batch, **nothing, "reason": timings}
    own = timings[name]
    return {
        "batch": batch,
        "images_per_s": batch / own.median,
        "speedup": 1 / own.ratio_of(timings[reference]),
        "spread": own.spread,
        "peak_memory_bytes": own.peak_memory_bytes,
    }


def _latency(timing: Timing) -> dict[str, float | int]:
    """Milliseconds of one image, alone."""
    percentiles = {f"p{percent}": 1000 * timing.percentile(percent) for percent in (50, 90, 95, 99)}
    mean = statistics.fmean(timing.seconds)
    return {**percentiles, "min": 1000 * min(timing.seconds), "mean": 1000 * mean, "repeats": len(timing.seconds)}


@dataclass
class _Measure:
    """The passes of one `measure_speed`."""

    samplers: Mapping[str, Sampler]
    tables: Mapping[str, CostTable]
    settings: SpeedSettings
    start: int
    cond: CondOf | None
    on_pass: Callable[[str], None] | None
    others: float | None = None
    macs: dict[str, dict[int, float]] = field(default_factory=dict)
    _at_work: str = ""

    def __post_init__(self) -> None:
        self.device = next(iter(self.samplers.values())).device

    def batch(self, size: int) -> dict[str, Timing] | str:
        """Timings of every row at one batch size, or why there are none."""
        methods = {name: self._method(name, size) for name in self.samplers}
        try:
            return self._interleave(methods, self.settings.rounds)
        except torch.OutOfMemoryError as error:
            reason = f"{self._at_work} ran out of memory: {_first_sentence(error)}"
        # Only here, outside the handler, nothing holds the tensors of the pass that failed any more.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            synchronize(self.device)
        return reason

    def latency(self) -> dict[str, Timing]:
        """Timings of single images, a new one in each round."""
        methods = {name: self._singles(name) for name in self.samplers}
        return self._interleave(methods, self.settings.latency_repeats)

    def _interleave(self, methods: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
        timings, others = interleave(methods, rounds, self.device, warmup=self.settings.warmup, on_run=self.on_pass)
        if others is not None:
            self.others = others if self.others is None else max(self.others, others)
        return timings

    def _method(self, name: str, size: int) -> Callable[[], None]:
        def run() -> None:
            self._at_work = name
            macs = self._generate(name, self.start, size)
            self.macs.setdefault(name, {})[size] = macs

        return run

    def _singles(self, name: str) -> Callable[[], None]:
        done = 0

        def run() -> None:
            nonlocal done
            self._generate(name, self.start + max(done - self.settings.warmup, 0), 1)
            done += 1

        return run

    def _generate(self, name: str, first: int, size: int) -> float:
        """One pass; MACs per image of what it made."""
        return _generate(self.samplers[name], first, size, self.tables[name], self.cond)


def _generate(sampler: Sampler, first: int, size: int, table: CostTable, cond: CondOf | None = None) -> float:
    index = torch.arange(first, first + size, device=sampler.device)
    given = None if cond is None else cond(index)
    return replace(sampler, chunk=size).generate(index, table, cond=given).ledger.macs_per_image


def _first_sentence(error: BaseException) -> str:
    """torch's message goes on with advice about its allocator."""
    text = " ".join(str(error).split())
    head = text.split(". ")
    # "CUDA out of memory. Tried to allocate 2.00 GiB."
    return ". ".join(head[:2]).rstrip(".") or type(error).__name__


# Several devices -----------------------------------------------------------------------------------------------------


def measure_scaling(
    sampler: Sampler, table: CostTable, settings: SpeedSettings, *, start: int = 0
) -> dict[str, Any] | None:
    """Images per second of all processes at once against the main one alone. Collective.

    In each round the main process makes `settings.images` images while the others wait; then all make those same images
    (so that all have the same work), started together at a barrier. A round of all ends with the slowest.

    Returns, on the main process (None elsewhere, and where there is one process): devices (processes), nodes (distinct
    host names), images_per_s_alone, images_per_s_device (median over devices, all at work), images_per_s_node (median
    over nodes), images_per_s (all together), efficiency = images_per_s / (devices * images_per_s_alone). Times are
    medians over rounds.

    Raises:
        RunError: another process ended.
    """
    if world_size() == 1:
        return None

    def run() -> None:
        _generate(sampler, start, settings.images, table)

    for _ in range(settings.warmup):
        seconds_of(run, sampler.device)
    alone: list[float] = []
    together: list[float] = []
    for _ in range(settings.rounds):
        peers.barrier("all had finished a timed pass")
        if is_main():
            alone.append(seconds_of(run, sampler.device))
        peers.barrier("the main process had been timed alone")
        together.append(seconds_of(run, sampler.device))
    everything = peers.gather((socket.gethostname(), tuple(together)), "all had been timed")
    if everything is None:
        return None
    return scaling(settings.images, alone, everything)


def scaling(
    images: int, alone: Sequence[float], together: Sequence[tuple[str, Sequence[float]]]
) -> dict[str, int | float]:
    """The arithmetic of `measure_scaling`.

    Args:
        images: of one pass of one device.
        alone: seconds of the main device by itself, by round.
        together: by device, its host's name and its seconds by round.
    """
    nodes: dict[str, list[Sequence[float]]] = {}
    for host, seconds in together:
        nodes.setdefault(host, []).append(seconds)
    by_itself = images / statistics.median(alone)
    total = _rate(images, [seconds for _, seconds in together])
    return {
        "devices": len(together),
        "nodes": len(nodes),
        "images_per_s_alone": by_itself,
        "images_per_s_device": statistics.median(_rate(images, [seconds]) for _, seconds in together),
        "images_per_s_node": statistics.median(_rate(images, devices) for devices in nodes.values()),
        "images_per_s": total,
        "efficiency": total / (len(together) * by_itself),
    }


def _rate(images: int, devices: Sequence[Sequence[float]]) -> float:
    """Images per second of devices that start together and are done when the slowest is; median over rounds."""
    slowest: list[float] = [max(of_round) for of_round in zip(*devices, strict=True)]
    return len(devices) * images / statistics.median(slowest)
