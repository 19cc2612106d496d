"""From the arrays of a row's chunks to its numbers.

Runs on the main process alone, over all images in order of their indices, so nothing here depends on how many processes
made them. Distribution metrics are computed in each repeat on its own: pooling repeats would change the bias.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gearshift.evaluation.metrics import Metric
from gearshift.evaluation.observe import feature_name
from gearshift.evaluation.paired import psnr, reduce_paired
from gearshift.evaluation.reference import Statistics
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.evaluation.shards import Column, Shards
from gearshift.sampling.ledger import LedgerData

Array = NDArray[Any]
# The arrays of a ledger that have an axis of images; the others are the same in every chunk.
LEDGER = ("depth", "called", "macs", "reused")
_QUANTILES = {"min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}


class RowArrays:
    """The arrays of one row over the whole evaluation, or over one repeat."""

    def __init__(self, shards: Shards, settings: EvaluationConfig, lpips: Sequence[str]) -> None:
        self._shards, self._settings, self._lpips = shards, settings, tuple(lpips)

    def column(self, repeat: int | None = None) -> Column:
        s = self._settings
        start, stop = (s.start, s.stop) if repeat is None else s.ranges()[repeat]
        return Column(self._shards, s.chunk, start, stop)

    def ledger(self) -> LedgerData:
        """Of all images."""
        column = self.column()
        arrays = {name: column.read(f"ledger/{name}", axis=2) for name in LEDGER}
        of_calls = [f"ledger/{name}" for name in LedgerData.__dataclass_fields__ if name not in LEDGER]
        fixed = self._shards.load(column.numbers[0], of_calls)
        # A policy that decides by data may keep more in one chunk than in another.
        kept = [self._shards.load(number, ["ledger/kept"])["ledger/kept"] for number in column.numbers]
        fixed["ledger/kept"] = np.max(kept, axis=0)
        return LedgerData(**arrays, **{name.removeprefix("ledger/"): value for name, value in fixed.items()})

    def images(self, count: int) -> Array:
        """The first `count` images, uint8 [n, C, H, W]."""
        s = self._settings
        return Column(self._shards, s.chunk, s.start, min(s.stop, s.start + count)).read("images")

    def paired(self, repeat: int | None = None) -> dict[str, float | None]:
        column = self.column(repeat)
        return reduce_paired(
            column.read("squared_error"), column.read("ssim"), {name: column.read(name) for name in self._lpips}
        )

    def labels(self, repeat: int | None = None) -> tuple[Array, Array] | None:
        """Labels that were asked for and those a classifier saw, int64 [n] each; None without either."""
        column = self.column(repeat)
        if not {"labels", "predicted"} <= set(self._shards.names(column.numbers[0])):
            return None
        return column.read("labels"), column.read("predicted")

    def distribution(
        self, metric: Metric, reference: Sequence[Statistics], repeat: int | None = None
    ) -> dict[str, float]:
        """The numbers of a distribution metric."""
        column = self.column(repeat)
        samples = [torch.from_numpy(column.read(feature_name(extractor, tap))) for extractor, tap in metric.needs]
        return metric.compute(samples, reference)


def cost_numbers(ledger: LedgerData, full: LedgerData, calls: int) -> dict[str, Any]:
    """MACs, FLOPs, calls, depth, skips and reuse of a row. `full` is the full computation at all steps."""
    one_call = float(np.mean(ledger.full_macs))
    longest, span = ledger.longest_skip()
    return {
        "steps": calls,
        "calls": ledger.calls_per_image,
        "macs_per_image": ledger.macs_per_image,
        "flops_per_image": 2 * ledger.macs_per_image,
        # The price in evaluations of the plain network: a guided call is two of them.
        "full_equivalents": ledger.macs_per_image / one_call,
        # Against the full computation at all steps, so that fewer steps show as a saving too.
        "macs_saved": 1 - ledger.macs_per_image / full.full_macs_per_image,
        "mean_depth": float(ledger.depth[ledger.called].mean(dtype=np.float64)) if ledger.called.any() else 0.0,
        "longest_skip": longest,
        "longest_skip_log_snr": span,
        "blocks_reused": ledger.blocks_reused,
        "kept_bytes_per_image": ledger.kept_bytes,
    }


def quality_numbers(
    arrays: RowArrays,
    repeats: int,
    distances: Sequence[tuple[Metric, Sequence[Statistics]]],
    on_metric: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Paired measures, label agreement and distribution metrics: the mean over repeats of each, and `sd` where there
    are several."""
    found: dict[str, list[float | None]] = {}
    for repeat in range(repeats):
        numbers: dict[str, float | None] = dict(arrays.paired(repeat))
        labels = arrays.labels(repeat)
        if labels is not None:
            numbers["label_agreement"] = float(np.mean(labels[0] == labels[1]))
        for metric, reference in distances:
            numbers.update(arrays.distribution(metric, reference, repeat))
            on_metric(metric.name)
        for key, value in numbers.items():
            found.setdefault(key, []).append(value)
    out: dict[str, Any] = {key: mean(values) for key, values in found.items()}
    if repeats > 1:
        known = {key: [v for v in values if v is not None] for key, values in found.items()}
        out["sd"] = {key: statistics.stdev(values) for key, values in known.items() if len(values) > 1}
    labels = arrays.labels()
    if labels is not None:
        out["label_agreement_per_class"] = per_class(*labels)
    return out


def mean(values: Sequence[float | None]) -> float | None:
    """Over the values there are; None where there is none (an infinite PSNR)."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def per_class(requested: Array, predicted: Array) -> list[float | None]:
    """Share of each requested class that was recognised as it, in [0, 1]; None for a class nobody asked for."""
    classes = int(max(requested.max(), predicted.max())) + 1
    return [
        float(np.mean(predicted[requested == label] == label)) if np.any(requested == label) else None
        for label in range(classes)
    ]


def per_image(ledger: LedgerData, squared_error: Array) -> dict[str, Array]:
    """Arrays float64 [N] over images: MACs, PSNR to the full computation (nan where equal), mean depth of its calls."""
    called = ledger.called.sum(axis=(0, 1))
    depth = np.where(ledger.called, ledger.depth, 0).sum(axis=(0, 1)) / np.maximum(called, 1)
    decibel = [psnr(float(error)) for error in squared_error]
    return {
        "macs_per_image": ledger.macs.sum(axis=(0, 1)).astype(np.float64),
        "psnr_to_full": np.array([np.nan if value is None else value for value in decibel]),
        "mean_depth": depth,
    }


def distribution(images: Mapping[str, Array]) -> dict[str, dict[str, float]]:
    """Quantiles over images of each array; arrays without a finite value are left out."""
    out = {}
    for name, values in images.items():
        finite = values[np.isfinite(values)]
        if len(finite):
            out[name] = {label: float(np.percentile(finite, q)) for label, q in _QUANTILES.items()}
    return out
