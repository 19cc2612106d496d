import numpy as np
import pytest
import torch

from gearshift.data.digits import Digits, DigitsConfig, held_out_indices
from gearshift.data.pixels import to_pm1
from gearshift.runtime.errors import UsageError


@pytest.fixture(scope="module")
def splits():
    digits = Digits(DigitsConfig())
    return digits.load("train"), digits.load("test")


def test_shapes_and_values(splits):
    train, test = splits
    assert (len(train), len(test)) == (1500, 297)
    assert train.images_u8.shape[1:] == (1, 8, 8) and train.images_u8.dtype == torch.uint8
    # 16 levels above zero, spread over all of 0..255 and rounded to nearest.
    expected = {int(v * 255 / 16 + 0.5) for v in range(17)}
    assert set(train.images_u8.unique().tolist()) == expected


def test_classes_are_balanced_in_both_splits(splits):
    for split, low, high in zip(splits, (145, 29), (154, 31), strict=True):
        counts = torch.bincount(split.labels, minlength=10)
        assert low <= int(counts.min()) and int(counts.max()) <= high


def test_splits_share_no_position_and_cover_everything(splits):
    from sklearn.datasets import load_digits

    labels = load_digits().target
    chosen = held_out_indices(labels, 297)
    assert len(set(chosen.tolist())) == 297
    joined = torch.cat([split.images_u8 for split in splits]).flatten(1).sum(dim=1)
    whole = np.floor(load_digits().images * 255 / 16 + 0.5).reshape(1797, -1).sum(axis=1)
    assert sorted(joined.tolist()) == sorted(whole.astype(int).tolist())


def test_shares_follow_the_largest_remainders():
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2)
    chosen = labels[held_out_indices(labels, 4)]
    # Exact shares 2.0, 1.2, 0.8: the last class has the largest remainder.
    assert np.bincount(chosen).tolist() == [2, 1, 1]


def test_loading_is_deterministic_and_described(splits):
    again = Digits(DigitsConfig()).load("train")
    assert again.digest == splits[0].digest != splits[1].digest
    assert "1500" in again.provenance and again.class_names[3] == "3"


def test_known_before_loading():
    digits = Digits(DigitsConfig(flip=True))
    assert (digits.image_size, digits.channels, digits.num_classes, digits.flip) == (8, 1, 10, True)
    assert Digits.Config is DigitsConfig


def test_gather_maps_and_mirrors(splits):
    train = splits[0]
    index = torch.tensor([5, 1, 5])
    plain, labels = train.gather(index)
    assert torch.equal(plain, to_pm1(train.images_u8[index])) and torch.equal(labels, train.labels[index])
    off, _ = train.gather(index, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(off, plain)
    mixed, _ = train.gather(index, torch.tensor([True, False, False]))
    assert torch.equal(mixed[0], plain[0].flip(-1)) and torch.equal(mixed[1:], plain[1:])


def test_unknown_split():
    with pytest.raises(UsageError, match=r"'valid'.*train, test"):
        Digits(DigitsConfig()).load("valid")
