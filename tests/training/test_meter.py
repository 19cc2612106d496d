"""Loss terms between two logged lines."""

from __future__ import annotations

import math

import pytest
import torch

from gearshift.training.meter import Meter


def filled(*values: tuple[float, float], start: int = 8) -> Meter:
    meter = Meter(5)
    for number, (loss, part) in enumerate(values, start):
        meter.add(number, {"loss": torch.tensor(loss, requires_grad=True), "part": torch.tensor(part)})
    return meter


def test_the_mean_and_a_fresh_start() -> None:
    meter = filled((1.0, 10.0), (2.0, 20.0), (6.0, 30.0))
    assert meter.take() == {"loss": 3.0, "part": 20.0}
    assert meter.take() == {}
    meter.add(11, {"loss": torch.tensor(5.0), "part": torch.tensor(7.0)})
    assert meter.take() == {"loss": 5.0, "part": 7.0}


def test_the_first_row_that_is_not_finite_is_named() -> None:
    assert filled((1.0, 2.0)).not_finite() is None
    found = filled((1.0, 2.0), (3.0, math.inf), (math.nan, math.nan)).not_finite()
    assert found == (9, {"loss": 3.0, "part": math.inf})


@pytest.mark.parametrize(("values", "bad"), [([(1.0, 2.0)], False), ([(1.0, 2.0), (math.nan, 0.0)], True)])
def test_the_newest_row(values: list[tuple[float, float]], bad: bool) -> None:
    assert filled(*values).last_not_finite() is bad


def test_going_on_in_the_middle_of_a_line() -> None:
    whole = filled((1.0, 2.0), (3.0, 4.0), (8.0, 9.0))
    part = filled((1.0, 2.0), (3.0, 4.0))
    other = Meter(5)
    other.load(**part.state(), device=torch.device("cpu"))  # type: ignore[arg-type]
    other.add(10, {"loss": torch.tensor(8.0), "part": torch.tensor(9.0)})
    assert other.first == 8 and other.take() == whole.take()


def test_what_is_saved_does_not_change_afterwards() -> None:
    meter = filled((1.0, 2.0))
    rows = meter.state()["rows"]
    meter.take()
    meter.add(9, {"loss": torch.tensor(5.0), "part": torch.tensor(7.0)})
    assert isinstance(rows, torch.Tensor) and rows.tolist() == [[1.0, 2.0]]
