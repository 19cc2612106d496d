"""LDM U-Nets: published sizes, names, costs and stages, counted on the meta device; impossible shapes are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gearshift.backbones.ldm_unet import LdmUNet, LdmUNetConfig
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.execution.cost import CostTable
from gearshift.runtime import config as configuration
from gearshift.runtime.errors import UsageError

CONF = Path(__file__).parents[2] / "conf" / "backbone"


def network(name: str, **changes: Any) -> LdmUNet:
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), changes)
    with torch.device("meta"):
        built = configuration.build(node)  # type: ignore[arg-type]
    assert isinstance(built, LdmUNet)
    return built


def numbers(names: Any) -> int:
    return sum(p.numel() for _, p in names)


def gmacs(built: LdmUNet) -> list[tuple[float, float]]:
    """(conv+linear, all) of each path."""
    table = CostTable.measure(built)
    costs = [table.full(built, path) for path in range(len(built.paths))]
    return [(cost.linear / 1e9, cost.macs / 1e9) for cost in costs]


def test_unified_is_what_was_published() -> None:
    """274.06 M parameters (arXiv 2112.10752); 88.36 GMACs in convolutions and linear layers, 101.20 in all."""
    built = network("ldm_vq4")
    assert numbers(built.named_parameters()) == 274_056_163
    assert gmacs(built) == [(pytest.approx(88.36, abs=0.0051), pytest.approx(101.20, abs=0.0051))]


def test_multi_decoder_is_what_was_published() -> None:
    """Active parameters leave the time MLP out, stored ones do not (arXiv 2312.09181, counted from its modules)."""
    built = network("multi_decoder_ldm")
    parameters = list(built.named_parameters())
    assert numbers(parameters) == pytest.approx(493.84e6, abs=5e3)
    time = numbers(built.time_embed.named_parameters())
    decoders = [numbers(decoder.named_parameters()) for decoder in built.decoders]
    assert decoders == [pytest.approx(1e6 * size, abs=5e3) for size in (208.06, 115.92, 61.96)]
    shared = numbers(parameters) - sum(decoders) - time
    assert [shared + own for own in decoders] == [314_961_827, 222_824_611, 168_862_627]
    assert gmacs(built) == [
        (pytest.approx(105.79, abs=0.0051), pytest.approx(120.44, abs=0.0051)),
        (pytest.approx(72.94, abs=0.0051), pytest.approx(78.21, abs=0.0051)),
        (pytest.approx(48.15, abs=0.0051), pytest.approx(53.41, abs=0.0051)),
    ]


def test_attention_in_every_decoder_is_another_network() -> None:
    """And the decoder that is as wide as the encoder is the unified network."""
    unified, narrow = gmacs(network("multi_decoder_ldm", decoders=[224, 128], decoder_attention=[], boundaries=[2.0]))
    assert unified == (pytest.approx(88.36, abs=0.0051), pytest.approx(101.20, abs=0.0051))
    assert narrow == (pytest.approx(48.15, abs=0.0051), pytest.approx(56.64, abs=0.0051))


def official_names(attention: bool = True) -> set[str]:
    """Written down from the layout of the official code: four levels, two blocks each, attention below the first."""

    def res(name: str, short: bool) -> list[str]:
        layers = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
        return [f"{name}.{layer}" for layer in layers + ["skip_connection"] * short]

    def attends(name: str) -> list[str]:
        return [f"{name}.{layer}" for layer in ("norm", "qkv", "proj_out")]

    names = ["time_embed.0", "time_embed.2", "input_blocks.0.0"]
    for block in (1, 2, 4, 5, 7, 8, 10, 11):
        names += res(f"input_blocks.{block}.0", short=block in (4, 7, 10))
        names += attends(f"input_blocks.{block}.1") if block > 2 else []
    names += [f"input_blocks.{block}.0.op" for block in (3, 6, 9)]
    names += [*res("middle_block.0", False), *attends("middle_block.1"), *res("middle_block.2", False)]
    for block in range(12):
        names += res(f"output_blocks.{block}.0", short=True)
        below = attention and block < 9
        names += attends(f"output_blocks.{block}.1") if below else []
        names += [f"output_blocks.{block}.{1 + below}.conv"] if block in (2, 5, 8) else []
    names += ["out.0", "out.2"]
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def test_official_names() -> None:
    built = network("ldm_vq4")
    state = built.state_dict()
    assert set(state) == official_names()
    assert not list(built.buffers())
    shapes = {
        "time_embed.0.weight": [896, 224],
        "input_blocks.0.0.weight": [224, 3, 3, 3],
        "input_blocks.4.0.emb_layers.1.weight": [448, 896],
        "input_blocks.4.0.skip_connection.weight": [448, 224, 1, 1],
        "input_blocks.4.1.qkv.weight": [1344, 448, 1],
        "input_blocks.4.1.proj_out.weight": [448, 448, 1],
        "middle_block.1.norm.weight": [896],
        "output_blocks.0.0.in_layers.2.weight": [896, 1792, 3, 3],
        "output_blocks.11.0.in_layers.0.weight": [448],
        "out.2.weight": [3, 224, 3, 3],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes


def test_names_of_several_decoders() -> None:
    up = ("output_blocks.", "out.")
    shared = {name for name in official_names() if not name.startswith(up)}
    wanted = set(shared)
    for stage, attention in enumerate((True, False, False)):
        wanted |= {f"decoders.{stage}.{name}" for name in official_names(attention) if name.startswith(up)}
    assert set(network("multi_decoder_ldm").state_dict()) == wanted


def test_label_rows() -> None:
    assert network("ldm_vq4", num_classes=10).label_emb.weight.shape == (10, 896)
    assert network("ldm_vq4", num_classes=10, null_class=True).label_emb.weight.shape == (11, 896)


def test_stages_are_the_published_entries_of_the_table() -> None:
    """[0, 442), [442, 631), [631, 1000) of the sqrt-linear table; sigma about 2.15 and 5.32 there."""
    log_alpha_bar, ratios = 0.0, []
    for step in range(1000):
        root = math.sqrt(0.0015) + (math.sqrt(0.0195) - math.sqrt(0.0015)) * step / 999
        log_alpha_bar += math.log1p(-(root**2))
        ratios.append(math.sqrt(math.expm1(-log_alpha_bar)))
    built = network("multi_decoder_ldm")
    assert built.boundaries == pytest.approx(
        [math.sqrt(ratios[entry - 1] * ratios[entry]) for entry in (442, 631)], rel=1e-12
    )
    assert (ratios[442], ratios[631]) == (pytest.approx(2.15, abs=0.005), pytest.approx(5.32, abs=0.005))
    table = Discrete(DiscreteConfig(schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195))
    routed = LdmUNet(built.config.shrunk()).route(table.log_snr(torch.arange(1000.0, dtype=torch.float64)))
    assert routed.tolist() == [0] * 442 + [1] * 189 + [2] * 369


@pytest.mark.parametrize("name", ["ldm_vq4", "multi_decoder_ldm"])
def test_headers_and_shrinking(name: str) -> None:
    """The header states the true number of parameters; the narrow twin differs in widths only."""
    built = network(name)
    count = f"{numbers(built.named_parameters()):,}".replace(",", " ")
    text = " ".join((CONF / f"{name}.yaml").read_text().replace("\n#", " ").split())
    assert f"Expected: {count} parameters" in text
    config, small = built.config, built.config.shrunk()
    wide = replace(small, model_channels=config.model_channels, head_dim=32, num_groups=32, decoders=config.decoders)
    assert wide == config
    assert small.shrunk() == small
    assert len(LdmUNet(small).blocks) == len(built.blocks)
    assert [width <= 12 for width in small.widths] == [True] * len(config.widths)


SMALL = LdmUNetConfig(
    image_size=8,
    in_channels=3,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsamplings=(2,),
    head_dim=8,
    num_groups=8,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_res_blocks": 0}, "num_res_blocks=0 must be positive"),
        ({"channel_mult": ()}, "must have at least one level"),
        ({"channel_mult": (1, 0)}, r"channel_mult=\[1, 0\] must be positive"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"model_channels": 15, "num_groups": 5}, "model_channels=15 must be even"),
        ({"image_size": 7}, "image_size=7 must be a multiple of 2"),
        ({"attention_downsamplings": (4,)}, r"attention_downsamplings=\[4\]: 4 is none of \[1, 2\]"),
        ({"num_classes": 0}, "num_classes=0 must be positive"),
        ({"null_class": True}, "null_class=True needs num_classes, which is None"),
        ({"num_groups": 32}, "model_channels: 16 must be a multiple of num_groups=32"),
        ({"decoders": (20,)}, "decoders: 20 must be a multiple of num_groups=8"),
        ({"head_dim": 5}, "model_channels: 16 x 2 must be a multiple of head_dim=5"),
        ({"boundaries": (1.0,)}, r"boundaries=\[1.0\] end 1 stages before the last; decoders=\[\] needs 0"),
        ({"decoders": (16, 8)}, r"boundaries=\[\] end 0 stages before the last; decoders=\[16, 8\] needs 1"),
        ({"decoder_attention": (True, False)}, r"decoder_attention=\[True, False\] must have one entry per decoder, 1"),
    ],
)
def test_bad_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


def test_bad_boundaries() -> None:
    with pytest.raises(UsageError, match="ascending"):
        LdmUNet(replace(SMALL, decoders=(16, 8, 8), boundaries=(2.0, 1.0)))
