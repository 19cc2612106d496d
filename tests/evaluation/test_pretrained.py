"""With random weights in the released formats: what is checked is how images get in and features come out."""

import numpy as np
import pytest
import torch
from torch import nn

from gearshift.evaluation.pretrained import InceptionExtractor, Vgg16Extractor

# Bilinear interpolation of 4 points to 7 on the grid of TensorFlow 1: output i reads at i * 4 / 7, and past the last
# point the last point. Row i holds the weights of the four inputs, in sevenths.
TABLE = np.array(
    [
        [7, 0, 0, 0],
        [3, 4, 0, 0],
        [0, 6, 1, 0],
        [0, 2, 5, 0],
        [0, 0, 5, 2],
        [0, 0, 1, 6],
        [0, 0, 0, 7],
    ]
)


def grid(size, out):
    """The weights of the table for any sizes, float64 [out, size]."""
    at = np.arange(out) * size / out
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, size - 1)
    weights = np.zeros((out, size))
    np.add.at(weights, (np.arange(out), low), 1 - (at - low))
    np.add.at(weights, (np.arange(out), high), at - low)
    return weights


def resized(images, out):
    """TF1's bilinear resize of uint8 [N, C, H, H] to float64 [N, C, out, out]."""
    weights = grid(images.shape[-1], out)
    return torch.from_numpy(np.einsum("oh,nchw,pw->ncop", weights, images.double().numpy(), weights))


def pictures(count=3, channels=3, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def test_the_grid_is_that_of_the_table():
    assert np.allclose(7 * grid(4, 7), TABLE, atol=1e-12)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """(the library's network, our extractor), of the same random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        library = Blank("inception-v3-compat", ["2048", "logits_unbiased"], str(folder / "empty.pth"))
        for module in library.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    torch.save(library.state_dict(), folder / "inception.pth")
    state = torch.random.get_rng_state()
    ours = InceptionExtractor(folder / "inception.pth")
    assert torch.equal(torch.random.get_rng_state(), state)
    ours.batch = 2
    return library, ours


def test_inception_equals_the_library(inception):
    library, ours = inception
    images = pictures()
    features, logits = library(images)
    assert float(features.std()) > 0.01
    read = ours.read(images, ("features", "logits"))
    torch.testing.assert_close(read["features"], features, rtol=1e-4, atol=1e-5 * float(features.std()))
    torch.testing.assert_close(read["logits"], logits, rtol=1e-4, atol=1e-5 * float(logits.std()))
    # Without the bias, as the Inception score takes them.
    torch.testing.assert_close(read["logits"], read["features"] @ library.fc.weight.T, rtol=1e-4, atol=1e-4)
    assert (ours.dim, ours.name) == (2048, "inception_2015_12_05")
    assert {tap: tuple(values.shape) for tap, values in ours.read(images, ours.taps).items()} == {
        tap: (3, width) for tap, width in ours.taps.items()
    }
    for part in ("tf1-bilinear-299", "pool3", "torch-fidelity", "not measured"):
        assert part in ours.protocol
    # Grey is repeated to RGB.
    assert torch.equal(ours(images[:2, :1]), ours(images[:2, :1].repeat(1, 3, 1, 1)))


def test_inception_takes_seven_channels_of_the_first_branch_as_spatial_features(inception):
    """In the order row, column, channel, in which TensorFlow flattens; after relu; in any thread."""
    library, ours = inception
    caught = []
    hook = library.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: caught.append(output))
    images = pictures(4)
    features, _ = library(images)
    hook.remove()
    [branch] = caught
    assert branch.shape == (4, 192, 17, 17)
    expected = branch[:, :7].permute(0, 2, 3, 1).reshape(4, 2023)
    assert float(expected.min()) == 0.0 and float(expected.std()) > 0.01
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            read = ours.read(images.flip(0), ("spatial", "features"))
            torch.testing.assert_close(read["spatial"], expected.flip(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(read["features"], features.flip(0), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def entering(module, run):
    """What a layer is given while `run` runs."""
    caught = []
    hook = module.register_forward_pre_hook(lambda layer, inputs: caught.append(inputs[0]))
    run()
    hook.remove()
    return torch.cat(caught).double()


def test_inception_resizes_on_the_grid_of_tensorflow_1(inception):
    _, ours = inception
    images = pictures(2, size=4)
    seen = entering(ours._network.Conv2d_1a_3x3, lambda: ours(images))
    right = (resized(images, 299) - 128) / 128
    torch.testing.assert_close(seen, right, rtol=0, atol=1e-4)
    # Half-pixel grids, with and without antialiasing, are grey levels away.
    for antialias in (False, True):
        other = nn.functional.interpolate(images.double(), (299, 299), mode="bilinear", antialias=antialias)
        assert float((seen * 128 + 128 - other).abs().mean()) > 1.0


def test_inception_stays_in_evaluation_mode(inception):
    """In training mode, batch normalisation would make the features of an image depend on the rest of its batch."""
    _, ours = inception
    assert not any(module.training for module in ours._network.modules())
    images = pictures(2)
    together, alone = ours(images), torch.cat([ours(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(together.std()))


def test_inception_ignores_precision_outside(inception):
    _, ours = inception
    images = pictures(2)
    plain = ours.read(images, ours.taps)
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            changed = ours.read(images, ours.taps)
    finally:
        conv.fp32_precision = before
    assert all(torch.equal(plain[tap], changed[tap]) for tap in ours.taps)


@pytest.mark.slow
def test_vgg16_equals_the_library(tmp_path):
    """4096 features of fc2 after relu, on images resized on the grid of TensorFlow 1."""
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
    from torchvision.models import vgg16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(vgg16(weights=None).state_dict(), tmp_path / "vgg16.pth")
    library = FeatureExtractorVGG16("vgg16", ["fc2", "fc2_relu"], str(tmp_path / "vgg16.pth"))
    ours = Vgg16Extractor(tmp_path / "vgg16.pth")
    assert not any(module.training for module in ours._network.modules())
    images = pictures(2, size=4)
    _, expected = library(images)
    seen = entering(ours._network.model.features[0], lambda: torch.testing.assert_close(ours(images), expected))
    assert ours.taps == {"features": 4096} and float(expected.min()) == 0.0 and float(expected.std()) > 0
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    levels = (seen * std[:, None, None] + mean[:, None, None]) * 255
    torch.testing.assert_close(levels, resized(images, 224), rtol=0, atol=1e-3)
    assert torch.equal(ours(images[:, :1]), ours(images[:, :1].repeat(1, 3, 1, 1)))
