"""Calibration, variance within times and rank correlation, from arrays."""

from __future__ import annotations

import numpy as np
import pytest

from gearshift.evaluation.calibration_numbers import curve, spearman, within_share

from .scripted_heads import exits_of


def test_right_on_average_is_calibrated() -> None:
    """Errors spread evenly around each prediction: ECE 0, though no prediction is right."""
    predicted = np.repeat([[0.1], [0.2], [0.4]], 30, axis=1)
    error = predicted + np.tile([-0.05, 0.05], 15)
    found = exits_of(predicted, error)
    assert found["ece"] == pytest.approx(0, abs=1e-12) and found["ece_by_time"] == pytest.approx(0, abs=1e-12)
    off = exits_of(predicted + 0.03, error)
    assert off["ece"] == pytest.approx(0.03) and off["bias"] == pytest.approx(0.03)
    assert off["ece_by_time"] == pytest.approx(0.03)


def test_one_answer_for_all_times_is_seen_by_time_only() -> None:
    generator = np.random.default_rng(0)
    error = np.array([[0.1], [0.3]]) + np.zeros((2, 500))
    predicted = 0.2 + 1e-3 * generator.standard_normal((2, 500))
    found = exits_of(predicted, error)
    assert found["ece"] < 0.03 and found["ece_by_time"] == pytest.approx(0.1, abs=1e-3)


def test_bins_hold_equally_many_and_order_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    u = np.round(generator.uniform(0, 1, 301), 1)  # with many ties
    error = generator.uniform(0, 1, 301)
    points, ece = curve(u, error, bins=10)
    order = generator.permutation(301)
    again, same = curve(u[order], error[order], bins=10)
    np.testing.assert_allclose(points, again, rtol=1e-12)
    assert ece == pytest.approx(same, rel=1e-12)
    assert points.shape == (2, 10) and (np.diff(points[0]) >= 0).all()
    assert ece >= abs(u.mean() - error.mean()) - 1e-12, "no less than what is wrong on average"
    few, _ = curve(np.array([0.1, 0.3]), np.array([0.2, 0.2]))
    assert few.tolist() == [[0.1, 0.3], [0.2, 0.2]]


def test_variance_within_and_between_times_add_up() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((6, 40)) * 0.5 + generator.standard_normal((6, 1))
    share = within_share(values)
    assert share is not None and share * values.var() == pytest.approx(values.var(1).mean())
    assert within_share(np.full((3, 7), 0.1)) is None
    assert within_share(np.arange(4.0)[None]) == 1.0
    assert within_share(np.repeat(np.arange(3.0), 4).reshape(3, 4)) == 0.0


def test_rank_correlation_is_spearmans() -> None:
    scipy = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    one = np.round(generator.uniform(0, 1, 60), 1)
    other = one + generator.standard_normal(60)
    assert spearman(one, other) == pytest.approx(scipy.spearmanr(one, other).statistic)
    assert spearman(one, one**3) == pytest.approx(1) and spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, np.zeros(60)) is None


def test_times_without_a_correlation_do_not_count() -> None:
    found = exits_of([[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]], [[0.2, 0.3, 0.4], [0.1, 0.2, 0.3]])
    assert found["rank_correlation"] == pytest.approx(1) and found["by_time"]["rank_correlation"][1] is None
