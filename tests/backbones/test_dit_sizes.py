"""DiT: the official configurations have the official sizes, names and costs; impossible ones are refused."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.execution.cost import CostTable
from gearshift.runtime import config as configuration
from gearshift.runtime.errors import UsageError

CONF = Path(__file__).parents[2] / "conf" / "backbone"
WIDTHS = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}

# name: millions of parameters and "Gflops" (multiply-accumulates) as the paper prints them.
PUBLISHED = {
    "dit_s_2": (32.96, 6.06),
    "dit_s_4": (32.95, 1.41),
    "dit_s_8": (33.15, 0.36),
    "dit_b_2": (130.51, 23.01),
    "dit_b_4": (130.48, 5.56),
    "dit_b_8": (130.88, 1.42),
    "dit_l_2": (458.10, 80.71),
    "dit_l_4": (458.05, 19.70),
    "dit_l_8": (458.59, 5.01),
    "dit_xl_2": (675.13, 118.64),
    "dit_xl_4": (675.07, 29.05),
    "dit_xl_8": (675.68, 7.39),
}
SIZES = [*PUBLISHED, "dit_xl_2_512"]


@functools.cache
def official(name: str) -> DiT:
    with torch.device("meta"):
        network = configuration.build(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(network, DiT)
    return network


@functools.cache
def costs(name: str) -> CostTable:
    return CostTable.measure(official(name))


def expected(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official file."""
    _, size, patch, *larger = name.split("_")
    dim, depth, _ = WIDTHS[size]
    p = int(patch)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, ((64 if larger else 32) // p) ** 2, dim),
        "y_embedder.embedding_table.weight": (1001, dim),
        "x_embedder.proj.weight": (dim, 4, p, p),
        "x_embedder.proj.bias": (dim,),
    }
    linears = {
        "t_embedder.mlp.0": (dim, 256),
        "t_embedder.mlp.2": (dim, dim),
        "final_layer.linear": (p * p * 8, dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
    }
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * dim, dim),
            f"blocks.{i}.attn.proj": (dim, dim),
            f"blocks.{i}.mlp.fc1": (4 * dim, dim),
            f"blocks.{i}.mlp.fc2": (dim, 4 * dim),
            f"blocks.{i}.adaLN_modulation.1": (6 * dim, dim),
        }
    for module, shape in linears.items():
        shapes |= {f"{module}.weight": shape, f"{module}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("name", SIZES)
def test_official_names_shapes_and_sizes(name: str) -> None:
    network = official(name)
    shapes = expected(name)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(p.numel() for p in network.parameters()) == count
    if name in PUBLISHED:
        assert round(count / 1e6, 2) == PUBLISHED[name][0]
    if name == "dit_xl_2":
        assert count == 675_129_632
    assert network.config.num_heads == WIDTHS[name.split("_")[1]][2]
    assert (network.out_channels, network.num_classes) == (8, 1000)


@pytest.mark.parametrize("name", SIZES)
def test_official_macs(name: str) -> None:
    """To 0.05 % of the paper's numbers, which themselves have two decimals; and to the unit of a count by hand."""
    network = official(name)
    table = costs(name)
    macs = table.full(network).macs
    if name in PUBLISHED:
        published = PUBLISHED[name][1]
        assert abs(macs / 1e9 - published) <= 0.0005 * published + 0.005
    config, tokens = network.config, network.config.side**2
    dim, p = config.embed_dim, config.patch_size
    block = tokens * 12 * dim**2 + 2 * tokens**2 * dim + 6 * dim**2
    outside = tokens * dim * p * p * (4 + 8) + 2 * dim**2 + 256 * dim + dim**2
    assert macs == config.depth * block + outside
    assert table.entries["block", 0, 0, "full"].macs == block


def test_published_costs_of_xl_2() -> None:
    network = official("dit_xl_2")
    table = costs("dit_xl_2")
    assert round(table.full(network).macs / 1e9, 2) == 118.62
    assert round(table.entries["block", 0, 0, "full"].macs / 1e9, 3) == 4.236
    # The one published exit schedule, ten equal bins of training steps.
    depths = [28, 28, 24, 24, 20, 20, 16, 16, 12, 12]
    assert round(sum(table.path_cost(0, d, blocks=network.paths[0]).macs for d in depths) / 1e10, 2) == 84.73
    larger = official("dit_xl_2_512")
    assert costs("dit_xl_2_512").full(larger).macs / 1e9 == pytest.approx(524.6, rel=0.0005)


@pytest.mark.parametrize("path", sorted(CONF.glob("dit_*.yaml")), ids=lambda path: path.stem)
def test_headers_and_shrinking(path: Path) -> None:
    """The header states the true parameters, tokens and cost; the narrow twin differs in width only."""
    network = official(path.stem)
    text = path.read_text().replace("\n# ", " ")
    count = f"{sum(p.numel() for p in network.parameters()):,}".replace(",", " ")
    assert f"Expected: {count} parameters" in text
    assert f"{network.config.side**2} tokens" in text
    gmacs = float(text.split(" GMACs")[0].rsplit(" ", 1)[1])
    assert costs(path.stem).full(network).macs / 1e9 == pytest.approx(gmacs, abs=0.0051, rel=0.01)
    config, small = network.config, network.config.shrunk()
    assert replace(small, embed_dim=config.embed_dim) == config
    assert small.embed_dim <= 64
    assert len(DiT(small).blocks) == config.depth


SMALL = DiTConfig(image_size=8, in_channels=3, patch_size=2, embed_dim=32, depth=4, num_heads=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth=0 must be positive"),
        ({"embed_dim": 34}, "embed_dim=34 must be a multiple of num_heads=4"),
        ({"embed_dim": 30, "num_heads": 3}, "embed_dim=30 must be a multiple of 4"),
        ({"patch_size": 3}, "image_size=8 must be a multiple of patch_size=3"),
        ({"num_classes": 0}, "num_classes=0 must be positive"),
        ({"null_class": True}, "null_class=True needs num_classes, which is None"),
    ],
)
def test_bad_configurations(change: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)  # type: ignore[arg-type]
