"""DeeDiff's objective against its closed form, and who gets gradients from which term."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.objectives.base import Batch, Draws
from gearshift.objectives.deediff import DeeDiff, DeeDiffConfig
from gearshift.runtime.errors import UsageError

from ..contract import build
from ..toys import Isotropic, TwoDecoders

M, B, SHAPE = 3, 4, (2, 3, 3)


def tensors(scalar: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(M, B, *SHAPE, generator=generator, dtype=torch.float64)
    shape = (M, B) if scalar else (M, B, *SHAPE)
    return (
        predictions,
        torch.rand(shape, generator=generator, dtype=torch.float64),
        torch.randn(B, *SHAPE, generator=generator, dtype=torch.float64),
    )


def by_loops(config: DeeDiffConfig, predictions: Tensor, u: Tensor, noise: Tensor) -> dict[str, float]:
    """Eqs. 5-9 with Python sums."""
    exits = range(M if config.include_final else M - 1)
    layer = [[float(((predictions[i, b] - noise[b]) ** 2).mean()) for b in range(B)] for i in range(M)]
    fits, means = [], []
    for i in exits:
        per_row = []
        for b in range(B):
            target = torch.tanh((predictions[i, b] - noise[b]).abs())
            if u.ndim == 2:
                per_row.append(float((u[i, b] - target.mean()) ** 2))
            else:
                per_row.append(float(((u[i, b] - target) ** 2).mean()))
        fits.append(sum(per_row) / B)
        means.append([float(u[i, b].mean()) for b in range(B)])
    total = 0.0
    for b in range(B):
        certainty = [1 - (means[i][b] if config.weight_scope == "sample" else sum(means[i]) / B) for i in exits]
        if config.ual_weighting == "normalized":
            weights = [c / sum(certainty) for c in certainty]
            assert sum(weights) == pytest.approx(1)
        elif config.ual_weighting == "paper":
            weights = certainty
        else:
            weights = [1 / len(certainty)] * len(certainty)
        total += sum(w * layer[i][b] for i, w in zip(exits, weights, strict=True)) / B
    fit = sum(fits) / (len(fits) if config.layer_reduction == "mean" else 1)
    simple = sum(layer[-1]) / B
    return {
        "loss": simple + config.uncertainty_weight * fit + config.layer_weight * total,
        "simple": simple,
        "uncertainty": fit,
        "layers": total,
    }


SWITCHES = list(
    itertools.product(
        ("mean", "sum"), ("normalized", "paper", "uniform"), ("batch", "sample"), (True, False), (True, False)
    )
)


@pytest.mark.parametrize("scalar", [False, True])
def test_closed_form_of_every_switch(scalar: bool) -> None:
    given = tensors(scalar)
    seen = set()
    for reduction, weighting, scope, final, detach in SWITCHES:
        config = DeeDiffConfig(0.7, 1.3, reduction, weighting, scope, detach, final)
        terms = DeeDiff(config).terms(*given)
        wanted = by_loops(config, *given)
        assert terms.keys() == wanted.keys()
        for name, value in wanted.items():
            assert float(terms[name]) == pytest.approx(value, rel=1e-12)
        seen.add(round(wanted["loss"], 10))
    assert len(seen) == 2 * (2 + 2 + 1) * 2  # all switches matter (the scope of uniform weights and detaching do not)


def test_paper_mode_is_the_plain_weighted_sum() -> None:
    predictions, u, noise = tensors(scalar=True)
    layer = (predictions - noise).square().flatten(2).mean(2)
    terms = DeeDiff(DeeDiffConfig(ual_weighting="paper")).terms(predictions, u, noise)
    torch.testing.assert_close(terms["layers"], ((1 - u) * layer).sum(0).mean())


def test_weights_of_the_batch_are_shared_and_those_of_a_sample_its_own() -> None:
    objective = {scope: DeeDiff(DeeDiffConfig(weight_scope=scope)) for scope in ("batch", "sample")}
    u = tensors(scalar=True)[1]
    weights = {scope: o._weights(u) for scope, o in objective.items()}
    for w in weights.values():
        torch.testing.assert_close(w.sum(0), torch.ones(B, dtype=torch.float64))
    assert torch.equal(weights["batch"], weights["batch"][:, :1].expand(M, B))
    other = u.clone()
    other[:, 1:] = other[:, 1:].flip(0)
    assert torch.equal(objective["sample"]._weights(other)[:, 0], weights["sample"][:, 0])
    assert not torch.allclose(objective["batch"]._weights(other)[:, 0], weights["batch"][:, 0])


def test_target_of_a_zero_prediction() -> None:
    """E tanh|N(0,1)| = 0.556; where the prediction is right it is 0."""
    noise = torch.randn(1, 1, 700, 700, generator=torch.Generator().manual_seed(0))
    objective = DeeDiff(DeeDiffConfig())
    # With u = 0 the fit is the mean square of the target, with u = 1 that of 1 - target: together they give its mean.
    zero = torch.zeros(1, 1, 1, 700, 700)
    fits = [float(objective.terms(zero, zero + u, noise)["uncertainty"]) for u in (0, 1)]
    assert (1 + fits[0] - fits[1]) / 2 == pytest.approx(0.556, abs=2e-3)
    right = objective.terms(noise[None], zero, noise)
    assert float(right["loss"]) == 0


def setting(config: DeeDiffConfig, exits: ExitsConfig | None = None) -> tuple[DeeDiff, Denoiser, Batch, Draws]:
    torch.manual_seed(0)
    network = EarlyExit(exits or ExitsConfig(), Isotropic())
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(B, 2, 8, 8, generator=generator) * 2 - 1
    batch = Batch(images, torch.tensor([0, 1, 2, 0]), torch.arange(B), 5)
    return DeeDiff(config), Denoiser(network, VPSDE(VPSDEConfig())), batch, Draws(9, batch)


def term_gradients(weights: tuple[float, float], exits: ExitsConfig | None = None, **switches: object) -> list[Tensor]:
    """Gradient of one term: the difference between the loss with it and without it."""

    def of(uncertainty: float, layer: float) -> list[Tensor]:
        config = DeeDiffConfig(uncertainty, layer, **switches)  # type: ignore[arg-type]
        objective, denoiser, batch, draws = setting(config, exits)
        parameters = dict(denoiser.network.named_parameters())
        loss = objective.loss(denoiser, batch, draws)["loss"]
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return list(grads)

    return [a - b for a, b in zip(of(*weights), of(0.0, 0.0), strict=True)]


def split(grads: list[Tensor], exits: ExitsConfig | None = None) -> tuple[float, float]:
    """Greatest gradient in the backbone and in the uncertainty heads."""
    names = [name for name, _ in setting(DeeDiffConfig(), exits)[1].network.named_parameters()]
    heads = [float(g.abs().max()) for n, g in zip(names, grads, strict=True) if n.startswith("uncertainty_heads")]
    body = [float(g.abs().max()) for n, g in zip(names, grads, strict=True) if n.startswith("backbone")]
    return max(body), max(heads)


def test_uncertainty_loss_trains_the_heads_only() -> None:
    body, heads = split(term_gradients((1.0, 0.0)))
    assert body == 0 and heads > 1e-4
    loose = ExitsConfig(detach_input=False)
    body, heads = split(term_gradients((1.0, 0.0), loose), loose)
    assert body > 1e-5 and heads > 1e-4


@pytest.mark.parametrize("weighting", ["normalized", "paper"])
def test_layer_loss_reaches_the_heads_unless_detached(weighting: str) -> None:
    body, heads = split(term_gradients((0.0, 1.0), ual_weighting=weighting, detach_weight=False))
    assert body > 1e-4 and heads > 1e-9
    body, heads = split(term_gradients((0.0, 1.0), ual_weighting=weighting, detach_weight=True))
    assert body > 1e-4 and heads == 0


def test_paper_form_pushes_uncertainty_up_unless_detached() -> None:
    predictions, u, noise = tensors(scalar=True)
    u.requires_grad_(True)
    config = DeeDiffConfig(uncertainty_weight=0.0, ual_weighting="paper")
    (grad,) = torch.autograd.grad(DeeDiff(config).terms(predictions, u, noise)["loss"], u)
    assert bool((grad < 0).all())


def test_no_parameter_is_left_out() -> None:
    """`may_leave_unused` is False: distributed training need not look for them."""
    for final, head in itertools.product((True, False), ("shared", "per_exit")):
        objective, denoiser, batch, draws = setting(DeeDiffConfig(include_final=final), ExitsConfig(head=head))
        objective.loss(denoiser, batch, draws)["loss"].backward()
        assert all(p.grad is not None for p in denoiser.network.parameters())
    assert DeeDiff.may_leave_unused is False


def test_the_loss_reads_every_exit_once() -> None:
    objective, denoiser, batch, draws = setting(DeeDiffConfig())
    outputs = denoiser.rows(batch.images, 0.5, batch.cond)
    terms = objective.loss(denoiser, batch, draws)
    assert outputs.prediction.shape == batch.images.shape
    time = denoiser.process.times_from_uniform(draws.uniform("time"))
    noise = draws.normal("noise", (2, 8, 8))
    noisy = denoiser.process.add_noise(batch.images, noise, time)
    predictions, u = [], []
    for depth in (1, 2, 3, 4):
        stream = denoiser.network.embed(noisy, denoiser.process.network_time(time), batch.cond)
        hidden = stream.hidden
        for block in range(depth):
            hidden = denoiser.network.blocks[block](hidden, stream.cond)
        predictions.append(denoiser.network.readout(hidden, stream.cond, depth))
        u.append(denoiser.network.uncertainty(hidden, stream.time, depth))
    wanted = objective.terms(torch.stack(predictions), torch.stack(u), noise)
    for name in wanted:
        torch.testing.assert_close(terms[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_what_the_network_must_have() -> None:
    objective = DeeDiff(DeeDiffConfig())
    objective.check(build("exits-isotropic"))
    for network, message in (
        (build("isotropic"), "needs uncertainty heads, and this Isotropic has none"),
        (
            EarlyExit(ExitsConfig(depths=[]), Isotropic()),
            r"needs exits before the full depth; Isotropic has only \[4\]",
        ),
        (EarlyExit(ExitsConfig(), TwoDecoders()), "needs one path through the network; TwoDecoders has 2"),
    ):
        with pytest.raises(UsageError, match=message):
            objective.check(network)
    with pytest.raises(UsageError, match="guidance needs a null condition"):
        DeeDiff(DeeDiffConfig(label_dropout=0.1)).check(EarlyExit(ExitsConfig(), _NoNull()))
    with pytest.raises(UsageError, match="ual_weighting='code' is not one of"):
        DeeDiffConfig(ual_weighting="code")


class _NoNull(Isotropic):
    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        return super(Isotropic, self).null_cond(num_rows, device)


def test_mean_of_tanh_is_what_the_note_says() -> None:
    """The 0.556 above, by quadrature."""
    steps = [i / 1000 + 0.0005 for i in range(8000)]
    value = sum(math.tanh(z) * math.exp(-z * z / 2) for z in steps) / 1000 * math.sqrt(2 / math.pi)
    assert value == pytest.approx(0.556, abs=5e-4)
