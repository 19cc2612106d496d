import warnings

import numpy as np
import pytest
import torch

from gearshift.evaluation.features import FeatureExtractor, RandomExtractor
from gearshift.evaluation.frechet import (
    Accumulator,
    FrechetMetric,
    build_metrics,
    frechet_distance,
    merged,
    sample_warning,
)
from gearshift.runtime.errors import RunError, UsageError


def features(n, dim, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(n, dim, generator=generator) @ mixing * scale + shift


def accumulate(values):
    total = Accumulator(values.shape[1])
    total.update(values)
    return total


class Flat(FeatureExtractor):
    """The pixels themselves as features, times a factor that stands for a seed."""

    def __init__(self, dim, factor=1.0):
        self.dim, self.name, self.protocol, self.factor = dim, "flat", "pixels", factor

    @property
    def device(self):
        return torch.device("cpu")

    def _features(self, images_u8):
        return images_u8.flatten(1).float() * self.factor


def test_diagonal_gaussians_in_closed_form():
    a, b = torch.rand(7, dtype=torch.float64) + 0.1, torch.rand(7, dtype=torch.float64) + 0.1
    mean = torch.linspace(-1, 1, 7, dtype=torch.float64)
    expected = float((a.sqrt() - b.sqrt()).square().sum() + mean.square().sum())
    value = frechet_distance(torch.zeros(7, dtype=torch.float64), a.diag(), mean, b.diag())
    assert value == pytest.approx(expected, rel=1e-12)


def test_symmetric_form_equals_the_general_one():
    (m1, c1), (m2, c2) = (
        accumulate(features(300, 12, 0)).moments(),
        accumulate(features(300, 12, 1, 2.0, 0.5)).moments(),
    )
    cross = torch.linalg.eigvals(c1 @ c2).sqrt().sum().real
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [200, 10])
def test_distance_to_itself_is_zero(n):
    mean, cov = accumulate(features(n, 32, 3)).moments()
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-5 * float(cov.trace())


def test_moments_are_those_of_numpy_far_from_the_origin():
    values = features(500, 6, 4, shift=100.0).double()
    mean, cov = accumulate(values).moments()
    assert np.allclose(mean, values.numpy().mean(axis=0), rtol=1e-13)
    assert np.allclose(cov, np.cov(values.numpy(), rowvar=False), rtol=1e-8)


def test_shards_merge_to_the_whole_and_order_does_not_matter():
    values = features(257, 9, 5)
    whole = accumulate(values)
    shards = merged(accumulate(part) for part in values.split(50))
    shuffled = accumulate(values[torch.randperm(257, generator=torch.Generator().manual_seed(0))])
    for other in (shards, shuffled):
        assert other.count == whole.count
        assert torch.allclose(other.sum, whole.sum, rtol=0, atol=1e-9)
        assert torch.allclose(other.outer, whole.outer, rtol=1e-12)
    # In the same order the sums are the same bits, whichever process made the shards.
    again = merged([accumulate(part) for part in values.split(50)])
    assert torch.equal(again.sum, shards.sum) and torch.equal(again.outer, shards.outer)


def test_agrees_with_torch_fidelity_and_torchmetrics():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    ours, theirs = features(400, 16, 6).float(), features(300, 16, 7, 1.3, 0.2).float()
    value = frechet_distance(*accumulate(ours).moments(), *accumulate(theirs).moments())
    stats = [fid_features_to_statistics(part) for part in (ours, theirs)]
    library = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    # torch-fidelity keeps the mean in float32.
    assert value == pytest.approx(float(library), rel=1e-6)

    class Identity(torch.nn.Module):
        num_features = 16

        def forward(self, x):
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = FrechetInceptionDistance(feature=Identity(), normalize=True).set_dtype(torch.float64)
        metric.real_features_sum += ours.double().sum(0)
        metric.real_features_cov_sum += ours.double().T @ ours.double()
        metric.real_features_num_samples += len(ours)
        metric.fake_features_sum += theirs.double().sum(0)
        metric.fake_features_cov_sum += theirs.double().T @ theirs.double()
        metric.fake_features_num_samples += len(theirs)
        metric._update_count, metric.orig_dtype = 1, torch.float64
        assert value == pytest.approx(float(metric.compute()), rel=1e-6)


def test_files_keep_sums_and_protocol(tmp_path):
    total = accumulate(features(40, 5, 8))
    total.save(tmp_path / "deep" / "ref.npz", "fd_x[n=40]")
    back = Accumulator.load(tmp_path / "deep" / "ref.npz", "fd_x[n=40]")
    assert back.count == 40 and torch.equal(back.sum, total.sum) and torch.equal(back.outer, total.outer)
    with pytest.raises(RunError, match=r"made under 'fd_x\[n=40\]', this run needs 'fd_y'"):
        Accumulator.load(tmp_path / "deep" / "ref.npz", "fd_y")
    content = (tmp_path / "deep" / "ref.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    for name in ("cut.npz", "missing.npz"):
        with pytest.raises(RunError, match="make it again"):
            Accumulator.load(tmp_path / name)


def test_refuses_what_would_poison_the_sums():
    total = Accumulator(3)
    with pytest.raises(ValueError, match="width 3"):
        total.update(torch.zeros(2, 4))
    with pytest.raises(RunError, match="not finite"):
        total.update(torch.tensor([[0.0, float("nan"), 1.0]]))
    assert total.count == 0
    with pytest.raises(UsageError, match="at least 2"):
        total.moments()


def test_warns_about_few_samples():
    assert "singular" in sample_warning("fd_x", 64, 64)
    assert "biased upwards" in sample_warning("fd_x", 500, 64)
    assert sample_warning("fd_x", 10_000, 64) is None


def images(n, seed, low=0, high=256):
    return torch.randint(low, high, (n, 1, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_metric_is_the_distance_of_its_features():
    metric = FrechetMetric("fd_flat", [Flat(4)], standardise=False)
    real, fake = images(90, 0), images(60, 1, 100)
    expected = frechet_distance(
        *accumulate(fake.flatten(1).float()).moments(), *accumulate(real.flatten(1).float()).moments()
    )
    assert metric.distance(metric.of(fake), metric.of(real)) == expected
    assert metric.distance(metric.of(real), metric.of(real)) == pytest.approx(0, abs=1e-6)


def test_standardising_the_moments_equals_standardising_the_features():
    metric = FrechetMetric("fd_flat", [Flat(4)], standardise=True)
    real, fake = images(90, 0), images(60, 1, 100)
    scale = real.flatten(1).double().std(dim=0)
    ours, theirs = (accumulate(part.flatten(1).double() / scale) for part in (fake, real))
    expected = frechet_distance(*ours.moments(), *theirs.moments())
    assert metric.distance(metric.of(fake), metric.of(real)) == pytest.approx(expected, rel=1e-9)


def test_standardised_value_does_not_depend_on_the_scale_of_the_extractor():
    real, fake = images(90, 0), images(60, 1, 100)
    one = FrechetMetric("fd_flat", [Flat(4)], standardise=True)
    three = FrechetMetric("fd_flat", [Flat(4), Flat(4, 3.0), Flat(4, 0.2)], standardise=True)
    value = one.distance(one.of(fake), one.of(real))
    assert three.distance(three.of(fake), three.of(real)) == pytest.approx(value, rel=1e-6)


def test_constant_features_do_not_divide_by_zero():
    metric = FrechetMetric("fd_flat", [Flat(4)], standardise=True)
    real, fake = images(50, 0), images(50, 1)
    real[:, :, 0, 0] = fake[:, :, 0, 0] = 7
    assert np.isfinite(metric.distance(metric.of(fake), metric.of(real)))


def test_build_names_what_is_there_and_what_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("GEARSHIFT_INCEPTION", raising=False)
    metrics, missing = build_metrics(["random_conv", "inception", "classifier"], image_size=8, data_name="digits")
    assert [metric.name for metric in metrics] == ["fd_random_conv_64[s0-s2]"]
    assert [item.name for item in missing] == ["fid", "fd_classifier_digits"]
    assert all(isinstance(extractor, RandomExtractor) for extractor in metrics[0].extractors)
    protocol = metrics[0].protocol(500, "digits-train", 1500)
    for part in ("fd_random_conv_64[s0-s2]", "n=500", "ref=digits-train-1500", "u8-round", "3 seeds", "standardised"):
        assert part in protocol
    with pytest.raises(UsageError, match=r"'fjd'; known are classifier"):
        build_metrics(["fjd"], image_size=8, data_name="digits")
    with pytest.raises(UsageError, match="at least 3 seeds"):
        build_metrics(["random_conv"], image_size=8, data_name="digits", seeds=(0,))
