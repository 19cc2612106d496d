"""Decisions that were tried are not tried again, whether the search was stopped or is asked for another budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gearshift.planning.kept import KeptMeasures, KeptResponses
from gearshift.planning.problem import Problem
from gearshift.planning.responses import measure_responses, tried
from gearshift.policies import Policy, UncertaintyExit

from .conftest import problem


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p, menu = problem(space=("steps", "depth"))
    whole = measure_responses(p, menu, 2)
    file, plain = tmp_path / "decisions.npz", Problem.deviating
    asked: list[int] = []

    def stopping(self: Problem, position: int, choices: object) -> object:
        asked.append(position)
        if len(asked) == 8:
            raise KeyboardInterrupt
        return plain(self, position, choices)  # type: ignore[arg-type]

    monkeypatch.setattr(Problem, "deviating", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_responses(p, menu, 2, kept=KeptResponses(file))
    told: list[int] = []
    again = measure_responses(p, menu, 2, told.append, KeptResponses(file))
    total = len(tried(p, menu, 2))
    assert len(asked) == 8 + total - 7 and told[0] == 7 and told[-1] == total
    np.testing.assert_allclose(again.gram, whole.gram, rtol=1e-5, atol=1e-12)  # kept in float32
    # Done: the next one tries nothing.
    third = measure_responses(p, menu, 2, kept=KeptResponses(file))
    assert len(asked) == 8 + total - 7 and np.array_equal(third.gram, again.gram)
    assert third.number == again.number == whole.number


def test_a_file_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    file = tmp_path / "decisions.npz"
    assert KeptResponses(file).errors == []
    file.write_bytes(b"half a file")
    kept = KeptResponses(file)
    assert kept.errors == [] and kept.gram is None


def test_policies_are_measured_once(tmp_path: Path) -> None:
    asked: list[Policy] = []

    def measure(policy: Policy) -> tuple[float, float]:
        asked.append(policy)
        if policy == UncertaintyExit(0.3):
            raise KeyboardInterrupt
        assert isinstance(policy, UncertaintyExit) and policy.threshold is not None
        return policy.threshold / 3, 1 / 7

    file = tmp_path / "thresholds.json"
    first = KeptMeasures(file, measure)
    assert first(UncertaintyExit(0.1)) == first(UncertaintyExit(0.1)) == (0.1 / 3, 1 / 7)
    with pytest.raises(KeyboardInterrupt):
        first(UncertaintyExit(0.3))
    again = KeptMeasures(file, measure)
    assert again(UncertaintyExit(0.1)) == (0.1 / 3, 1 / 7) and again(UncertaintyExit(0.2)) == (0.2 / 3, 1 / 7)
    assert asked == [UncertaintyExit(0.1), UncertaintyExit(0.3), UncertaintyExit(0.2)]
    for broken in ("", "[1, 2", "3"):
        file.write_text(broken)
        assert KeptMeasures(file, measure)(UncertaintyExit(0.2)) == (0.2 / 3, 1 / 7)


def test_what_cannot_say_what_it_is_is_not_kept(tmp_path: Path) -> None:
    class Nameless(Policy):
        pass

    asked: list[Policy] = []

    def measure(policy: Policy) -> tuple[float, float]:
        asked.append(policy)
        return float(len(asked)), 0.0

    kept = KeptMeasures(tmp_path / "thresholds.json", measure)
    assert [kept(Nameless())[0] for _ in range(3)] == [1.0, 2.0, 3.0] and not kept.path.exists()
