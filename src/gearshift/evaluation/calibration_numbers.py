"""Numbers of predicted against true errors: calibration, and what tells images of one noise level apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BINS = 15
"""Of the calibration curve, with equally many of the values each."""


@dataclass(frozen=True)
class Records:
    """Predicted and true error of every image at every exit and time.

    Attributes:
        exits: depths with a head and a readout, ascending.
        times, log_snr: process time and log-SNR, float64 [T], from data to noise.
        uncertainty: mean of u over channels and pixels, float64 [T, E, N] in [0, 1].
        error: mean of tanh|eps_hat - eps|, float64 [T, E, N] in [0, 1).
    """

    exits: tuple[int, ...]
    times: Array
    log_snr: Array
    uncertainty: Array
    error: Array


def summarise(records: Records) -> list[dict[str, Any]]:
    """Of every exit, ready for JSON (numbers that are not defined are None):

    depth
    uncertainty, error       means over times and images
    bias                     mean of u minus mean of the true error
    ece                      expected calibration error, see `curve`
    ece_by_time              the same over times in the place of bins: bins of u cannot see a head that says one
                             and the same of every time
    within_time_share        share of the variance of u that lies within times (population variances: within and
                             between add up)
    error_within_time_share  the same of the true error: what there is to tell
    rank_correlation         Spearman's, of u and true error over the images of one time, averaged over the times at
                             which both vary
    curve                    {"uncertainty", "error"}: lists over bins
    by_time                  lists over times, from data to noise: "uncertainty" and "error" (means),
                             "uncertainty_sd" and "error_sd" (over images), "rank_correlation"
    """
    return [_exit(depth, records.uncertainty[:, k], records.error[:, k]) for k, depth in enumerate(records.exits)]


def _exit(depth: int, uncertainty: Array, error: Array) -> dict[str, Any]:
    bins, ece = curve(uncertainty.ravel(), error.ravel())
    correlations = [spearman(*pair) for pair in zip(uncertainty, error, strict=True)]
    defined = [value for value in correlations if value is not None]
    return {
        "depth": depth,
        "uncertainty": float(uncertainty.mean()),
        "error": float(error.mean()),
        "bias": float(uncertainty.mean() - error.mean()),
        "ece": ece,
        "ece_by_time": float(np.abs(uncertainty.mean(1) - error.mean(1)).mean()),
        "within_time_share": within_share(uncertainty),
        "error_within_time_share": within_share(error),
        "rank_correlation": float(np.mean(defined)) if defined else None,
        "curve": {"uncertainty": bins[0].tolist(), "error": bins[1].tolist()},
        "by_time": {
            "uncertainty": uncertainty.mean(1).tolist(),
            "error": error.mean(1).tolist(),
            "uncertainty_sd": uncertainty.std(1).tolist(),
            "error_sd": error.std(1).tolist(),
            "rank_correlation": correlations,
        },
    }


def curve(uncertainty: Array, error: Array, bins: int = BINS) -> tuple[Array, float]:
    """The calibration curve, mean u and mean true error of every bin [2, bins], and the expected calibration error
    (Naeini et al. 2015, for a regression): the mean over bins, by their counts, of |mean u - mean error|.

    Bins of u hold equally many of the values [M] (one more in the first). Values with equal u count with the mean of
    their errors, so that nothing depends on their order.
    """
    levels, group = np.unique(uncertainty, return_inverse=True)
    counts = np.bincount(group)
    errors = np.repeat(np.bincount(group, weights=error) / counts, counts)
    found = [
        (len(one), one.mean(), other.mean())
        for one, other in zip(
            np.array_split(np.repeat(levels, counts), bins), np.array_split(errors, bins), strict=True
        )
        if len(one)
    ]
    held, predicted, true = np.array(found).T
    return np.stack([predicted, true]), float(np.average(np.abs(predicted - true), weights=held))


def within_share(values: Array) -> float | None:
    """Share of the variance of [T, N] that lies within the rows; None where values differ by rounding only."""
    within, between = float(values.var(1).mean()), float(values.mean(1).var())
    rounding = 1e-14 * float(np.square(values).mean())  # of float32
    return within / (within + between) if within + between > rounding else None


def spearman(one: Array, other: Array) -> float | None:
    """Correlation of the ranks of two [N], ties with their mean rank; None where one of the two does not vary."""
    a, b = _ranks(one), _ranks(other)
    spread = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / spread if spread > 0 else None


def _ranks(values: Array) -> Array:
    """Ranks less their mean."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = (last - (counts - 1) / 2)[group] - (len(values) + 1) / 2
    return ranks
