"""Which noise level belongs to which stage: a hard switch on the caller's own float64 level (arXiv 2312.09181).

A boundary is the noise-to-signal ratio sigma(t)/alpha(t) at which a stage ends; the ratio of log-SNR l is exp(-l/2).
Stage 0 is next to the data and holds (0 and) everything up to the first boundary, inclusive; the last stage holds all
that is above the last boundary, infinity included. Ratios, unlike times, mean the same in every process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.runtime.errors import UsageError

# A level that is a boundary but for the rounding of its way through a schedule belongs to the lower stage.
TOLERANCE = 1e-12


class StageRouter:
    """Stages of noise between ascending `boundaries`; k boundaries make k + 1 stages, none makes one.

    Args:
        boundaries: ratios sigma/alpha, positive, finite, strictly ascending; each is the end of a stage, inclusive.

    Raises:
        UsageError: the boundaries are something else.
    """

    def __init__(self, boundaries: Sequence[float]) -> None:
        self.boundaries = tuple(float(boundary) for boundary in boundaries)
        given = list(self.boundaries)
        for boundary in given:
            if not (math.isfinite(boundary) and boundary > 0):
                raise UsageError(f"boundaries={given}: {boundary} is no noise-to-signal ratio; give finite numbers > 0")
        for before, after in itertools.pairwise(given):
            if not before < after:
                raise UsageError(f"boundaries={given}: {before} stands before {after}; give them strictly ascending")
        self.log_snr = -2.0 * torch.tensor(given, dtype=torch.float64, device="cpu").log()  # descending

    @property
    def num_stages(self) -> int:
        return len(self.boundaries) + 1

    def route(self, log_snr: Tensor) -> Tensor:
        """Stage of each level: host log-SNR [n] (float64; -inf is pure noise, +inf is data) to host int64 [n]."""
        below = log_snr.to("cpu", torch.float64)[..., None] < self.log_snr - 2.0 * TOLERANCE
        return below.sum(-1)

    def stage_of_sigma(self, sigma: float) -> int:
        """Stage of a noise-to-signal ratio in [0, inf].

        Raises:
            ValueError: the ratio is negative or no number.
        """
        if not sigma >= 0:
            raise ValueError(f"{sigma} is no noise-to-signal ratio")
        log_snr = -2.0 * math.log(sigma) if sigma > 0 else math.inf
        return int(self.route(torch.tensor(log_snr, dtype=torch.float64)))
