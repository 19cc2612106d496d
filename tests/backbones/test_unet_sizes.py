"""U-Net: published configurations have the published sizes, names and costs; impossible ones are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_config import UNetConfig
from gearshift.execution.cost import CostTable
from gearshift.runtime import config as configuration
from gearshift.runtime.errors import UsageError

CONF = Path(__file__).parents[2] / "conf" / "backbone"
FILES = sorted(
    path for path in CONF.glob("*.yaml") if "\n_target_: gearshift.backbones.unet.UNet\n" in path.read_text()
)


def named(name: str, **change: Any) -> UNet:
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), OmegaConf.create(change))
    with torch.device("meta"):
        network = configuration.build(node)
    assert isinstance(network, UNet)
    return network


def stored(network: UNet) -> int:
    return sum(p.numel() for p in network.parameters())


def active(network: UNet) -> list[int]:
    """Parameters a row of each stage uses: all but those of the other decoders."""
    own = [sum(p.numel() for p in network.decoder(stage).parameters()) for stage in range(len(network.paths))]
    return [stored(network) - sum(own) + count for count in own]


def gmacs(network: UNet) -> tuple[list[float], list[float]]:
    """In layers, and in all, of each path."""
    table = CostTable.measure(network)
    costs = [table.full(network, path) for path in range(len(network.paths))]
    return [cost.linear / 1e9 for cost in costs], [cost.macs / 1e9 for cost in costs]


def entries(network: UNet) -> int:
    return len(network.state_dict())


def test_ddpmpp() -> None:
    network = named("ddpmpp")
    assert (entries(network), stored(network)) == (425, 55_733_891)
    assert gmacs(network) == (pytest.approx([21.02], abs=0.005), pytest.approx([21.19], abs=0.005))
    told = named("ddpmpp", num_classes=10)
    assert stored(told) == 55_733_891 + 128 * 11
    assert gmacs(told) == (pytest.approx([21.02], abs=0.005), pytest.approx([21.19], abs=0.005))


def test_ncsnpp() -> None:
    network = named("ncsnpp")
    assert (entries(network), stored(network)) == (432, 56_397_827)
    layers, total = gmacs(network)
    assert layers == pytest.approx([21.06], abs=0.005)
    assert total == pytest.approx([21.23], abs=0.008)  # published without the filters


def test_ddpmpp_at_64() -> None:
    network = named("ddpmpp", image_size=64, channel_mult=[1, 2, 2, 2])
    assert stored(network) / 1e6 == pytest.approx(61.8, abs=0.05)
    assert gmacs(network) == (pytest.approx([41.69], abs=0.005), pytest.approx([41.86], abs=0.005))


def test_ddpmpp_deep() -> None:
    assert stored(named("ddpmpp_deep")) / 1e6 == pytest.approx(106.63, abs=0.005)
    assert gmacs(named("ddpmpp_deep"))[0] == pytest.approx([17.64], abs=0.005)
    layers, total = gmacs(named("ddpmpp_deep", nin=False))
    assert (layers, total) == (pytest.approx([18.2], abs=0.05), pytest.approx([18.5], abs=0.05))


def test_multi_decoder_vp() -> None:
    network = named("multi_decoder_vp")
    assert active(network) == [169_478_467, 107_521_411, 47_134_707]
    decoders = [sum(p.numel() for p in network.decoder(stage).parameters()) for stage in range(3)]
    assert stored(network) - sum(decoders) == 43_482_624
    assert [count / 1e6 for count in decoders] == pytest.approx([126.00, 64.04, 3.65], abs=0.005)
    assert stored(network) == 237_169_337
    layers, total = gmacs(network)
    assert layers == pytest.approx([29.93, 17.64, 6.31], abs=0.005)
    # Published totals hold work that is thrown away: filters over zeros that were put between pixels on the way up, and
    # at pixels that are left out on the way down. Sixteen products per pixel and channel, two convolutions per block.
    wasted = [_wasted(width) / 1e9 for width in (384, 256, 32)]
    assert [a + b for a, b in zip(total, wasted, strict=True)] == pytest.approx([30.99, 18.59, 7.16], abs=0.005)


def _wasted(decoder: int) -> int:
    ups = sum(3 * side**2 * width for side, width in ((4, 256), (8, decoder), (16, decoder)))
    downs = sum(((2 * side - 1) ** 2 - side**2) * width for side, width in ((16, 128), (8, 256), (4, 256)))
    return 2 * 16 * (ups + downs)


def test_unified_vp_is_the_middle_stage_alone() -> None:
    network = named("unified_vp")
    assert stored(network) == 107_521_411
    assert gmacs(network)[0] == pytest.approx([17.64], abs=0.005)
    table, staged = CostTable.measure(network), CostTable.measure(named("multi_decoder_vp"))
    assert table.full(network) == staged.full(named("multi_decoder_vp"), 1)


def test_multi_decoder_edm() -> None:
    network = named("multi_decoder_edm")
    assert active(network) == [87_917_315, 55_733_891, 24_407_715]
    assert stored(network) == 128_793_385
    assert gmacs(network)[1] == pytest.approx([35.75, 21.19, 7.73], abs=0.005)
    assert stored(named("unified_edm")) == 55_733_891


def expected_names(pyramid: bool) -> set[str]:
    """Of the official networks for 32x32, without the embedding of labels."""
    names = {"map_augment.weight", *(["map_noise.freqs"] if pyramid else [])}
    layers = ["map_layer0", "map_layer1", "enc.32x32_conv", "dec.32x32_aux_norm", "dec.32x32_aux_conv"]

    def block(name: str, shortcut: bool, attention: bool) -> None:
        inside = ["norm0", "conv0", "affine", "norm1", "conv1"]
        inside += ["skip"] * shortcut + ["norm2", "qkv", "proj"] * attention
        layers.extend(f"{name}.{layer}" for layer in inside)
        if name.endswith(("_down", "_up")):
            names.update({f"{name}.conv0.resample_filter", f"{name}.skip.resample_filter"})

    for side in (32, 16, 8):
        if side < 32:
            block(f"enc.{side}x{side}_down", True, False)
            if pyramid:
                layers.append(f"enc.{side}x{side}_aux_residual")
                names.add(f"enc.{side}x{side}_aux_residual.resample_filter")
        for i in range(4):
            block(f"enc.{side}x{side}_block{i}", side == 32 and i == 0, side == 16)
        if side == 8:
            block("dec.8x8_in0", False, True)
            block("dec.8x8_in1", False, False)
        else:
            block(f"dec.{side}x{side}_up", True, False)
        for i in range(5):
            block(f"dec.{side}x{side}_block{i}", True, side == 16 and i == 4)
    return names | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])
def test_official_names_and_shapes(name: str) -> None:
    pyramid = name == "ncsnpp"
    state = named(name).state_dict()
    assert set(state) == expected_names(pyramid)
    assert state["enc.16x16_block0.qkv.weight"].shape == (768, 256, 1, 1)
    assert state["dec.16x16_up.conv0.resample_filter"].shape == ((1, 1, 4, 4) if pyramid else (1, 1, 2, 2))
    assert state["map_augment.weight"].shape == ((256, 9) if pyramid else (128, 9))
    assert state["map_layer0.weight"].shape == ((512, 256) if pyramid else (512, 128))
    if pyramid:
        assert state["map_noise.freqs"].shape == (128,)
        assert state["enc.16x16_aux_residual.weight"].shape == (256, 3, 3, 3)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_headers_and_shrinking(path: Path) -> None:
    """The header states the true number of parameters; the narrow twin differs in widths only."""
    network = named(path.stem)
    count = f"{stored(network):,}".replace(",", " ")
    assert f"Expected: {count} parameters" in path.read_text().replace("\n# ", " ")
    small = network.config.shrunk()
    assert replace(small, model_channels=network.config.model_channels, decoders=network.config.decoders) == (
        network.config
    )
    twin = UNet(small)
    assert (twin.paths, twin.pops, twin.pushes) == (network.paths, network.pops, network.pushes)
    assert stored(twin) < 2_000_000
    assert small.shrunk() == small


def test_all_configurations_are_looked_at() -> None:
    assert {path.stem for path in FILES} >= {
        *("ddpmpp", "ncsnpp", "ddpmpp_deep", "unified_vp", "multi_decoder_vp", "unified_edm", "multi_decoder_edm"),
        *("unet_digits", "multi_decoder_digits", "unet_cifar10_tiny", "multi_decoder_cifar10_tiny"),
    }


@pytest.mark.parametrize("data", ["digits", "cifar10_tiny"])
def test_small_pairs_share_their_backbone(data: str) -> None:
    """The multi-stage network is the baseline but for its decoders, one of which is the baseline's own."""
    plain, staged = named(f"unet_{data}").config, named(f"multi_decoder_{data}").config
    assert replace(staged, decoders=(), boundaries=()) == plain
    assert staged.decoders[1] == plain.model_channels


SMALL = UNetConfig(image_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 0}, "num_blocks=0 must be positive"),
        ({"channel_mult": (1, 0)}, r"channel_mult=\[1, 0\] must be positive"),
        ({"channel_mult": ()}, "names no level"),
        ({"model_channels": 10}, "model_channels=10 must be a multiple of 4"),
        ({"image_size": 9}, "image_size=9 must be a multiple of 2"),
        ({"embedding": "sines"}, r"embedding='sines' is not one of \['positional', 'fourier'\]"),
        ({"encoder": "skip"}, "encoder='skip' is not one of"),
        ({"middle": "both"}, "middle='both' is not one of"),
        ({"resample_filter": (1, 2, 1)}, "even number of taps"),
        ({"resample_filter": (1, 3)}, "two taps must be equal"),
        ({"dropout": 1.0}, "dropout=1.0 must be in"),
        ({"num_classes": 0}, "num_classes=0 must be positive"),
        ({"null_class": True}, "null_class=True needs num_classes, which is None"),
        ({"augment_dim": -1}, "augment_dim=-1"),
        ({"decoders": (8, 8)}, r"decoders=\[8, 8\] make 2 stages, and boundaries=\[\] make 1"),
        ({"boundaries": (1.0,)}, r"boundaries=\[1.0\] make 2"),
        ({"decoders": (8, 8, 8), "boundaries": (2.0, 1.0)}, "strictly ascending"),
    ],
)
def test_bad_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


def test_bad_widths() -> None:
    with (
        torch.device("meta"),
        pytest.raises(UsageError, match=r"144 channels would have min\(32, 144//4\) = 32 groups"),
    ):
        UNet(replace(SMALL, model_channels=128, decoders=(16,)))
    with pytest.raises(UsageError, match="num_heads=3"):
        UNet(replace(SMALL, num_heads=3))
