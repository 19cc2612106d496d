"""What a network can leave behind for later calls: which parts of which blocks, and how much room each takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from gearshift.execution.cost import REUSED_IN_BLOCK, meta_twin
from gearshift.execution.memory import Key, Slot
from gearshift.execution.network import Network

Shapes = tuple[tuple[int, ...], ...]

_known: WeakKeyDictionary[Network, Mapping[Key, Shapes]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention operator: tokens N, heads h and width d of a head."""

    tokens: int
    heads: int
    head_dim: int


def parts_of(network: Network) -> Mapping[Key, Shapes]:
    """Shapes of what one row leaves under each (block, part), found by running the network on the meta device once.

    Every block has the part "block"; "qk", "map" and "output" are there where the block has attention. Networks that
    are not made of our blocks `declare` theirs.
    """
    if network not in _known:
        found: dict[Key, Shapes] = {}
        twin = meta_twin(network)
        with torch.no_grad():
            for path in range(len(twin.paths)):
                _walk(twin, path, found)
        _known[network] = found
    return _known[network]


def declare(network: Network, parts: Mapping[Key, Shapes]) -> None:
    """Say what a network leaves behind that `parts_of` cannot run; shapes may be empty as long as they are unknown."""
    _known[network] = parts


def _walk(twin: Network, path: int, found: dict[Key, Shapes]) -> None:
    size = twin.image_size
    x = torch.empty(1, twin.in_channels, size, size, device="meta")
    stream = twin.enter(twin.embed(x, torch.empty(1, device="meta"), twin.example_cond(1)), path)
    for block in twin.paths[path]:
        skip = stream.pop() if block in twin.pops else None
        slot = Slot(wanted=frozenset(REUSED_IN_BLOCK))
        stream.hidden = twin.blocks[block](stream.hidden, stream.cond, skip, slot)
        slot.store("block", stream.hidden)
        parts: dict[str, list[tuple[int, ...]]] = {}
        for name, tensors in slot.stored.items():
            parts.setdefault(name.rsplit(".", 1)[-1], []).extend(tuple(tensor.shape[1:]) for tensor in tensors)
        found |= {(block, part): tuple(shapes) for part, shapes in parts.items()}
        if block in twin.pushes:
            stream.push()
        if block in twin.carries:
            stream.cond = {**stream.cond, twin.carries[block]: stream.hidden}


def attention_of(network: Network) -> dict[int, tuple[AttentionShape, ...]]:
    """Attention operators of every block that has any; no shapes where queries and keys cannot be told apart."""
    parts = parts_of(network)
    return {
        block: tuple(
            AttentionShape(shape[-2], shape[-3], shape[-1])
            for shape in parts.get((block, "qk"), ())[::2]  # q, k, ...
        )
        for block, part in parts
        if part in ("output", "qk")
    }


def kept_bytes(network: Network, keys: Iterable[Key], element_size: int = 4) -> int:
    """Bytes that one row's entries under `keys` take."""
    parts = parts_of(network)
    return element_size * sum(math.prod(shape) for key in keys for shape in parts.get(key, ()))


def attention_bytes(part: str, rows: int, shape: AttentionShape, element_size: int) -> int:
    """Bytes one attention operator keeps for `rows` rows (samples times branches): B h N^2 b for the map, 2 B N D b for
    queries and keys, B N D b for the output, with D = h d."""
    width = shape.heads * shape.head_dim
    per_row = {
        "map": shape.heads * shape.tokens**2,
        "qk": 2 * shape.tokens * width,
        "output": shape.tokens * width,
    }
    return rows * per_row[part] * element_size
