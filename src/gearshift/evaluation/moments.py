"""Mean and covariance of a matrix of features, in float64 and always by the same blocks of rows.

The result is a function of the rows in their order and of nothing else: shards are put together in chunk order before
they come here, so any number of processes gives the same bits. Two passes, the second about the mean: features that lie
far from the origin (random networks: |mean| / spread of 3 and more) lose no digits to cancellation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.runtime.errors import RunError, UsageError

BLOCK = 1024
# A spread below this part of the mean is the rounding of float32 features, not a scale.
_ROUNDING = 1e-6


def moments(features: Tensor, *, device: torch.device | str = "cpu", block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Mean float64 [d] and unbiased covariance float64 [d, d] of `features` [n, d] (any floating type), on `device`
    (on the host where that has no float64).

    Raises UsageError below two rows, RunError where a value is not finite, ValueError for another shape.
    """
    if features.dim() != 2:
        raise ValueError(f"features must be [n, d], got shape {tuple(features.shape)}")
    count, dim = features.shape
    device = float64_device(device)
    if count < 2:
        raise UsageError(f"a covariance needs at least 2 samples, got {count}; raise the number of images")
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    for part in features.detach().split(block):
        total += part.to(device, torch.float64).sum(dim=0)
    # float32 values cannot overflow a float64 sum, so anything odd here was odd in the features.
    if not bool(torch.isfinite(total).all()):
        raise RunError("features hold values that are not finite; check the images and the extractor's weights")
    mean = total / count
    scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    for part in features.detach().split(block):
        centred = part.to(device, torch.float64) - mean
        scatter.addmm_(centred.T, centred)
    return mean, (scatter + scatter.T) / (2 * (count - 1))


def float64_device(device: torch.device | str) -> torch.device:
    """`device` if it is a CUDA device, else the host: Apple's GPUs have no float64."""
    device = torch.device(device)
    return device if device.type == "cuda" else torch.device("cpu")


def spread(mean: Tensor, covariance: Tensor) -> Tensor:
    """Standard deviation of every feature, float64 [d]; 1 where a feature is constant and so has no scale of its own.

    Dividing by it makes distances independent of the chance scale of every feature of a random network.
    """
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    return torch.where(deviation > _ROUNDING * mean.abs(), deviation, torch.ones_like(deviation))
