import warnings

import pytest
import torch

from gearshift.evaluation import kernel
from gearshift.evaluation.kernel import KernelMetric, kernel_distance
from gearshift.runtime.errors import UsageError

from .fakes import Named, draw, mixed, reference_of


def pair(n, m, dim, seed=0, shift=0.0):
    return draw(n, dim, seed).double(), draw(m, dim, 100 + seed, shift=shift).double()


def test_is_the_unbiased_estimate_over_all_pairs():
    x, y = pair(9, 6, 4, shift=0.5)

    def k(a, b):
        return float((a @ b / 4 + 1) ** 3)

    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (9 * 8)
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (6 * 5)
    across = sum(k(a, b) for a in x for b in y) / (9 * 6)
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-10)


def test_agrees_with_torch_fidelity_and_torchmetrics():
    """Over all samples, because both draw their subsets from generators of their own."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = mixed(300, 16, 0, 0.3).double(), mixed(300, 16, 1, 0.3, 0.2).double()
    value = kernel_distance(x, y)
    library = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=300, verbose=False)
    assert value == pytest.approx(library["kernel_inception_distance_mean"], rel=1e-9)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=300)
        metric.update(x, real=False)
        metric.update(y, real=True)
        assert value == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_expectation_is_zero_between_equal_distributions_whatever_the_number():
    """A biased estimate, with the diagonal counted, would read about 0.3 at this number."""
    values = torch.tensor([kernel_distance(*pair(50, 40, 8, seed)) for seed in range(60)])
    error = float(values.std()) / 60**0.5
    assert abs(float(values.mean())) < 4 * error and error < 0.02
    assert float(values.min()) < 0


def test_subsets_estimate_the_same_quantity():
    x, y = pair(900, 700, 8, shift=0.5)
    whole = kernel_distance(x, y)
    assert kernel_distance(x, y, subsets=50, size=200) == pytest.approx(whole, rel=0.05)
    # Drawn without replacement: repeats within a subset would add about 0.05 at this size.
    x, y = pair(900, 900, 8, seed=1)
    assert kernel_distance(x, y, subsets=20, size=850) == pytest.approx(kernel_distance(x, y), abs=2e-3)


def test_few_on_either_side_are_used_whole():
    x, y = pair(30, 80, 4, shift=0.3)
    assert kernel_distance(x, y, size=30) == kernel_distance(x, y, size=1000)
    assert kernel_distance(x, y, size=30, seed=1) == kernel_distance(x, y, size=30, seed=2)
    assert kernel_distance(x, y, size=29) != kernel_distance(x, y, size=30)


def test_subsets_are_keyed_and_leave_global_generators_alone():
    x, y = pair(120, 150, 4)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = kernel_distance(x, y, subsets=5, size=50)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert kernel_distance(x, y, subsets=5, size=50) == first
    assert kernel_distance(x, y, subsets=5, size=50, seed=1) != first


def test_subsets_of_samples_and_reference_are_drawn_apart():
    """Paired subsets of paired sets share all their points, which would double the negative value of a set against
    itself."""
    x, _ = pair(120, 2, 4)
    whole = kernel_distance(x, x)
    assert whole < -0.05
    assert kernel_distance(x, x, subsets=400, size=60) == pytest.approx(whole, rel=0.2)


def test_neither_tiles_nor_order_matter(monkeypatch):
    x, y = pair(70, 50, 4, shift=0.4)
    value = kernel_distance(x, y)
    assert kernel_distance(x.flip(0), y.roll(7, 0)) == pytest.approx(value, rel=1e-10)
    monkeypatch.setattr(kernel, "_TILE", (8, 11))
    assert kernel_distance(x, y) == pytest.approx(value, rel=1e-10)


def test_refuses_single_samples():
    with pytest.raises(UsageError, match="at least 2 samples on both sides, got 1 and 5"):
        kernel_distance(*pair(1, 5, 3))


def raw_random_features(n, seed):
    """As random networks give them: the mean of a feature is three times its spread, and scales differ."""
    scale = 1 + draw(1, 64, 9).abs()
    return (draw(n, 64, seed) + 3 * draw(1, 64, 8).sign()) * scale


def test_random_features_are_standardised_because_raw_ones_explode():
    theirs, ours = raw_random_features(300, 0), raw_random_features(300, 1)
    shifted = ours + 0.5 * ours.std(dim=0)
    random = KernelMetric("kd@random", [Named(f"random_flat_64[s{seed}]", 64) for seed in range(3)], "kd_random")
    plain = KernelMetric("kd@flat", [Named("flat", 64)], "kd_flat")
    reference = reference_of(theirs)
    scaled = [random.compute([x] * 3, [reference] * 3)["kd_random"] for x in (ours, shifted)]
    raw = plain.compute([ours], [reference])["kd_flat"]
    assert abs(scaled[0]) < 0.01 and scaled[1] > 10 * abs(scaled[0])
    # Equal distributions, and noise of whole units.
    assert abs(raw) > 100 * abs(scaled[0])
    # By the moments of all images of the reference, not of the kept ones, and by deviations, not variances.
    mean, deviation = theirs.double().mean(dim=0), theirs.double().std(dim=0)
    expected = kernel_distance(*((x.double() - mean) / deviation for x in (shifted, theirs)))
    assert scaled[1] == pytest.approx(expected, rel=1e-9)
    few = reference_of(theirs, keep=100)
    expected = kernel_distance(*((x.double() - mean) / deviation for x in (shifted, few.features)))
    assert random.compute([shifted] * 3, [few] * 3)["kd_random"] == pytest.approx(expected, rel=1e-9)


def test_products_are_taken_in_float64():
    """Far from the origin float32 keeps nothing of the differences that the estimate is made of."""
    x, y = draw(200, 16, 0, shift=100.0), draw(200, 16, 1, shift=100.0)
    metric = KernelMetric("kd@flat", [Named("flat", 16)], "kd_flat")
    from torch_fidelity.metric_kid import kid_features_to_metric

    exact = kid_features_to_metric(x.double(), y.double(), kid_subsets=1, kid_subset_size=200, verbose=False)
    careless = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=200, verbose=False)
    key = "kernel_inception_distance_mean"
    assert metric.compute([x], [reference_of(y)])["kd_flat"] == pytest.approx(exact[key], rel=1e-5)
    assert careless[key] != pytest.approx(exact[key], rel=1e-3)


def test_published_moments_are_refused():
    from gearshift.evaluation.moments import moments
    from gearshift.evaluation.reference import Statistics

    metric = KernelMetric("kid", [Named("flat", 4)], "kid")
    published = Statistics(*moments(draw(20, 4, 0)), 0, None, {"source": "x.npz (ADM layout)"})
    said = metric.refusal([published])
    assert "kid compares features one by one" in said and "published: x.npz (ADM layout)" in said
    assert "gearshift reference" in said
    assert metric.refusal([reference_of(draw(20, 4, 0))]) is None


def test_protocol_says_how_it_was_estimated():
    metric = KernelMetric("kd@flat", [Named("flat", 4)], "kd_flat")
    large, small = reference_of(draw(1200, 4, 0)), reference_of(draw(900, 4, 0))
    assert metric.protocol(5000, [large]) == (
        "kd_flat[protocol of flat|unbiased mmd^2, (x.y/d+1)^3, 100 subsets of 1000, seed 0|d=4|u8-round|n=5000"
        "|ref=noise-train-1200[digest 1234abcd], 1200 kept]"
    )
    for count, reference in ((1000, large), (5000, small)):
        assert "all of both sets" in metric.protocol(count, [reference])
