import warnings

import numpy as np
import pytest
import torch

from gearshift.evaluation.frechet import FrechetMetric, frechet_distance, square_root
from gearshift.evaluation.moments import moments, spread
from gearshift.evaluation.reference import Statistics
from gearshift.runtime.errors import RunError, UsageError

from .fakes import ABOUT, Named, draw, mixed, reference_of


def test_diagonal_gaussians_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(7, dtype=torch.float64, generator=generator) + 0.1 for _ in range(2))
    mean = torch.linspace(-1, 1, 7, dtype=torch.float64)
    expected = float((a.sqrt() - b.sqrt()).square().sum() + mean.square().sum())
    value = frechet_distance(torch.zeros(7, dtype=torch.float64), a.diag(), mean, b.diag())
    assert value == pytest.approx(expected, rel=1e-12)


def test_symmetric_form_equals_the_general_one_both_ways():
    (m1, c1), (m2, c2) = moments(mixed(300, 12, 0)), moments(mixed(300, 12, 1, 2.0, 0.5))
    cross = torch.linalg.eigvals(c1 @ c2).sqrt().sum().real
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m1, c1, m2, c2, square_root(c2)) == frechet_distance(m1, c1, m2, c2)


def test_square_root():
    _, covariance = moments(mixed(10, 32, 2))  # singular: fewer samples than dimensions
    root = square_root(covariance)
    assert torch.allclose(root @ root, covariance, atol=1e-10 * float(covariance.trace()))
    assert torch.allclose(root, root.T)


@pytest.mark.parametrize("n", [200, 10])
def test_distance_to_itself_is_zero(n):
    mean, cov = moments(mixed(n, 32, 3))
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-5 * float(cov.trace())


def test_singular_covariances_have_a_real_distance():
    """Products of singular matrices are where general matrix square roots turn complex."""
    one, two = moments(mixed(20, 64, 4)), moments(mixed(15, 64, 5))
    value = frechet_distance(*one, *two)
    # The cross term lies between 0 and the geometric mean of the traces.
    far = float((one[0] - two[0]).square().sum())
    traces = float(one[1].trace()), float(two[1].trace())
    assert far + (traces[0] ** 0.5 - traces[1] ** 0.5) ** 2 <= value <= far + sum(traces)
    assert frechet_distance(*two, *one) == pytest.approx(value, rel=1e-6)


def test_covariance_is_unbiased():
    values = mixed(9, 3, 6)
    mean, covariance = moments(values)
    assert np.allclose(mean, values.double().numpy().mean(axis=0), rtol=1e-13)
    assert np.allclose(covariance, np.cov(values.double().numpy(), rowvar=False, ddof=1), rtol=1e-12)


def test_sums_keep_their_digits_far_from_the_origin():
    values = draw(5000, 6, 7, scale=0.1, shift=1000.0)
    _, covariance = moments(values)
    exact = np.cov(values.double().numpy(), rowvar=False)
    assert np.allclose(covariance, exact, rtol=1e-10, atol=1e-14)
    # The same from float32 sums: a variance of 0.01 is lost in squares of a million.
    mean = values.mean(dim=0)
    careless = (values.T @ values - len(values) * torch.outer(mean, mean)) / (len(values) - 1)
    assert not np.allclose(careless.diagonal(), exact.diagonal(), rtol=0.5)


def test_float32_sums_would_move_the_distance():
    ours, theirs = draw(3000, 8, 8, shift=300.0), draw(3000, 8, 9, shift=300.0)
    exact = [
        (torch.from_numpy(x.double().numpy().mean(0)), torch.from_numpy(np.cov(x.double().T))) for x in (ours, theirs)
    ]
    expected = frechet_distance(*exact[0], *exact[1])
    assert frechet_distance(*moments(ours), *moments(theirs)) == pytest.approx(expected, rel=1e-8)


def test_neither_blocks_nor_order_matter():
    values = mixed(2500, 9, 10)
    mean, covariance = moments(values)
    shuffled = values[torch.randperm(2500, generator=torch.Generator().manual_seed(0))]
    for other in (moments(values, block=7), moments(values, block=10_000), moments(shuffled)):
        assert torch.allclose(other[0], mean, rtol=1e-12, atol=1e-12)
        assert torch.allclose(other[1], covariance, rtol=1e-12, atol=1e-10)


def test_shards_merge_to_the_whole():
    values = mixed(2500, 9, 11)
    mean, covariance = moments(values)
    # Put together again in order, however they were cut, they are the same bits.
    for size in (50, 999):
        again = moments(torch.cat([part.clone() for part in values.split(size)]))
        assert torch.equal(again[0], mean) and torch.equal(again[1], covariance)
    # And the moments of the parts add up by the law of total covariance.
    parts = [(len(part), *moments(part)) for part in values.split(600)]
    centre = sum(n * m for n, m, _ in parts) / 2500
    total = sum((n - 1) * c + n * torch.outer(m - centre, m - centre) for n, m, c in parts) / 2499
    assert torch.allclose(centre, mean, atol=1e-9) and torch.allclose(total, covariance, atol=1e-9)


@pytest.mark.parametrize(("n", "m", "dim"), [(400, 300, 16), (40, 300, 64)])
def test_agrees_with_torch_fidelity_and_torchmetrics(n, m, dim):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    ours, theirs = mixed(n, dim, 12), mixed(m, dim, 13, 1.3, 0.2)
    value = frechet_distance(*moments(ours), *moments(theirs))
    stats = [fid_features_to_statistics(part) for part in (ours, theirs)]
    library = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    # torch-fidelity keeps the mean in float32.
    assert value == pytest.approx(float(library), rel=1e-6)

    class Identity(torch.nn.Module):
        num_features = dim

        def forward(self, x):
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
        metric.update(theirs.double(), real=True)
        metric.update(ours.double(), real=False)
        assert value == pytest.approx(float(metric.compute()), rel=1e-6)


def test_refuses_what_would_poison_the_moments():
    with pytest.raises(RunError, match="not finite"):
        moments(torch.tensor([[0.0, float("nan")], [1.0, 1.0]]))
    with pytest.raises(RunError, match="not finite"):
        moments(torch.tensor([[0.0, float("inf")], [1.0, float("-inf")]]))
    with pytest.raises(UsageError, match="at least 2 samples, got 1"):
        moments(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        moments(torch.zeros(3))


def test_spread_is_a_standard_deviation_where_there_is_one():
    values = draw(500, 3, 14) * torch.tensor([0.01, 1.0, 50.0])
    values[:, 1] = 1 / 3
    found = spread(*moments(values))
    assert torch.allclose(found[[0, 2]], values.double().std(dim=0)[[0, 2]])
    assert found[1] == 1
    # What float32 leaves of a constant is not a scale either.
    values[:, 1] += 1e-7 * draw(500, 1, 15)[:, 0]
    assert spread(*moments(values))[1] == 1


def test_metric_is_the_distance_of_the_moments():
    metric = FrechetMetric("fd@flat", [Named()], "fd_flat")
    samples, theirs = mixed(60, 4, 16, 0.7, 0.3), mixed(90, 4, 17)
    expected = frechet_distance(*moments(samples), *moments(theirs))
    found = metric.compute([samples], [reference_of(theirs)])
    assert list(found) == ["fd_flat"] and found["fd_flat"] == pytest.approx(expected, rel=1e-12)
    # A second row against the same reference, and another reference after it.
    reference = reference_of(theirs)
    assert [metric.compute([samples], [reference]) for _ in range(2)] == [found, found]
    assert metric.compute([samples], [reference_of(samples)])["fd_flat"] == pytest.approx(0, abs=1e-6)


def test_all_images_of_the_reference_count_and_published_moments_suffice():
    metric = FrechetMetric("fd@flat", [Named()], "fd_flat")
    samples, theirs = mixed(60, 4, 18), mixed(90, 4, 19)
    whole = metric.compute([samples], [reference_of(theirs)])
    assert metric.compute([samples], [reference_of(theirs, keep=7)]) == whole
    published = Statistics(*moments(theirs), 0, None, {"source": "x.npz"})
    assert metric.refusal([published]) is None
    assert metric.compute([samples], [published]) == whole


def randoms(dim=4):
    return [Named(f"random_flat_{dim}[s{seed}]", dim) for seed in range(3)]


def test_standardising_the_moments_equals_standardising_the_features():
    metric = FrechetMetric("fd@random", randoms(), "fd_random")
    samples, theirs = mixed(60, 4, 20, 2.0, 0.3), mixed(90, 4, 21)
    scale = theirs.double().std(dim=0)
    expected = frechet_distance(*moments(samples / scale), *moments(theirs / scale))
    found = metric.compute([samples] * 3, [reference_of(theirs)] * 3)
    assert found["fd_random"] == pytest.approx(expected, rel=1e-9)


def test_standardised_values_do_not_depend_on_the_scale_of_a_network():
    metric = FrechetMetric("fd@random", randoms(), "fd_random")
    samples, theirs = mixed(60, 4, 22, 2.0, 0.3), mixed(90, 4, 23)
    once = metric.compute([samples] * 3, [reference_of(theirs)] * 3)["fd_random"]
    scales = (1.0, 3.0, torch.tensor([0.2, 1.0, 7.0, 100.0]))
    scaled = metric.compute([samples * s for s in scales], [reference_of(theirs * s) for s in scales])["fd_random"]
    assert scaled == pytest.approx(once, rel=1e-5)
    # A trained network's scale means something and stays.
    plain = FrechetMetric("fd@flat", [Named()], "fd_flat")
    tripled = plain.compute([3 * samples], [reference_of(3 * theirs)])["fd_flat"]
    assert tripled == pytest.approx(9 * plain.compute([samples], [reference_of(theirs)])["fd_flat"], rel=1e-5)


def test_the_value_is_the_mean_over_networks():
    metric = FrechetMetric("fd@random", randoms(), "fd_random")
    pairs = [(mixed(60, 4, seed, 1.5, 0.1 * seed), reference_of(mixed(90, 4, 50 + seed))) for seed in range(3)]
    alone = [metric.compute([ours] * 3, [theirs] * 3)["fd_random"] for ours, theirs in pairs]
    together = metric.compute([ours for ours, _ in pairs], [theirs for _, theirs in pairs])["fd_random"]
    assert together == pytest.approx(sum(alone) / 3, rel=1e-12) and max(alone) > 1.1 * min(alone)


def test_constant_features_do_not_divide_by_zero():
    metric = FrechetMetric("fd@random", randoms(), "fd_random")
    samples, theirs = draw(50, 4, 24), draw(50, 4, 25)
    samples[:, 0] = theirs[:, 0] = 7
    found = metric.compute([samples] * 3, [reference_of(theirs)] * 3)["fd_random"]
    assert 0 < found < 10


def test_notes_about_few_samples():
    fid = FrechetMetric("fid", [Named("inception_2015_12_05", 2048)], "fid", usual=50_000)
    assert "singular" in fid.note(2048)
    assert "biased upwards" in fid.note(49_999) and "n=50000" in fid.note(49_999)
    assert fid.note(50_000) is None
    other = FrechetMetric("fd@flat", [Named("flat", 64)], "fd_flat")
    assert "64 samples in 64 dimensions (singular covariance)" in other.note(64)
    assert "biased upwards" in other.note(500) and "published" not in other.note(500)
    assert other.note(10_000) is None
    # The width is that of the tap, not of the network's main features.
    sfid = FrechetMetric("sfid", [Named("inception_2015_12_05", 2048, spatial=2023)], "sfid", tap="spatial")
    assert "2023 dimensions" in sfid.note(100)


def test_protocol_says_what_changes_the_number():
    metric = FrechetMetric("fd@random", randoms(), "fd_random_flat_4[s0-s2]")
    reference = Statistics.of(draw(90, 4, 0), provenance=ABOUT)
    assert metric.protocol(500, [reference] * 3) == (
        "fd_random_flat_4[s0-s2][protocol of random_flat_4[s0]|mean over 3 seeds|standardised by the reference|d=4"
        "|u8-round|n=500|ref=noise-train-90[digest 1234abcd]]"
    )
