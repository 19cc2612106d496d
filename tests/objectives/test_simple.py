"""The plain loss, and the draws every objective is given."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.objectives.base import Batch, Draws, drop_condition, noised
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.runtime.errors import UsageError

from ..contract import build


def batch_of(slot: Tensor, micro_batch: int = 2, channels: int = 2, side: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(int(slot.max()) + 1, channels, side, side, generator=generator)[slot] * 2 - 1
    return Batch(images, slot % 3, slot, micro_batch)


@pytest.mark.parametrize("name", ["isotropic", "uvit-class", "long-skips"])
def test_mean_squared_error_by_hand(name: str) -> None:
    network = build(name)
    denoiser = Denoiser(network, VPSDE(VPSDEConfig()))
    batch = batch_of(torch.arange(5), channels=network.in_channels, side=network.image_size)
    if network.cond_kind == "none":
        batch = Batch(batch.images, None, batch.slot, batch.micro_batch)
    draws = Draws(4, batch)
    time = 1 - draws.uniform("time").double()
    noise = draws.normal("noise", tuple(batch.images.shape[1:]))
    alpha, sigma = (f(time).float()[:, None, None, None] for f in (denoiser.process.alpha, denoiser.process.sigma))
    predicted = denoiser.rows(alpha * batch.images + sigma * noise, time, batch.cond).prediction
    wanted = ((predicted[:, : network.in_channels] - noise) ** 2).mean()
    terms = Simple(SimpleConfig()).loss(denoiser, batch, draws)
    if network.out_channels == network.in_channels:
        assert set(terms) == {"loss"}
        torch.testing.assert_close(terms["loss"], wanted)
    else:  # variance channels have a term of their own, with weight 1; see test_variational
        torch.testing.assert_close(terms["mse"], wanted)
        torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vlb"])
        assert float(terms["vlb"]) != 0


class _Weighted(VPSDE):
    Config: ClassVar[type] = VPSDEConfig

    def loss_weight(self, t: Tensor) -> Tensor:
        return (2 * t).float()


def test_weights_of_the_process_count() -> None:
    batch = batch_of(torch.arange(5))
    draws = Draws(4, batch)
    one = Simple(SimpleConfig())
    per_sample = [
        float(one.loss(Denoiser(build("isotropic"), VPSDE(VPSDEConfig())), part, Draws(4, part))["loss"])
        for part in (batch_of(torch.tensor([slot])) for slot in range(5))
    ]
    time = 1 - draws.uniform("time").double()
    wanted = sum(2 * float(t) * loss for t, loss in zip(time, per_sample, strict=True)) / 5
    weighted = one.loss(Denoiser(build("isotropic"), _Weighted(VPSDEConfig())), batch, draws)["loss"]
    assert float(weighted) == pytest.approx(wanted, rel=1e-5)


def test_draws_do_not_depend_on_the_layout() -> None:
    """One process with ten samples, or two with every other one: the same times, noise and dropped labels."""
    network, denoiser = build("isotropic"), Denoiser(build("isotropic"), VPSDE(VPSDEConfig()))
    whole = batch_of(torch.arange(10))
    draws = Draws(1, whole)
    time, noise, noisy = noised(denoiser, whole, draws)
    dropped = drop_condition(network, whole.cond, draws, 0.5)
    assert dropped is not None
    for part in (torch.arange(0, 10, 2), torch.tensor([7, 1]), torch.tensor([9])):
        batch = batch_of(part)
        mine = noised(denoiser, batch, Draws(1, batch))
        for got, wanted in zip(mine, (time, noise, noisy), strict=True):
            assert torch.equal(got, wanted[part])
        some = drop_condition(network, batch.cond, Draws(1, batch), 0.5)
        assert some is not None and torch.equal(some, dropped[part])


def test_draws_change_with_micro_batch_seed_and_purpose() -> None:
    batch = batch_of(torch.arange(64))
    draws = [
        Draws(1, batch).uniform("time"),
        Draws(2, batch).uniform("time"),
        Draws(1, batch).uniform("label_dropout"),
        Draws(1, batch_of(torch.arange(64), micro_batch=3)).uniform("time"),
    ]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert not bool((a == b).any())


def test_label_dropout_has_its_rate() -> None:
    network = build("isotropic")
    slot = torch.arange(20000)
    batch = Batch(torch.zeros(20000, 1, 1, 1), slot % 3, slot, 0)
    dropped = drop_condition(network, batch.cond, Draws(0, batch), 0.15)
    assert dropped is not None
    gone = dropped == 3
    assert abs(float(gone.float().mean()) - 0.15) < 4 * (0.15 * 0.85 / 20000) ** 0.5
    assert torch.equal(dropped[~gone], (slot % 3)[~gone])
    assert drop_condition(network, batch.cond, Draws(0, batch), 0.0) is batch.cond
    assert drop_condition(network, None, Draws(0, batch), 0.5) is None
    assert bool((drop_condition(network, batch.cond, Draws(0, batch), 1.0) == 3).all())  # type: ignore[union-attr]


def test_text_is_dropped_by_row() -> None:
    network = build("uvit-text")
    null = torch.full((3, 5), 7.0)
    network.set_null_context(null)  # type: ignore[operator]
    slot = torch.arange(50)
    batch = Batch(torch.zeros(50, 1, 1, 1), torch.randn(50, 3, 5), slot, 0)
    dropped = drop_condition(network, batch.cond, Draws(0, batch), 0.4)
    assert dropped is not None and batch.cond is not None
    gone = (dropped == 7).flatten(1).all(1)
    assert 0 < int(gone.sum()) < 50
    assert torch.equal(dropped[~gone], batch.cond[~gone])


def test_dropout_needs_a_null_condition() -> None:
    class NoNull(type(build("isotropic"))):  # type: ignore[misc]
        def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
            raise UsageError("no null condition")

    with pytest.raises(UsageError, match="no null"):
        Simple(SimpleConfig(label_dropout=0.1)).check(NoNull())
    Simple(SimpleConfig()).check(NoNull())
    Simple(SimpleConfig(label_dropout=0.1)).check(build("long-skips"))  # nothing to drop


def test_gradients_reach_the_whole_backbone() -> None:
    network = type(build("isotropic"))()
    batch = batch_of(torch.arange(4))
    Simple(SimpleConfig()).loss(Denoiser(network, VPSDE(VPSDEConfig())), batch, Draws(0, batch))["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())
