from dataclasses import replace

import pytest
import torch

from gearshift.data.digits import Digits, DigitsConfig
from gearshift.evaluation.features import FeatureExtractor, fingerprint_of
from gearshift.evaluation.references import reference_for
from gearshift.runtime.errors import RunError


class Corners(FeatureExtractor):
    """The first three pixels; a second tap with their sum. Says how many images it read."""

    batch = 16
    dim = 3
    name, protocol = "corners", "first three pixels"

    def __init__(self):
        self.taps = {"features": 3, "sum": 1}
        self.fingerprint = fingerprint_of(self.protocol, "")
        self.images = 0

    @property
    def device(self):
        return torch.device("cpu")

    def _forward(self, images_u8):
        self.images += len(images_u8)
        corner = images_u8.flatten(1)[:, 27:30].float()
        return {"features": corner, "sum": corner.sum(dim=1, keepdim=True)}


@pytest.fixture(scope="module")
def digits():
    return Digits(DigitsConfig()).load("train")


def features_of(data):
    return data.images_u8.flatten(1)[:, 27:30].double()


def test_statistics_of_every_image_with_their_provenance(digits, tmp_path):
    extractor, calls = Corners(), []
    found = reference_for(
        extractor, digits, ("sum", "features"), tmp_path, lambda *counts: calls.append(counts), keep=100
    )
    expected = features_of(digits)
    torch.testing.assert_close(found["features"].mean, expected.mean(dim=0))
    torch.testing.assert_close(found["features"].covariance, expected.T.cov())
    torch.testing.assert_close(found["sum"].mean, expected.sum(dim=1, keepdim=True).mean(dim=0))
    assert found["features"].count == 1500 and found["features"].features.shape == (100, 3)
    # One pass for both taps, and progress to the end.
    assert extractor.images == 1500
    assert calls[-1] == (1500, 1500) and calls == sorted(calls) and len(calls) > 2
    assert dict(found["sum"].provenance) == {
        "extractor": "corners",
        "fingerprint": extractor.fingerprint,
        "protocol": "first three pixels",
        "tap": "sum",
        "data": "digits",
        "split": "train",
        "digest": digits.digest,
        "source": digits.provenance,
    }


def same(one, other):
    assert set(one) == set(other)
    for tap in one:
        assert torch.equal(one[tap].mean, other[tap].mean) and torch.equal(one[tap].covariance, other[tap].covariance)
        assert torch.equal(one[tap].features, other[tap].features)
        assert dict(one[tap].provenance) == dict(other[tap].provenance) and one[tap].count == other[tap].count


def test_computed_once_and_read_back_the_same(digits, tmp_path):
    extractor, calls = Corners(), []
    first = reference_for(extractor, digits, ("features", "sum"), tmp_path)
    again = reference_for(extractor, digits, ["sum", "features"], tmp_path, lambda *counts: calls.append(counts))
    same(first, again)
    assert extractor.images == 1500 and calls == []
    assert len(list((tmp_path / "references").iterdir())) == 1


def changes(digits):
    other = Corners()
    other.fingerprint = fingerprint_of("other weights", "")
    return {
        "digest": (Corners(), replace(digits, digest="another"), ("features",), 100),
        "split": (Corners(), replace(digits, split="test"), ("features",), 100),
        "weights": (other, digits, ("features",), 100),
        "taps": (Corners(), digits, ("features", "sum"), 100),
        "keep": (Corners(), digits, ("features",), 50),
    }


@pytest.mark.parametrize("what", ["digest", "split", "weights", "taps", "keep"])
def test_whatever_decides_the_numbers_is_in_the_key(digits, tmp_path, what):
    reference_for(Corners(), digits, ("features",), tmp_path, keep=100)
    extractor, data, taps, keep = changes(digits)[what]
    found = reference_for(extractor, data, taps, tmp_path, keep=keep)
    assert extractor.images == 1500
    assert set(found) == set(taps) and len(found["features"].features) == keep
    assert found["features"].provenance["digest"] == data.digest


@pytest.mark.parametrize("damage", ["cut", "noise", "foreign", "other data"])
def test_a_file_that_is_not_what_its_name_says_is_made_again(digits, tmp_path, damage):
    first = reference_for(Corners(), digits, ("features",), tmp_path)
    [path] = (tmp_path / "references").iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "noise":
        path.write_bytes(b"no archive")
    else:
        elsewhere = tmp_path / "elsewhere"
        other = Corners()
        if damage == "foreign":
            other.fingerprint = fingerprint_of("other weights", "")
        reference_for(other, replace(digits, digest="another"), ("features",), elsewhere)
        [wrong] = (elsewhere / "references").iterdir()
        path.write_bytes(wrong.read_bytes())
    extractor = Corners()
    same(reference_for(extractor, digits, ("features",), tmp_path), first)
    assert extractor.images == 1500
    # It replaced what was there.
    same(reference_for(extractor, digits, ("features",), tmp_path), first)
    assert extractor.images == 1500


def test_the_number_of_threads_changes_no_bit_of_the_features(digits, tmp_path):
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(reference_for(Corners(), digits, ("features",), tmp_path / str(threads)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0]["features"].features, found[1]["features"].features)


def test_a_place_that_cannot_be_written_is_told(digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="GEARSHIFT_CACHE"):
        reference_for(Corners(), digits, ("features",), tmp_path / "file")
