"""What a call of a pipeline's models costs: a copy on the meta device is run with the shapes of a real call.

Nothing is computed and no weight is copied; adapters and exchanged processors that the model has are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gearshift.execution.cost import Cost, CostTable
from gearshift.execution.plan import KINDS, PARTS
from gearshift.integrations.diffusers import trees
from gearshift.integrations.diffusers.attention import projections_of
from gearshift.integrations.diffusers.compat import private_to_hooks, strip_hooks
from gearshift.integrations.diffusers.layout import Block, PipelineNetwork, Site, blocks_of

_LAYERS = ("aten.mm", "aten.addmm", "aten.convolution", "aten._convolution")
"""Products with weights; those of attention are batched."""


@dataclass(frozen=True)
class Seen:
    """One call of a model: its arguments on the meta device, and how many rows it had."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: int

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> Seen:
        return cls(model, trees.describing(args), trees.describing(dict(kwargs)), rows)


@dataclass(frozen=True)
class Counted:
    """Of one call, per row: everything, every block, every attention operator (whole, and per part what it saves), and
    tokens, source tokens, heads and width of each operator."""

    total: Cost
    blocks: list[Cost]
    saves: dict[str, dict[str, Cost]]
    shapes: dict[str, tuple[int, int, int, int]]


def measure(network: PipelineNetwork, seen: Mapping[str, Seen], helpers: Sequence[Seen] = ()) -> CostTable:
    """Costs of one row in every mode.

    Args:
        seen: a call of each denoiser, by the name of its component; one that was never called costs nothing.
        helpers: calls of what runs beside the denoisers (ControlNets). A block of theirs is counted with the block of
            the same name, because it is left out with it.
    """
    entries: dict[tuple[str, int, int, str], Cost] = {}
    shapes: dict[str, tuple[int, int, int, int]] = {}
    beside = [count(one) for one in helpers]
    for path, name in enumerate(network.denoisers):
        blocks = network.paths[path]
        if name not in seen:
            own = Counted(Cost(), [Cost()] * len(blocks), {}, {})
        else:
            own = count(seen[name])
        shapes |= own.shapes
        rest = own.total
        for cost in own.blocks:
            rest = _less(rest, cost)
        extra = {block: Cost() for block in blocks}
        for one, helper in zip(beside, helpers, strict=True):
            left = one.total
            names = [block.name for block, _ in blocks_of(helper.model)]
            for block in blocks:
                if network.blocks[block].name in names:
                    cost = one.blocks[names.index(network.blocks[block].name)]
                    extra[block], left = extra[block] + cost, _less(left, cost)
            rest = rest + left
        entries["embed", path, 0, "full"] = rest
        for depth in {*network.exits(path), len(blocks)}:
            entries["readout", path, depth, "full"] = Cost()  # counted with the embedding
        for block, cost in zip(blocks, own.blocks, strict=True):
            for mode in modes_of(network.blocks[block]):
                entries["block", path, block, mode] = extra[block] + _less(
                    cost, _saved(network.blocks[block], mode, own)
                )
            entries["block", path, block, "full"] = extra[block] + cost
            entries["block", path, block, "block"] = entries["block", path, block, "bypass"] = Cost()
    network.learn(shapes)
    return CostTable(entries)


def modes_of(block: Block) -> list[str]:
    """What may be taken from memory in the attention of a block."""
    parts = PARTS[:-1]
    single = [*parts, *(f"{kind}.{part}" for kind in KINDS for part in parts)]
    return single + [f"{KINDS[0]}.{a}+{KINDS[1]}.{b}" for a in parts for b in parts if a != b]


def _saved(block: Block, mode: str, own: Counted) -> Cost:
    total = Cost()
    for one in mode.split("+"):
        kind, _, part = one.rpartition(".")
        for site in block.sites:
            if site.name in own.saves and (not kind or site.kind == kind):
                total = total + own.saves[site.name][part]
    return total


def _less(a: Cost, b: Cost) -> Cost:
    return Cost(a.linear - b.linear, a.attention - b.attention)


def count(seen: Seen) -> Counted:
    """Run the copy of a model once, and add up what its modules compute."""
    twin = meta_copy(seen.model)
    shapes: dict[str, tuple[int, int, int, int]] = {}
    found = list(blocks_of(twin))
    sites = {site.name: site for block, _ in found for site in block.sites}
    handles = [_listen(site, shapes) for site in sites.values()]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        twin(*seen.args, **seen.kwargs)
    for handle in handles:
        handle.remove()
    names = {id(module): name for name, module in twin.named_modules()}
    root = type(twin).__name__

    def of(module: nn.Module) -> Cost:
        name = names[id(module)]
        return _cost(counter, f"{root}.{name}" if name else root, seen.rows)

    blocks = []
    for block, _ in found:
        cost = Cost()
        for module in block.modules:
            cost = cost + of(module)
        blocks.append(cost)
    saves = {name: _savings(site, of) for name, site in sites.items()}
    return Counted(of(twin), blocks, saves, shapes)


def _savings(site: Site, of: Any) -> dict[str, Cost]:
    """What each part of an attention operator saves."""
    module = site.module
    whole = of(module)
    projections = Cost()
    for one in projections_of(module):
        projections = projections + of(one)
    # Scores and mixing are products of one size.
    scores = Cost(0, whole.attention // 2)
    return {"output": whole, "qk": projections, "map": projections + scores}


def _listen(site: Site, shapes: dict[str, tuple[int, int, int, int]]) -> Any:
    """Takes down what an attention operator is called with."""

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if not isinstance(hidden, torch.Tensor) or not isinstance(getattr(module, "to_q", None), nn.Module):
            return
        tokens = hidden.shape[1] if hidden.ndim == 3 else hidden[0, 0].numel()
        source = text.shape[1] if isinstance(text, torch.Tensor) and site.kind == "cross" else tokens
        heads = int(module.heads)
        width = module.to_q.weight.shape[0] // heads
        shapes[site.name] = (int(tokens), int(source), heads, int(width))

    return site.module.register_forward_pre_hook(look, with_kwargs=True)


def _cost(counter: FlopCounterMode, name: str, rows: int) -> Cost:
    linear = attention = 0
    for operator, flops in counter.flop_counts.get(name, {}).items():
        if any(str(operator).startswith(layer) for layer in _LAYERS):
            linear += flops
        else:
            attention += flops
    return Cost(linear // 2 // rows, attention // 2 // rows)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without weights, and without the hooks and processors that were put into it."""
    memo: dict[int, Any] = {}
    for tensor in model.parameters():
        memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    gone = object()
    for module in model.modules():
        for thing in private_to_hooks(module):
            memo[id(thing)] = gone
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "stock"):
            memo[id(processor)] = copy.deepcopy(processor.stock)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        strip_hooks(module)
    return twin
