"""The splits that the paper compares with (arXiv 2312.09181, Table 4): by time, by log-SNR, by gradient affinity."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.stages.axis import Axis
from gearshift.stages.partition import best_partition, log_snr_affinity, sizes, to_middle

Shares = tuple[float | None, float | None]
LEVELS = 1000
"""Nodes of the log-SNR split: time i / 1000, as published schedules count."""


def uniform_time(axis: Axis, stages: int) -> tuple[float, ...]:
    """Shares that divide the axis equally. Published for three stages as 0.330 and 0.670, which is 1/3 and 2/3."""
    return tuple(number / stages for number in range(1, stages))


def log_snr(axis: Axis, stages: int, shares: Shares = (None, None)) -> tuple[float, ...]:
    """The cut of 1000 levels at which the distances in 2 log-SNR to the middle level of each stage sum to the least.

    On the VP-SDE's whole axis of time this is the published 0.348 and 0.709, read as the first level of a stage.
    """
    share = torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS
    value = to_middle(log_snr_affinity(axis.log_snr(share)))
    return tuple(float(share[first]) for first in best_partition(value, stages, *sizes(LEVELS, stages, *shares)))


def by_affinity(cosine: Tensor, stages: int, shares: Shares = (None, None)) -> tuple[float, ...]:
    """The cut at which the affinities [G, G] to the middle node of each stage sum to the most, on the edges between
    nodes that are the centres of equal parts of the axis."""
    nodes = len(cosine)
    cuts = best_partition(to_middle(cosine), stages, *sizes(nodes, stages, *shares))
    return tuple(first / nodes for first in cuts)
