"""The optimal denoiser against its closed form, all at once and in float64."""

import math

import pytest
import torch

from gearshift.diffusion.edm import EDM, EDMConfig
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.stages import optimal
from gearshift.stages.optimal import OptimalDenoiser
from gearshift.stages.rows import Rows

VP = VPSDE(VPSDEConfig())
N, WIDTH = 200, 48
TIMES = [1e-5, 1e-3, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0]


def draw(count, purpose, shape=(3, 4, 4)):
    return keys.normal(3, purpose, torch.arange(count), 0, shape).double()


@pytest.fixture(scope="module")
def data():
    """200 images of 48 numbers that are grey levels."""
    return keys.integers(3, "image", torch.arange(N), 0, 256, (3, 4, 4)).to(torch.uint8)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows and several chunks of queries, neither of which divides what there is."""
    monkeypatch.setattr(optimal, "_ROWS", 37)
    monkeypatch.setattr(optimal, "_QUERIES", 7)
    monkeypatch.setattr(optimal, "_GROUP", 2)
    monkeypatch.setattr(optimal, "_FEW", 5)


def unit(data):
    return data.double() / 255


def brute(data, z, sigma):
    """Softmax over the distances themselves: no expansion, no blocks."""
    flat, queries = data.flatten(1), z.flatten(1)
    weights = torch.softmax(-(queries[:, None] - flat).square().sum(2) / (2 * sigma[:, None] ** 2), dim=1)
    entropy = -torch.special.xlogy(weights, weights).sum(1)
    return (weights @ flat).reshape(z.shape), weights.amax(1), entropy


def queries(data, t, count=20):
    sigma = torch.exp(-0.5 * VP.log_snr(torch.full((count,), t, dtype=torch.float64)))
    return unit(data)[:count] + sigma[:, None, None, None] * draw(count, "noise"), sigma


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
def test_streaming_is_the_closed_form(data, t, dtype, tolerance):
    z, sigma = queries(data, t)
    found = OptimalDenoiser(Rows.of(data), dtype=dtype).posterior(z, sigma)
    mean, greatest, entropy = brute(unit(data), z, sigma)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.max_weight, greatest, rtol=10 * tolerance, atol=0)
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=20 * tolerance)
    assert found.mean.dtype == torch.float64


def test_queries_of_every_noise_level_at_once(data):
    """Rows of a block that are done, and rows that are not, stand side by side."""
    z, sigma = zip(*(queries(data, t, 3) for t in reversed(TIMES)), strict=True)
    z, sigma = torch.cat(z), torch.cat(sigma)
    found = OptimalDenoiser(Rows.of(data), dtype=torch.float64).posterior(z, sigma)
    torch.testing.assert_close(found.mean, brute(unit(data), z, sigma)[0], rtol=0, atol=1e-12)


def test_far_from_the_data_nothing_underflows(data):
    """Raw densities would be 0 / 0 there."""
    z = unit(data)[:4] + 100.0
    found = OptimalDenoiser(Rows.of(data), dtype=torch.float64).posterior(z, 0.01)
    torch.testing.assert_close(found.mean, brute(unit(data), z, torch.full((4,), 0.01))[0], rtol=0, atol=1e-9)
    assert found.mean.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits(data, dtype):
    denoiser = OptimalDenoiser(Rows.of(data), dtype=dtype)
    z = unit(data)[:9] + 0.05 * draw(9, "noise")
    nearest = unit(data)[(z.flatten(1)[:, None] - unit(data).flatten(1)).square().sum(2).argmin(1)]
    little = denoiser.posterior(z, 1e-4)
    torch.testing.assert_close(little.mean, nearest, rtol=0, atol=1e-7)
    assert (little.max_weight == 1).all() and (little.entropy == 0).all()
    much = denoiser.posterior(z, 1e6)
    torch.testing.assert_close(much.mean, unit(data).mean(0).expand(z.shape), rtol=0, atol=1e-6)
    torch.testing.assert_close(much.entropy, torch.full((9,), math.log(N), dtype=torch.float64))
    torch.testing.assert_close(denoiser.mean.reshape(3, 4, 4), unit(data).mean(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_the_score_is_the_gradient_of_the_log_density(data, sigma):
    z = (unit(data)[:5] + sigma * draw(5, "noise")).requires_grad_(True)
    distance = (z.flatten(1)[:, None] - unit(data).flatten(1)).square().sum(2)
    torch.logsumexp(-distance / (2 * sigma**2), dim=1).sum().backward()
    denoiser = OptimalDenoiser(Rows.of(data), dtype=torch.float64)
    torch.testing.assert_close(denoiser.score(z.detach(), sigma), z.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoiser.eps(z.detach(), sigma), -sigma * z.grad, rtol=1e-9, atol=1e-9)


def test_vp_and_edm_say_the_same(data):
    """eps*_t(alpha z) of VP is eps* of z at the ratio; EDM's time is the ratio."""
    denoiser = OptimalDenoiser(Rows.of(data), dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    noise, clean = draw(4, "noise"), unit(data)[:4]
    alpha, sigma, ratio = VP.alpha(t), VP.sigma(t), torch.exp(-0.5 * VP.log_snr(t))

    def column(values):
        return values[:, None, None, None]

    x = column(alpha) * clean + column(sigma) * noise
    by_vp = denoiser.eps_at(VP, x, t)
    torch.testing.assert_close(by_vp, denoiser.eps(clean + column(ratio) * noise, ratio))
    edm = EDM(EDMConfig())
    torch.testing.assert_close(denoiser.eps_at(edm, column(edm.alpha(ratio)) * x / column(alpha), ratio), by_vp)
    mean = denoiser.posterior(x / column(alpha), ratio).mean
    torch.testing.assert_close(by_vp, (x - column(alpha) * mean) / column(sigma))


def test_ratio_of_the_published_times():
    assert float(torch.exp(-0.5 * VP.log_snr(0.4420))) == pytest.approx(2.51027, abs=5e-6)
    assert float(VP.time_of_log_snr(-2 * math.log(2.5103))) == pytest.approx(0.44200, abs=5e-6)
    assert float(VP.time_of_log_snr(-2 * math.log(7.6577))) == pytest.approx(0.6360, abs=5e-5)


def test_symmetric_range_is_unit_stretched(data):
    one = OptimalDenoiser(Rows.of(data, "symmetric"), dtype=torch.float64)
    two = OptimalDenoiser(Rows.of(data, "unit"), dtype=torch.float64)
    z = 2 * unit(data)[:6] - 1 + 0.8 * draw(6, "noise")
    torch.testing.assert_close(one.posterior(z, 0.8).mean, 2 * two.posterior((z + 1) / 2, 0.4).mean - 1)


def test_threads_change_no_bit_and_the_switches_are_put_back(data):
    z, sigma = queries(data, 0.4)
    before = torch.get_num_threads()
    precision = torch.backends.mkldnn.matmul.fp32_precision
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(OptimalDenoiser(Rows.of(data)).posterior(z, sigma))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].mean, found[1].mean) and torch.equal(found[0].entropy, found[1].entropy)
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


def test_products_are_exact_inside_and_as_before_outside(data, monkeypatch):
    seen = []
    chunk = OptimalDenoiser.chunk

    def spy(self, *arguments):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return chunk(self, *arguments)

    monkeypatch.setattr(OptimalDenoiser, "chunk", spy)
    place = torch.backends.cuda.matmul
    before = place.fp32_precision
    try:
        place.fp32_precision = "tf32"
        with torch.autocast("cpu"):
            OptimalDenoiser(Rows.of(data)).posterior(unit(data)[:8], 1.0)
        assert place.fp32_precision == "tf32"
    finally:
        place.fp32_precision = before
    assert set(seen) == {("ieee", False)} and len(seen) == 2


def test_float_tensors_are_taken_as_they_are():
    values = draw(10, "values", (5,)) * 7
    rows = Rows.of(values)
    assert rows.range == "values" and torch.equal(rows.take(torch.tensor([4, 1])), values[[4, 1]])


def test_bad_inputs(data):
    with pytest.raises(UsageError, match=r"has 1 images, and an optimal denoiser needs at least 2"):
        Rows.of(data[:1])
    with pytest.raises(UsageError, match="range=255 is not one of unit, symmetric"):
        Rows.of(data, "255")
    denoiser = OptimalDenoiser(Rows.of(data))
    with pytest.raises(ValueError, match="queries have 12 numbers and the data 48"):
        denoiser.posterior(torch.zeros(2, 12), 1.0)
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            denoiser.posterior(unit(data)[:2], sigma)


@pytest.mark.gpu
def test_the_gpu_agrees(data):
    z, sigma = queries(data, 0.4)
    found = OptimalDenoiser(Rows.of(data), device="cuda").posterior(z, sigma)
    torch.testing.assert_close(found.mean.cpu(), brute(unit(data), z, sigma)[0], rtol=0, atol=2e-4)
