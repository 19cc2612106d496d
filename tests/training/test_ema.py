"""The average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gearshift.training.ema import Ema


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
