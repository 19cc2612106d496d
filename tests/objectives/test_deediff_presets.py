"""The named forms of DeeDiff's objective against what is published of each, and the switches between them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.assembly import named
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.objectives.base import Batch, Draws
from gearshift.objectives.deediff import DeeDiff, DeeDiffConfig
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError

from ..contract import build

M, B, SHAPE = 4, 6, (2, 3, 3)


def preset(name: str) -> DeeDiff:
    """A file of conf/objective, with what it is made from."""
    node = named("objective", name)
    merged: dict[str, Any] = {}
    for part in node.pop("defaults", []):
        if part != "_self_":
            merged |= dict(named("objective", part))
    objective = config.build({**merged, **dict(node)})
    assert isinstance(objective, DeeDiff)
    return objective


def tensors(maps: bool, exits: int = M) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (exits, B, *SHAPE) if maps else (exits, B)
    return (
        torch.randn(M, B, *SHAPE, generator=generator, dtype=torch.float64),
        torch.rand(shape, generator=generator, dtype=torch.float64),
        torch.randn(B, *SHAPE, generator=generator, dtype=torch.float64),
    )


def test_the_official_code() -> None:
    """Certainty maps, L_u averaged over pixels, layers and batch; weights of batch means that add up to one; all of
    depth + 1 exits in both; the final output once more."""
    predictions, u, noise = tensors(maps=True)
    certainty = 1 - u
    target = 1 - torch.tanh((predictions - noise).abs())
    final = ((predictions[-1] - noise) ** 2).mean()
    fit = sum(((certainty[i] - target[i]) ** 2).mean() for i in range(M)) / M
    mean = [certainty[i].mean() for i in range(M)]
    layers = sum(mean[i] / sum(mean) * ((predictions[i] - noise) ** 2).mean() for i in range(M))
    terms = preset("deediff_official").terms(predictions, u, noise)
    torch.testing.assert_close(terms["loss"], final + fit + layers, rtol=1e-12, atol=0)
    assert sum(float(m / sum(mean)) for m in mean) == pytest.approx(1)


def test_the_paper() -> None:
    """Scalars; sums over layers; layers weighted by 1 - u, each sample by its own."""
    predictions, u, noise = tensors(maps=False)
    loss = 0.0
    for b in range(B):
        for i in range(M):
            error = float(((predictions[i, b] - noise[b]) ** 2).mean())
            true = float(torch.tanh((predictions[i, b] - noise[b]).abs()).mean())
            loss += (float(u[i, b]) - true) ** 2 + (1 - float(u[i, b])) * error + (error if i == M - 1 else 0.0)
    terms = preset("deediff_paper").terms(predictions, u, noise)
    assert float(terms["loss"]) == pytest.approx(loss / B, rel=1e-12)


def test_the_reproduction() -> None:
    """L_u summed over layers and a batch of 128, layers weighted by 1 minus their true error; exits at inputs, so the
    final output is none of them."""
    predictions, u, noise = tensors(maps=False, exits=M - 1)
    error = ((predictions - noise) ** 2).flatten(2).mean(2)
    true = torch.tanh((predictions - noise).abs()).flatten(2).mean(2)
    fit = ((u - true[:-1]) ** 2).sum() / B * 128
    wanted = error[-1].mean() + fit + ((1 - true[:-1]) * error[:-1]).sum(0).mean()
    torch.testing.assert_close(preset("deediff_reproduction").terms(predictions, u, noise)["loss"], wanted)


def test_berxit() -> None:
    predictions, u, noise = tensors(maps=False)
    error = ((predictions - noise) ** 2).flatten(2).mean(2)
    true = torch.tanh((predictions - noise).abs()).flatten(2).mean(2)
    wanted = error[-1].mean() + ((u - true) ** 2).mean() + error.mean()
    torch.testing.assert_close(preset("berxit").terms(predictions, u, noise)["loss"], wanted)


def test_the_default_is_the_official_code_with_a_weight_for_every_sample() -> None:
    given = tensors(maps=True)
    official, own = preset("deediff_official"), preset("deediff")
    assert float(official.terms(*given)["loss"]) != float(own.terms(*given)["loss"])
    one = tuple(tensor[:, :1] if tensor.ndim == 5 else tensor[:1] for tensor in given)
    torch.testing.assert_close(official.terms(*one)["loss"], own.terms(*one)["loss"])


@pytest.mark.parametrize("name", ["deediff", "deediff_paper", "deediff_official"])
def test_processes_are_coupled_only_where_the_preset_says_so(name: str) -> None:
    """The loss of a batch is the mean of the losses of its halves, as on two devices; with weights of the batch not."""
    predictions, u, noise = tensors(maps=name != "deediff_paper")
    objective = preset(name)
    whole = objective.terms(predictions, u, noise)["loss"]
    halves = [
        objective.terms(predictions[:, part], u[:, part], noise[part])["loss"] for part in (slice(0, 2), slice(2, B))
    ]
    apart = halves[0] * 2 / B + halves[1] * (B - 2) / B
    assert torch.isclose(whole, apart, rtol=1e-12, atol=0) == (name != "deediff_official")


# Switches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maps", "weighting"), list(itertools.product((True, False), ("normalized", "paper", "uniform")))
)
def test_weights_of_the_true_error(maps: bool, weighting: str) -> None:
    predictions, u, noise = tensors(maps)
    error = ((predictions - noise) ** 2).flatten(2).mean(2)
    certainty = 1 - torch.tanh((predictions - noise).abs()).flatten(2).mean(2)
    weight = {"normalized": certainty / certainty.sum(0), "paper": certainty, "uniform": torch.full_like(error, 1 / M)}
    found = DeeDiff(DeeDiffConfig(ual_weighting=weighting, weight_from="target")).terms(predictions, u, noise)
    torch.testing.assert_close(found["layers"], (weight[weighting] * error).sum(0).mean())


def test_the_plain_sum_of_the_layers() -> None:
    given = tensors(maps=True)
    without, with_it = (DeeDiff(DeeDiffConfig(unweighted_layers=gamma)).terms(*given) for gamma in (0.0, 0.3))
    layers = ((given[0] - given[2]) ** 2).flatten(2).mean(2).sum(0).mean()
    torch.testing.assert_close(with_it["loss"], without["loss"] + 0.3 * layers)


@pytest.mark.parametrize("weight_from", ["predicted", "target"])
def test_the_gradient_goes_through_the_true_error_only_where_it_may(weight_from: str) -> None:
    predictions, u, noise = tensors(maps=True)
    predictions.requires_grad_(True)

    def gradient(**switches: Any) -> Tensor:
        """Of everything but what the layers give with their weights held fixed, and the final output."""
        objective = DeeDiff(DeeDiffConfig(ual_weighting="paper", weight_from=weight_from, **switches))
        (grad,) = torch.autograd.grad(objective.terms(predictions, u, noise)["loss"], predictions)
        return grad

    error = predictions.detach() - noise
    true = torch.tanh(error.abs())
    certainty = 1 - (u if weight_from == "predicted" else true).flatten(2).mean(2)
    pixels = error[0, 0].numel()
    held = 2 * error / pixels / B * certainty[:, :, None, None, None]
    held[-1] += 2 * error[-1] / pixels / B
    torch.testing.assert_close(gradient(), held)
    slope = (1 - true**2) * error.sign()
    through = -2 * (u - true) * slope / (M * B * pixels)
    if weight_from == "target":
        through = through - slope / pixels / B * error.square().flatten(2).mean(2)[:, :, None, None, None]
    torch.testing.assert_close(gradient(detach_target=False), held + through)


def test_heads_at_the_inputs_of_blocks_leave_out_the_final_output() -> None:
    torch.manual_seed(0)
    network = EarlyExit(
        ExitsConfig(points="block_inputs", uncertainty="attention", head="per_exit"), build("uvit-class")
    ).requires_grad_(True)
    with pytest.raises(UsageError, match=r"include_final=true needs an uncertainty head at the full depth"):
        DeeDiff(DeeDiffConfig()).check(network)
    objective = DeeDiff(DeeDiffConfig(include_final=False))
    objective.check(network)
    batch = Batch(torch.rand(B, 2, 8, 8), torch.arange(B) % 3, torch.arange(B), 5)
    objective.loss(Denoiser(network, VPSDE(VPSDEConfig())), batch, Draws(9, batch))["loss"].backward()
    assert all(p.grad is not None for p in network.parameters())
    heads = list(network.exit_heads["0_0"].parameters())
    assert all(bool((p.grad != 0).any()) for p in heads)  # exit 0 learns


def test_what_is_not_a_switch() -> None:
    with pytest.raises(UsageError, match=r"objective.weight_from='truth' is not one of \['predicted', 'target'\]"):
        DeeDiffConfig(weight_from="truth")
