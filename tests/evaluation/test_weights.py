import hashlib

import pytest
import torch
from torch import nn

from gearshift.evaluation.features import build_extractor
from gearshift.evaluation.paired import load_lpips
from gearshift.evaluation.pretrained import load_inception, load_vgg16
from gearshift.evaluation.weights import ALEXNET, INCEPTION, VGG16, Unavailable, WeightFile, locate, weights_digest

FILES = {"inception": INCEPTION, "vgg16": VGG16, "alexnet": ALEXNET}


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """The folder of an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for weights in FILES.values():
        monkeypatch.delenv(weights.variable, raising=False)
    return tmp_path / "hub" / "checkpoints"


def load(name, path=None):
    if name == "alexnet":
        return load_lpips("alex", {"alexnet": path})
    return build_extractor(name, image_size=32, data_name="x", weights={name: path})


@pytest.mark.parametrize("name", FILES)
def test_what_is_missing_is_said_and_how_to_fetch_it(name, no_weights):
    found = load(name)
    weights = FILES[name]
    assert isinstance(found, Unavailable)
    for part in (weights.file_name, weights.sha256_prefix, weights.variable, str(no_weights)):
        assert part in found.reason
    assert weights.url in found.fetch_line and str(no_weights) in found.fetch_line
    assert found.as_row() == {"name": found.name, "reason": found.reason, "fetch": found.fetch_line}
    assert weights.sha256_prefix in weights.file_name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cache", "variable", "path"])
def test_other_weights_never_bear_the_name(name, how, no_weights, monkeypatch):
    """Random weights, right in shape or not, are told from the released ones by their checksum wherever they lie."""
    weights = FILES[name]
    no_weights.mkdir(parents=True)
    place = no_weights / (weights.file_name if how == "cache" else "other.pth")
    torch.save({"weight": torch.randn(3)}, place)
    if how == "variable":
        monkeypatch.setenv(weights.variable, str(place))
    found = load(name, place if how == "path" else None)
    assert isinstance(found, Unavailable)
    assert f"begins with {weights.sha256_prefix}" in found.reason and str(place) in found.reason


def test_each_file_has_its_own_variable(no_weights, monkeypatch, tmp_path):
    assert [weights.variable for weights in FILES.values()] == [
        "GEARSHIFT_INCEPTION",
        "GEARSHIFT_VGG16",
        "GEARSHIFT_ALEXNET",
    ]
    for name, weights in FILES.items():
        monkeypatch.setenv(weights.variable, str(tmp_path / f"{name}.pth"))
        assert str(tmp_path / f"{name}.pth") in load(name).reason
    # LPIPS with VGG16 takes VGG16's file.
    assert str(tmp_path / "vgg16.pth") in load_lpips("vgg").reason
    assert str(tmp_path / "mine.pth") in load_lpips("vgg", {"vgg16": tmp_path / "mine.pth"}).reason


def test_what_is_missing_bears_the_name_that_was_asked_for(no_weights):
    assert load_inception().name == "inception" and load_inception(metric="fid").name == "fid"
    assert load_vgg16(metric="precision_recall").name == "precision_recall"
    assert load_lpips("vgg").name == "lpips_vgg_to_full"


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


def test_digest_of_weights_sees_every_stored_number():
    network = nn.BatchNorm1d(3)
    first = weights_digest(network)
    assert weights_digest(nn.BatchNorm1d(3)) == first
    network.running_var[2] += 1e-6
    assert weights_digest(network) != first
    assert len(weights_digest(network.bfloat16())) == 64, "NumPy has no such type"
