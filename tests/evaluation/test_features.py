import hashlib
import math

import pytest
import torch

from gearshift.data.digits import Digits, DigitsConfig
from gearshift.evaluation.features import INCEPTION, InceptionExtractor, load_inception, random_conv, random_vgg16
from gearshift.evaluation.frechet import FrechetMetric
from gearshift.evaluation.weights import Unavailable, WeightFile, exact_fp32, locate


@pytest.fixture(scope="module")
def digits():
    return Digits(DigitsConfig()).load("train").images_u8


@pytest.fixture(scope="module")
def vgg():
    return random_vgg16(0)


def test_random_conv_is_a_function_of_the_seed_and_of_nothing_else(digits):
    torch.manual_seed(1)
    first = random_conv(3, 8)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    again, other = random_conv(3, 8), random_conv(4, 8)
    assert torch.equal(first(digits[:20]), again(digits[:20]))
    assert not torch.allclose(first(digits[:20]), other(digits[:20]))
    torch.manual_seed(1)
    random_conv(3, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.name == "random_conv_64[s3]" and "seed 3" in first.protocol


def test_weights_have_the_spread_that_the_recipe_says(vgg):
    layers = [module for module in vgg._network if hasattr(module, "weight")]
    assert [layer.weight.shape[0] for layer in layers] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [4096, 64]
    for layer in layers:
        fan_in = math.prod(layer.weight.shape[1:])
        assert float(layer.weight.std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
        assert not layer.bias.any()


def test_vgg_takes_small_grey_digits(vgg, digits):
    out = vgg(digits[:6])
    assert out.shape == (6, 64) and out.dtype == torch.float32 and not out.requires_grad
    # Grey is repeated to RGB.
    assert torch.equal(out, vgg(digits[:6].repeat(1, 3, 1, 1)))
    # Different images stay different.
    assert float(torch.cdist(out, out).fill_diagonal_(1).min()) > 1e-3


def test_features_do_not_depend_on_company(digits):
    net = random_conv(0, 8)
    whole = net(digits[:300])
    # Exact within one size of batch, close between sizes.
    assert torch.equal(whole[128:256], net(digits[128:256]))
    assert torch.allclose(whole[:5], net(digits[:5]), atol=1e-5)
    assert net(digits[:0]).shape == (0, 64)


@pytest.mark.parametrize("size", [8, 17, 32])
def test_random_conv_at_other_sizes(size):
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    assert random_conv(0, size)(images).shape == (3, 64)


def test_distance_grows_with_noise(digits):
    nets = [random_conv(seed, 8) for seed in range(3)]
    metric = FrechetMetric("fd_random_conv", nets, standardise=True)
    # Every other image, because neighbours are of one writer.
    reference = metric.of(digits[::2])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(750, 1, 8, 8, generator=generator)
    values = []
    for sigma in (0, 16, 32, 64):
        noisy = (digits[1::2].float() + sigma * noise).round().clamp(0, 255).to(torch.uint8)
        values.append(metric.distance(metric.of(noisy), reference))
    assert values == sorted(values) and values[-1] > 3 * values[0]


def test_precision_switches_are_strict_inside_and_restored_after():
    cudnn, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = (cudnn.fp32_precision, matmul.fp32_precision)
    matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_fp32(torch.device("cpu")):
            assert (cudnn.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
            assert not torch.is_grad_enabled()
        assert (cudnn.fp32_precision, matmul.fp32_precision) == (before[0], "tf32")
    finally:
        matmul.fp32_precision = before[1]


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("GEARSHIFT_INCEPTION", raising=False)
    return tmp_path / "hub" / "checkpoints"


def test_missing_inception_is_said_and_how_to_fetch_it(no_weights):
    found = load_inception()
    assert isinstance(found, Unavailable)
    assert "weights-inception-2015-12-05-6726825d.pth" in found.reason and "GEARSHIFT_INCEPTION" in found.reason
    assert INCEPTION.url in found.fetch_line and str(no_weights) in found.fetch_line
    assert found.as_row()["name"] == "fid"


def test_other_weights_never_bear_the_name(no_weights):
    no_weights.mkdir(parents=True)
    (no_weights / INCEPTION.file_name).write_bytes(b"random")
    found = load_inception()
    assert isinstance(found, Unavailable) and "begins with 6726825d" in found.reason


def test_places_are_tried_in_order(no_weights, tmp_path, monkeypatch):
    content = b"weights"
    prefix = hashlib.sha256(content).hexdigest()[:8]
    weights = WeightFile("w.pth", "https://example.org/w.pth", prefix, "GEARSHIFT_SOME_WEIGHTS")
    places = [tmp_path / "named.pth", tmp_path / "variable.pth", no_weights / "w.pth"]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    assert locate(weights, "m") == places[2]
    monkeypatch.setenv("GEARSHIFT_SOME_WEIGHTS", str(places[1]))
    assert locate(weights, "m") == places[1]
    assert locate(weights, "m", places[0]) == places[0]
    # A place that was named and is empty is an answer, not an invitation to look elsewhere.
    assert isinstance(locate(weights, "m", tmp_path / "typo.pth"), Unavailable)


@pytest.mark.slow
def test_inception_wrapper_equals_the_library(tmp_path):
    """With random weights in the released format: same features, same logits, uint8 in, batches in order."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            pass

    torch.save({}, tmp_path / "empty.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        library = Blank("inception-v3-compat", ["2048", "logits_unbiased"], str(tmp_path / "empty.pth"))
    torch.save(library.state_dict(), tmp_path / "inception.pth")
    ours = InceptionExtractor(tmp_path / "inception.pth")
    ours.batch = 2
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features, logits = library(images)
    assert torch.allclose(ours(images), features, atol=1e-5) and ours.dim == 2048
    assert torch.allclose(ours.logits(images), logits, atol=1e-5)
    assert "tf1-bilinear-299" in ours.protocol
    assert ours(images[:1, :1]).shape == (1, 2048)
