"""U-ViT with several decoders: one of the encoder's width is the plain U-ViT; stages share the encoder and no more."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.backbones.uvit_decoders import MultiDecoderUViT, MultiDecoderUViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.execution.cost import CostTable
from gearshift.execution.executor import execute
from gearshift.execution.plan import FULL, StepPlan
from gearshift.runtime import config as configuration
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError

CONF = Path(__file__).parents[2] / "conf" / "backbone" / "multi_decoder_uvit.yaml"
SMALL = MultiDecoderUViTConfig(
    image_size=8,
    in_channels=3,
    patch_size=2,
    embed_dim=32,
    depth=4,
    num_heads=4,
    decoders=(48, 32, 8),
    boundaries=(0.5, 3.0),
)
OWN = ("out_blocks.", "norm.", "decoder_pred.", "final_layer.")


def filled(network: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Every weight a fixed function of its name and shape."""
    state = {}
    for name, tensor in network.state_dict().items():
        draw = keys.normal(7, f"weights {name}", torch.tensor([0]), 0, tensor.shape)[0]
        state[name] = 0.1 * draw + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    network.load_state_dict(state)
    return network.to(dtype).eval()


def build(config: MultiDecoderUViTConfig, dtype: torch.dtype = torch.float32) -> MultiDecoderUViT:
    network: MultiDecoderUViT = filled(MultiDecoderUViT(config), dtype)
    return network


def inputs(rows: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    index = torch.arange(rows)
    return keys.normal(7, "images", index, 0, (3, 8, 8)).to(dtype), 999 * keys.uniform(7, "time", index, 0)


def plain_state(network: MultiDecoderUViT, stage: int) -> dict[str, Tensor]:
    """What a U-ViT made of the shared part and one stage's decoder would be given."""
    prefix = f"decoders.{stage}."
    state = {name: t for name, t in network.state_dict().items() if not name.startswith("decoders.")}
    own = {name: t for name, t in network.state_dict().items() if name.startswith(prefix)}
    return {**state, **{name.removeprefix(prefix): tensor for name, tensor in own.items()}}


def plain_config(config: MultiDecoderUViTConfig) -> UViTConfig:
    return UViTConfig(**{field.name: getattr(config, field.name) for field in fields(UViTConfig)})


@pytest.mark.parametrize("decoders", [(), (32,)])
@pytest.mark.parametrize(
    "change", [{}, {"num_classes": 5, "null_class": True}, {"mlp_time_embed": True, "conv": False}]
)
def test_one_stage_is_the_plain_network_bit_for_bit(decoders: tuple[int, ...], change: dict[str, Any]) -> None:
    one = build(replace(SMALL, decoders=decoders, boundaries=(), **change))
    plain = UViT(plain_config(one.config)).eval()
    state = plain_state(one, 0)
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    x, time = inputs()
    cond = torch.tensor([0, 4, 5]) if one.num_classes else None
    assert one.exits() == plain.exits() and one.paths == plain.paths
    assert (one.pops, one.pushes) == (plain.pops, plain.pushes)
    with torch.no_grad():
        for plan in (FULL, StepPlan(taps=plain.exits()), StepPlan(depth=2), StepPlan(bypass=frozenset({1, 3}))):
            a, b = (execute(network, network.embed(x, time, cond), plan) for network in (one, plain))
            assert torch.equal(a.prediction, b.prediction)
            assert all(torch.equal(a.taps[depth], b.taps[depth]) for depth in plan.taps)


def test_a_stage_of_the_plain_width_is_the_plain_network_bit_for_bit() -> None:
    staged = build(SMALL)
    plain = UViT(plain_config(SMALL)).eval()
    plain.load_state_dict(plain_state(staged, 1))
    x, time = inputs()
    with torch.no_grad():
        wanted = execute(plain, plain.embed(x, time, None), FULL).prediction
        got = [execute(staged, staged.embed(x, time, None), StepPlan(expert=stage)).prediction for stage in range(3)]
    assert torch.equal(got[1], wanted)
    assert not torch.equal(got[0], wanted) and not torch.equal(got[2], wanted)


def test_other_widths_by_hand() -> None:
    """The narrow decoder, block by block: the first one merges the middle's 32 channels, the second its own 8."""
    network = build(SMALL, torch.float64)
    decoder = network.decoders[2]
    assert [tuple(block.skip_linear.weight.shape) for block in decoder.out_blocks] == [(8, 64), (8, 40)]
    assert [block.attn.num_heads for block in decoder.out_blocks] == [1, 1]
    assert [block.attn.num_heads for block in network.decoders[0].out_blocks] == [6, 6]
    x, time = inputs(dtype=torch.float64)
    with torch.no_grad():
        stream = network.embed(x, time, None)
        first = network.in_blocks[0](stream.hidden, {})
        second = network.in_blocks[1](first, {})
        hidden = network.mid_block(second, {})
        for block, skip in zip(decoder.out_blocks, (second, first), strict=True):
            hidden = torch.cat([hidden, skip], -1) @ block.skip_linear.weight.T + block.skip_linear.bias
            hidden = hidden + block.attn(block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
        tokens = decoder.decoder_pred(decoder.norm(hidden))[:, 1:]
        wanted = decoder.final_layer(tokens.reshape(3, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 8, 8))
        got = execute(network, network.embed(x, time, None), StepPlan(expert=2)).prediction
    assert wanted.std() > 0.01
    assert (got - wanted).abs().max() < 1e-12


def test_rows_go_to_the_decoder_of_their_own_level() -> None:
    network = build(SMALL, torch.float64)
    process = VPSDE(VPSDEConfig())
    ratios = torch.tensor([4.0, 0.01, 3.0, 0.5, 0.5001, 3.1], dtype=torch.float64)
    stages = [2, 0, 1, 0, 1, 2]
    assert network.boundaries == (0.5, 3.0)
    assert network.route(-2 * ratios.log()).tolist() == stages
    time = process.time_of_log_snr(-2 * ratios.log())
    x, _ = inputs(6, torch.float64)
    with torch.no_grad():
        together = Denoiser(network, process).rows(x, time, None).prediction
        fed = process.network_time(time)
        for row, stage in enumerate(stages):
            stream = network.embed(x[row : row + 1], fed[row : row + 1], None)
            alone = execute(network, stream, StepPlan(expert=stage)).prediction[0]
            assert (together[row] - alone).abs().max() < 1e-12


def test_nothing_is_shared_across_stages() -> None:
    network = build(SMALL)
    x, time = inputs()
    stream = network.embed(x, time, None)
    execute(network, stream, StepPlan(expert=0)).prediction.square().sum().backward()
    for name, parameter in network.named_parameters():
        idle = name.startswith(("decoders.1.", "decoders.2."))
        assert (parameter.grad is None) == idle, name
    for stage in range(3):
        assert {name for name in plain_state(network, stage) if name.startswith(OWN)} == {
            name for name in UViT(plain_config(SMALL)).state_dict() if name.startswith(OWN)
        }
    assert len({id(module) for decoder in network.decoders for module in decoder.modules()}) == sum(
        len(list(decoder.modules())) for decoder in network.decoders
    )


def test_exits_are_where_the_width_is_the_readouts() -> None:
    network = build(SMALL)
    assert [network.exits(path) for path in range(3)] == [(4, 5), (1, 2, 3, 4, 5), (4, 5)]
    assert [network.width(5, path) for path in range(3)] == [48, 32, 8]
    assert [network.width(depth, 1) for depth in (1, 3, 4)] == [32, 32, 32]
    wrapped = EarlyExit(ExitsConfig(head="per_exit"), network)
    head = wrapped.exit_heads["0_4"]
    hidden = torch.randn(2, 17, 48)
    assert torch.equal(wrapped.readout(hidden, {}, 4, 0), network.readout(hidden, {}, 4, 0))
    nn.init.zeros_(head["norm"].weight)  # type: ignore[index]
    assert not torch.equal(wrapped.readout(hidden, {}, 4, 0), network.readout(hidden, {}, 4, 0))


def test_batched_readout_equals_single_ones() -> None:
    network = build(SMALL)
    hiddens = [torch.randn(rows, 17, 48) for rows in (2, 2, 3)]
    for hidden, image in zip(hiddens, network.readouts(hiddens, {}, (4, 4, 5), 0), strict=True):
        assert torch.allclose(network.readout(hidden, {}, 4, 0), image, atol=1e-6)
    assert network.readouts([], {}, (), 0) == []


def test_initialisation() -> None:
    network = MultiDecoderUViT(replace(SMALL, embed_dim=256, decoders=(512, 256, 64)))
    for name, parameter in network.named_parameters():
        if name.endswith("bias") and "proj" not in name and "final" not in name:
            assert not parameter.any(), name
    assert network.decoders[0].out_blocks[0].skip_linear.weight.std().item() == pytest.approx(0.02, rel=0.05)


def released() -> MultiDecoderUViT:
    with torch.device("meta"):
        network = configuration.build(OmegaConf.load(CONF))  # type: ignore[arg-type]
    assert isinstance(network, MultiDecoderUViT)
    return network


def test_header_and_sizes() -> None:
    network = released()
    config = network.config
    assert (config.embed_dim, config.decoders) == (512, (768, 512, 128))
    count = f"{sum(p.numel() for p in network.parameters()):,}".replace(",", " ")
    text = " ".join(CONF.read_text().replace("\n#", " ").split())
    assert f"Expected: {count} parameters" in text
    table = CostTable.measure(network)
    costs = [table.full(network, path) for path in range(3)]
    assert [round(cost.macs / 1e9, 2) for cost in costs] == [19.12, 12.20, 6.68]
    assert [round(cost.linear / 1e9, 2) for cost in costs] == [18.04, 11.32, 6.10]
    # The middle decoder is that of the U-ViT for CIFAR-10 (44 255 328 parameters).
    twin = plain_state(copy.deepcopy(network), 1)
    assert sum(tensor.numel() for tensor in twin.values()) == 44_255_328
    process = VPSDE(VPSDEConfig())
    ratios = torch.exp(-process.log_snr(torch.tensor([0.4420, 0.6308], dtype=torch.float64)) / 2)
    assert network.boundaries == pytest.approx(ratios.tolist(), rel=1e-9)


def test_shrinking() -> None:
    config = released().config
    small = config.shrunk()
    assert replace(small, embed_dim=512, decoders=config.decoders) == config
    assert (small.embed_dim, small.decoders) == (32, (48, 32, 8))
    assert small.shrunk() == small
    assert len(MultiDecoderUViT(small).blocks) == 7 + 3 * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 5}, "depth=5 must be even"),
        ({"decoders": (48, 30, 8)}, r"decoders=\[48, 30, 8\]: 30 must be a positive multiple of the head width .* = 8"),
        ({"decoders": (48, 0, 8)}, "0 must be a positive multiple"),
        ({"decoders": (48, 8)}, r"boundaries=\[0.5, 3.0\] end 2 stages before the last; decoders=\[48, 8\] needs 1"),
    ],
)
def test_bad_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)
