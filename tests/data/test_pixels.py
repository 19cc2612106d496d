import pytest
import torch

from gearshift.data.pixels import to_pm1, to_u8

LEVELS = torch.arange(256, dtype=torch.uint8)


def test_ends_and_middle():
    assert to_pm1(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert to_u8(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]


def test_every_level_survives_the_round_trip():
    assert torch.equal(to_u8(to_pm1(LEVELS)), LEVELS)
    assert torch.equal(to_u8(to_pm1(LEVELS).double()), LEVELS)


def test_rounds_to_the_nearest_level_and_clips():
    just_below, just_above = to_pm1(LEVELS) - 0.49 / 127.5, to_pm1(LEVELS) + 0.49 / 127.5
    assert torch.equal(to_u8(just_below), LEVELS)
    assert torch.equal(to_u8(just_above), LEVELS)
    assert to_u8(torch.tensor([-3.0, 3.0, float("inf")])).tolist() == [0, 255, 255]


def test_leaves_its_input_alone():
    x = torch.tensor([0.3, -0.2])
    to_u8(x)
    assert torch.equal(x, torch.tensor([0.3, -0.2]))


def test_refuses_the_wrong_kind_of_numbers():
    with pytest.raises(TypeError, match="uint8"):
        to_pm1(torch.zeros(2))
    with pytest.raises(TypeError, match="int64"):
        to_u8(torch.zeros(2, dtype=torch.int64))
