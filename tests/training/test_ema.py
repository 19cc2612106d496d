"""The average of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gearshift.runtime.errors import UsageError
from gearshift.training.config import TrainerConfig
from gearshift.training.ema import Ema, HalfLife


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def move(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_it_begins_as_the_weights() -> None:
    net = network()
    for name, value in Ema(net, 0.9999).average().items():
        assert torch.equal(value, net.state_dict()[name])


def test_one_update_moves_it_by_1e_4_of_the_difference() -> None:
    net = network()
    ema = Ema(net, 0.9999)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    move(net, 1)
    ema.update()
    for name, parameter in net.named_parameters():
        moved = ema.average()[name].double() - before[name].double()
        expected = 1e-4 * (parameter.detach().double() - before[name].double())
        torch.testing.assert_close(moved, expected, rtol=0, atol=2e-7)  # fp32 of values near one


def test_closed_form_over_many_updates() -> None:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.0)
    ema = Ema(net, 0.9)
    with torch.no_grad():
        net.weight.fill_(1.0)
    for _ in range(20):
        ema.update()
    assert ema.average()["weight"].item() == pytest.approx(1 - 0.9**20, rel=1e-5)


def test_warm_up_is_one_plus_n_over_ten_plus_n_up_to_the_decay() -> None:
    net = nn.Linear(1, 1)
    ema, plain = Ema(net, 0.5, warmup=True), Ema(net, 0.5)
    seen = []
    for _ in range(12):
        seen.append(ema.current_decay())
        assert plain.current_decay() == 0.5
        ema.update()
        plain.update()
    assert seen[:3] == [1 / 10, 2 / 11, 3 / 12]
    assert seen[8:] == [0.5] * 4  # (1 + 8) / (10 + 8)
    assert sorted(seen) == seen


def test_swap_shows_the_average_and_saving_within_it_changes_nothing() -> None:
    net = network()
    ema = Ema(net, 0.5)
    move(net, 1)
    ema.update()
    weights = {name: value.clone() for name, value in ema.weights().items()}
    average = {name: value.clone() for name, value in ema.average().items()}
    assert not torch.equal(weights["0.weight"], average["0.weight"])
    with ema.swap():
        for name, value in net.state_dict().items():
            assert torch.equal(value, average[name])
        for name in weights:
            assert torch.equal(ema.weights()[name], weights[name])
            assert torch.equal(ema.average()[name], average[name])
        with pytest.raises(RuntimeError, match="cannot move"):
            ema.update()
        with pytest.raises(RuntimeError, match="already"), ema.swap():
            pass
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name])


def test_swap_puts_the_weights_back_after_an_error_and_the_optimiser_goes_on() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    ema = Ema(net, 0.5)
    before = net.weight.detach().clone()
    with pytest.raises(KeyError), ema.swap():
        raise KeyError
    net.weight.grad = torch.ones_like(net.weight)
    optimizer.step()
    assert torch.equal(net.weight, before - 1)
    assert torch.equal(ema.average()["weight"], before)


def test_tied_frozen_and_buffer_entries() -> None:
    net = network()
    net.append(nn.Linear(4, 4))
    net.append(nn.Linear(4, 4))
    net[3].weight = net[2].weight
    net[0].bias.requires_grad_(False)
    ema = Ema(net, 0.5)
    move(net, 1)
    net[1].running_mean.fill_(3.0)
    ema.update()
    state = ema.average()
    assert state.keys() == net.state_dict().keys()
    assert torch.equal(state["2.weight"], state["3.weight"])
    assert not torch.equal(state["2.weight"], net[2].weight)
    assert torch.equal(state["0.bias"], net[0].bias)
    assert torch.equal(state["1.running_mean"], torch.full((4,), 3.0))


def test_the_shadow_of_half_precision_weights_is_fp32() -> None:
    net = nn.Linear(2, 2).half()
    ema = Ema(net, 0.999)
    with torch.no_grad():
        net.weight += 1
    ema.update()
    assert {tensor.dtype for tensor in ema.tensors()} == {torch.float32}
    with ema.swap():
        assert net.weight.dtype == torch.float16


def test_loading_restores_it() -> None:
    net = network()
    ema = Ema(net, 0.5, warmup=True)
    move(net, 1)
    ema.update()
    other = Ema(network(), 0.5, warmup=True)
    other.load(ema.average(), ema.updates)
    assert other.updates == 1 and other.current_decay() == ema.current_decay()
    for a, b in zip(other.tensors(), ema.tensors(), strict=True):
        assert torch.equal(a, b)


# Half-lives in images -----------------------------------------------------------------------------------------------


def test_the_half_life_of_edm() -> None:
    """edm-unet.md, sections 5 and 10: beta = 0.5^(batch / min(halflife, 0.05 images)) at 0, 5, 10 and 50 M images."""
    average = TrainerConfig(batch_size=500, ema_decay=None, ema_halflife_images=5e5, ema_rampup_ratio=0.05).average
    assert average == HalfLife(5e5, 500, 0.05)
    million = [0, 5, 10, 50]
    assert [average.decay(n * 1_000_000 // 500) for n in million] == pytest.approx(
        [0.0, 0.5 ** (500 / 250_000), 0.5 ** (500 / 500_000), 0.5 ** (500 / 500_000)], rel=1e-12
    )
    assert average.decay(1) == 0.5**20  # 500 images seen, half-life 25


def test_without_a_ramp_a_half_life_halves_what_came_before() -> None:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
    ema = Ema(net, HalfLife(images=640, batch=64))
    with torch.no_grad():
        net.weight.fill_(0.0)
    for _ in range(10):
        ema.update()
    assert ema.average()["weight"].item() == pytest.approx(0.5, rel=1e-5)


def test_the_first_update_of_a_ramp_takes_the_weights() -> None:
    net = network()
    ema = Ema(net, HalfLife(images=640, batch=64, ramp=0.05))
    move(net, 1)
    net[1].running_mean.fill_(3.0)
    ema.update()
    for name, value in ema.average().items():
        assert torch.equal(value, net.state_dict()[name])
    assert ema.current_decay() == 0.5**20


def test_a_decay_is_what_it_was() -> None:
    """Bit for bit the one kernel over all parameters that old runs were averaged with."""
    net = network()
    ema = Ema(net, 0.9)
    shadow = [p.detach().clone() for p in net.parameters()]
    for seed in range(3):
        move(net, seed)
        torch._foreach_lerp_(shadow, [p.detach() for p in net.parameters()], 1 - 0.9)
        ema.update()
    assert all(torch.equal(a, b) for a, b in zip(ema.tensors(), shadow, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(ema_halflife_images=5e5),
            "ema_halflife_images=500000 and trainer.ema_decay=0.9999 .* set ema_decay=null",
        ),
        (dict(ema_decay=None, ema_halflife_images=5e5, ema_warmup=True), "trainer.ema_warmup=true are two memories"),
        (dict(ema_rampup_ratio=0.05), "ema_rampup_ratio=0.05 needs a half-life, and trainer.ema_halflife_images=null"),
        (dict(ema_decay=None, ema_halflife_images=0), "ema_halflife_images=0 must be above 0, or null"),
        (dict(ema_clock="images"), r"ema_clock='images' is not one of \['step', 'stage'\]"),
        (dict(ema_decay=None, ema_clock="stage"), "ema_clock=stage, but there is no average"),
    ],
)
def test_memories_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainerConfig(**settings)


def test_no_average_at_all() -> None:
    assert TrainerConfig(ema_decay=None).average is None and TrainerConfig().average == 0.9999


# Clocks of their own ------------------------------------------------------------------------------------------------


def step(net: nn.Sequential, seed: int, *used: int) -> None:
    """Weights of the layers in `used` change, and have gradients; the others have none."""
    for number, layer in enumerate(net):
        if number in used:
            move(layer, seed)
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter) if number in used else None


@pytest.mark.parametrize("decay", [0.8, HalfLife(640, 64, 0.05)], ids=["decay", "halflife"])
def test_an_average_goes_by_the_steps_that_trained_its_parameter(decay: float | HalfLife) -> None:
    """Each layer's average is that of a training which consists of its own steps alone."""
    turns = [(0, 1), (1,), (0, 1), (1,), (1,), (0, 1)]
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    warmup = not isinstance(decay, HalfLife)
    ema = Ema(net, decay, warmup=warmup, own_clocks=True)
    alone = [Ema(layer, decay, warmup=warmup) for layer in net]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for seed, used in enumerate(turns):
        step(net, seed, *used)
        ema.update()
        for number in used:
            alone[number].update()
    for number in range(3):
        for name, value in alone[number].average().items():
            assert torch.equal(ema.average()[f"{number}.{name}"], value)
    assert torch.equal(ema.average()["2.weight"], before["2.weight"])
    assert ema.updates == 6 and ema.clocks() == {f"{k}.{n}": [3, 6, 0][k] for k in range(3) for n in ("weight", "bias")}


def test_by_the_step_it_moves_whether_or_not_there_was_a_gradient() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = Ema(net, 0.5)
    move(net, 1)
    step(net, 2, 0)
    before = ema.average()["1.weight"].clone()
    ema.update()
    assert not torch.equal(ema.average()["1.weight"], before) and ema.clocks() is None


def test_loading_restores_the_clocks() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = Ema(net, 0.9, warmup=True, own_clocks=True)
    for seed, used in enumerate([(0,), (0, 1), (0,)]):
        step(net, seed, *used)
        ema.update()
    other = Ema(net, 0.9, warmup=True, own_clocks=True)
    other.load(ema.average(), ema.updates, ema.clocks())
    for one in (ema, other):
        step(net, 9, 0, 1)
        one.update()
    assert other.clocks() == ema.clocks()
    for a, b in zip(other.tensors(), ema.tensors(), strict=True):
        assert torch.equal(a, b)
