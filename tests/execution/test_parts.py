"""What a network can leave behind: against what a call does leave behind, and against published sizes."""

from __future__ import annotations

import pytest
import torch

from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.execution.memory import Memory
from gearshift.execution.parts import AttentionShape, attention_bytes, attention_of, kept_bytes, parts_of
from gearshift.execution.plan import PARTS
from gearshift.execution.stream import Rows

from ..contract import CASES, Subject, build


@pytest.fixture(params=[case.name for case in CASES])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_a_call_leaves_behind(name: str) -> None:
    """On every path, with everything wanted: the same entries, shapes and bytes."""
    network = build(name)
    parts, every = parts_of(network), Rows(6)
    memory = Memory(6, {(block, part) for block in range(len(network.blocks)) for part in PARTS})
    for path in range(len(network.paths)):
        subject = Subject.of(name, path)
        memory.begin_call()
        subject.run(subject.plan(), memory)
    assert {key for key in memory.keys if bool(memory.valid(key, every).all())} == set(parts)
    for key, shapes in parts.items():
        stored = [tensor for tensors in memory.read(key, every).values() for tensor in tensors]
        assert tuple(tuple(tensor.shape[1:]) for tensor in stored) == shapes
        assert sum(tensor.numel() * 4 for tensor in stored) == 6 * kept_bytes(network, [key]) > 0
    assert memory.num_bytes == 6 * kept_bytes(network, parts)


def test_attention_by_its_shapes(name: str) -> None:
    network = build(name)
    parts, attending = parts_of(network), attention_of(network)
    assert set(attending) == {block for block, part in parts if part == "map"}
    assert all((block, "block") in parts for block in range(len(network.blocks)))
    for block, shapes in attending.items():
        assert parts[block, "map"] == tuple((shape.heads, shape.tokens, shape.tokens) for shape in shapes)
        assert parts[block, "output"] == tuple((shape.tokens, shape.heads * shape.head_dim) for shape in shapes)
        for part in ("qk", "map", "output"):
            wanted = sum(attention_bytes(part, 6, shape, 2) for shape in shapes)
            assert wanted == 6 * kept_bytes(network, [(block, part)], element_size=2)


def test_what_is_not_there_takes_no_room() -> None:
    assert kept_bytes(build("unet-class"), [(0, "map"), (99, "block")]) == 0


# Self-attention of whole models: operators of one shape, and how many of them.
SD15 = {
    AttentionShape(64**2, 8, 40): 5,
    AttentionShape(32**2, 8, 80): 5,
    AttentionShape(16**2, 8, 160): 5,
    AttentionShape(8**2, 8, 160): 1,
}
SDXL = {AttentionShape(64**2, 10, 64): 10, AttentionShape(32**2, 20, 64): 60}
DIT_256, DIT_512 = {AttentionShape(256, 16, 72): 28}, {AttentionShape(1024, 16, 72): 28}
PIXART = {AttentionShape(64**2, 16, 72): 28}
FLUX = {AttentionShape(64**2 + 512, 24, 128): 57}  # text and image tokens in one
GB, MB = 1e9, 1e6


@pytest.mark.parametrize(
    ("model", "rows", "part", "size", "rounded"),
    [
        (SD15, 2, "map", 2.86 * GB, 0.005 * GB),
        (SD15, 2, "qk", 92 * MB, 0.5 * MB),
        (SD15, 2, "output", 46 * MB, 0.5 * MB),
        (SDXL, 2, "map", 11.7 * GB, 0.05 * GB),
        (SDXL, 2, "qk", 0.84 * GB, 0.005 * GB),
        (SDXL, 2, "output", 0.42 * GB, 0.005 * GB),
        (DIT_256, 2, "map", 0.12 * GB, 0.005 * GB),
        (DIT_256, 2, "output", 33 * MB, 0.5 * MB),
        (DIT_512, 2, "map", 1.9 * GB, 0.05 * GB),
        (PIXART, 2, "map", 30 * GB, 0.5 * GB),
        (PIXART, 2, "output", 0.53 * GB, 0.005 * GB),
        (FLUX, 1, "map", 58 * GB, 0.5 * GB),
        (FLUX, 1, "output", 1.6 * GB, 0.05 * GB),
    ],
)
def test_sizes_in_the_literature(
    model: dict[AttentionShape, int], rows: int, part: str, size: float, rounded: float
) -> None:
    """Table of section 6 of our notes on arXiv 2401.01008: two bytes an element, both branches of guidance.

    Its maps, queries and keys and outputs are of self-attention alone; cross-attention, which no operator of this
    project does, has a column of its own (66 MB of maps in SD-1.5).
    """
    held = sum(count * attention_bytes(part, rows, shape, 2) for shape, count in model.items())
    assert held == pytest.approx(size, abs=rounded)


def test_cross_maps_are_the_column_that_is_left_out() -> None:
    """77 tokens of text against N of the image."""
    cross = sum(count * 2 * shape.heads * shape.tokens * 77 * 2 for shape, count in SD15.items())
    assert cross == pytest.approx(66 * MB, abs=0.5 * MB)
    one = attention_bytes("map", 2, AttentionShape(64**2, 8, 40), 2)
    assert one == pytest.approx(537 * MB, abs=0.5 * MB)


@pytest.mark.parametrize(("image_size", "shapes"), [(32, DIT_256), (64, DIT_512)])
def test_a_published_network(image_size: int, shapes: dict[AttentionShape, int]) -> None:
    """DiT-XL/2 as the backbone builds it."""
    with torch.device("meta"):
        sizes = dict(in_channels=4, patch_size=2, embed_dim=1152, depth=28, num_heads=16)
        network = DiT(DiTConfig(image_size=image_size, num_classes=1000, **sizes))
    found = [shape for block in attention_of(network).values() for shape in block]
    assert found == [shape for shape, count in shapes.items() for _ in range(count)]
