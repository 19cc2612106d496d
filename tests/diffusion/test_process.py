"""Noise processes: known values, closed forms, and that log-SNR is an axis."""

import math

import numpy as np
import pytest
import torch

from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig, betas
from gearshift.runtime.errors import UsageError

PROCESSES = {
    "vp_sde": VPSDE(VPSDEConfig()),
    "linear": Discrete(DiscreteConfig("linear")),
    "scaled_linear": Discrete(DiscreteConfig("scaled_linear", 1000, 8.5e-4, 0.012, first_index=1)),
    "cosine": Discrete(DiscreteConfig("cosine")),
    "short": Discrete(DiscreteConfig("linear", num_steps=100, beta_start=1e-3, beta_end=0.2)),
}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def spread(process: Process, n: int = 997) -> torch.Tensor:
    """Times over the whole range, most of them between table entries."""
    return torch.linspace(process.t_min, process.t_max, n, dtype=torch.float64)


def test_vp_sde_known_values() -> None:
    process = PROCESSES["vp_sde"]
    assert process.alpha_bar(0.5).item() == pytest.approx(math.exp(-2.5375), rel=1e-12)
    t = spread(process)
    closed = torch.exp(-0.1 * t - 9.95 * t**2)
    torch.testing.assert_close(process.alpha_bar(t), closed, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - closed, rtol=1e-11, atol=0)
    assert process.network_time(1.0).item() == 999.0
    assert process.network_time(1e-3).item() == pytest.approx(0.999)
    assert process.beta(0.25).item() == pytest.approx(0.1 + 19.9 * 0.25)  # type: ignore[attr-defined]


def test_vp_sde_marginal_variance() -> None:
    x = PROCESSES["vp_sde"].add_noise(
        torch.zeros(1, 200_000), torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0)), 0.3
    )
    expected = 1 - math.exp(-0.1 * 0.3 - 9.95 * 0.09)
    assert x.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / 200_000))


def test_vp_sde_table_is_near_the_ddpm_table() -> None:
    # u-vit: alpha_bar at index 299 is 0.3963 and 0.3964, at 999 4.3e-5 and 4.0e-5.
    vp, linear = PROCESSES["vp_sde"], PROCESSES["linear"]
    assert vp.alpha_bar(0.3).item() == pytest.approx(0.3963, abs=5e-5)
    assert linear.alpha_bar(299).item() == pytest.approx(0.3964, abs=5e-5)
    assert vp.alpha_bar(1.0).item() == pytest.approx(4.3e-5, rel=0.01)
    assert linear.alpha_bar(999).item() == pytest.approx(4.0e-5, rel=0.01)


@pytest.mark.parametrize(("index", "value"), [(1, 0.99915), (500, 0.27767), (1000, 0.00466)])
def test_latent_table_known_values(index: int, value: float) -> None:
    process = PROCESSES["scaled_linear"]
    assert process.alpha_bar(index).item() == pytest.approx(value, abs=5e-6)
    assert process.network_time(index).item() == index
    assert (process.t_min, process.t_max) == (1.0, 1000.0)


def test_cosine_table() -> None:
    config = DiscreteConfig("cosine")
    table = betas(config)
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    assert table[0].item() == pytest.approx(1 - f[1] / f[0])
    assert table[-1].item() == 0.999 and (table <= 0.999).all()
    # Before the cap acts, the product telescopes.
    assert PROCESSES["cosine"].alpha_bar(499).item() == pytest.approx(f[500] / f[0], rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "short"])
def test_discrete_alpha_bar_is_the_running_product(name: str) -> None:
    process = PROCESSES[name]
    assert isinstance(process, Discrete)
    table = np.cumprod(1 - betas(process.config).numpy())
    times = torch.arange(process.num_steps, dtype=torch.float64) + process.t_min
    np.testing.assert_allclose(process.alpha_bar(times).numpy(), table, rtol=1e-10)
    np.testing.assert_allclose(process.sigma(times).numpy(), np.sqrt(1 - table), rtol=1e-10)


@each_process
def test_log_snr_falls_and_inverts(process: Process) -> None:
    t = spread(process)
    levels = process.log_snr(t)
    assert (levels.diff() < 0).all()
    torch.testing.assert_close(process.time_of_log_snr(levels), t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.log_snr(process.time_of_log_snr(levels)), levels, rtol=1e-9, atol=1e-9)
    assert process.time_of_log_snr(levels[5].item()).item() == pytest.approx(t[5].item(), abs=1e-9)
    assert levels.dtype == torch.float64


@each_process
def test_amplitudes(process: Process) -> None:
    t = spread(process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-14)
    torch.testing.assert_close(2 * torch.log(alpha / sigma), process.log_snr(t), rtol=1e-10, atol=1e-10)


@each_process
def test_training_index_runs_from_0_to_999(process: Process) -> None:
    assert process.training_index(process.t_min).item() == pytest.approx(0, abs=1e-12)
    assert process.training_index(process.t_max).item() == pytest.approx(999)
    t = spread(process)
    torch.testing.assert_close(process.time_of_training_index(process.training_index(t)), t, rtol=1e-12, atol=1e-12)


def test_training_index_of_each_kind() -> None:
    assert PROCESSES["vp_sde"].training_index(0.25).item() == pytest.approx(249)
    assert PROCESSES["vp_sde"].training_index(1e-5).item() == 0  # closer to the data than the table goes
    assert PROCESSES["linear"].training_index(10).item() == pytest.approx(10)
    assert PROCESSES["scaled_linear"].training_index(10).item() == pytest.approx(9)
    assert PROCESSES["short"].training_index(99).item() == pytest.approx(999)


@each_process
def test_add_noise_is_its_closed_form(process: Process) -> None:
    draws = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=draws)
    t = process.times_from_uniform(torch.rand(5, generator=draws))
    noisy = process.add_noise(x0, noise, t)
    for i in range(5):
        bar = process.alpha_bar(t[i].item()).item()
        torch.testing.assert_close(noisy[i], math.sqrt(bar) * x0[i] + math.sqrt(1 - bar) * noise[i])
    one = process.add_noise(x0, noise, t[2].item())
    assert torch.equal(one[2], noisy[2]) and one.dtype == torch.float32
    assert process.add_noise(x0.double(), noise.bfloat16(), t).dtype == torch.float32


@each_process
def test_training_times_cover_the_range_and_stay_finite(process: Process) -> None:
    u = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24], dtype=torch.float32)  # the ends of what a float32 draw can be
    t = process.times_from_uniform(u)
    assert t.dtype == torch.float64 and (t <= process.t_max).all() and (t > 0).logical_or(t == process.t_min).all()
    assert torch.isfinite(process.log_snr(t)).all()
    assert torch.isfinite(process.add_noise(torch.ones(4, 1), torch.ones(4, 1), t)).all()
    assert torch.equal(process.loss_weight(t), torch.ones(4))


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "short"])
def test_discrete_training_times_are_uniform_integers(name: str) -> None:
    process = PROCESSES[name]
    n = process.num_steps
    u = ((torch.arange(4 * n) + 0.5) / (4 * n)).to(torch.float32)  # four draws fall into each bin
    t = process.times_from_uniform(u)
    assert torch.equal(t, t.round())
    assert torch.equal(torch.bincount((t - process.t_min).long(), minlength=n), torch.full((n,), 4))


def test_vp_sde_training_times_are_uniform() -> None:
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(2))
    t = PROCESSES["vp_sde"].times_from_uniform(u)
    assert torch.equal(t, 1 - u.double())


@each_process
def test_runs_without_data_on_the_meta_device(process: Process) -> None:
    t = torch.empty(3, dtype=torch.float64, device="meta")
    for result in (process.alpha(t), process.training_index(t), process.network_time(t), process.time_of_log_snr(t)):
        assert result.device.type == "meta" and result.shape == (3,)
    image = torch.empty(3, 1, 2, 2, device="meta")
    assert process.add_noise(image, image, t).shape == image.shape


@pytest.mark.parametrize(
    "make",
    [
        lambda: VPSDEConfig(beta_min=0.0),
        lambda: VPSDEConfig(beta_min=3.0, beta_max=1.0),
        lambda: VPSDEConfig(t_min=0.0),
        lambda: DiscreteConfig(schedule="quadratic"),
        lambda: DiscreteConfig(num_steps=1),
        lambda: DiscreteConfig(first_index=2),
        lambda: DiscreteConfig(beta_end=1.5),
    ],
)
def test_impossible_settings_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=r"got|known"):
        make()
