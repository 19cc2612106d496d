"""The augmentation pipe: closed forms of its filters, exact flips and translations, draws that belong to samples."""

import itertools
import math

import numpy as np
import pytest
import torch

from gearshift.data.augment import SYM6, AugmentConfig, AugmentPipe, Transforms, check_augment, transform
from gearshift.data.dataset import ImageDataset
from gearshift.objectives.base import Batch
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir
from gearshift.training.feed import Feed

OFF = dict(xflip=0, yflip=0, scale=0, rotate_frac=0, aniso=0, translate_frac=0)


def some(count=6, side=16, channels=3):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def pipe(**changes):
    return AugmentPipe(AugmentConfig(**changes))


def draw(count=512, **changes):
    return pipe(**changes).draw(3, torch.arange(count), 7)


def warp(images, linear, shift=(0.0, 0.0)):
    """Images under one map from output to input, in parts of the side."""
    none = torch.zeros(len(images), dtype=torch.bool)
    maps = torch.cat([torch.tensor(linear), torch.tensor(shift)[:, None]], 1).double().expand(len(images), 2, 3)
    return transform(images, Transforms(none, none, torch.arange(len(images)), maps, torch.zeros(len(images), 9)))


# The filter ---------------------------------------------------------------------------------------------------------


def test_the_filter_is_orthonormal_with_six_vanishing_moments():
    taps = np.array(SYM6)
    assert len(taps) == 12 and abs(taps.sum() - math.sqrt(2)) < 1e-12
    for shift in range(6):
        product = float((taps[: len(taps) - 2 * shift] * taps[2 * shift :]).sum())
        assert abs(product - (shift == 0)) < 1e-12
    signs = (-1.0) ** np.arange(12)
    for moment in range(6):
        powers = (np.arange(12) / 11) ** moment
        assert abs((signs * taps * powers).sum()) < 1e-12
    assert abs((signs * taps * (np.arange(12) / 11) ** 6).sum()) > 1e-4


def test_the_filter_is_the_factor_with_the_straightest_phase():
    """Daubechies' polynomial of order six has eight factors with real taps; two of them, each the other reversed, are
    the symlet."""
    roots = np.roots([math.comb(5 + k, k) for k in range(6)][::-1])
    pairs = []
    for y in roots[roots.imag > -1e-9]:
        half = 1 - 2 * y
        inner = half - np.sqrt(half**2 - 1)
        pairs.append((inner if abs(inner) < 1 else 1 / inner, abs(y.imag) < 1e-9))
    factors = []
    for outside in itertools.product([False, True], repeat=3):
        taps = np.array([1.0])
        for _ in range(6):
            taps = np.convolve(taps, [1, 1])
        for (root, real), out in zip(pairs, outside, strict=True):
            root = 1 / root if out else root
            for each in [root] if real else [root, root.conj()]:
                taps = np.convolve(taps, [1, -each])
        factors.append((taps / taps.sum()).real * math.sqrt(2))

    def bend(taps):
        k = np.arange(12)
        frequency = np.linspace(0.01, 0.99, 99) * math.pi
        response = np.exp(-1j * frequency[:, None] * (k - (k * taps).sum() / taps.sum())) @ taps
        return np.abs(np.angle(response)).max()

    straightest = sorted(factors, key=bend)[:2]
    assert min(np.abs(taps - SYM6).max() for taps in straightest) < 1e-8


# What is done to images ---------------------------------------------------------------------------------------------


def test_nothing_is_done_at_probability_zero():
    images = some()
    out, labels = pipe(p=0.0)(images, 0, torch.arange(6), 0)
    assert torch.equal(out, images) and labels.shape == (6, 9) and not labels.any()


def test_a_map_that_changes_nothing_gives_the_image_back():
    torch.testing.assert_close(warp(some(), [[1.0, 0.0], [0.0, 1.0]]), some(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [8, 16])
def test_translations_by_whole_pixels_move_the_reflected_image(side):
    images = some(side=side)
    right, down = 3, -2
    found = warp(images, [[1.0, 0.0], [0.0, 1.0]], (-right / side, -down / side))
    wide = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    expected = wide[..., 4 - down : 4 - down + side, 4 - right : 4 - right + side]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_translations_of_half_pixels_and_back():
    """Of a picture without fine detail."""
    grid = (torch.arange(16) + 0.5) * math.pi / 16
    images = (torch.cos(2 * grid)[:, None] * torch.cos(grid))[None, None]
    there = warp(images, [[1.0, 0.0], [0.0, 1.0]], (0.5 / 16, -0.5 / 16))
    back = warp(there, [[1.0, 0.0], [0.0, 1.0]], (-0.5 / 16, 0.5 / 16))
    inner = (..., slice(3, -3), slice(3, -3))
    assert (there - images)[inner].abs().max() > 0.05
    torch.testing.assert_close(back[inner], images[inner], atol=0.02, rtol=0)


def hill(side, linear=((1.0, 0.0), (0.0, 1.0))):
    """A hill off the centre, seen through a map from output to input, and where that stays within the picture."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    u, v = linear[0][0] * x + linear[0][1] * y, linear[1][0] * x + linear[1][1] * y
    picture = torch.exp(-((u - 0.15) ** 2 + (v + 0.1) ** 2) / 0.02).float()[None]
    return picture, (u.abs() < 0.45) & (v.abs() < 0.45)


@pytest.mark.parametrize(
    ("changes", "linear"),
    [
        (dict(scale=1e8), lambda n: [[2 ** (-0.2 * n[2]), 0], [0, 2 ** (-0.2 * n[2])]]),
        (dict(rotate_frac=1e8), lambda n: [[n[3] + 1, -n[4]], [n[4], n[3] + 1]]),
        (dict(aniso=1e8, aniso_rotate_prob=0.0), lambda n: [[2 ** (-0.2 * n[5]), 0], [0, 2 ** (0.2 * n[5])]]),
    ],
)
def test_an_image_is_what_its_label_says(changes, linear):
    """Zoom and stretch are binary logarithms in units of their spread, and pictures turn counter-clockwise (y points
    down). The wavelet is not quite symmetric: what is turned and scaled is up to 0.4 pixels off each way."""
    images = hill(64)[0].expand(8, 1, 64, 64).contiguous()
    found, labels = pipe(**{**OFF, **changes})(images, 5, torch.arange(8), 0)
    assert (labels != 0).any(1).all()
    for image, label in zip(found, labels.tolist(), strict=True):
        expected, inside = hill(64, linear(label))
        torch.testing.assert_close(image[:, inside], expected[:, inside], atol=0.06, rtol=0)


def test_stretching_along_any_axis():
    """By 2^(0.2 n) along (cos r, sin r), with y upwards, and by the inverse across."""
    drawn = draw(**{**OFF, "aniso": 1e8}, aniso_rotate_prob=1.0)
    linear, label = drawn.maps[:, :, :2], drawn.labels[:, 5:7].double()
    size = label.norm(dim=1, keepdim=True)
    axis = label * torch.tensor([1.0, -1.0]) / size
    inverse = linear @ axis[:, :, None]
    factor = (inverse[..., 0] * axis).sum(1, keepdim=True)
    torch.testing.assert_close(inverse[..., 0], factor * axis, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(factor.log2().abs(), 0.2 * size, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.det(linear), torch.ones(512, dtype=torch.float64))


def test_translation_labels_are_in_units_of_the_spread():
    drawn = draw(**{**OFF, "translate_frac": 1e8})
    torch.testing.assert_close(drawn.maps[:, :, 2], -0.125 * drawn.labels[:, 7:].double(), atol=1e-7, rtol=1e-6)
    assert abs(float(drawn.labels[:, 7:].std()) - 1) < 0.1


def test_flips_are_exact():
    images = some(64)
    out, labels = pipe(**{**OFF, "xflip": 1e8, "yflip": 1e8})(images, 1, torch.arange(64), 0)
    assert len(labels[:, :2].unique(dim=0)) == 4 and not labels[:, 2:].any()
    for image, found, (x, y) in zip(images, out, labels[:, :2].tolist(), strict=True):
        expected = image.flip(-1) if x else image
        assert torch.equal(found, expected.flip(-2) if y else expected)


def test_only_images_with_a_map_are_resampled():
    images = some(64)
    out, labels = pipe(xflip=0.0, yflip=0.0, p=0.05)(images, 1, torch.arange(64), 0)
    same = torch.tensor([torch.equal(a, b) for a, b in zip(images, out, strict=True)])
    assert torch.equal(same, ~labels.any(1)) and same.any() and not same.all()


def test_the_range_of_a_flat_image_stays():
    flat = torch.full((64, 1, 8, 8), 0.5)
    out, labels = pipe(p=1.0)(flat, 0, torch.arange(64), 0)
    assert labels[:, 2:].any(1).all()
    torch.testing.assert_close(out, flat, atol=1e-5, rtol=0)


def test_chunks_of_rows_change_nothing(monkeypatch):
    images, wanted = some(12), pipe(p=1.0)(some(12), 0, torch.arange(12), 0)[0]
    monkeypatch.setattr("gearshift.data.augment._CHUNK", 5 * 16 * images[0].numel())
    assert torch.equal(pipe(p=1.0)(images, 0, torch.arange(12), 0)[0], wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_makes_the_same_images_without_being_waited_for():
    images, slot = some(64, 32), torch.arange(64)
    expected, labels = pipe(p=0.5)(images, 0, slot, 1)
    there = images.cuda()
    pipe(p=0.5)(there, 0, slot, 0)  # the filters travel once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, told = pipe(p=0.5)(there, 0, slot, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(told.cpu(), labels)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=1e-6)


# What is drawn ------------------------------------------------------------------------------------------------------


def test_how_often_each_transform_is_drawn():
    labels = draw(20_000).labels
    assert labels.dtype == torch.float32 and labels.shape == (20_000, 9)
    rates = (labels != 0).float().mean(0)
    expected = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.06, 0.12, 0.12])
    assert bool(((rates - expected).abs() < 0.012).all()), rates
    both = ((labels[:, 2] != 0) & (labels[:, 4] != 0)).float().mean()
    assert abs(float(both) - 0.12**2) < 0.004  # independent
    spread = labels[labels[:, 2] != 0, 2]
    assert abs(float(spread.std()) - 1) < 0.06 and abs(float(spread.mean())) < 0.06


def test_draws_belong_to_samples_and_micro_batches():
    images = some(12)
    whole, labels = pipe(p=0.8)(images, 4, torch.arange(12), 9)
    halves = [pipe(p=0.8)(images[part], 4, torch.arange(12)[part], 9) for part in (slice(0, 5), slice(5, 12))]
    assert torch.equal(torch.cat([half[0] for half in halves]), whole)
    assert torch.equal(torch.cat([half[1] for half in halves]), labels)
    for other in (pipe(p=0.8)(images, 5, torch.arange(12), 9), pipe(p=0.8)(images, 4, torch.arange(12), 10)):
        assert not torch.equal(other[1], labels)


def toy_data(**changes):
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return ImageDataset(images, torch.arange(20) % 2, 2, ("a", "b"), "toy", "train", "toy", "made", **changes)


def feed(augment, start=0, stop=8, **settings):
    fields = dict(seed=2, size=8, start=start, stop=stop, device=torch.device("cpu"), augment=augment)
    return Feed(toy_data(), **{**fields, **settings})


def test_the_feed_augments_whatever_the_processes_are():
    with_pipe, without = feed(pipe(p=0.5)).batch(3), feed(None).batch(3)
    assert without.augment is None and with_pipe.augment.shape == (8, 9)
    images, labels = pipe(p=0.5)(without.images, 2, torch.arange(8), 3)
    assert torch.equal(with_pipe.images, images) and torch.equal(with_pipe.augment, labels)
    parts = [feed(pipe(p=0.5), start, start + 4).batch(3) for start in (0, 4)]
    assert torch.equal(torch.cat([part.images for part in parts]), images)
    assert torch.equal(torch.cat([part.augment for part in parts]), labels)
    ahead = feed(pipe(p=0.5), resident=False)
    try:
        assert torch.equal(ahead.batch(3).images, images)
    finally:
        ahead.close()


def test_labels_go_with_their_images():
    batch = feed(pipe(p=0.5)).batch(0)
    order = torch.tensor([5, 1, 3])
    taken = batch.take(order)
    assert torch.equal(taken.augment, batch.augment[order]) and torch.equal(taken.images, batch.images[order])
    assert Batch(batch.images, None, batch.slot, 0).take(order).augment is None


# What does not go together ------------------------------------------------------------------------------------------


def test_a_flip_of_the_data_is_refused():
    with pytest.raises(UsageError, match=r"data\.flip=true and augment \(.*xflip=1e\+08\).*set data\.flip=false"):
        check_augment(pipe(), toy_data(), flip=True, augment_dim=9, network="UNet")


@pytest.mark.parametrize("takes", [0, 6])
def test_a_network_that_cannot_be_told_is_refused(takes):
    check_augment(pipe(), toy_data(), flip=False, augment_dim=9, network="UNet")
    with pytest.raises(UsageError, match=rf"in 9 numbers and UViT takes {takes}.*backbone\.augment_dim=9"):
        check_augment(pipe(), toy_data(), flip=False, augment_dim=takes, network="UViT")


def test_latents_are_refused():
    from gearshift.data.latents import LatentDataset

    latents = LatentDataset((torch.zeros(2, 1, 8, 4, 4),), None, None, (), "latents", "train", "d", "p", 1.0)
    with pytest.raises(UsageError, match=r"the data are latents.*augment=none"):
        check_augment(pipe(), latents, flip=False, augment_dim=9, network="UNet")


@pytest.mark.parametrize("wrong", [dict(p=1.5), dict(scale_std=-1.0), dict(xflip=float("inf")), dict(p=-0.1)])
def test_numbers_that_make_no_sense(wrong):
    with pytest.raises(UsageError, match=rf"augment\.{next(iter(wrong))}="):
        AugmentConfig(**wrong)


def test_the_file_says_the_defaults():
    from omegaconf import OmegaConf

    built = config.build(OmegaConf.load(conf_dir() / "augment" / "edm.yaml"))
    assert built.config == AugmentConfig() and built.label_dim == 9


def test_a_centred_blob_stays_where_it_is_however_it_is_turned() -> None:
    """The centre of rotation is that of the image: half a pixel beside it would move the blob."""
    place = torch.arange(32.0) - 15.5
    blob = torch.exp(-(place[:, None] ** 2 + place**2) / 32)[None, None].expand(16, 1, 32, 32).contiguous()
    only = dict.fromkeys(("xflip", "yflip", "scale", "aniso", "translate_frac"), 0.0)
    turned, labels = AugmentPipe(AugmentConfig(p=1.0, **only))(blob, 0, torch.arange(16), 0)
    assert bool((labels[:, 3:5] != 0).any(1).all())
    mass = turned.sum((1, 2, 3))
    for axis in (2, 3):
        centre = (turned.sum(5 - axis).squeeze(1) * place).sum(1) / mass
        assert float(centre.abs().max()) < 0.15, centre
