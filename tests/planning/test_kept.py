"""Decisions that were tried are not tried again, whether the search was stopped or is asked for another budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gearshift.planning.kept import KeptResponses
from gearshift.planning.problem import Problem
from gearshift.planning.responses import measure_responses, tried

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
