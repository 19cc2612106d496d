"""The loss of networks that predict a learned-range variance: squared error plus variational bound (arXiv 2102.09672).

The network gives eps and v, C channels each. One step of the process' table, from the level before, has variance beta:

    log sigma^2 = f log beta + (1 - f) log beta~,   f = (v + 1) / 2,   beta~ = (1 - abar_before) / (1 - abar) beta

The bound is KL(q(x_before | x_t, x_0) || p(x_before | x_t)) in bits per dimension, and at the level next to the data
the negative log-likelihood of x_0, each value being one of 256 between -1 and 1 (eqs. 15-16 and section 3.1). Latents
are treated alike, as in the official DiT, although they are no such values. The mean is detached: v alone learns from
it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gearshift.diffusion.process import Process

HALF_BIN = 1 / 255
"""Half the distance of two neighbouring pixel values in [-1, 1]."""
OUTERMOST = 0.999
"""Beyond this the first and last values reach to infinity."""
LEAST = 1e-12


def noise_losses(
    process: Process, time: Tensor, images: Tensor, noise: Tensor, output: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Squared error of eps [B] (mean over pixels), and the bound [B] where `output` has variance channels, else None.

    Args:
        time: of the process, [B].
        images: clean, [B, C, H, W].
        noise: that was added, [B, C, H, W].
        output: of the network, [B, C or 2C, H, W].
    """
    channels = noise.shape[1]
    eps = output[:, :channels].float()
    squared = (eps - noise).square().flatten(1).mean(1)
    if output.shape[1] == channels:
        return squared, None
    return squared, bits_per_dim(process, time, images, noise, eps.detach(), output[:, channels:].float())


def bits_per_dim(
    process: Process, time: Tensor, images: Tensor, noise: Tensor, eps: Tensor, variance: Tensor
) -> Tensor:
    """The bound's term at `time` [B], in bits per dimension, [B]; images, noise, eps and variance [B, C, H, W].

    The gradient flows into `eps` and `variance`. On a continuous process a step is one of its table of `num_steps`.
    """
    index = process.index_of_time(time)
    first = index <= 0
    here = process.log_snr(time)
    # The level next to the data has none before it; the variance of the second one stands in for its posterior's.
    there = process.log_snr(process.time_of_index(index.clamp(min=1) - 1))
    second = process.log_snr(process.time_of_index(torch.ones_like(index)))
    step_end = torch.where(first, second, here)
    log_beta, log_small = _log_variances(step_end, there)
    log_beta = torch.where(first, F.logsigmoid(-here), log_beta)
    # Both means are of x_0; they differ by this much of the error of eps (eq. 11 of arXiv 2006.11239).
    log_alpha = F.logsigmoid(here) - F.logsigmoid(there)
    log_shift = torch.where(
        first, 0.5 * (F.logsigmoid(-here) - F.logsigmoid(here)), log_beta - 0.5 * (log_alpha + F.logsigmoid(-here))
    )

    # Above the posterior's log variance by `gap`, which is tiny near noise: the range is taken in float64.
    low, reach, shift = (_beside(value, images) for value in (log_small, log_beta - log_small, log_shift.exp()))
    gap = 0.5 * (variance + 1) * reach
    log_variance = low + gap
    error = shift * (noise - eps)  # mean that is predicted, minus that of the posterior (or x_0, next to the data)
    divergence = 0.5 * (gap + torch.expm1(-gap) + error.square() * (-log_variance).exp())
    surprise = -_log_likelihood(images.float(), error, (0.5 * log_variance).exp())
    nats = torch.where(first.reshape(-1, *[1] * (images.ndim - 1)), surprise, divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def _log_variances(here: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """log beta and log beta~ of the step between two log-SNRs, float64."""
    beta = -torch.expm1(F.logsigmoid(here) - F.logsigmoid(before))
    return beta.log(), beta.log() + F.logsigmoid(-before) - F.logsigmoid(-here)


def _beside(values: Tensor, images: Tensor) -> Tensor:
    """[B] as float32 [B, 1, 1, 1]."""
    return values.to(torch.float32).reshape(-1, *[1] * (images.ndim - 1))


def _log_likelihood(x: Tensor, error: Tensor, deviation: Tensor) -> Tensor:
    """Log-probability of the bins around `x` under a normal distribution whose mean is x + error."""
    above = torch.special.ndtr((HALF_BIN - error) / deviation)
    below = torch.special.ndtr((-HALF_BIN - error) / deviation)
    above = torch.where(x > OUTERMOST, 1.0, above)
    below = torch.where(x < -OUTERMOST, 0.0, below)
    return (above - below).clamp(min=LEAST).log()
