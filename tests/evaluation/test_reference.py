import itertools
import json

import numpy as np
import pytest
import torch

from gearshift.evaluation.moments import moments
from gearshift.evaluation.reference import Statistics, load_reference, save_reference
from gearshift.runtime.errors import RunError, UsageError

from .fakes import ABOUT, Named, draw, mixed

INCEPTION = Named("inception_2015_12_05", 5, spatial=3)


def about(extractor, tap="features"):
    return {**ABOUT, "extractor": extractor.name, "fingerprint": extractor.fingerprint, "tap": tap}


def statistics(extractor=INCEPTION, tap="features", n=40):
    return Statistics.of(mixed(n, extractor.taps[tap], 0), provenance=about(extractor, tap))


def test_moments_are_over_all_rows_and_features_are_a_keyed_subset():
    features = draw(300, 4, 0)
    state = torch.random.get_rng_state()
    found = Statistics.of(features, provenance=ABOUT, keep=100)
    assert torch.equal(torch.random.get_rng_state(), state)
    mean, covariance = moments(features)
    assert found.count == 300 and torch.equal(found.mean, mean) and torch.equal(found.covariance, covariance)
    assert found.mean.dtype == found.covariance.dtype == torch.float64 and found.features.dtype == torch.float32
    rows = [int((features == row).all(dim=1).nonzero()) for row in found.features]
    assert len(rows) == 100 and rows == sorted(set(rows))
    # Neither the first hundred nor an even grid, the same every time, another one under another seed.
    assert rows != list(range(100)) and len({b - a for a, b in itertools.pairwise(rows)}) > 3
    assert torch.equal(Statistics.of(features, provenance=ABOUT, keep=100).features, found.features)
    assert not torch.equal(Statistics.of(features, provenance=ABOUT, keep=100, seed=1).features, found.features)
    assert torch.equal(Statistics.of(features, provenance=ABOUT, keep=300).features, features)


def test_refuses_what_has_no_moments():
    with pytest.raises(UsageError, match="at least 2"):
        Statistics.of(torch.zeros(1, 3), provenance=ABOUT)
    with pytest.raises(RunError, match="not finite"):
        Statistics.of(torch.full((4, 3), float("nan")), provenance=ABOUT)


def test_describes_itself():
    assert statistics().describe() == "noise-train-40[digest 1234abcd]"
    published = Statistics(*moments(draw(9, 2, 0)), 0, None, {"source": "fid_stats.npz (EDM layout)"})
    assert published.describe() == "published: fid_stats.npz (EDM layout), n unknown"


def test_files_keep_everything(tmp_path):
    taps = {"features": statistics(), "spatial": statistics(tap="spatial")}
    path = tmp_path / "deep" / "ref.npz"
    save_reference(path, taps)
    back = load_reference(path, extractor=INCEPTION)
    assert list(back) == ["features", "spatial"]
    for tap, one in taps.items():
        assert back[tap].count == 40 and dict(back[tap].provenance) == dict(one.provenance)
        assert torch.equal(back[tap].mean, one.mean) and torch.equal(back[tap].covariance, one.covariance)
        assert torch.equal(back[tap].features, one.features) and back[tap].features.dtype == torch.float32
    content = path.read_bytes()
    save_reference(path, taps)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="no statistics"):
        save_reference(path, {})


def test_other_weights_are_refused(tmp_path):
    save_reference(tmp_path / "ref.npz", {"features": statistics()})
    other = Named("inception_2015_12_05", 5, spatial=3)
    other.fingerprint = "f" * 16
    with pytest.raises(RunError, match=rf"{INCEPTION.fingerprint}.*this metric uses inception_2015_12_05 \(f{{16}}\)"):
        load_reference(tmp_path / "ref.npz", extractor=other)
    # Without an extractor there is nothing to compare with.
    assert load_reference(tmp_path / "ref.npz")["features"].count == 40
    narrow = Named("inception_2015_12_05", 5)
    save_reference(tmp_path / "two.npz", {"spatial": statistics(tap="spatial")})
    with pytest.raises(RunError, match="'spatial' is 3 wide, inception_2015_12_05 gives no such tap"):
        load_reference(tmp_path / "two.npz", extractor=narrow)


def covariance_of(dim, seed=0):
    mean, covariance = moments(mixed(50, dim, seed))
    return mean.numpy(), covariance.numpy()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_reads_published_moments(tmp_path, dtype):
    mu, sigma = (array.astype(dtype) for array in covariance_of(5))
    np.savez(tmp_path / "cifar10-32x32.npz", mu=mu, sigma=sigma)
    [(tap, found)] = load_reference(tmp_path / "cifar10-32x32.npz", extractor=INCEPTION).items()
    assert tap == "features" and found.count == 0 and found.features is None
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert np.array_equal(found.mean, mu.astype(np.float64))
    assert np.allclose(found.covariance, sigma, rtol=1e-6)
    assert found.describe() == "published: cifar10-32x32.npz (EDM or pytorch-fid layout), n unknown"
    assert found.provenance["extractor"] == "assumed inception 2015-12-05" and "fingerprint" not in found.provenance
    # Written into a file of our own they stay what they are.
    save_reference(tmp_path / "own.npz", {"features": found})
    again = load_reference(tmp_path / "own.npz", extractor=INCEPTION)["features"]
    assert again.features is None and again.describe() == found.describe()


def test_reads_the_layout_of_adm_and_leaves_its_images(tmp_path):
    mu, sigma = covariance_of(5)
    mu_s, sigma_s = covariance_of(3, 1)
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "virtual.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found = load_reference(tmp_path / "virtual.npz", extractor=INCEPTION)
    assert list(found) == ["features", "spatial"]
    assert np.array_equal(found["spatial"].mean, mu_s) and found["spatial"].provenance["tap"] == "spatial"
    assert "ADM layout" in found["features"].describe() and "arr_0" in found["features"].provenance["note"]


def test_published_moments_are_of_inception_alone(tmp_path):
    mu, sigma = covariance_of(5)
    np.savez(tmp_path / "x.npz", mu=mu, sigma=sigma)
    with pytest.raises(RunError, match="published statistics of inception_2015_12_05, this metric uses vgg16"):
        load_reference(tmp_path / "x.npz", extractor=Named("vgg16", 5))
    with pytest.raises(RunError, match="'features' is 5 wide, inception_2015_12_05 gives 7"):
        load_reference(tmp_path / "x.npz", extractor=Named("inception_2015_12_05", 7))


def _asymmetric(mu, sigma):
    sigma[0, 1] += 0.1
    return mu, sigma


def _negative(mu, sigma):
    sigma[2, 2] = -1.0
    return mu, sigma


def _infinite(mu, sigma):
    mu[0] = np.inf
    return mu, sigma


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_asymmetric, "not symmetric"),
        (_negative, "negative variance"),
        (_infinite, "not finite"),
        (lambda mu, sigma: (mu[:4], sigma), r"shapes \(4,\) and \(5, 5\)"),
        (lambda mu, sigma: (mu[None], sigma), r"shapes \(1, 5\)"),
    ],
)
def test_moments_that_no_features_have_are_refused(tmp_path, spoil, said):
    mu, sigma = spoil(*(array.copy() for array in covariance_of(5)))
    np.savez(tmp_path / "x.npz", mu=mu, sigma=sigma)
    with pytest.raises(RunError, match=said):
        load_reference(tmp_path / "x.npz")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    save_reference(tmp_path / "ref.npz", {"features": statistics()})
    content = (tmp_path / "ref.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("not statistics")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    (tmp_path / "bare.npz").write_bytes((tmp_path / "bare.npy").read_bytes())
    # Pickles run code when they are opened.
    np.savez(tmp_path / "pickled.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "half.npz", meta=np.frombuffer(b'{"format": 1, "taps": {"features": {}}}', dtype=np.uint8))
    for name in ("cut", "empty", "text", "bare", "pickled", "half", "missing"):
        with pytest.raises(RunError, match="make it again"):
            load_reference(tmp_path / f"{name}.npz")


def test_samples_are_not_statistics(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(RunError, match="holds arr_0; reference statistics are 'mu' and 'sigma'"):
        load_reference(tmp_path / "samples.npz")


def test_a_later_format_is_refused(tmp_path):
    meta = np.frombuffer(json.dumps({"format": 99, "taps": {}}).encode(), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", meta=meta)
    with pytest.raises(RunError, match="has format 99, this program reads format 1"):
        load_reference(tmp_path / "x.npz")


def test_kept_features_must_belong_to_the_moments(tmp_path):
    good = statistics()
    for kept in (torch.zeros(4, 2), torch.full((4, 5), float("nan"))):
        save_reference(tmp_path / "x.npz", {"features": Statistics(good.mean, good.covariance, 40, kept, ABOUT)})
        with pytest.raises(RunError, match="kept features of 'features'"):
            load_reference(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"# a page of text\n", b"\x80\x04K\x01.", b""])
def test_a_file_that_is_no_archive_is_refused_without_advice_to_unpickle_it(tmp_path, content):
    file = tmp_path / "page.npz"
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"no \.npz archive does") as refused:
        load_reference(file)
    assert "pickle" not in str(refused.value)
