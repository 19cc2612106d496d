"""Which parameters a prediction uses: found by following the autograd graph of one prediction on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.execution.cost import meta_twin as meta_twin
from gearshift.execution.memory import NO_SLOT
from gearshift.execution.network import Network
from gearshift.execution.stream import Stream


@dataclass(frozen=True)
class PathParameters:
    """Parameters of one path at full depth, as positions in `list(backbone.parameters())`.

    Attributes:
        embed: used before the first block.
        blocks: used by each block of the path, by the block's index.
        readout: used after the last block, and not before.
    """

    embed: frozenset[int]
    blocks: dict[int, frozenset[int]]
    readout: frozenset[int]

    @property
    def all(self) -> frozenset[int]:
        """The active parameters of the path. Heads that the plain prediction does not read are not among them."""
        return self.embed.union(self.readout, *self.blocks.values())


def parameters_used(backbone: Network) -> list[PathParameters]:
    """Of every path. Conditioning and augmentation labels are given where the network takes them."""
    twin = meta_twin(backbone)
    parameters = list(twin.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    place = {id(parameter): position for position, parameter in enumerate(parameters)}
    with torch.enable_grad():
        return [_of_path(twin, path, place) for path in range(len(twin.paths))]


def _of_path(twin: Any, path: int, place: dict[int, int]) -> PathParameters:
    stream = twin.enter(_embedded(twin), path)
    embed = _leaves([stream.hidden, *stream.cond.values(), *(skip.hidden for skip in stream.skips)], place)
    blocks = twin.paths[path]
    for block in blocks:
        skip = stream.pop() if block in twin.pops else None
        stream.hidden = twin.blocks[block](stream.hidden, stream.cond, skip, NO_SLOT)
        if block in twin.pushes:
            stream.push()
        if block in twin.carries:
            stream.cond = {**stream.cond, twin.carries[block]: stream.hidden}
    used = _leaves([twin.readout(stream.hidden, stream.cond, len(blocks), path)], place)
    own = {block: used & {place[id(p)] for p in twin.blocks[block].parameters()} for block in blocks}
    return PathParameters(embed & used, own, used.difference(embed, *own.values()))


def _embedded(twin: Any) -> Stream:
    size = twin.image_size
    x = torch.empty(1, twin.in_channels, size, size, device="meta")
    time, cond = torch.empty(1, device="meta"), twin.example_cond(1)
    width = getattr(twin, "augment_dim", 0)
    stream: Stream
    if width:
        stream = twin.embed_augmented(x, time, cond, torch.empty(1, width, device="meta"))
    else:
        stream = twin.embed(x, time, cond)
    return stream


def _leaves(results: Iterable[Tensor], place: dict[int, int]) -> frozenset[int]:
    """Positions of the parameters that the results depend on."""
    found: set[int] = set()
    waiting = [result.grad_fn for result in results if result.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)  # of the nodes that would collect a gradient
        if variable is not None and id(variable) in place:
            found.add(place[id(variable)])
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return frozenset(found)
