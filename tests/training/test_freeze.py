"""Frozen parts: no gradient, the same bits after any number of steps, in averages and checkpoints, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.objectives.base import Batch, Draws
from gearshift.objectives.scheduled import Scheduled, ScheduledConfig
from gearshift.policies import ExitSchedule
from gearshift.runtime.errors import UsageError
from gearshift.training.optim import freeze, make_optimizer

TIME = ("t_embedder.*",)


class Ours(Scheduled):
    """ASE's objective; it remembers the gradients that the last step left, and what every step gave the weights."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__(ScheduledConfig(schedule=ExitSchedule(depths=[4, 3, 2, 1]), label_dropout=0.2))
        self.history: list[dict[str, Tensor]] = []
        self.grads: set[str] = set()
        self.stop = stop

    def loss(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        self.grads |= {name for name, p in denoiser.network.named_parameters() if p.grad is not None}
        if batch.micro_batch == self.stop:
            raise KeyboardInterrupt
        if batch.micro_batch % 2 == 0:
            self.history.append({name: p.detach().clone() for name, p in denoiser.network.named_parameters()})
        return super().loss(denoiser, batch, draws)


def saved(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    found["gearshift"].pop("seconds")
    return found


def trained(toy: ModuleType, folder: Path, **changes: Any) -> Ours:
    """Ten steps of two micro-batches, the time embedder frozen."""
    objective = Ours()
    config = toy.toy_config(**({"freeze": TIME, "lr_schedule": "constant", "ema_warmup": False} | changes))
    toy.toy_train(folder, config, denoiser=toy.toy_dit(), objective=objective)
    return objective


def test_frozen_parts_stay_the_same_bits_and_get_no_gradient(toy: ModuleType, tmp_path: Path) -> None:
    objective = trained(toy, tmp_path / "run", weight_decay=0.1)
    found = saved(tmp_path / "run")
    frozen, learned = 0, 0
    for name, before in toy.toy_dit().network.state_dict().items():
        after, average = found["state_dict"][f"denoiser.network.{name}"], found["gearshift"]["ema"]["weights"][name]
        if name.startswith("t_embedder.") or name == "pos_embed":
            assert torch.equal(after, before) and torch.equal(average, before)
            assert name not in objective.grads
            frozen += 1
        else:
            assert not torch.equal(after, before) and not torch.equal(average, before)
            assert name in objective.grads
            learned += 1
    assert frozen == 5 and learned > 30


def test_without_the_pattern_they_learn(toy: ModuleType, tmp_path: Path) -> None:
    objective = trained(toy, tmp_path / "run", freeze=())
    after = saved(tmp_path / "run")["state_dict"]["denoiser.network.t_embedder.mlp.0.weight"]
    assert not torch.equal(after, toy.toy_dit().network.t_embedder.mlp[0].weight)
    assert "t_embedder.mlp.0.weight" in objective.grads


def test_the_average_is_the_closed_form_over_the_steps(toy: ModuleType, tmp_path: Path) -> None:
    """d^k w_0 + (1 - d) sum_j d^(k-j) w_j after k steps, which is what is sampled."""
    objective = trained(toy, tmp_path / "run", ema_decay=0.8)
    found = saved(tmp_path / "run")
    final = {name: found["state_dict"][f"denoiser.network.{name}"] for name in objective.history[0]}
    weights = [*objective.history, final]  # w_0 .. w_10
    assert len(weights) == 11 and found["gearshift"]["ema"]["updates"] == 10
    for name, average in found["gearshift"]["ema"]["weights"].items():
        wanted = 0.8**10 * weights[0][name].double()
        for step in range(1, 11):
            wanted = wanted + 0.2 * 0.8 ** (10 - step) * weights[step][name].double()
        torch.testing.assert_close(average.double(), wanted, rtol=1e-5, atol=1e-7)


def test_a_run_goes_on_bit_for_bit(toy: ModuleType, tmp_path: Path, assert_equal: Callable[[Any, Any], None]) -> None:
    config = toy.toy_config(freeze=TIME, checkpoint_every_steps=3)
    toy.toy_train(tmp_path / "whole", config, denoiser=toy.toy_dit(), objective=Ours())
    with pytest.raises(BaseException):  # noqa: B017, PT011  # as Lightning passes an interrupt on
        toy.toy_train(tmp_path / "parts", config, denoiser=toy.toy_dit(), objective=Ours(stop=14))
    assert saved(tmp_path / "parts")["global_step"] == 6
    toy.toy_train(tmp_path / "parts", config, denoiser=toy.toy_dit(), objective=Ours())
    assert_equal(saved(tmp_path / "parts"), saved(tmp_path / "whole"))


# Patterns ------------------------------------------------------------------------------------------------------------


def test_patterns_say_which(toy: ModuleType) -> None:
    network = toy.toy_dit().network
    freeze(network, ["blocks.[01].attn.*", "*embedding_table*"])
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad} - {"pos_embed"}
    parts = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    assert frozen == {f"blocks.{i}.attn.{part}" for i in (0, 1) for part in parts} | {
        "y_embedder.embedding_table.weight"
    }
    held = {
        id(p) for group in make_optimizer(toy.toy_config(), network.parameters()).param_groups for p in group["params"]
    }
    assert held == {id(p) for p in network.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("t_embeder.*", r"no parameter is named 't_embeder.\*'; did you mean t_embedder.\*"),
        ("mlp.0.weight", r"no parameter is named 'mlp.0.weight'; did you mean .*t_embedder.mlp"),
        ("t_embedder", r"no parameter is named 't_embedder'; did you mean t_embedder.\*"),
        ("zzz", "no parameter is named 'zzz'; parts of the network are pos_embed, x_embedder, t_embedder"),
        ("*", "leaves nothing that learns"),
    ],
)
def test_patterns_that_match_nothing_or_everything(toy: ModuleType, pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        freeze(toy.toy_dit().network, [pattern])


def test_under_exit_heads_the_name_has_a_prefix(toy: ModuleType) -> None:
    from gearshift.backbones.exits import EarlyExit, ExitsConfig

    network = EarlyExit(ExitsConfig(), toy.toy_dit().network)
    with pytest.raises(UsageError, match=r"did you mean backbone.t_embedder.\*"):
        freeze(network, ["t_embedder.*"])


def test_a_training_refuses_before_it_starts(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trainer.freeze: no parameter is named 'time.\*'"):
        toy.toy_train(tmp_path / "run", toy.toy_config(freeze=("time.*",)))
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
