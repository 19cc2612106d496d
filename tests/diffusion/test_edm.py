"""EDM and VE: the preconditioning table and its identities, training levels, the index axis; and what VP-SDE and the
tables are in the same terms."""

import math

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.edm import EDM, VE, EDMConfig, VEConfig
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.runtime.errors import UsageError

D = 0.5
EDM_, VE_ = EDM(EDMConfig()), VE(VEConfig())
VP, COSINE = VPSDE(VPSDEConfig(t_min=1e-5)), Discrete(DiscreteConfig("cosine"))
PROCESSES = {
    "edm": EDM_,
    "ve": VE_,
    "vp": VP,
    "cosine": COSINE,
    "scaled_linear": Discrete(DiscreteConfig("scaled_linear", 1000, 8.5e-4, 0.012, first_index=1)),
}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())

# c_skip, c_out, c_in of the published table, as functions of the ratio s.
TABLE = {
    "edm": (
        lambda s: D**2 / (s**2 + D**2),
        lambda s: s * D / math.sqrt(s**2 + D**2),
        lambda s: 1 / math.sqrt(s**2 + D**2),
    ),
    "vp": (lambda s: 1.0, lambda s: -s, lambda s: 1 / math.sqrt(s**2 + 1)),
    "ve": (lambda s: 1.0, lambda s: s, lambda s: 1.0),
    "cosine": (lambda s: 1.0, lambda s: -s, lambda s: 1 / math.sqrt(s**2 + 1)),
}
WEIGHT = {  # of |D - y|^2
    "edm": lambda s: (s**2 + D**2) / (s * D) ** 2,
    "vp": lambda s: 1 / s**2,
    "ve": lambda s: 1 / s**2,
    "cosine": lambda s: 1 / s**2,
}
EACH = pytest.mark.parametrize("name", TABLE)


def images(seed: int, count: int = 2) -> tuple[Tensor, ...]:
    """Float64 images [1, 1, 4, 4]."""
    return tuple(torch.randn(count, 1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).double())


def ratio(process: Process, t: float) -> float:
    return math.exp(-0.5 * process.log_snr(t).item())


def some_times(process: Process) -> list[float]:
    times = process.time_of_index(torch.tensor([0.0, 10.0, 300.0, 700.0, 999.0])).tolist()
    return [*times, process.t_min]


@EACH
def test_preconditioning_is_the_published_table(name: str) -> None:
    process, (skip, out, into) = PROCESSES[name], TABLE[name]
    x0, noise, seen = images(0, 3)
    for t in some_times(process):
        s = ratio(process, t)
        x_e = x0 + s * noise
        x = x_e / math.sqrt(1 + s**2)
        torch.testing.assert_close(process.precondition(x.float(), t).double(), into(s) * x_e, rtol=3e-7, atol=1e-8)
        # D from eps as a sampler derives it, and D from the table.
        eps = process.to_eps(seen.float(), x.float(), t).double()
        denoised = skip(s) * x_e + out(s) * seen
        torch.testing.assert_close(x_e - s * eps, denoised, rtol=1e-5, atol=2e-6 * max(s, 1))
        assert s * eps.abs().max() == pytest.approx((x_e - denoised).abs().max().item(), rel=1e-4)


@EACH
def test_what_the_network_is_fed(name: str) -> None:
    process = PROCESSES[name]
    for t in some_times(process):
        s = ratio(process, t)
        if name == "cosine":  # M - 1 - argmin_j |u_j - s|, where u_0 is the noisiest of the table
            table = [ratio(process, float(i)) for i in reversed(range(1000))]
            expected = 999 - min(range(1000), key=lambda j: abs(table[j] - s))
        else:
            slope = 19.9
            expected = {
                "edm": 0.25 * math.log(s),
                "ve": math.log(s / 2),
                "vp": 999 * (math.sqrt(0.1**2 + 2 * slope * math.log1p(s**2)) - 0.1) / slope,
            }[name]
        fed = process.network_time(t)
        assert fed.item() == pytest.approx(expected, rel=1e-6, abs=1e-6) and fed.dtype == torch.float32


@EACH
def test_the_loss_is_one_and_the_same_in_all_three_terms(name: str) -> None:
    """weight |eps_hat - eps|^2 = lambda |D - y|^2 = lambda c_out^2 |F - F_target|^2."""
    process, (skip, out, _), weight = PROCESSES[name], TABLE[name], WEIGHT[name]
    y, noise, seen = images(1, 3)
    for t in some_times(process):
        s = ratio(process, t)
        x_e = y + s * noise
        denoised, target = skip(s) * x_e + out(s) * seen, (y - skip(s) * x_e) / out(s)
        x = (x_e / math.sqrt(1 + s**2)).float()
        eps = process.to_eps(seen.float(), x, t).double()
        ours = process.loss_weight(torch.tensor([t], dtype=torch.float64)).double() * (eps - noise).square().sum()
        theirs = weight(s) * (denoised - y).square().sum()
        assert ours.item() == pytest.approx(theirs.item(), rel=2e-3 if s > 50 else 1e-4)
        in_f = weight(s) * out(s) ** 2 * (seen - target).square().sum()
        assert theirs.item() == pytest.approx(in_f.item(), rel=1e-9)
        if name == "edm":
            assert weight(s) * out(s) ** 2 == pytest.approx(1)  # which is why lambda is what it is


def test_the_network_sees_and_says_unit_variance() -> None:
    """Data of standard deviation sigma_data: c_in^2 (s^2 + sigma_data^2) = 1, and the target has variance 1, too."""
    process = EDM(EDMConfig(sigma_data=0.7))
    draws = torch.Generator().manual_seed(0)
    y, noise = 0.7 * torch.randn(1, 200_000, generator=draws), torch.randn(1, 200_000, generator=draws)
    for s in (0.002, 0.3, 1.0, 20.0, 80.0):
        x = process.add_noise(y, noise, s)
        zero = torch.zeros_like(x)
        bias, slope = process.to_eps(zero, x, s), process.to_eps(zero + 1, zero, s)
        target = (noise - bias) / slope  # F with to_eps(F) = noise
        assert process.precondition(x, s).var().item() == pytest.approx(1, rel=0.02)
        assert target.var().item() == pytest.approx(1, rel=0.02)


def test_nearest_the_data_the_denoiser_leaves_the_image() -> None:
    y, noise, seen = (part.float() for part in images(2, 3))
    for s in (1e-6, 1e-9):
        x = EDM_.add_noise(y, noise, s)
        eps = EDM_.to_eps(seen, x, s)
        assert eps.isfinite().all()
        torch.testing.assert_close(eps, -seen, rtol=1e-3, atol=1e-4)  # -F, although 1 - c_skip is below fp32's reach
        torch.testing.assert_close((x - s * eps), x, rtol=1e-5, atol=1e-5)
    x = EDM_.add_noise(y, noise, 1e30)
    torch.testing.assert_close(EDM_.to_eps(seen, x, 1e30), noise)


def test_one_level_per_row_equals_one_level() -> None:
    x, f = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0.002, 0.1, 1.0, 7.0, 80.0], dtype=torch.float64)
    for process in (EDM_, VE_):
        rows = process.precondition(x, t), process.to_eps(f, x, t)
        for i in range(5):
            alone = x[i : i + 1], f[i : i + 1]
            assert torch.equal(rows[0][i : i + 1], process.precondition(alone[0], t[i].item()))
            assert torch.equal(rows[1][i : i + 1], process.to_eps(alone[1], alone[0], t[i].item()))
        half = process.precondition(x.bfloat16(), t), process.to_eps(f.bfloat16(), x.half(), t)
        assert half[0].dtype == half[1].dtype == torch.float32


def test_processes_without_preconditioning_hand_through() -> None:
    x, f = torch.randn(2, 1, 1, 2, 2)
    for process in (VP, COSINE):
        assert not process.preconditioned and process.evenly_timed
        assert process.precondition(x, 0.3) is x and process.to_eps(f, x, 0.3) is f
    assert EDM_.preconditioned and VE_.preconditioned and not EDM_.evenly_timed and not VE_.evenly_timed


@pytest.mark.parametrize("process", [EDM_, VE_], ids=["edm", "ve"])
def test_time_is_the_ratio(process: Process) -> None:
    t = torch.logspace(-4, 4, 100, dtype=torch.float64)
    torch.testing.assert_close(torch.exp(-0.5 * process.log_snr(t)), t, rtol=1e-14, atol=0)
    torch.testing.assert_close(process.time_of_log_snr(process.log_snr(t)), t, rtol=1e-13, atol=0)
    torch.testing.assert_close(process.sigma(t) / process.alpha(t), t, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("process", [EDM_, VE_], ids=["edm", "ve"])
def test_index_axis_runs_over_the_range_of_solvers(process: Process) -> None:
    index = torch.linspace(0, 999, 1234, dtype=torch.float64)
    times = process.time_of_index(index)
    assert (times.diff() > 0).all()
    torch.testing.assert_close(process.index_of_time(times), index, rtol=1e-9, atol=1e-8)
    assert process.training_index(process.t_min).item() == pytest.approx(0, abs=1e-9)
    assert process.training_index(process.t_max).item() == pytest.approx(999)
    assert process.training_index(1e-9).item() == 0 and process.training_index(1e9).item() == 999
    torch.testing.assert_close(process.time_of_training_index(process.training_index(times)), times, rtol=1e-9, atol=0)


def test_index_axes_are_the_published_grids() -> None:
    # The 18-step grid of EDM is evenly spaced on the axis; the VE one is geometric.
    grid = EDM_.time_of_index(torch.arange(17, -1, -1).double() * (999 / 17)).tolist()
    published = [80, 57.59, 40.79, 28.37, 19.35, 12.91, 8.401, 5.315, 3.257, 1.923, 1.088, 0.5853, 0.2964, 0.1395]
    assert grid == pytest.approx([*published, 0.0599, 0.0229, 0.0075, 0.002], rel=5e-3)
    steps = VE_.time_of_index(torch.arange(1000)).log().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(5000) / 999))


def test_training_levels_of_edm_are_log_normal() -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(4))
    levels = EDM_.times_from_uniform(u).log()
    assert levels.mean().item() == pytest.approx(-1.2, abs=0.015) and levels.std().item() == pytest.approx(
        1.2, rel=0.01
    )
    # Masses of the published stages: 96.1 %, 3.5 %, 0.35 %.
    mass = EDM_.cdf(torch.tensor([2.5103, 7.6577, math.inf], dtype=torch.float64))
    assert mass.diff(prepend=torch.zeros(1)).tolist() == pytest.approx([0.9614, 0.0351, 0.0035], abs=5e-5)
    # Deep in both tails, against mathematics of the error function.
    for s in (1e-7, 1e-4, 0.3, 50.0, 1e4):
        z = (math.log(s) + 1.2) / 1.2
        assert EDM_.cdf(s).item() == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)), rel=1e-10)


def test_training_levels_of_ve_are_log_uniform() -> None:
    u = (torch.arange(1000).double() + 0.5) / 1000
    levels = VE_.times_from_uniform(u)
    torch.testing.assert_close(levels.log(), math.log(0.02) + u * math.log(5000))
    assert VE_.cdf(torch.tensor([0.0, 0.001, 0.02, 100.0, 1e5, math.inf])).tolist() == [0, 0, 0, 1, 1, 1]


@each_process
def test_quantile_inverts_cdf(process: Process) -> None:
    times = process.times_from_uniform(torch.rand(997, generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(process.quantile(process.cdf(times)), times, rtol=1e-9, atol=1e-12)
    assert (process.cdf(torch.sort(times).values).diff() >= 0).all()
    assert process.cdf(-1.0 if process.continuous is False else 0.0).item() == 0
    assert process.cdf(math.inf).item() == 1 and process.cdf(0.5).dtype == torch.float64


@each_process
def test_quantiles_are_the_draws(process: Process) -> None:
    """A cdf is the share of draws below: Kolmogorov-Smirnov against evenly spread uniforms."""
    n = 20_000
    u = (torch.arange(n).double() + 0.5) / n
    drawn = torch.sort(process.times_from_uniform(u)).values
    by_quantile = torch.sort(process.quantile(u)).values
    torch.testing.assert_close(by_quantile, drawn, rtol=1e-9, atol=1e-12)
    share = torch.searchsorted(drawn, drawn, right=True).double() / n
    assert (process.cdf(drawn) - share).abs().max() < 1.5 / n


@each_process
def test_ends_of_the_quantile_have_noise_and_signal_left(process: Process) -> None:
    ends = torch.cat([process.quantile(torch.tensor([0.0, 1.0])), process.times_from_uniform(torch.zeros(1))])
    assert process.log_snr(ends).isfinite().all()
    image = torch.ones(3, 1, 2, 2)
    assert process.add_noise(image, image, ends).isfinite().all() and process.loss_weight(ends).isfinite().all()
    assert process.to_eps(image, image, ends).isfinite().all() and process.network_time(ends).isfinite().all()


def test_draws_within_a_stage_of_a_table_stay_there() -> None:
    """quantile(p) with p in (cdf(a), cdf(b)] is a uniform draw of the entries in (a, b]."""
    process = PROCESSES["scaled_linear"]
    for a, b in ((441.0, 630.0), (0.0, 1.0), (441.3, 442.0), (1 - 1e-13, 7.5)):
        low, high = process.cdf(torch.tensor([a, b], dtype=torch.float64))
        u = 1 - torch.arange(2**16).double() / 2**16
        drawn = process.quantile(low + u * (high - low))
        wanted = [t for t in range(1, 1001) if a + 1e-9 < t <= b + 1e-9]
        counts = torch.bincount(drawn.long(), minlength=1001)
        assert torch.equal(counts.nonzero().flatten(), torch.tensor(wanted))
        assert counts[wanted].double().std(correction=0) <= 1 or len(wanted) == 1


@pytest.mark.parametrize("process", [EDM_, VE_], ids=["edm", "ve"])
def test_tensor_times_never_make_the_host_wait(process: Process) -> None:
    t, image = torch.empty(3, dtype=torch.float64, device="meta"), torch.empty(3, 1, 2, 2, device="meta")
    for result in (process.cdf(t), process.quantile(t), process.network_time(t), process.loss_weight(t)):
        assert result.device.type == "meta" and result.shape == (3,)
    for image_like in (
        process.precondition(image, t),
        process.to_eps(image, image, t),
        process.precondition(image, 2.0),
    ):
        assert image_like.shape == image.shape and image_like.device.type == "meta"


def test_published_levels_of_the_vp_sde() -> None:
    assert ratio(VP, 0.4420) == pytest.approx(2.51027, abs=5e-5)
    assert VP.time_of_log_snr(-2 * math.log(2.5103)).item() == pytest.approx(0.4420, abs=1e-5)
    assert VP.time_of_log_snr(-2 * math.log(7.6577)).item() == pytest.approx(0.6360, abs=5e-5)
    assert ratio(VP, 0.6308) == pytest.approx(7.405, abs=5e-4) and ratio(VP, 1.0) == pytest.approx(152, abs=0.5)
    t = torch.logspace(-5, 0, 500, dtype=torch.float64)
    closed = torch.sqrt(torch.expm1(0.5 * 19.9 * t**2 + 0.1 * t))
    torch.testing.assert_close(torch.exp(-0.5 * VP.log_snr(t)), closed, rtol=1e-10, atol=0)
    torch.testing.assert_close(VP.time_of_log_snr(VP.log_snr(t)), t, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (lambda: EDMConfig(sigma_data=0.0), "sigma_data=0.0"),
        (lambda: EDMConfig(P_std=-1.0), "P_std=-1.0"),
        (lambda: EDMConfig(rho=0.0), "rho=0.0"),
        (lambda: EDMConfig(sigma_min=3.0, sigma_max=2.0), "sigma_min=3.0 sigma_max=2.0"),
        (lambda: VEConfig(sigma_min=0.0), "sigma_min=0.0"),
        (lambda: VEConfig(sigma_max=math.inf), "sigma_max=inf"),
    ],
)
def test_impossible_settings_are_refused(make, quoted) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=quoted):
        make()
