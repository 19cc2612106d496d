"""Uncertainty heads: the attention probe against plain attention, weights by timestep, and which head an exit has."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.uncertainty_heads import AttentionHead, TokenHead
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.execution.plan import StepPlan
from gearshift.runtime.errors import UsageError

from ..toys import Isotropic

UVIT = dict(image_size=4, in_channels=1, patch_size=2, embed_dim=8, depth=4, num_heads=2)


def drawn(module: torch.nn.Module, std: float = 0.7) -> None:
    """Weights large enough that nothing is near its beginning."""
    torch.manual_seed(2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)


def wrapped(**config: object) -> EarlyExit:
    torch.manual_seed(0)
    network = EarlyExit(ExitsConfig(**config), UViT(UViTConfig(num_classes=3, **UVIT)))  # type: ignore[arg-type]
    drawn(network.uncertainty_heads)
    return network.requires_grad_(False)


def state_after(network: EarlyExit, x: Tensor, time: Tensor, cond: Tensor, depth: int) -> Tensor:
    """The hidden state, by hand."""
    stream = network.embed(x, time, cond)
    hidden, skips = stream.hidden, []
    for block in range(depth):
        skip = skips.pop() if block in network.pops else None
        hidden = network.blocks[block](hidden, stream.cond, skip)
        if block in network.pushes:
            skips.append(hidden)
    return hidden


# The attention probe -----------------------------------------------------------------------------------------------


def test_parameters_of_the_attention_probe() -> None:
    """788,993 at D = 512 (the reproduction of arXiv 2410.09633)."""
    with torch.device("meta"):
        assert sum(p.numel() for p in AttentionHead(512, 0).parameters()) == 788_993


@pytest.mark.parametrize("time_width", [0, 3])
@pytest.mark.parametrize("timesteps", [None, 5])
def test_the_attention_probe_is_attention_with_one_query(time_width: int, timesteps: int | None) -> None:
    """Keys and values of every token, softmax over tokens, as it is usually written."""
    head = AttentionHead(6, time_width, timesteps).double()
    drawn(head)
    tokens = torch.randn(4, 7, 6, dtype=torch.float64)
    time = torch.randn(4, time_width, dtype=torch.float64) if time_width else None
    timestep = torch.tensor([4, 0, 0, 2]) if timesteps else None
    query = head.to_q(head.query if timestep is None else head.query[timestep])
    keys, values = head.to_k(tokens), head.to_v(tokens)
    seen = torch.softmax((query[:, None] * keys).sum(-1) / math.sqrt(6), -1)
    pooled = (seen[..., None] * values).sum(1)
    if time is not None:
        pooled = torch.cat([pooled, time], -1)
    weight, bias = head.linear.weight, head.linear.bias
    if timestep is not None:
        weight, bias = weight[timestep], bias[timestep]
        wanted = torch.sigmoid((weight * pooled[:, None]).sum(-1) + bias)
    else:
        wanted = torch.sigmoid(pooled @ weight.T + bias)
    torch.testing.assert_close(head(tokens, time, timestep)[:, 0], wanted, rtol=1e-12, atol=1e-12)


# Weights by timestep -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixel_map", "token_mean", "attention"])
@pytest.mark.parametrize("time_embed", ["none", "concat"])
def test_every_row_takes_the_weights_of_its_own_timestep(kind: str, time_embed: str) -> None:
    """A mixed batch gives what each row gives alone, and each that of a head with its timestep's weights for all."""
    network = wrapped(uncertainty=kind, time_embed=time_embed, per="layer_timestep", timesteps=10)
    time = torch.tensor([3.0, 9.0, 0.0, 3.0, 6.4])
    hidden = torch.randn(5, 6, 8)
    together = network.uncertainty(hidden, time, 2)
    head = network.uncertainty_heads["0_2"]
    for row in range(5):
        alone = network.uncertainty(hidden[row : row + 1], time[row : row + 1], 2)
        torch.testing.assert_close(together[row : row + 1], alone)
        step = int(time[row].round())
        plain = wrapped(uncertainty=kind, time_embed=time_embed)
        state = {name: value[step] if name.startswith("linear") else value for name, value in head.state_dict().items()}
        if "query" in state:
            state["query"] = state["query"][step : step + 1]
        plain.uncertainty_heads["0_2"].load_state_dict(state)
        torch.testing.assert_close(plain.uncertainty(hidden[row : row + 1], time[row : row + 1], 2), alone)
    moved = network.uncertainty(hidden, torch.full((5,), 1.0), 2)
    assert not torch.allclose(moved, together)


def test_gradients_reach_only_the_timesteps_of_the_batch() -> None:
    head = TokenHead(4, 0, 2, timesteps=6)
    timestep = torch.tensor([1, 4, 1])
    head(torch.randn(3, 5, 4), None, timestep).sum().backward()
    touched = head.linear.weight.grad.abs().sum((1, 2)) > 0  # type: ignore[union-attr]
    assert touched.tolist() == [False, True, False, False, True, False]


def test_timesteps_outside_the_table_take_its_ends() -> None:
    network = wrapped(uncertainty="token_mean", per="timestep", timesteps=4, first_timestep=1)
    hidden = torch.randn(1, 6, 8)
    for inside, outside in ((1.0, 0.2), (4.0, 9.0), (2.0, 2.4)):
        ends = [network.uncertainty(hidden, torch.tensor([t]), 2) for t in (inside, outside)]
        assert torch.equal(*ends)


def test_which_exits_share_a_head() -> None:
    names = {
        "layer": {"0_1", "0_2", "0_3", "0_4", "0_5"},
        "layer_timestep": {"0_1", "0_2", "0_3", "0_4", "0_5"},
        "timestep": {"0"},
        "network": {"0"},
    }
    for per, keys in names.items():
        network = wrapped(per=per, uncertainty="token_mean", timesteps=7)
        assert set(network.uncertainty_heads) == keys
        weight = next(iter(network.uncertainty_heads.values())).linear.weight
        assert weight.shape == ((7, 1, 8) if "timestep" in per else (1, 8))


def test_a_head_by_timestep_needs_a_process_with_these_timesteps() -> None:
    network = wrapped(per="timestep", timesteps=1000)
    Denoiser(network, Discrete(DiscreteConfig("linear")))
    with pytest.raises(UsageError, match=r"weights for 1000 timesteps, and process vp_sde is continuous"):
        Denoiser(network, VPSDE(VPSDEConfig()))
    with pytest.raises(UsageError, match=r"has 500 from 0 on; set exits.timesteps=500 and exits.first_timestep=0"):
        Denoiser(network, Discrete(DiscreteConfig("linear", num_steps=500)))
    with pytest.raises(UsageError, match=r"has 1000 from 1 on; set exits.timesteps=1000 and exits.first_timestep=1"):
        Denoiser(network, Discrete(DiscreteConfig("scaled_linear", first_index=1)))
    Denoiser(wrapped(per="timestep", first_timestep=1), Discrete(DiscreteConfig("scaled_linear", first_index=1)))
    Denoiser(wrapped(per="layer"), VPSDE(VPSDEConfig()))


# Where exits are -----------------------------------------------------------------------------------------------------


def test_exits_at_the_inputs_of_blocks() -> None:
    """Exit 0 reads out the embedding; the full depth has no uncertainty head: 13 probes on the published model."""
    network = wrapped(points="block_inputs", head="per_exit", uncertainty="token_mean")
    assert network.exits() == (0, 1, 2, 3, 4, 5)
    assert set(network.exit_heads) == set(network.uncertainty_heads) == {f"0_{depth}" for depth in range(5)}
    assert [network.predicts_error(depth) for depth in network.exits()] == [True] * 5 + [False]
    with torch.device("meta"):
        backbone = UViT(UViTConfig(image_size=32, in_channels=3, patch_size=2, embed_dim=512, depth=12, num_heads=8))
        published = EarlyExit(
            ExitsConfig(points="block_inputs", head="per_exit", uncertainty="token_mean", tokens="all"), backbone
        )
    assert sum(p.numel() for p in published.uncertainty_heads.parameters()) == 13 * 513
    head = {sum(p.numel() for p in head.parameters()) for head in published.exit_heads.values()}
    assert head == {7264}  # LayerNorm, linear and convolution of the reproduction


def test_exit_zero_reads_out_the_embedding() -> None:
    network = wrapped(points="block_inputs").eval()
    denoiser = Denoiser(network, Discrete(DiscreteConfig("linear")))
    x, time, cond = torch.randn(3, 1, 4, 4), torch.tensor([5.0, 100.0, 700.0]), torch.tensor([0, 2, 1])
    stream = network.embed(x, time, cond)
    wanted = network.backbone.readout(stream.hidden, stream.cond, 0)
    outputs = denoiser.rows(x, time, cond, StepPlan(depth=0))
    torch.testing.assert_close(outputs.prediction, wanted)
    assert outputs.depth.tolist() == [0, 0, 0]
    assert [event.kind for event in outputs.trace] == ["embed", "readout"]


def test_tokens_of_time_and_label_count_where_all_do() -> None:
    network = wrapped(uncertainty="token_mean", tokens="all")
    hidden, time = torch.randn(2, 6, 8), torch.zeros(2)
    linear = network.uncertainty_heads["0_3"].linear
    each = torch.sigmoid(hidden @ linear.weight.T + linear.bias)[..., 0]
    torch.testing.assert_close(network.uncertainty(hidden, time, 3), each.mean(1))
    image = wrapped(uncertainty="token_mean")
    torch.testing.assert_close(image.uncertainty(hidden, time, 3), each[:, 2:].mean(1))


@pytest.mark.parametrize(
    "config",
    [
        dict(uncertainty="attention"),
        dict(uncertainty="attention", per="timestep"),
        dict(uncertainty="token_mean", per="network"),
        dict(uncertainty="token_mean", tokens="all", points="block_inputs"),
        dict(uncertainty="pixel_map", per="layer_timestep", time_embed="concat"),
    ],
)
def test_heads_of_every_kind_leave_the_network_as_it_is(config: dict[str, object]) -> None:
    network = wrapped(**config)
    denoiser = Denoiser(network, Discrete(DiscreteConfig("linear")))
    bare = Denoiser(network.backbone, denoiser.process)
    x, time, cond = torch.randn(3, 1, 4, 4), torch.tensor([5.0, 100.0, 700.0]), torch.tensor([0, 2, 1])
    assert torch.equal(denoiser.rows(x, time, cond).prediction, bare.rows(x, time, cond).prediction)
    outputs = denoiser.rows(x, time, cond, StepPlan(taps=network.exits()))
    for depth, u in outputs.uncertainty.items():
        assert u.min() >= 0 and u.max() <= 1 and len(u) == 3
        mean = u if u.ndim == 1 else u.flatten(1).mean(1)
        hidden = state_after(network, x, time, cond, depth)
        torch.testing.assert_close(network.mean_uncertainty(hidden, time, depth), mean, rtol=1e-5, atol=1e-6)
    assert set(outputs.uncertainty) == {depth for depth in network.exits() if network.predicts_error(depth)}


# What does not fit ---------------------------------------------------------------------------------------------------


def test_settings_that_exclude_each_other() -> None:
    for config, message in (
        (dict(tokens="all"), "only image tokens make a map; take tokens=image"),
        (dict(per="row"), r"exits.per='row' is not one of \['layer', 'timestep', 'layer_timestep', 'network'\]"),
        (dict(points="inputs"), "exits.points='inputs' is not one of"),
        (dict(timesteps=0), "exits.timesteps=0 must be at least 1"),
        (dict(uncertainty="probe"), "exits.uncertainty='probe' is not one of"),
    ):
        with pytest.raises(UsageError, match=message):
            ExitsConfig(**config)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a readout before the first block, and Isotropic can be read out at"):
        EarlyExit(ExitsConfig(points="block_inputs"), Isotropic())
