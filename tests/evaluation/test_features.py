import math
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import nn

from gearshift.data.digits import Digits, DigitsConfig
from gearshift.data.pixels import to_pm1, to_u8
from gearshift.evaluation.classifier import Recipe, get_classifier
from gearshift.evaluation.features import (
    EXTRACTORS,
    ClassifierExtractor,
    FeatureExtractor,
    build_extractor,
    fingerprint_of,
    to_rgb,
)
from gearshift.evaluation.random_nets import random_conv, random_vgg16
from gearshift.evaluation.weights import Unavailable
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError


@pytest.fixture(scope="module")
def digits():
    return Digits(DigitsConfig()).load("train").images_u8


@pytest.fixture(scope="module")
def vgg():
    return random_vgg16(0)


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class ProjectionConfig:
    dim: int = 3


class Projection(FeatureExtractor):
    """A random projection that counts its passes. Its matrix product has other bits on other numbers of threads."""

    Config = ProjectionConfig
    batch = 16

    def __init__(self, config, *, image_size, device):
        self.name, self.dim, self.protocol = "projection", config.dim, "projection"
        self.taps = {"features": config.dim, "sum": 1}
        self.fingerprint = fingerprint_of(self.protocol, str(image_size))
        self._weight = keys.normal(0, "projection", torch.arange(config.dim), 0, (3 * image_size**2,)).to(device)
        self.passes = 0

    @property
    def device(self):
        return self._weight.device

    def _forward(self, images_u8):
        self.passes += 1
        flat = to_rgb(images_u8).float().flatten(1)
        return {"features": flat @ self._weight.T, "sum": flat.sum(dim=1, keepdim=True)}


# The interface -------------------------------------------------------------------------------------------------------


def test_every_tap_comes_from_one_pass_per_batch():
    net = Projection(ProjectionConfig(), image_size=8, device="cpu")
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    both = net.read(images, ("sum", "features"))
    assert net.passes == 3
    assert {tap: tuple(value.shape) for tap, value in both.items()} == {"sum": (40, 1), "features": (40, 3)}
    assert torch.equal(both["features"], net(images)) and set(net.read(images)) == {"features"}
    assert torch.equal(both["sum"][:, 0], 3 * images.float().sum(dim=(1, 2, 3)))
    empty = net.read(images[:0], ("features", "sum"))
    assert empty["features"].shape == (0, 3) and empty["sum"].shape == (0, 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    net = Projection(ProjectionConfig(dim=64), image_size=36, device="cpu")
    images = torch.randint(0, 256, (48, 3, 36, 36), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.set_num_threads(1)
    alone = torch.cat([net._forward(part)["features"] for part in images.split(16)])
    torch.set_num_threads(threads)
    assert torch.equal(net(images), alone)
    assert torch.get_num_threads() == threads


def test_wrong_requests_are_refused(digits):
    net = random_conv(0, 8)
    with pytest.raises(ValueError, match="has no tap spatial; there are features"):
        net.read(digits[:2], ("spatial",))
    with pytest.raises(ValueError, match="float32"):
        net(digits[:2].float())
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 8\)"):
        net(digits[:2].repeat(1, 2, 1, 1))


def test_precision_and_modes_outside_change_nothing(digits):
    net = random_conv(0, 8)
    images = digits[:300]
    plain = net(images)
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(net(images), plain)
        assert conv.fp32_precision == "bf16"
    finally:
        conv.fp32_precision = before
    with torch.inference_mode():
        assert torch.equal(net(images), plain)
    assert plain.dtype == torch.float32 and not plain.requires_grad


# Rounding, on which every feature rests ------------------------------------------------------------------------------


def test_samples_are_rounded_to_the_nearest_grey_level():
    """Truncation instead darkens every image by half a level, even those that only went through [-1, 1]."""
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = to_pm1(levels)
    assert torch.equal(to_u8(pixels), levels)
    inner = slice(1, 255)
    for off in (-0.49, 0.49):
        assert torch.equal(to_u8(pixels + off / 127.5)[inner], levels[inner])
        floored = ((pixels + off / 127.5 + 1) * 127.5).to(torch.uint8)
        assert torch.equal(floored, levels) == (off > 0)  # what would be wrong fails here
    assert to_u8(torch.tensor([-1.2, 1.2])).tolist() == [0, 255]


# Random networks -----------------------------------------------------------------------------------------------------


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
    assert first.fingerprint == again.fingerprint and len(first.fingerprint) == 16
    # Another seed and another size are other networks.
    assert len({first.fingerprint, other.fingerprint, random_conv(3, 32).fingerprint}) == 3


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
    for batch in (1, 7, 300):
        net.batch = batch
        torch.testing.assert_close(net(digits[:300]), whole, rtol=1e-5, atol=1e-5 * float(whole.std()))


@pytest.mark.parametrize("size", [8, 17, 32])
def test_random_conv_at_other_sizes(size):
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    assert random_conv(0, size)(images).shape == (3, 64)


def test_distance_grows_with_noise(digits):
    """Fréchet distance of standardised features with their correlations left out: sums of squares of differences."""
    nets = [random_conv(seed, 8) for seed in range(3)]
    # Every other image, because neighbours are of one writer.
    references = [net(digits[::2]) for net in nets]
    noise = torch.randn(750, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    values = []
    for sigma in (0, 16, 32, 64):
        noisy = (digits[1::2].float() + sigma * noise).round().clamp(0, 255).to(torch.uint8)
        total = 0.0
        for net, reference in zip(nets, references, strict=True):
            scale = reference.std(dim=0)
            ours, theirs = net(noisy) / scale, reference / scale
            total += float((ours.mean(0) - theirs.mean(0)).square().sum() + (ours.std(0) - 1).square().sum())
        values.append(total)
    assert values == sorted(values) and values[-1] > 3 * values[0]


# The classifier ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    data = Digits(DigitsConfig())
    folder = tmp_path_factory.mktemp("classifier")
    return get_classifier(data.load("train"), data.load("test"), folder, recipe=Recipe("plain", steps=5, batch=32))


def test_classifier_gives_features_and_logits(classifier, digits):
    extractor = ClassifierExtractor(classifier, "digits")
    read = extractor.read(digits[:10], ("features", "logits"))
    assert extractor.name == "classifier_digits" and extractor.dim == 64
    assert extractor.taps == {"features": 64, "logits": 10}
    assert torch.equal(read["features"], classifier.features(digits[:10]))
    assert torch.equal(read["logits"], classifier.logits(digits[:10]))
    assert f"accuracy {100 * classifier.accuracy:.1f} %" in extractor.protocol and "5 steps" in extractor.protocol


def test_another_training_is_another_fingerprint(classifier, tmp_path):
    data = Digits(DigitsConfig())
    recipe = Recipe("plain", steps=5, batch=32, seed=1)
    other = get_classifier(data.load("train"), data.load("test"), tmp_path, recipe=recipe)
    first, second = ClassifierExtractor(classifier, "digits"), ClassifierExtractor(other, "digits")
    assert first.fingerprint == ClassifierExtractor(classifier, "digits").fingerprint
    assert first.fingerprint != second.fingerprint
    # Weights count too, not only what is said of them.
    second.classifier._network.head.bias.data += 1
    second.classifier.recipe, second.classifier.accuracy = classifier.recipe, classifier.accuracy
    again = ClassifierExtractor(second.classifier, "digits")
    assert again.protocol == first.protocol and again.fingerprint != first.fingerprint


def test_networks_are_in_evaluation_mode(classifier, vgg, digits):
    """In training mode, batch normalisation would make the features of an image depend on the rest of its batch."""
    assert not any(module.training for module in vgg._network.modules())
    extractor = ClassifierExtractor(classifier, "digits")
    assert any(isinstance(module, nn.BatchNorm2d) for module in classifier._network.modules())
    together, alone = extractor(digits[:8]), torch.cat([extractor(image[None]) for image in digits[:8]])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# By name -------------------------------------------------------------------------------------------------------------


def build(name, **settings):
    return build_extractor(name, **{"image_size": 8, "data_name": "digits", **settings})


def test_random_networks_come_with_three_seeds():
    assert [net.name for net in build("random_conv")] == [f"random_conv_64[s{seed}]" for seed in range(3)]
    assert [net.name for net in build("random_vgg16")] == [f"random_vgg16_64[s{seed}]" for seed in range(3)]


def test_names_that_cannot_be_had(classifier):
    [found] = build("classifier", classifier=classifier)
    assert isinstance(found, ClassifierExtractor)
    missing = build("classifier")
    assert isinstance(missing, Unavailable) and "no classes" in missing.reason
    with pytest.raises(UsageError, match="no extractor 'dino'; there are " + ", ".join(EXTRACTORS)):
        build("dino")


def test_an_own_class_is_an_extractor(monkeypatch, digits):
    module = ModuleType("own_extractor")
    module.Projection = Projection
    monkeypatch.setitem(sys.modules, "own_extractor", module)
    [net] = build({"_target_": "own_extractor.Projection", "dim": 5})
    assert isinstance(net, Projection) and net(digits[:2]).shape == (2, 5)
    with pytest.raises(UsageError, match="dmi"):
        build({"_target_": "own_extractor.Projection", "dmi": 5})
    with pytest.raises(UsageError, match=r"Digits, which is not a FeatureExtractor"):
        build({"_target_": "gearshift.data.digits.Digits"})
