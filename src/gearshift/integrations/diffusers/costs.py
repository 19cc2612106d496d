"""What a call of a pipeline's models costs: a copy on the meta device is run with the shapes of a real call.

Nothing is computed and no weight is copied; adapters and exchanged processors that the model has are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gearshift.execution.cost import Cost, CostTable
from gearshift.execution.network import Network
from gearshift.execution.plan import KINDS, PARTS, StepPlan
from gearshift.execution.reach import embedded_skips, unread
from gearshift.integrations.diffusers import trees
from gearshift.integrations.diffusers.attention import gives, projections_of
from gearshift.integrations.diffusers.compat import private_to_hooks, strip_hooks
from gearshift.integrations.diffusers.layout import Block, PipelineNetwork, Site, blocks_of
from gearshift.runtime.errors import RunError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Products with weights; the others are those of attention."""


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


@dataclass(frozen=True)
class PipelineCosts(CostTable):
    """With what runs beside a denoiser (ControlNets): per (path, block), what of it is left out with that block."""

    beside: dict[tuple[int, int], Cost] = field(default_factory=dict)

    def path_cost(self, path: int = 0, depth: int | None = None, *, blocks: tuple[int, ...]) -> Cost:
        total = super().path_cost(path, depth, blocks=blocks)
        for block in blocks:
            total = total + self.beside.get((path, block), Cost())
        return total

    def of_plan(self, backbone: Network, plan: StepPlan, path: int = 0) -> Cost:
        total = super().of_plan(backbone, plan, path)
        blocks = backbone.paths[path]
        whole = {block for block, part in plan.reuse if part == "block"}
        idle = unread(backbone, blocks, whole, embedded_skips(backbone, blocks)) - whole
        helped = [block for block in blocks if (path, block) in self.beside]
        # What runs beside is read by itself, so it runs up to the last block that is wanted.
        last = max((k for k, block in enumerate(helped) if block not in idle), default=-1)
        for block in helped[: last + 1]:
            total = total + self.beside[path, block]
        return total


def measure(network: PipelineNetwork, seen: Mapping[str, Seen], helpers: Sequence[Seen] = ()) -> PipelineCosts:
    """Costs of one row in every mode.

    Args:
        seen: a call of each denoiser, by the name of its component; one that was never called costs nothing.
        helpers: calls of what runs beside the denoisers (ControlNets), for as many rows or fewer.

    Raises:
        RunError: a model cannot be run on the meta device.
    """
    try:
        return _measured(network, seen, helpers)
    except Exception as error:  # any operator of any model may lack a meta kernel
        raise RunError(
            f"the MACs of {network.name} cannot be counted: it does not run on the meta device "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def _measured(network: PipelineNetwork, seen: Mapping[str, Seen], helpers: Sequence[Seen]) -> PipelineCosts:
    entries: dict[tuple[str, int, int, str], Cost] = {}
    shapes: dict[str, tuple[int, int, int, int]] = {}
    beside: dict[tuple[int, int], Cost] = {}
    counted = [count(one) for one in helpers]
    for path, name in enumerate(network.denoisers):
        blocks = network.paths[path]
        own = count(seen[name]) if name in seen else Counted(Cost(), [Cost()] * len(blocks), {}, {})
        sites = [site for block in blocks for site in network.blocks[block].sites]
        shapes |= {site.name: own.shapes[site.place] for site in sites if site.place in own.shapes}
        rest = own.total
        for cost in own.blocks:
            rest = _less(rest, cost)
        for one, helper in zip(counted, helpers, strict=True):
            rows = seen[name].rows if name in seen else helper.rows
            left, names = one.total, [block.name for block in blocks_in(helper.model)]
            of_name = {network.blocks[block].name: block for block in blocks}  # no prefix: of two, neither has a helper
            for block_name, cost in zip(names, one.blocks, strict=True):
                if block_name in of_name:
                    at = path, of_name[block_name]
                    beside[at] = beside.get(at, Cost()) + _share(cost, helper.rows, rows)
                    left = _less(left, cost)
            rest = rest + _share(left, helper.rows, rows)
        entries["embed", path, 0, "full"] = rest
        for depth in {*network.exits(path), len(blocks)}:
            entries["readout", path, depth, "full"] = Cost()  # counted with the embedding
        for block, cost in zip(blocks, own.blocks, strict=True):
            for mode in modes_of(network.blocks[block]):
                entries["block", path, block, mode] = _less(cost, _saved(network.blocks[block], mode, own))
            entries["block", path, block, "full"] = cost
            entries["block", path, block, "block"] = entries["block", path, block, "bypass"] = Cost()
    network.learn(shapes)
    return PipelineCosts(entries, beside)


def blocks_in(model: nn.Module) -> list[Block]:
    """The blocks of a model, or of the several that it holds."""
    nets = getattr(model, "nets", None)
    return [block for net in (nets if isinstance(nets, nn.ModuleList) else [model]) for block, _ in blocks_of(net)]


def _share(cost: Cost, rows: int, of: int) -> Cost:
    """What a helper that is called for `rows` costs each of the `of` rows of the denoiser."""
    return Cost(cost.linear * rows // of, cost.attention * rows // of)


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
            if site.place in own.saves and (not kind or site.kind == kind) and gives(site.module, part):
                total = total + own.saves[site.place][part]
    return total


def _less(a: Cost, b: Cost) -> Cost:
    return Cost(a.linear - b.linear, a.attention - b.attention)


def count(seen: Seen) -> Counted:
    """Run the copy of a model once, and add up what its modules compute."""
    twin = meta_copy(seen.model)
    shapes: dict[str, tuple[int, int, int, int]] = {}
    found = blocks_in(twin)
    sites = {site.place: site for block in found for site in block.sites}
    handles = [_listen(site, shapes) for site in sites.values()]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        twin(*seen.args, **seen.kwargs)
    for handle in handles:
        handle.remove()
    names = {id(module): name for name, module in twin.named_modules()}
    root = type(twin).__name__

    def flops(module: nn.Module) -> int:
        name = names[id(module)]
        return sum(counter.flop_counts.get(f"{root}.{name}" if name else root, {}).values())

    def of(module: nn.Module) -> Cost:
        linear = sum(flops(part) for part in module.modules() if isinstance(part, _LAYERS))
        return Cost(linear // 2 // seen.rows, (flops(module) - linear) // 2 // seen.rows)

    blocks = []
    for block in found:
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
        shapes[site.place] = (int(tokens), int(source), heads, int(width))

    return site.module.register_forward_pre_hook(look, with_kwargs=True)


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
