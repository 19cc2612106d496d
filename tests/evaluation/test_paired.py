import math

import numpy as np
import pytest
import torch

from gearshift.evaluation.paired import (
    Lpips,
    PairedSums,
    image_errors,
    label_agreement,
    load_lpips,
    psnr,
    ssim,
    ssim_protocol,
    ssim_window,
)
from gearshift.evaluation.weights import Unavailable


def images(n=6, channels=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def test_psnr_of_one_grey_level():
    a = images().clamp(max=254)
    assert image_errors(a, a + 1).tolist() == [1.0] * 6
    assert psnr(1.0) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(255.0**2) == 0.0
    assert psnr(0.0) is None


def test_global_and_per_image_differ_and_both_are_right():
    a = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    b = a.clone()
    b[0] += 1
    b[1] += 100
    sums = PairedSums()
    sums.update(a, b)
    values = sums.compute()
    each = [10 * math.log10(255**2 / error) for error in (1, 10000)]
    assert values["psnr_to_full"] == pytest.approx(10 * math.log10(255**2 / 5000.5))
    assert values["psnr_to_full_per_image"] == pytest.approx(sum(each) / 2)


def test_agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = images(), images(seed=1)
    sums = PairedSums()
    sums.update(a, b)
    values = sums.compute()
    pooled = peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0)
    each = peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0, dim=(1, 2, 3))
    assert values["psnr_to_full"] == pytest.approx(float(pooled), rel=1e-6)
    assert values["psnr_to_full_per_image"] == pytest.approx(float(each), rel=1e-6)


def test_equal_images_have_no_psnr_but_a_share():
    a, b = images(4), images(4)
    sums = PairedSums()
    sums.update(a, b)
    equal = sums.compute()
    assert equal["psnr_to_full"] is None and equal["psnr_to_full_per_image"] is None
    assert equal["identical_to_full"] == 1.0 and equal["ssim_to_full"] == 1.0
    b[0, 0, 0, 0] ^= 1
    sums = PairedSums()
    sums.update(a, b)
    mixed = sums.compute()
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


def test_one_image_and_many_chunks():
    a, b = images(7, 1, 8), images(7, 1, 8, seed=1)
    whole, parts = PairedSums(), PairedSums()
    whole.update(a, b)
    for k in range(7):
        shard = PairedSums()
        shard.update(a[k : k + 1], b[k : k + 1])
        parts.merge(shard)
    for key, value in whole.compute().items():
        assert parts.compute()[key] == pytest.approx(value, rel=1e-9)


def test_label_agreement():
    assert label_agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    with pytest.raises(ValueError, match="predictions"):
        label_agreement(torch.tensor([1]), torch.tensor([1, 2]))


def test_refuses_pairs_that_are_no_pairs():
    with pytest.raises(ValueError, match="uint8 of one shape"):
        image_errors(images(), images(5))
    with pytest.raises(ValueError, match="float32"):
        ssim(images().float(), images().float())
    with pytest.raises(ValueError, match="no image pairs"):
        PairedSums().compute()


def test_lpips_without_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = load_lpips()
    assert isinstance(found, Unavailable) and found.name == "lpips_alex_to_full"
    assert "alexnet-owt-7be5be79.pth" in found.reason and "curl" in found.fetch_line


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """A file in the format of torchvision's AlexNet, with random weights."""
    from torchvision.models import alexnet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = alexnet(weights=None).state_dict()
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save({name: value for name, value in state.items() if name.startswith("features")}, path)
    return path


def test_lpips_takes_the_weights_and_measures(alexnet):
    network = Lpips(alexnet)
    released = torch.load(alexnet, weights_only=True)
    loaded = network._network.net.state_dict()
    assert torch.equal(loaded["slice1.0.weight"], released["features.0.weight"])
    assert torch.equal(loaded["slice5.10.weight"], released["features.10.weight"])
    a, b = images(3, 1, 8), images(3, 1, 8, seed=1)
    assert network(a, a).tolist() == [0.0, 0.0, 0.0]
    distances = network(a, b)
    assert distances.shape == (3,) and bool((distances > 0).all())
    sums = PairedSums(network=network)
    sums.update(a, b)
    assert sums.compute()["lpips_alex_to_full"] == pytest.approx(float(distances.mean()), rel=1e-5)
