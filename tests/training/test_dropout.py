"""Dropout that a resumed training repeats."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.training import dropout
from gearshift.training.signals import Stopped

HOST = torch.device("cpu")


class StopAfter(Simple):
    def __init__(self, micro_batch: int) -> None:
        super().__init__(SimpleConfig(label_dropout=0.2))
        self.when = micro_batch

    def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, Tensor]:
        if batch.micro_batch == self.when:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(denoiser, batch, draws)


def saved(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    found["gearshift"].pop("seconds")
    return found


@pytest.mark.parametrize("stop", [7, 12])
def test_resumed_is_uninterrupted_bit_for_bit(
    toy: ModuleType, tmp_path: Path, assert_equal: Callable[[Any, Any], None], stop: int
) -> None:
    """With other numbers drawn in between."""
    config = toy.toy_config()
    toy.toy_train(tmp_path / "whole", config, denoiser=toy.toy_denoiser(dropout=0.3))
    with pytest.raises(Stopped):
        toy.toy_train(tmp_path / "parts", config, denoiser=toy.toy_denoiser(dropout=0.3), objective=StopAfter(stop))
    torch.rand(17)
    toy.toy_train(tmp_path / "parts", config, denoiser=toy.toy_denoiser(dropout=0.3))
    assert_equal(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    toy.toy_train(tmp_path / "plain", config)
    plain, whole = (saved(tmp_path / name)["state_dict"] for name in ("plain", "whole"))
    assert not any(torch.equal(plain[name], whole[name]) for name in plain)  # something was dropped


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_generator_of_the_caller_is_left_as_it_was(toy: ModuleType, tmp_path: Path, share: float) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    toy.toy_train(tmp_path / "run", toy.toy_config(), denoiser=toy.toy_denoiser(dropout=share))
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_differ_between_micro_batches_ranks_and_seeds_and_repeat() -> None:
    layer, ones = nn.Dropout(0.5), torch.ones(4096)

    def mask(*key: int) -> Tensor:
        with dropout.keyed(*key, HOST):  # type: ignore[misc]
            return layer(ones)

    cases = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    masks = [mask(*case) for case in cases]
    for i, (case, one) in enumerate(zip(cases, masks, strict=True)):
        assert torch.equal(mask(*case), one)
        for other in masks[i + 1 :]:
            assert abs(float((one == other).float().mean()) - 0.5) < 4 * 0.5 / 64  # independent


def test_an_error_within_leaves_the_generator_too() -> None:
    def draws_and_fails() -> None:
        with dropout.keyed(0, 1, 0, HOST):
            torch.rand(3)
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        draws_and_fails()
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_that_drop_nothing_cost_nothing() -> None:
    assert not dropout.drops(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.Dropout2d(0.0)))
    assert dropout.drops(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.1))))
    assert dropout.drops(nn.Dropout2d(0.1)) and dropout.drops(nn.AlphaDropout(0.1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_masks_on_a_device_repeat_and_leave_its_generator() -> None:
    device = torch.device("cuda")
    layer, ones = nn.Dropout(0.5), torch.ones(4096, device=device)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    masks = []
    for key in ((0, 1, 0), (0, 2, 0), (0, 1, 0)):
        with dropout.keyed(*key, device):
            masks.append(layer(ones))
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])
