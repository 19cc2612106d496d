import math

import numpy as np
import pytest
import torch

from gearshift.evaluation.paired import (
    Lpips,
    image_errors,
    load_lpips,
    psnr,
    reduce_paired,
    ssim,
    ssim_protocol,
    ssim_window,
)
from gearshift.runtime.errors import UsageError


def images(n=6, channels=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def test_psnr_of_one_grey_level():
    a = images().clamp(max=254)
    assert image_errors(a, a + 1).tolist() == [1.0] * 6
    assert psnr(1.0) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(255.0**2) == 0.0
    assert psnr(0.0) is None


def reduced(a, b, **more):
    return reduce_paired(image_errors(a, b), ssim(a, b), more)


def test_global_and_per_image_differ_and_both_are_right():
    a = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    b = a.clone()
    b[0] += 1
    b[1] += 100
    values = reduced(a, b)
    each = [10 * math.log10(255**2 / error) for error in (1, 10000)]
    assert values["psnr_to_full"] == pytest.approx(10 * math.log10(255**2 / 5000.5))
    assert values["psnr_to_full_per_image"] == pytest.approx(sum(each) / 2)
    assert values["psnr_to_full_per_image"] - values["psnr_to_full"] > 10


def test_agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = images(), images(seed=1)
    values = reduced(a, b)
    pooled = peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0)
    each = peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0, dim=(1, 2, 3))
    assert values["psnr_to_full"] == pytest.approx(float(pooled), rel=1e-6)
    assert values["psnr_to_full_per_image"] == pytest.approx(float(each), rel=1e-6)


def test_equal_images_have_no_psnr_but_a_share():
    a, b = images(4), images(4)
    equal = reduced(a, b)
    assert equal["psnr_to_full"] is None and equal["psnr_to_full_per_image"] is None
    assert equal["identical_to_full"] == 1.0 and equal["ssim_to_full"] == 1.0
    b[0, 0, 0, 0] ^= 1
    mixed = reduced(a, b)
    assert mixed["identical_to_full"] == 0.75
    # The mean is over the image that differs; the pooled error is over all of them.
    assert mixed["psnr_to_full"] == pytest.approx(mixed["psnr_to_full_per_image"] + 10 * math.log10(4))


def reference_ssim(a, b, sigma, window):
    """SSIM written out with loops over one grey image, reflected borders."""
    half = window // 2
    line = np.exp(-((np.arange(window) - half) ** 2) / (2 * sigma**2))
    weights = np.outer(line, line) / line.sum() ** 2
    a, b = (np.pad(x.astype(float), half, mode="reflect") for x in (a, b))
    total = []
    for i in range(a.shape[0] - 2 * half):
        for j in range(a.shape[1] - 2 * half):
            p, q = a[i : i + window, j : j + window], b[i : i + window, j : j + window]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * p * p).sum() - mp**2, (weights * q * q).sum() - mq**2
            cov = (weights * p * q).sum() - mp * mq
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            total.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(total)


@pytest.mark.parametrize("size", [8, 16])
def test_ssim_is_the_formula_with_the_window_that_is_stated(size):
    a, b = images(3, 1, size), images(3, 1, size, seed=1)
    b = ((a.int() * 3 + b.int()) // 4).to(torch.uint8)
    sigma, window = ssim_window(size)
    expected = [reference_ssim(x[0].numpy(), y[0].numpy(), sigma, window) for x, y in zip(a, b, strict=True)]
    assert np.allclose(ssim(a, b), expected, atol=1e-6)
    assert f"({window}x{window})" in ssim_protocol(size) and window <= size


def test_ssim_falls_with_noise_and_is_symmetric():
    a = images(8, size=8)
    values = []
    for reach in (0, 5, 30, 120):
        noise = torch.randint(-reach, reach + 1, a.shape, generator=torch.Generator().manual_seed(2))
        b = (a.int() + noise).clamp(0, 255).to(torch.uint8)
        values.append(float(ssim(a, b).mean()))
        assert torch.allclose(ssim(a, b), ssim(b, a))
    assert values[0] == 1.0 and values == sorted(values, reverse=True)


def test_order_and_cuts_change_no_bit():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 1000, generator=generator, dtype=torch.float64) * torch.logspace(-8, 8, 1000)
    whole = reduce_paired(values[0], values[1], {"lpips_alex_to_full": values[2]})
    order = torch.randperm(1000, generator=generator)
    # NumPy arrays, as they come out of files.
    shuffled = [value[order].numpy() for value in values]
    assert reduce_paired(shuffled[0], shuffled[1], {"lpips_alex_to_full": shuffled[2]}) == whole
    # Added one by one from the left, the ones would be lost.
    for similarity in ([2.0**53, 1.0, 1.0], [1.0, 1.0, 2.0**53]):
        assert reduce_paired(np.ones(3), np.array(similarity))["ssim_to_full"] == (2.0**53 + 2) / 3


def test_values_per_image_do_not_depend_on_company_or_threads():
    a, b = images(70, 1, 8), images(70, 1, 8, seed=1)
    whole = ssim(a, b)
    assert whole.shape == (70,) and whole.dtype == torch.float64
    torch.testing.assert_close(torch.cat([ssim(x[None], y[None]) for x, y in zip(a, b, strict=True)]), whole)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ssim(a, b), whole) and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_refuses_pairs_that_are_no_pairs():
    with pytest.raises(ValueError, match="uint8 of one shape"):
        image_errors(images(), images(5))
    with pytest.raises(ValueError, match="float32"):
        ssim(images().float(), images().float())
    with pytest.raises(ValueError, match="no image pairs"):
        reduce_paired(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="of different numbers"):
        reduce_paired(torch.zeros(2), torch.zeros(2), {"lpips_alex_to_full": torch.zeros(1)})


def backbone(folder, net):
    """A file in the format of torchvision's network, with random weights."""
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # The wide layers after the features take no part and would take seconds to draw.
        features = models.alexnet().features if net == "alex" else models.vgg.make_layers(models.vgg.cfgs["D"])
    path = folder / f"{net}.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module", params=["alex", "vgg"])
def lpips(request, tmp_path_factory):
    path = backbone(tmp_path_factory.mktemp("weights"), request.param)
    return Lpips(path, net=request.param), torch.load(path, weights_only=True)


def test_lpips_takes_the_weights_and_measures(lpips):
    network, released = lpips
    loaded = network._network.net.state_dict()
    assert loaded
    for name, value in loaded.items():
        assert torch.equal(value, released["features." + name.split(".", 1)[1]])
    assert not any(module.training for module in network._network.modules())
    a, b = images(3, 1, 8), images(3, 1, 8, seed=1)
    assert network(a, a).tolist() == [0.0, 0.0, 0.0]
    distances = network(a, b)
    assert distances.shape == (3,) and bool((distances > 0).all()) and network(a[:0], b[:0]).shape == (0,)
    torch.testing.assert_close(network(a[1:2], b[1:2]), distances[1:2], rtol=1e-4, atol=1e-6)
    assert network.name in ("lpips_alex", "lpips_vgg") and "px when smaller" in network.protocol


def test_lpips_sees_the_range_it_was_fitted_on(lpips):
    """[-1, 1]; with [0, 1] half of the contrast would be gone."""
    network, _ = lpips
    from torchmetrics.functional.image.lpips import _lpips_update

    seen = []
    hook = network._network.scaling_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    a, b = images(2, 3, 64), images(2, 3, 64, seed=1)
    a[0], a[1] = 0, 255
    ours = network(a, b)
    hook.remove()
    assert seen[0][0].unique().tolist() == [-1.0] and seen[0][1].unique().tolist() == [1.0]
    # The library's own way in for images in [0, 1].
    theirs = _lpips_update(a / 255, b / 255, network._network, normalize=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    wrong = _lpips_update(a / 255, b / 255, network._network, normalize=False)
    assert bool(((ours - wrong).abs() > 1e-2 * ours).all())


def test_lpips_does_not_depend_on_precision_outside_or_on_threads(lpips):
    network, _ = lpips
    a, b = images(40, 1, 8), images(40, 1, 8, seed=1)
    plain = network(a, b)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(network(a, b), plain)
    finally:
        torch.set_num_threads(before)


def test_making_a_network_draws_nothing_from_the_global_generator(tmp_path):
    path = backbone(tmp_path, "alex")
    state = torch.random.get_rng_state()
    Lpips(path)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_unknown_backbone_is_refused():
    with pytest.raises(UsageError, match="'squeeze'; there are alex, vgg"):
        load_lpips("squeeze")
