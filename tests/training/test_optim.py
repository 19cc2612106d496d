"""The rate of the optimiser."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from gearshift.training.config import TrainerConfig
from gearshift.training.optim import learning_rate, make_optimizer


def test_linear_warm_up_from_zero_and_then_constant(toy: ModuleType) -> None:
    config = toy.toy_config(lr=0.4, warmup_steps=4, lr_schedule="constant", max_steps=100)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert learning_rate(config, 99) == 0.4


def test_cosine_is_half_way_in_the_middle_and_zero_at_the_end(toy: ModuleType) -> None:
    config = toy.toy_config(lr=0.4, warmup_steps=20, lr_schedule="cosine", max_steps=100)
    assert learning_rate(config, 20) == pytest.approx(0.4)
    assert learning_rate(config, 60) == pytest.approx(0.2)
    assert learning_rate(config, 100) == pytest.approx(0.0, abs=1e-12)
    rates = [learning_rate(config, step) for step in range(20, 101)]
    assert rates == sorted(rates, reverse=True)


def test_the_ramp_of_edm() -> None:
    """lr min(images / 10 M, 1) at a batch of 512, the images being those before the step: the first rate is zero."""
    config = TrainerConfig(batch_size=512, lr=1e-3, warmup_steps=19531, max_steps=400_000)
    assert learning_rate(config, 0) == 0
    for step in (1, 5000, 19530, 19531, 100_000):
        assert learning_rate(config, step) == pytest.approx(1e-3 * min(step * 512 / 1e7, 1), rel=2e-5)


def test_without_warm_up_the_first_rate_is_the_full_one(toy: ModuleType) -> None:
    assert learning_rate(toy.toy_config(lr=0.4, warmup_steps=0), 0) == 0.4


def test_only_what_learns_is_optimised(toy: ModuleType) -> None:
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    optimizer = make_optimizer(toy.toy_config(weight_decay=0.1), net.parameters())
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [torch.Size([2, 2])]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1 and optimizer.param_groups[0]["betas"] == (0.99, 0.999)
