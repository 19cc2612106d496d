"""The bound of a learned variance against a plain transcription of its formulas, table entry by table entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.objectives.variational import bits_per_dim, noise_losses

SHAPE = (2, 3, 3)


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def by_the_book(t: int, betas: Tensor, x0: Tensor, noise: Tensor, eps: Tensor, v: Tensor) -> Tensor:
    """Bits per dimension of one sample at table entry t, float64 (arXiv 2006.11239 eqs. 6-7, 2102.09672 eq. 15)."""
    abar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    small = betas * (1 - before) / (1 - abar)
    small = torch.cat([small[1:2], small[1:]])  # its first entry is zero
    x = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * noise

    def posterior_mean(start: Tensor) -> Tensor:
        kept = (1 - betas[t]).sqrt() * (1 - before[t]) / (1 - abar[t])
        return betas[t] * before[t].sqrt() / (1 - abar[t]) * start + kept * x

    mean = posterior_mean((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt())
    share = (v + 1) / 2
    log_variance = share * betas[t].log() + (1 - share) * small[t].log()
    if t == 0:
        deviation = (0.5 * log_variance).exp()
        above, below = ((x0 + side / 255 - mean) / deviation for side in (1, -1))
        inside = normal_cdf(above) - normal_cdf(below)
        inside = torch.where(x0 < -0.999, normal_cdf(above), torch.where(x0 > 0.999, 1 - normal_cdf(below), inside))
        nats = -inside.clamp(min=1e-12).log()
    else:
        distance = (posterior_mean(x0) - mean) ** 2
        ratio = (small[t].log() - log_variance).exp()
        nats = 0.5 * (log_variance - small[t].log() + ratio + distance / log_variance.exp() - 1)
    return nats.mean() / math.log(2)


def drawn(count: int, error: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = (torch.randint(0, 256, (count, *SHAPE), generator=generator) / 127.5 - 1).float()
    images[:, 0, 0, 0], images[:, 0, 0, 1] = -1.0, 1.0
    noise, off, v = (torch.randn(count, *SHAPE, generator=generator) for _ in range(3))
    return images, noise, noise + error * off, 1.5 * v


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("first_index", [0, 1])
def test_every_kind_of_table_entry(schedule: str, first_index: int) -> None:
    from gearshift.diffusion.process import betas

    config = DiscreteConfig(schedule=schedule, first_index=first_index)
    entries = torch.tensor([0, 1, 2, 17, 500, 998])
    images, noise, eps, v = drawn(len(entries), error=0.3)
    time = entries.double() + first_index
    got = bits_per_dim(Discrete(config), time, images, noise, eps, v)
    rows = [tensor.double() for tensor in (images, noise, eps, v)]
    wanted = [by_the_book(t, betas(config), *(row[i] for row in rows)) for i, t in enumerate(entries.tolist())]
    torch.testing.assert_close(got.double(), torch.stack(wanted), rtol=2e-4, atol=1e-5)


def test_the_posterior_itself_costs_nothing() -> None:
    process = Discrete(DiscreteConfig())
    images, noise, _, _ = drawn(3, error=0.0)
    time = torch.tensor([1.0, 300.0, 999.0]).double()
    bound = bits_per_dim(process, time, images, noise, noise, torch.full_like(noise, -1.0))
    torch.testing.assert_close(bound, torch.zeros(3), rtol=0, atol=1e-6)
    assert bool((bits_per_dim(process, time, images, noise, noise, torch.zeros_like(noise)) > 0).all())


@pytest.mark.parametrize("process", [Discrete(DiscreteConfig()), VPSDE(VPSDEConfig())], ids=lambda p: p.name)
def test_the_mean_learns_from_the_squared_error_alone(process: Process) -> None:
    images, noise, eps, v = drawn(5, error=0.1)
    output = torch.cat([eps, v], dim=1).requires_grad_()
    time = process.times_from_uniform(torch.tensor([0.0, 0.001, 0.3, 0.7, 1 - 2.0**-24]))
    squared, bound = noise_losses(process, time, images, noise, output)
    assert bound is not None
    [of_error] = torch.autograd.grad(squared.sum(), output, retain_graph=True)
    [of_bound] = torch.autograd.grad(bound.sum(), output)
    assert bool(of_bound.isfinite().all()) and bool(bound.isfinite().all())
    assert not bool(of_bound[:, :2].any()) and bool((of_bound[:, 2:] != 0).any(dim=(1, 2, 3)).all())
    assert not bool(of_error[:, 2:].any()) and bool(of_error[:, :2].any())
    torch.testing.assert_close(squared, (eps - noise).square().mean((1, 2, 3)))


def test_levels_below_the_first_entry_of_a_continuous_process() -> None:
    """The likelihood next to the data, at a level of its own; and no jump where table steps begin."""
    process = VPSDE(VPSDEConfig())
    images, noise, eps, v = drawn(4, error=0.01)
    time = torch.tensor([2.0**-24, 5e-4, 1e-3, 1.5e-3]).double()
    bound = bits_per_dim(process, time, images, noise, eps, v)
    assert bool(bound.isfinite().all())


def test_without_variance_channels_there_is_no_bound() -> None:
    images, noise, eps, _ = drawn(2, error=0.1)
    squared, bound = noise_losses(VPSDE(VPSDEConfig()), torch.tensor([0.1, 0.2]).double(), images, noise, eps)
    assert bound is None
    assert torch.equal(squared, (eps - noise).square().flatten(1).mean(1))
