"""DeeDiff's objective on a U-Net: maps of levels of different width and side in one loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.unet import UNet
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.objectives.base import Batch, Draws
from gearshift.objectives.deediff import DeeDiff, DeeDiffConfig
from gearshift.runtime.errors import UsageError

from ..backbones.unets import STAGED, STANDARD, drawn, with_exits

SHAPE = replace(STANDARD, model_channels=8, channel_mult=(1, 2, 3), num_classes=3, null_class=True)
DEPTHS, B = (9, 12, 15), 4


def setting(config: DeeDiffConfig, dtype: torch.dtype = torch.float32) -> tuple[DeeDiff, Denoiser, Batch, Draws]:
    network = with_exits(drawn(SHAPE, dtype))
    images = torch.rand(B, 2, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1
    batch = Batch(images, torch.tensor([0, 1, 2, 0]), torch.arange(B), 5)
    return DeeDiff(config), Denoiser(network, VPSDE(VPSDEConfig())), batch, Draws(9, batch)


def by_hand(network: EarlyExit, noisy: Tensor, time: Tensor, cond: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions and uncertainty maps of every level, without executor and without the heads' own code."""
    stream = network.embed(noisy, time, cond)
    predictions, maps = [], []
    for depth, block in enumerate(network.paths[0], start=1):
        skip = stream.pop() if block in network.pops else None
        stream.hidden = network.blocks[block](stream.hidden, stream.cond, skip)
        if block in network.pushes:
            stream.push()
        if depth not in DEPTHS:
            continue
        side = stream.hidden.shape[-1]
        p = 8 // side
        if depth == DEPTHS[-1]:
            decoder = network.backbone.decoder(0)
            norm, convolution = decoder["8x8_aux_norm"], decoder["8x8_aux_conv"]
        else:
            norm, convolution = network.exit_heads[f"0_{depth}"].norm, network.exit_heads[f"0_{depth}"].conv
        linear = network.uncertainty_heads[f"0_{depth}"].linear
        pixels = convolution(F.silu(norm(stream.hidden)))
        certain = F.conv2d(stream.hidden.detach(), linear.weight[:, :, None, None], linear.bias).sigmoid()
        for channels, found in ((pixels, predictions), (certain, maps)):
            found.append(F.pixel_shuffle(channels.unflatten(1, (p * p, 2)).transpose(1, 2).flatten(1, 2), p))
    return predictions, maps


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_closed_form(reduction: str) -> None:
    """L = l_M + L_u + L_UAL of three levels, 2 x 2, 4 x 4 and 8 x 8."""
    objective, denoiser, batch, draws = setting(DeeDiffConfig(layer_reduction=reduction))
    network = denoiser.network
    assert isinstance(network, EarlyExit) and network.exits() == DEPTHS
    time = denoiser.process.times_from_uniform(draws.uniform("time"))
    noise = draws.normal("noise", (2, 8, 8))
    noisy = denoiser.process.add_noise(batch.images, noise, time)
    predictions, maps = by_hand(network, noisy, denoiser.process.network_time(time), batch.cond)
    layer = torch.stack([((eps - noise) ** 2).mean(dim=(1, 2, 3)) for eps in predictions])
    fits = [((u - (eps - noise).abs().tanh()) ** 2).mean() for eps, u in zip(predictions, maps, strict=True)]
    certainty = torch.stack([1 - u.mean(dim=(1, 2, 3)) for u in maps])
    assert float(layer.detach().std(dim=0).min()) > 1e-2, "levels have to differ for this to prove anything"
    wanted = {
        "simple": layer[-1].mean(),
        "uncertainty": sum(fits) / (3 if reduction == "mean" else 1),
        "layers": (certainty / certainty.sum(0) * layer).sum(0).mean(),
    }
    wanted["loss"] = wanted["simple"] + wanted["uncertainty"] + wanted["layers"]
    terms = objective.loss(denoiser, batch, draws)
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(terms[name].detach()) == pytest.approx(float(value.detach()), rel=1e-5)


def gradients(weights: tuple[float, float]) -> dict[str, float]:
    """Greatest gradient of one term in each part of the network: of the loss with it less that without it."""

    def of(uncertainty: float, layer: float) -> dict[str, Tensor]:
        # Of uniform weights the layers' term says nothing to the uncertainty heads.
        config = DeeDiffConfig(uncertainty, layer, ual_weighting="uniform")
        objective, denoiser, batch, draws = setting(config)
        names, parameters = zip(*denoiser.network.named_parameters(), strict=True)
        loss = objective.loss(denoiser, batch, draws)["loss"]
        return dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))

    with_it, without = of(*weights), of(0.0, 0.0)
    found: dict[str, float] = {}
    for name, grad in with_it.items():
        part = ".".join(name.split(".")[:2]) if "heads" in name else "backbone"
        found[part] = max(found.get(part, 0.0), float((grad - without[name]).abs().max()))
    return found


def test_each_term_trains_its_own_parts() -> None:
    heads = [f"exit_heads.0_{depth}" for depth in DEPTHS[:-1]]
    uncertainty = [f"uncertainty_heads.0_{depth}" for depth in DEPTHS]
    fit = gradients((1.0, 0.0))
    assert set(fit) == {"backbone", *heads, *uncertainty}
    assert all(fit[name] > 1e-4 for name in uncertainty)
    assert not any(fit[name] for name in ("backbone", *heads))
    layers = gradients((0.0, 1.0))
    assert all(layers[name] > 1e-4 for name in ("backbone", *heads))
    assert not any(layers[name] for name in uncertainty)


def test_an_exit_trains_what_runs_before_it() -> None:
    """The error of the lowest level leaves the levels above it, and their heads, alone."""
    _, denoiser, batch, _ = setting(DeeDiffConfig())
    network = denoiser.network
    assert isinstance(network, EarlyExit)
    predictions, _ = by_hand(network, batch.images, torch.arange(B) * 200.0, batch.cond)
    predictions[0].square().sum().backward()
    for name, parameter in network.named_parameters():
        above = name.startswith(("backbone.dec.4x4", "backbone.dec.8x8", "exit_heads.0_12", "uncertainty_heads"))
        assert (parameter.grad is None) == above, name
        assert above or parameter.grad.abs().max() > 0, name  # type: ignore[union-attr]


@pytest.mark.parametrize("final", [True, False])
def test_no_parameter_is_left_out(final: bool) -> None:
    """`may_leave_unused` is False."""
    objective, denoiser, batch, draws = setting(DeeDiffConfig(include_final=final, label_dropout=0.5))
    objective.check(denoiser.network)
    objective.loss(denoiser, batch, draws)["loss"].backward()
    assert all(parameter.grad is not None for parameter in denoiser.network.parameters())


def test_what_the_network_must_have() -> None:
    objective = DeeDiff(DeeDiffConfig())
    with pytest.raises(UsageError, match=r"needs exits before the full depth; UNet has only \[15\]"):
        objective.check(EarlyExit(ExitsConfig(head="shared"), UNet(SHAPE)))
    with pytest.raises(UsageError, match="needs one path through the network; UNet has 3"):
        objective.check(EarlyExit(ExitsConfig(head="per_exit"), UNet(STAGED)))
