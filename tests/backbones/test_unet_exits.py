"""Exits of U-Nets: where they can be set, their heads, and the plain network that they leave as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.ldm_unet import LdmUNet, LdmUNetConfig
from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_blocks import SMALL
from gearshift.backbones.unet_exits import DecoderLevels, LevelHead
from gearshift.execution.cost import CostTable
from gearshift.execution.executor import execute
from gearshift.execution.outputs import SIMULATE
from gearshift.execution.plan import FULL, StepPlan
from gearshift.runtime.errors import UsageError

from ..contract import EAGER, TOLERANCE
from .unets import PYRAMID, STAGED, STANDARD, drawn, inputs, run, with_exits

THREE = replace(STANDARD, model_channels=8, channel_mult=(1, 2, 3))
LDM = LdmUNetConfig(
    image_size=8,
    in_channels=2,
    model_channels=8,
    channel_mult=(1, 2, 3),
    num_res_blocks=1,
    attention_downsamplings=(2,),
    head_dim=4,
    num_groups=4,
)


def after(network: Backbone, path: int = 0) -> dict[int, Tensor]:
    """Hidden states of the path by depth, run by hand on `example`."""
    stream = network.embed(*example(network), None)
    states = {}
    for depth, block in enumerate(network.paths[path], start=1):
        skip = stream.pop() if block in network.pops else None
        stream.hidden = network.blocks[block](stream.hidden, stream.cond, skip)
        states[depth] = stream.hidden
        if block in network.pushes:
            stream.push()
        if block in network.carries:
            stream.cond = {**stream.cond, network.carries[block]: stream.hidden}
    return states


def example(network: Backbone) -> tuple[Tensor, Tensor]:
    """Three images and times."""
    generator = torch.Generator().manual_seed(4)
    dtype, size = next(network.parameters()).dtype, network.image_size
    x = torch.randn(3, network.in_channels, size, size, generator=generator)
    return x.to(dtype), torch.rand(3, generator=generator).to(dtype)


def fresh(network: Backbone) -> EarlyExit:
    return EarlyExit(ExitsConfig(head="per_exit"), network)


# Where ---------------------------------------------------------------------------------------------------------------


def test_levels_end_after_their_last_block() -> None:
    """A decoder level has `num_blocks` + 1 blocks and, but for the lowest, a step up before them."""
    network = UNet(PYRAMID)
    names = {id(module): name for name, module in network.named_modules()}
    ends = network.readable(own=True)
    assert [names[id(network.blocks[depth - 1])] for depth in ends] == [f"dec.{s}x{s}_block2" for s in (2, 4, 8)]
    assert (network.exits(), network.readable()) == ((len(network.blocks),),) * 2
    assert UNet(THREE).readable(own=True) == (9, 12, 15)  # 5 blocks of the encoder, 2 in the middle
    assert UNet(replace(THREE, channel_mult=(1,), attention_resolutions=())).readable(own=True) == (5,)
    # The middle is no level, whichever half it belongs to.
    assert UNet(replace(THREE, middle="shared")).readable(own=True) == UNet(THREE).readable(own=True)


@pytest.mark.parametrize(
    ("network", "shapes"),
    [
        (UNet(THREE), [[(24, 4), (16, 2), (8, 1)]]),
        (UNet(STAGED), [[(24, 2), (12, 1)], [(16, 2), (8, 1)], [(8, 2), (4, 1)]]),
        # The last block of a level of the latent U-Net doubles the side too.
        (LdmUNet(LDM), [[(24, 2), (16, 1), (8, 1)]]),
        (
            LdmUNet(replace(LDM, decoders=(12, 4), boundaries=(1.0,))),
            [[(36, 2), (24, 1), (12, 1)], [(12, 2), (8, 1), (4, 1)]],
        ),
    ],
    ids=["unet", "unet-decoders", "ldm", "ldm-decoders"],
)
def test_widths_and_patches_are_those_of_the_states(
    network: DecoderLevels, shapes: list[list[tuple[int, int]]]
) -> None:
    for path, wanted in enumerate(shapes):
        depths = network.readable(path, own=True)
        assert [(network.width(d, path), network.patch(d, path)) for d in depths] == wanted
        assert depths[-1] == network.num_blocks(path)
        states = after(network, path)
        for depth in depths:
            width, side = network.width(depth, path), network.image_size // network.patch(depth, path)
            assert states[depth].shape == (3, width, side, side)
            tokens = network.tokens(states[depth], depth, path)
            assert tokens.shape == (3, side * side, width)
            assert torch.equal(tokens[:, side + 1], states[depth][:, :, 1, 1])


def test_every_level_has_an_exit() -> None:
    network = fresh(UNet(STAGED))
    assert [network.exits(path) for path in range(3)] == [(7, 10)] * 3
    assert sorted(network.exit_heads) == ["0_7", "1_7", "2_7"]
    assert sorted(network.uncertainty_heads) == [f"{path}_{depth}" for path in range(3) for depth in (10, 7)]
    assert EarlyExit(ExitsConfig(head="per_exit", depths=[12]), UNet(THREE)).exits() == (12, 15)


# Heads ---------------------------------------------------------------------------------------------------------------


def test_a_head_is_norm_silu_and_a_convolution_of_its_level() -> None:
    network = fresh(UNet(THREE))
    for key, width, patch in (("0_9", 24, 4), ("0_12", 16, 2)):
        head = network.exit_heads[key]
        assert isinstance(head, LevelHead)
        assert (head.norm.num_groups, head.norm.num_channels, head.norm.eps) == (width // 4, width, 1e-6)
        outputs = patch * patch * 2
        assert head.conv.weight.shape == (outputs, width, 3, 3)
        assert sum(p.numel() for p in head.parameters()) == 2 * width + outputs * (9 * width + 1)
        assert network.uncertainty_heads[key].linear.weight.shape == (outputs, width)
    hidden = after(network)[12]
    head = network.exit_heads["0_12"]
    wanted = nn.functional.pixel_shuffle(  # whose order of channels is (C, p1, p2)
        head.conv(nn.functional.silu(head.norm(hidden))).unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2), 2
    )
    torch.testing.assert_close(network.readout(hidden, {}, 12), wanted, **TOLERANCE)


@pytest.mark.parametrize(("network", "depth"), [(UNet(THREE), 9), (UNet(THREE), 12), (LdmUNet(LDM), 8)])
def test_channels_of_a_position_are_its_pixels(network: DecoderLevels, depth: int) -> None:
    """Channel (p1, p2, c) of the position in row i, column j is pixel (i p + p1, j p + p2) of channel c: a convolution
    that hands channel k on to output k shows where each goes."""
    p, side = network.patch(depth), network.image_size // network.patch(depth)
    outputs = p * p * network.out_channels
    head = network.readout_modules(depth)
    with torch.no_grad():
        head.norm = nn.GroupNorm(1, outputs)
        head.conv = nn.Conv2d(outputs, outputs, 3, padding=1)
        head.conv.weight.zero_()
        head.conv.weight[:, :, 1, 1] = torch.eye(outputs)
        head.conv.bias.zero_()
        hidden = torch.randn(2, outputs, side, side)
        image = network.readout_with(head, hidden, {}, depth)
        seen = nn.functional.silu(head.norm(hidden))
    assert image.shape == (2, network.out_channels, network.image_size, network.image_size)
    assert image.is_contiguous()
    for p1 in range(p):
        for p2 in range(p):
            for c in range(network.out_channels):
                channel = (p1 * p + p2) * network.out_channels + c
                torch.testing.assert_close(image[:, c, p1::p, p2::p], seen[:, channel], **TOLERANCE)


def test_untrained_exits_predict_nearly_nothing() -> None:
    """As the U-Net's own readout: xavier times 1e-5, zero bias; the latent U-Net's is zero."""
    torch.manual_seed(0)
    network = fresh(UNet(THREE))
    for key, depth in (("0_9", 9), ("0_12", 12)):
        head = network.exit_heads[key]
        outputs, width = head.conv.weight.shape[:2]
        bound = SMALL * (6 / (9 * (outputs + width))) ** 0.5
        assert 0.9 * bound < head.conv.weight.abs().max() < 1.001 * bound
        assert not head.conv.bias.any() and not head.norm.bias.any() and bool((head.norm.weight == 1).all())
        assert 0 < network.readout(after(network)[depth], {}, depth).abs().max() < 1e-3
    latent = fresh(LdmUNet(LDM))
    assert sorted(latent.exit_heads) == ["0_10", "0_8"]
    assert not any(latent.readout(after(latent)[depth], {}, depth).any() for depth in (8, 10))


def test_the_full_depth_keeps_the_networks_own_readout() -> None:
    for network, name in ((drawn(STANDARD, torch.float32), "8x8_aux_conv"), (LdmUNet(LDM), None)):
        full = network.num_blocks()
        own = network.readout_modules(full)
        assert isinstance(own, LevelHead)
        convolution = network.decoder(0)[name] if isinstance(network, UNet) else network.out[2]
        assert own.conv is convolution
        nn.init.normal_(convolution.weight)
        hidden = after(network)[full]
        torch.testing.assert_close(
            network.readout_with(own, hidden, {}, full), network.readout(hidden, {}, full), **TOLERANCE
        )
        wrapped = fresh(network)
        assert f"0_{full}" not in wrapped.exit_heads
        assert torch.equal(wrapped.readout(hidden, {}, full), network.readout(hidden, {}, full))


def test_heads_lie_as_the_network_does() -> None:
    """Channels last, in its precision."""
    network = with_exits(drawn(THREE, torch.float64))
    states = after(network)
    for depth in (9, 12):
        head = network.exit_heads[f"0_{depth}"]
        assert head.conv.weight.dtype == head.norm.weight.dtype == torch.float64
        assert head.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not head.conv.weight.is_contiguous()
        prediction = network.readout(states[depth], {}, depth)
        assert prediction.dtype == torch.float64 and prediction.is_contiguous()


def test_loading_a_network_leaves_the_heads_of_lower_levels() -> None:
    network = with_exits(drawn(THREE, torch.float32))
    before = {name: tensor.clone() for name, tensor in network.exit_heads.state_dict().items()}
    network.copy_readout()
    assert len(before) == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.exit_heads.state_dict().items())


# The network around them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [THREE, PYRAMID, STAGED], ids=["three", "pyramid", "staged"])
def test_exits_leave_the_plain_network_bit_for_bit(config) -> None:  # type: ignore[no-untyped-def]
    plain = drawn(config, torch.float32)
    names = set(plain.state_dict())
    wrapped = with_exits(drawn(config, torch.float32))
    assert {f"backbone.{name}" for name in names} < set(wrapped.state_dict())
    assert set(plain.state_dict()) == names
    x, time = inputs(config, dtype=torch.float32)
    expert = torch.arange(len(x)) % len(plain.paths)
    plan = StepPlan(expert=expert) if len(plain.paths) > 1 else FULL
    with torch.no_grad():
        assert torch.equal(
            execute(wrapped, wrapped.embed(x, time, None), plan).prediction, run(plain, x, time, plan=plan).prediction
        )


def test_an_exit_is_the_level_read_out_by_its_head() -> None:
    """Three levels, the pyramid carried along; nothing behind the exit runs."""
    network = with_exits(drawn(PYRAMID, torch.float64))
    with torch.no_grad():
        states = after(network)
        for depth in network.exits():
            outputs = execute(network, network.embed(*example(network), None), StepPlan(depth=depth))
            ran = [event.index for event in outputs.trace if event.kind == "block"]
            assert ran == list(network.paths[0][:depth])
            hand = network.readout(states[depth], {}, depth)
            torch.testing.assert_close(outputs.prediction, hand, rtol=0, atol=1e-12)


def test_rows_of_several_decoders_leave_behind_their_own_levels() -> None:
    """A batch of three stages and two depths: every row as if it were alone, packed and simulated alike."""
    network = with_exits(drawn(STAGED, torch.float64))
    x, time = inputs(STAGED, rows=6)
    expert, depth = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([7, 10, 7, 10, 7, 10])
    with torch.no_grad():
        mixed = [
            execute(network, network.embed(x, time, None), StepPlan(expert=expert, depth=depth), packing=packing)
            for packing in (EAGER, SIMULATE)
        ]
        for row in range(6):
            plan = StepPlan(expert=int(expert[row]), depth=int(depth[row]))
            alone = execute(network, network.embed(x[row : row + 1], time[row : row + 1], None), plan).prediction
            for outputs in mixed:
                torch.testing.assert_close(outputs.prediction[row : row + 1], alone, rtol=0, atol=1e-10)
    assert all(torch.equal(outputs.depth, depth) for outputs in mixed)


def test_what_exits_cost() -> None:
    """Blocks up to the exit and its heads, nothing behind; a head's convolution takes 9 D C for every pixel."""
    network = with_exits(drawn(replace(STANDARD, model_channels=8), torch.float32))
    table = CostTable.measure(network)
    blocks, pixels = network.paths[0], 8 * 8
    for depth, width in ((7, 16), (10, 8)):
        assert table.entries["readout", 0, depth, "full"].linear == 9 * width * 2 * pixels
        assert table.entries["uncertainty", 0, depth, "full"].linear == width * 2 * pixels
        before = sum(table.entries["block", 0, block, "full"].macs for block in blocks[:depth])
        embedded = table.entries["embed", 0, 0, "full"].macs
        assert table.path_cost(0, depth, blocks=blocks).macs == embedded + before + 9 * width * 2 * pixels
    assert table.full(network) == CostTable.measure(network.backbone).full(network.backbone)


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_the_networks_own_readout_serves_the_full_depth_alone() -> None:
    assert EarlyExit(ExitsConfig(), UNet(THREE)).exits() == (15,)
    with pytest.raises(UsageError, match=r"names depth 9; UNet can be read out at \[15\]"):
        EarlyExit(ExitsConfig(depths=[9]), UNet(THREE))
    with pytest.raises(UsageError, match=r"names depth 8; UNet can be read out at \[9, 12, 15\]"):
        EarlyExit(ExitsConfig(head="per_exit", depths=[8]), UNet(THREE))
    with pytest.raises(UsageError, match=r"block_inputs needs a readout before the first block, and UNet can be read"):
        EarlyExit(ExitsConfig(head="per_exit", points="block_inputs"), UNet(THREE))


@pytest.mark.parametrize("per", ["network", "timestep"])
def test_one_uncertainty_head_does_not_fit_several_levels(per: str) -> None:
    config = ExitsConfig(head="per_exit", uncertainty="token_mean", per=per)
    with pytest.raises(UsageError, match=f"per={per} has one head for all depths, and those of UNet have widths 24 "):
        EarlyExit(config, UNet(THREE))


@pytest.mark.parametrize("kind", ["unet", "ldm"])
def test_only_ends_of_levels_have_a_shape(kind: str) -> None:
    network: DecoderLevels = UNet(THREE) if kind == "unet" else LdmUNet(LDM)
    for ask in (network.width, network.patch, network.readout_modules):
        with pytest.raises(UsageError, match=r"depth 3 is not the end of a decoder level of .*UNet; they end at \["):
            ask(3)
