"""Thresholds by noise level: the choice against all combinations, and what is handed back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gearshift.planning.threshold import Tuned
from gearshift.planning.threshold_bins import FACTORS, cheapest, check_binned, runs_of, tune_bins
from gearshift.policies import AdaptiveSkip, FixedDepth, Policy, UncertaintyExit
from gearshift.runtime.errors import UsageError


def test_the_choice_is_the_best_of_all_combinations() -> None:
    """Savings are rounded down to a thousandth of what is wanted: within that, nothing is better."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        savings, losses = generator.random((4, 5)) * 0.3, generator.random((4, 5))
        savings[:, 0] = losses[:, 0] = 0.0
        found = cheapest(savings, losses, 0.4)
        ways = [
            (sum(losses[k, c] for k, c in enumerate(way)), way)
            for way in itertools.product(range(5), repeat=4)
            if sum(savings[k, c] for k, c in enumerate(way)) >= 0.4 * 1.004
        ]
        if not ways:
            continue
        assert found is not None
        assert sum(savings[k, c] for k, c in enumerate(found)) >= 0.4 - 1e-9
        assert sum(losses[k, c] for k, c in enumerate(found)) <= min(ways)[0] + 1e-12


def test_nothing_reaches_what_is_wanted() -> None:
    assert cheapest(np.full((3, 2), 0.1), np.ones((3, 2)), 0.5) is None
    assert cheapest(np.zeros((2, 3)), np.zeros((2, 3)), 0.0) == [0, 0]


class Additive:
    """Bins that do not know each other: what a threshold saves and spoils in each."""

    def __init__(self, saves: list[float], spoils: list[float]) -> None:
        self.saves, self.spoils, self.asked = saves, spoils, 0

    def __call__(self, policy: Policy) -> tuple[float, float]:
        assert isinstance(policy, UncertaintyExit)
        self.asked += 1
        thresholds = policy.thresholds or [policy.threshold or 0.0] * len(self.saves)
        cost = 1 - sum(s * min(t, 1.0) for s, t in zip(self.saves, thresholds, strict=True))
        return cost, sum(s * t * t for s, t in zip(self.spoils, thresholds, strict=True))


def test_bins_that_spoil_little_are_opened_first() -> None:
    measure = Additive([0.5, 0.5, 0.5], [10.0, 1.0, 0.1])
    single = Tuned(UncertaintyExit(0.2), 0.2, 0.7)
    best, uniform = tune_bins(UncertaintyExit(0.1), single, measure, 0.7, 3)
    assert uniform.cost == pytest.approx(0.7) and best.cost <= 0.7 and best.loss < uniform.loss
    assert isinstance(best.policy, UncertaintyExit) and best.policy.threshold is None
    data, middle, noise = best.policy.thresholds or []
    assert data <= middle < noise
    assert measure.asked <= runs_of(3) and runs_of(3) == 3 + 3 * len(FACTORS) + 8


def test_one_threshold_stays_where_nothing_beats_it() -> None:
    measure = Additive([0.4, 0.4], [1.0, 1.0])  # alike: the square makes equal thresholds best
    single = Tuned(UncertaintyExit(0.25), 0.25, 0.8)
    best, uniform = tune_bins(UncertaintyExit(0.9), single, measure, 0.8, 2)
    assert best is uniform and best.policy == UncertaintyExit(0.25)


def test_what_misses_the_budget_together_is_scaled() -> None:
    class Stubborn(Additive):
        def __call__(self, policy: Policy) -> tuple[float, float]:
            cost, loss = super().__call__(policy)
            assert isinstance(policy, UncertaintyExit)
            several = sum(t > 0 for t in policy.thresholds or [1]) > 1
            return (cost + 0.05 if several else cost), loss

    measure = Stubborn([0.5, 0.5, 0.5], [10.0, 1.0, 0.1])
    single = Tuned(UncertaintyExit(0.24), 0.24, 0.69)
    best, uniform = tune_bins(UncertaintyExit(0.1), single, measure, 0.7, 3)
    assert best.cost <= 0.7 and best.loss < uniform.loss
    assert isinstance(best.policy, UncertaintyExit) and len(set(best.policy.thresholds or [])) > 1
    assert measure(best.policy) == (best.cost, best.loss)


def test_what_can_have_bins() -> None:
    check_binned(UncertaintyExit(0.1), 4)
    check_binned(UncertaintyExit(0.1, edges=[100.0]), 2)
    for policy, bins, message in (
        (UncertaintyExit(0.1), 1, "bins=1 must be at least 2"),
        (AdaptiveSkip(), 3, "policy AdaptiveSkip has one threshold for all noise levels"),
        (FixedDepth(3), 3, "policy FixedDepth has one threshold"),
        (UncertaintyExit(0.1, domain="log_snr"), 3, "give edges for log_snr"),
        (UncertaintyExit(0.1, edges=[100.0]), 4, r"bins=4 need 3 edges, and policy.edges has 1"),
    ):
        with pytest.raises(UsageError, match=message):
            check_binned(policy, bins)
