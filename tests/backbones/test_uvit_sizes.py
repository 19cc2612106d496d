"""U-ViT: the official configurations have the official sizes, names and costs; impossible ones are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.execution.executor import execute
from gearshift.execution.plan import FULL
from gearshift.runtime import config as configuration
from gearshift.runtime.errors import UsageError

CONF = Path(__file__).parents[2] / "conf" / "backbone"

# name: parameters, entries of the state dict, tokens, extra tokens, GMACs without and with attention products
# (paper's official configurations; parameters and entries counted from the official code).
OFFICIAL = {
    "uvit_cifar10": (44_255_328, 164, 257, 1, 11.32, 12.20),
    "uvit_celeba64": (44_292_228, 164, 257, 1, 11.33, 12.21),
    "uvit_imagenet64_m": (130_940_292, 213, 258, 2, 33.50, 35.24),
    "uvit_imagenet64_l": (286_827_652, 261, 258, 2, 73.61, 76.47),
    "uvit_imagenet256_l": (286_763_172, 261, 258, 2, 73.59, 76.46),
    "uvit_imagenet256_h": (500_832_016, 355, 258, 2, 128.75, 133.20),
    "uvit_imagenet512_l": (286_861_524, 261, 258, 2, 73.62, 76.48),
    "uvit_imagenet512_h": (500_942_656, 355, 258, 2, 128.78, 133.23),
    "uvit_mscoco": (44_692_644, 166, 334, 78, 14.74, 16.23),
    "uvit_mscoco_deep": (58_345_636, 214, 334, 78, 19.30, 21.24),
}


def official(name: str) -> UViT:
    with torch.device("meta"):
        network = configuration.build(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(network, UViT)
    return network


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name: str) -> None:
    params, entries, tokens, extras, _, _ = OFFICIAL[name]
    network = official(name)
    assert sum(p.numel() for p in network.parameters()) == params
    assert len(network.state_dict()) == entries
    assert network.pos_embed.shape == (1, tokens, network.config.embed_dim)
    assert network.config.extras == extras
    assert not list(network.buffers())


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_macs(name: str) -> None:
    network = official(name)
    size = network.image_size
    x = torch.empty(1, network.in_channels, size, size, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        execute(network, network.embed(x, torch.empty(1, device="meta"), network.example_cond(1)), FULL)
    counts = {str(op): flops / 2e9 for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(macs for op, macs in counts.items() if "attention" in op or "bmm" in op)
    # The published figures are rounded to two digits.
    assert sum(counts.values()) - attention == pytest.approx(OFFICIAL[name][4], abs=0.0051)
    assert sum(counts.values()) == pytest.approx(OFFICIAL[name][5], abs=0.0051)


def expected_keys(depth: int, *, condition: list[str], conv: bool) -> set[str]:
    names = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", *condition}
    blocks = (
        [f"in_blocks.{i}" for i in range(depth // 2)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(depth // 2)]
    )
    for block in blocks:
        names.add(f"{block}.attn.qkv.weight")
        layers = ["norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"] + ["skip_linear"] * block.startswith(
            "out_blocks"
        )
        names |= {f"{block}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    layers = ["norm", "decoder_pred"] + ["final_layer"] * conv
    return names | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "condition", "conv"),
    [
        ("uvit_cifar10", [], True),
        ("uvit_imagenet256_h", ["label_emb.weight"], False),
        ("uvit_mscoco_deep", ["context_embed.weight", "context_embed.bias"], True),
    ],
)
def test_official_names(name: str, condition: list[str], conv: bool) -> None:
    network = official(name)
    assert set(network.state_dict()) == expected_keys(network.config.depth, condition=condition, conv=conv)


def test_label_rows() -> None:
    assert official("uvit_imagenet64_l").label_emb.weight.shape[0] == 1000
    assert official("uvit_imagenet256_l").label_emb.weight.shape[0] == 1001


@pytest.mark.parametrize("path", sorted(CONF.glob("uvit_*.yaml")), ids=lambda path: path.stem)
def test_headers_and_shrinking(path: Path) -> None:
    """The header states the true number of parameters; the narrow twin differs in width only."""
    network = official(path.stem)
    count = f"{sum(p.numel() for p in network.parameters()):,}".replace(",", " ")
    assert f"Expected: {count} parameters" in path.read_text().replace("\n# ", " ")
    config, small = network.config, network.config.shrunk()
    assert replace(small, embed_dim=config.embed_dim) == config
    assert small.embed_dim <= 64
    assert len(UViT(small).blocks) == config.depth + 1


SMALL = UViTConfig(image_size=8, in_channels=3, patch_size=2, embed_dim=32, depth=4, num_heads=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 5}, "depth=5 must be even"),
        ({"embed_dim": 34}, "embed_dim=34 must be a multiple of num_heads=4"),
        ({"embed_dim": 33, "num_heads": 3}, "embed_dim=33 must be even"),
        ({"patch_size": 3}, "image_size=8 must be a multiple of patch_size=3"),
        ({"num_heads": 0}, "num_heads=0 must be positive"),
        ({"num_classes": 0}, "num_classes=0 must be positive"),
        ({"null_class": True}, "null_class=True needs num_classes, which is None"),
        ({"context_dim": 6}, "context_dim=6 and context_tokens=None"),
        ({"num_classes": 5, "context_dim": 6, "context_tokens": 3}, "num_classes=5 and context_dim=6 exclude"),
    ],
)
def test_bad_configurations(change: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)
