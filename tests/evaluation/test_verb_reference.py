import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from gearshift.evaluation import classifier as classifiers
from gearshift.evaluation import pretrained
from gearshift.evaluation.features import FeatureExtractor, build_extractor, fingerprint_of
from gearshift.evaluation.reference import load_reference
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.paths import conf_dir
from gearshift.verbs import reference


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An own folder and cache, and no weights anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("INCEPTION", "VGG16"):
        monkeypatch.delenv(f"GEARSHIFT_{name}", raising=False)


def run(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return reference.run(compose("reference", overrides=list(overrides)))


class Stand(FeatureExtractor):
    """In the place of Inception: as many taps, no network."""

    batch = 64

    def __init__(self, weights=None, device="cpu"):
        self.name, self.protocol, self.dim = "inception_2015_12_05", "stand-in", 4
        self.taps = {"features": 4, "logits": 3, "spatial": 6}
        self.fingerprint = fingerprint_of(self.protocol, str(weights))

    @property
    def device(self):
        return torch.device("cpu")

    def _forward(self, images_u8):
        flat = images_u8.flatten(1).float()
        return {tap: flat[:, 20 : 20 + width] for tap, width in self.taps.items()}


def test_makes_a_file_for_every_tap_worth_having(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pretrained, "load_inception", lambda path, device: Stand(path, device))
    answer = run("data=digits", "out=made/here.npz", "weights.inception=mine.pth", "keep=300")
    extractor = Stand("mine.pth")
    found = load_reference("made/here.npz", extractor=extractor)
    assert answer == {
        "path": "made/here.npz",
        "extractor": "inception_2015_12_05",
        "fingerprint": extractor.fingerprint,
        "protocol": "stand-in",
        "count": 1500,
        "split": "train",
        "digest": found["features"].provenance["digest"],
        "taps": {"features": 4, "spatial": 6},
    }
    # Logits are compared with nothing.
    assert set(found) == {"features", "spatial"} and found["spatial"].features.shape == (300, 6)
    said = capsys.readouterr().err
    assert "1500/1500 images (100%)" in said and "made/here.npz" in said
    # A second file comes from the cache, and says so by its progress.
    again = run("data=digits", "out=copy.npz", "weights.inception=mine.pth", "keep=300")
    assert again == {**answer, "path": "copy.npz"}
    assert (tmp_path / "copy.npz").read_bytes() == (tmp_path / "made" / "here.npz").read_bytes()


def test_the_other_split_under_a_name_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "load_inception", lambda path, device: Stand(path, device))
    answer = run("data=digits", "split=test")
    assert (answer["count"], answer["split"]) == (297, "test")
    assert answer["path"] == "digits-test-inception_2015_12_05.npz" and (tmp_path / answer["path"]).is_file()


def test_random_networks_leave_one_file_per_seed():
    answer = run("data=digits", "split=test", "extractor=random_conv", "out=random.npz")
    assert [one["path"] for one in answer["references"]] == ["random-s0.npz", "random-s1.npz", "random-s2.npz"]
    named = run("data=digits", "split=test", "extractor=random_conv")["references"]
    assert [one["path"] for one in named] == [f"digits-test-random_conv_64-s{seed}.npz" for seed in range(3)]
    extractors = build_extractor("random_conv", image_size=8, data_name="digits")
    for one, extractor in zip(answer["references"], extractors, strict=True):
        assert one["extractor"] == extractor.name
        load_reference(one["path"], extractor=extractor)
    with pytest.raises(RunError, match="fingerprint"):
        load_reference("random-s0.npz", extractor=extractors[1])


def test_a_classifier_is_trained_for_it(monkeypatch):
    recipe = classifiers.Recipe("plain", steps=2, batch=16)
    monkeypatch.setattr(classifiers, "default_recipe", lambda train: recipe)
    answer = run("data=digits", "split=test", "extractor=classifier", "out=classifier.npz")
    assert answer["extractor"] == "classifier_digits" and answer["taps"] == {"features": 64}
    assert "2 steps" in answer["protocol"]
    # The same weights, read back.
    again = run("data=digits", "split=test", "extractor=classifier", "out=again.npz")
    assert again["fingerprint"] == answer["fingerprint"]


@pytest.mark.parametrize(("name", "file"), [("inception", "6726825d"), ("vgg16", "397923af")])
def test_missing_weights_are_refused_with_the_line_that_fetches_them(name, file):
    with pytest.raises(UsageError) as refusal:
        run("data=digits", f"extractor={name}", "out=x.npz")
    for part in (f"extractor={name}", file, "curl -L", "https://", f"GEARSHIFT_{name.upper()}"):
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=x.npz"], "add e.g. data=cifar10"),
        (["data=digits", "out=x.pt"], "out=x.pt is not the name of an .npz file"),
        (["data=digits", "out=file/x.npz"], "cannot be written"),
        (["data=digits", "out=x.npz", "extractor=dino"], "no extractor 'dino'"),
        (["data=digits", "out=x.npz", "extractor=3"], "no extractor '3'"),
        (["data=digits", "out=x.npz", "extractor={_target_: gearshift.data.digits.Digits}"], "not a FeatureExtractor"),
        (["data=digits", "out=x.npz", "extractor=random_conv", "split=val"], "no split 'val'"),
        (["data=digits", "out=x.npz", "keep=1"], "keep=1"),
        (["read=x.npz", "out=y.npz"], "give one of them"),
    ],
)
def test_bad_requests_are_refused_by_name(overrides, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        run(*overrides)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(reference, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="2 were started"):
        run("data=digits", "out=x.npz")


def test_reads_its_own_files(capsys):
    made = run("data=digits", "split=test", "extractor=random_conv", "out=random.npz", "keep=50")["references"][0]
    capsys.readouterr()
    answer = run(f"read={made['path']}")
    tap = answer["taps"]["features"]
    assert answer["layout"] == "gearshift" and answer["path"] == made["path"]
    assert (tap["dim"], tap["count"], tap["kept_features"]) == (64, 297, 50)
    assert tap["fingerprint"] == made["fingerprint"] and tap["data"] == "digits"
    said = capsys.readouterr().err
    assert "digits-test-297" in said and made["protocol"] in said


def test_reads_published_files(capsys):
    eye = np.eye(5)
    np.savez("edm.npz", mu=np.zeros(5), sigma=eye)
    np.savez("adm.npz", mu=np.zeros(5), sigma=eye, mu_s=np.ones(3), sigma_s=np.eye(3), arr_0=np.zeros((2, 2, 2, 3)))
    answer = run("read=edm.npz")
    assert answer["layout"] == "published"
    assert {tap: (one["dim"], one["count"], one["kept_features"]) for tap, one in answer["taps"].items()} == {
        "features": (5, None, 0)
    }
    assert "EDM" in capsys.readouterr().err
    assert set(run("read=adm.npz")["taps"]) == {"features", "spatial"}
    with pytest.raises(RunError, match=r"missing\.npz"):
        run("read=missing.npz")
