import math

import pytest
import torch

from gearshift.evaluation import manifold
from gearshift.evaluation.manifold import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    precision_recall,
    radii,
)
from gearshift.evaluation.moments import moments
from gearshift.evaluation.reference import Statistics
from gearshift.runtime.errors import UsageError

from .fakes import Named, draw, mixed, reference_of


def line(*positions):
    return torch.tensor(positions, dtype=torch.float64)[:, None]


def pair(n, m, dim, seed=0, shift=0.0, scale=1.0):
    return draw(n, dim, seed, scale, shift).double(), draw(m, dim, 100 + seed).double()


def expected_coverage(n, m, k):
    """Of n samples and m reference points of one distribution (2002.09797, Lemma 2)."""
    return 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))


def test_radii_reach_to_the_kth_other_point():
    points = line(0.0, 1.0, 3.0, 7.0, 15.0)
    # Squared. A point is not its own neighbour.
    assert radii(points, 1).tolist() == [1, 1, 4, 16, 64]
    assert radii(points, 3).tolist() == [49, 36, 16, 49, 196]
    with pytest.raises(UsageError, match="5 points have no 5-th"):
        radii(points, 5)


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    modes = [draw(60, 4, 0).double(), draw(60, 4, 1).double() + 50]
    reference = torch.cat(modes)
    # One mode of two, and every sample real.
    assert precision_recall(modes[0], reference) == (1.0, 0.5)
    # Every mode, and half of the samples elsewhere.
    strangers = draw(60, 4, 2).double() - 50
    assert precision_recall(torch.cat([modes[0], strangers]), modes[0]) == (0.5, 1.0)
    assert density_coverage(modes[0], reference)[1] == pytest.approx(0.5)
    assert density_coverage(torch.cat([modes[0], strangers]), modes[0])[1] == pytest.approx(1.0)


def test_a_sample_on_the_edge_of_a_ball():
    """Precision takes <= and density <, as their authors do."""
    reference, edge = line(0.0, 1.0, 2.0, 3.0), line(4.0, -1.0)
    assert precision_recall(edge, reference, k=1)[0] == 1.0
    assert precision_recall(reference, edge, k=1)[1] == 1.0
    assert density_coverage(edge, reference, k=1) == (0.0, 0.0)
    assert density_coverage(line(3.5, -0.5), reference, k=1) == (1.0, 0.5)


@pytest.mark.parametrize(("n", "m", "dim"), [(200, 150, 12), (90, 300, 3)])
def test_agrees_with_torch_fidelity(n, m, dim):
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples, reference = mixed(n, dim, 0, 0.9, 0.3), mixed(m, dim, 1)
    for sparing in (True, False):
        library = prc_features_to_metric(samples, reference, verbose=False, save_cpu_ram=sparing)
        ours = precision_recall(samples.double(), reference.double())
        assert ours == pytest.approx((library["precision"], library["recall"]), abs=1e-6)
    assert min(ours) > 0.05 and max(ours) < 0.999


def test_is_the_definition_of_density_and_coverage():
    samples, reference = pair(80, 60, 5, shift=0.4, scale=0.8)
    k = 5
    distance = (reference[:, None] - samples[None]).square().sum(dim=2).sqrt()
    radius = (reference[:, None] - reference[None]).square().sum(dim=2).sqrt().sort(dim=1).values[:, k]
    within = distance < radius[:, None]
    expected = float(within.sum()) / (k * 80), float((distance.amin(dim=1) < radius).double().mean())
    assert density_coverage(samples, reference) == pytest.approx(expected, rel=1e-12)


def test_expectations_for_equal_distributions():
    found = torch.tensor([density_coverage(*pair(300, 400, 4, seed)) for seed in range(12)])
    error = found.std(dim=0) / math.sqrt(len(found))
    expected = 1.0, expected_coverage(300, 400, 5)
    for value, sigma, at in zip(found.mean(dim=0), error, expected, strict=True):
        assert abs(float(value) - at) < 4 * float(sigma) and float(sigma) < 0.02
    # The formula itself, for many samples (2002.09797).
    assert expected_coverage(10**6, 10**6, 5) == pytest.approx(1 - 2**-5, abs=1e-5)


@pytest.mark.slow
def test_published_values_for_gaussians_in_a_thousand_dimensions():
    """clovaai/generative-evaluation-prdc prints .4772, .4705, 1.0555, .9735 for one draw of this."""
    samples, reference = pair(10_000, 10_000, 1000)
    assert precision_recall(samples, reference, k=5) == pytest.approx((0.4772, 0.4705), abs=0.02)
    density, coverage = density_coverage(samples, reference)
    assert density == pytest.approx(1.0555, abs=0.1)
    assert coverage == pytest.approx(0.9735, abs=0.01)
    assert coverage == pytest.approx(expected_coverage(10_000, 10_000, 5), abs=0.01)


def test_repeated_samples_have_no_recall():
    """Copies are each other's nearest neighbours, so the balls of the samples shrink to points."""
    samples, reference = pair(50, 400, 8)
    repeated = samples.repeat(10, 1)
    precision, recall = precision_recall(repeated, reference)
    assert recall == 0.0 and precision == precision_recall(samples, reference)[0] > 0.5
    assert precision_recall(samples, reference)[1] > 0.5
    # Coverage hardly falls below that of the fifty.
    assert density_coverage(repeated, reference)[1] == density_coverage(samples, reference)[1] > 0.2


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_copies_are_at_distance_zero(shift):
    """|x|^2 + |y|^2 - 2 x.y is not zero for equal points in floating arithmetic; the radii have to be."""
    points = draw(30, 33, 0, shift=shift).double()
    repeated = points.repeat(6, 1)[torch.randperm(180, generator=torch.Generator().manual_seed(0))]
    assert not radii(repeated, 5).any()
    # A sample that is a copy lies in a ball of radius 0 (<=), and not strictly within (<).
    assert precision_recall(points, repeated)[0] == 1.0
    assert density_coverage(points, repeated) == (0.0, 0.0)


def test_a_set_against_itself():
    points = draw(100, 6, 0).double()
    assert precision_recall(points, points) == (1.0, 1.0)
    assert density_coverage(points, points) == (1.0, 1.0)


def test_a_radius_equals_the_distance_it_was_taken_from(monkeypatch):
    """Copies in another order lie in other tiles, where products round differently, and k-th neighbours lie exactly on
    the edges of balls: strictly within are k of them, so the density is 1 and not 1.2."""
    points = draw(403, 37, 1, shift=5.0).double()
    copies = points[torch.randperm(403, generator=torch.Generator().manual_seed(1))]
    for tile in ((1024, 8192), (50, 64)):
        monkeypatch.setattr(manifold, "_TILE", tile)
        assert density_coverage(copies, points) == (1.0, 1.0)
        assert precision_recall(copies, points) == (1.0, 1.0)


def test_distances_keep_their_digits_far_from_the_origin():
    samples, reference = pair(150, 150, 6, shift=0.3)
    near = precision_recall(samples, reference), density_coverage(samples, reference)
    far = [x + 1e7 for x in (samples, reference)]
    assert (precision_recall(*far), density_coverage(*far)) == near
    # float32 would not: the spread is lost in squares of 10^14.
    careless = torch.cdist(*(x.float() for x in far), compute_mode="use_mm_for_euclid_dist")
    assert not torch.allclose(careless.double(), torch.cdist(*far), atol=0.5)


def test_neither_tiles_nor_order_matter(monkeypatch):
    samples, reference = pair(150, 110, 6, shift=0.5)
    whole = precision_recall(samples, reference), density_coverage(samples, reference)
    shuffled = samples.flip(0), reference.roll(13, 0)
    assert (precision_recall(*shuffled), density_coverage(*shuffled)) == whole
    # Tiles narrower than k among them.
    monkeypatch.setattr(manifold, "_TILE", (7, 3))
    assert (precision_recall(samples, reference), density_coverage(samples, reference)) == whole
    known = radii(reference, 3), radii(reference, 5)
    assert precision_recall(samples, reference, 3, known[0]) == whole[0]
    assert density_coverage(samples, reference, 5, known[1]) == whole[1]


def test_no_matrix_of_all_pairs_is_made():
    points = torch.arange(2500, dtype=torch.float64)[:, None]
    many = torch.arange(20_000, dtype=torch.float64)[:, None]
    seen = 0
    for _, tiles in manifold._rows(points, many):
        for _, tile in tiles:
            assert tile.numel() <= 1024 * 8192
            seen += tile.numel()
    assert seen == 2500 * 20_000


def randoms(dim):
    return [Named(f"random_flat_{dim}[s{seed}]", dim) for seed in range(3)]


@pytest.mark.parametrize(("make", "plain"), [(PrecisionRecall, precision_recall), (DensityCoverage, density_coverage)])
def test_as_metrics(make, plain):
    metric = make("asked", [Named("vgg16", 6)], "vgg16")
    samples, theirs = draw(80, 6, 0, 0.9), draw(90, 6, 1)
    reference = reference_of(theirs)
    expected = plain(samples.double(), theirs.double())
    for _ in range(2):  # the second time from what was kept of the reference
        found = metric.compute([samples], [reference])
        assert tuple(found.values()) == pytest.approx(expected, rel=1e-12) and tuple(found) == metric.keys
    assert set(metric.better.values()) == {1} and metric.reference == "features"
    # Two kept features of another reference are other radii.
    other = reference_of(draw(90, 6, 2), keep=40)
    expected = plain(samples.double(), other.features.double())
    assert tuple(metric.compute([samples], [other]).values()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("make", [PrecisionRecall, DensityCoverage])
def test_random_features_are_standardised_by_the_reference(make):
    """One feature of chance scale would decide alone who is near whom."""
    scale = torch.tensor([1.0, 0.02, 300.0, 1.0, 1.0, 5.0])
    samples, theirs = draw(80, 6, 0, 0.9), draw(90, 6, 1)
    metric = make("asked", randoms(6), "random_flat_6[s0-s2]")
    found = metric.compute([samples * scale] * 3, [reference_of(theirs * scale)] * 3)
    unit = metric.compute([samples] * 3, [reference_of(theirs)] * 3)
    assert found == pytest.approx(unit, abs=1e-9)
    raw = make("asked", [Named("vgg16", 6)], "vgg16").compute([samples * scale], [reference_of(theirs * scale)])
    assert list(raw.values()) != pytest.approx(list(unit.values()), abs=0.05)


def test_refusals():
    published = Statistics(*moments(draw(20, 4, 0)), 0, None, {"source": "x.npz"})
    few = reference_of(draw(5, 4, 0))
    for metric in (PrecisionRecall("p", [Named()], "flat"), DensityCoverage("d", [Named()], "flat")):
        assert "mean and covariance only" in metric.refusal([published])
        assert metric.refusal([reference_of(draw(20, 4, 0))]) is None
        assert metric.minimum == metric.k + 2
    assert "more than 5 features" in DensityCoverage("d", [Named()], "flat").refusal([few])
    with pytest.raises(UsageError, match="3 points have no 3-th nearest"):
        precision_recall(draw(3, 4, 0).double(), draw(9, 4, 1).double())
    with pytest.raises(UsageError, match="no images"):
        density_coverage(draw(0, 4, 0).double(), draw(9, 4, 1).double())


def test_protocols_tell_the_two_apart():
    reference = reference_of(draw(90, 6, 1), keep=50)
    assert PrecisionRecall("p", [Named("vgg16", 6)], "vgg16").protocol(80, [reference]) == (
        "precision_vgg16,recall_vgg16[protocol of vgg16|k=3, distance <= radius|d=6|u8-round|n=80"
        "|ref=noise-train-90[digest 1234abcd], 50 kept]"
    )
    assert "k=5, distance < radius" in DensityCoverage("d", [Named("vgg16", 6)], "vgg16").protocol(80, [reference])
