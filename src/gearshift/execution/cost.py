"""What things cost: multiply-accumulates of every block in every mode, measured once on the meta device.

Convention: a multiply-add is one MAC (papers print MACs as "Gflops"); `flops = 2 * macs`. Matrix products, convolutions
and attention products are counted; norms, activations and additions are not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gearshift.execution.memory import NO_SLOT, Slot
from gearshift.execution.network import Network, common_prefix
from gearshift.execution.outputs import Event
from gearshift.execution.plan import StepPlan
from gearshift.execution.reach import embedded_skips, unread
from gearshift.execution.stream import Stream

REUSED_IN_BLOCK = ("qk", "map", "output")


@dataclass(frozen=True, slots=True)
class Cost:
    """MACs of one row: in layers (linear, and convolutions whose weights are learnt), and in all other products.

    The others are those of attention, and what counters of layers do not see: filters that resample, and projections
    that are written as matrix products (NIN of Score SDE). `linear` is what papers print as "GFLOPs" without attention.
    """

    linear: int = 0
    attention: int = 0

    @property
    def macs(self) -> int:
        return self.linear + self.attention

    @property
    def flops(self) -> int:
        return 2 * self.macs

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.linear + other.linear, self.attention + other.attention)


@dataclass(frozen=True)
class CostTable:
    """Cost of one row per (kind, path, index, mode), with the keys of `execution.outputs.Event`."""

    entries: dict[tuple[str, int, int, str], Cost] = field(default_factory=dict)

    @classmethod
    def measure(cls, backbone: Network, cond: Tensor | None = None) -> CostTable:
        """Count every block of `backbone` in every mode, every readout and uncertainty head.

        Args:
            cond: conditioning of one row ([1] labels or [1, L, D] text); None takes the backbone's own kind with the
                shapes it declares.
        """
        own = getattr(backbone, "measure_costs", None)
        if own is not None:  # networks that are not made of our blocks
            table: CostTable = own()
            return table
        twin = meta_twin(backbone)
        meta_cond = twin.example_cond(1) if cond is None else cond.to("meta")
        entries: dict[tuple[str, int, int, str], Cost] = {}
        with torch.no_grad():
            for path in range(len(twin.paths)):
                _measure_path(twin, path, meta_cond, entries)
        return cls(entries)

    def of(self, event: Event) -> Cost:
        """Cost of one row of an event."""
        return self.entries[event.kind, event.path, event.index, event.mode]

    def path_cost(self, path: int = 0, depth: int | None = None, *, blocks: tuple[int, ...]) -> Cost:
        """One row, embedded, run through `blocks` (those of the path) up to `depth`, and read out there."""
        depth = len(blocks) if depth is None else depth
        total = self.entries["embed", path, 0, "full"] + self.entries["readout", path, depth, "full"]
        for index in blocks[:depth]:
            total = total + self.entries["block", path, index, "full"]
        return total

    def of_plan(self, backbone: Network, plan: StepPlan, path: int = 0) -> Cost:
        """One row that is called under `plan`, which says the same of every row and has no exit rule; what it reuses is
        taken to be there. `path` is that of its noise level; a plan that names an expert has the last word."""
        per_row = isinstance(plan.depth, Tensor) or isinstance(plan.expert, Tensor)
        if plan.exit is not None or per_row or not isinstance(plan.bypass, frozenset):
            raise ValueError("the cost of a plan that tells rows apart is known only once it has run")
        if isinstance(plan.expert, int):
            path = plan.expert
        blocks = backbone.paths[path]
        if plan.depth is not None:
            blocks = blocks[: min(plan.depth, len(blocks))]
        modes = {b: "bypass" if b in plan.bypass else plan.reused_part(b) or "full" for b in blocks}
        whole = {b for b, mode in modes.items() if mode == "block"}
        for block in unread(backbone, blocks, whole, embedded_skips(backbone, backbone.paths[path])):
            modes[block] = "block"
        total = self.entries["embed", path, 0, "full"] + self.entries["readout", path, len(blocks), "full"]
        for block in blocks:
            total = total + self.entries["block", path, block, modes[block]]
        return total

    def full(self, backbone: Network, path: int = 0) -> Cost:
        """The plain network, no heads but the final one."""
        return self.path_cost(path, blocks=backbone.paths[path])


def _measure_path(
    twin: Network, path: int, cond: Tensor | None, entries: dict[tuple[str, int, int, str], Cost]
) -> None:
    size = twin.image_size
    x = torch.empty(1, twin.in_channels, size, size, device="meta")

    def embed() -> Stream:
        return twin.enter(twin.embed(x, torch.empty(1, device="meta"), cond), path)

    stream, entries["embed", path, 0, "full"] = _count(embed)
    blocks, exits = twin.paths[path], twin.exits(path)
    known = common_prefix([twin.paths[0], blocks]) if path else 0  # measured on the first path
    for depth in range(len(blocks) + 1):
        if depth in exits:
            _, entries["readout", path, depth, "full"] = _count(twin.readout, stream.hidden, stream.cond, depth, path)
            if twin.predicts_error(depth, path):
                _, cost = _count(twin.uncertainty, stream.hidden, stream.time, depth, path)
                entries["uncertainty", path, depth, "full"] = cost
        if depth < len(blocks):
            _measure_block(twin, path, blocks[depth], stream, entries, known=depth < known)


def _measure_block(
    twin: Network,
    path: int,
    index: int,
    stream: Stream,
    entries: dict[tuple[str, int, int, str], Cost],
    *,
    known: bool,
) -> None:
    """Count one block in every mode (unless its costs on path 0 are known), and move the stream past it."""
    block = twin.blocks[index]
    skip = stream.pop() if index in twin.pops else None
    if known:
        for mode in ("full", "block", "bypass", *REUSED_IN_BLOCK):
            entries["block", path, index, mode] = entries["block", 0, index, mode]
        after = block(stream.hidden, stream.cond, skip, NO_SLOT)
    else:
        after = _count_modes(twin, path, index, stream, skip, entries)
    stream.hidden = after
    if index in twin.pushes:
        stream.push()
    if index in twin.carries:
        stream.cond = {**stream.cond, twin.carries[index]: stream.hidden}


def _count_modes(
    twin: Network,
    path: int,
    index: int,
    stream: Stream,
    skip: Tensor | None,
    entries: dict[tuple[str, int, int, str], Cost],
) -> Tensor:
    """Count one block in every mode; its output."""
    block = twin.blocks[index]
    kept = Slot(wanted=frozenset(REUSED_IN_BLOCK))
    block(stream.hidden, stream.cond, skip, kept)
    after, full = _count(block, stream.hidden, stream.cond, skip, NO_SLOT)
    entries["block", path, index, "full"] = full
    entries["block", path, index, "block"] = Cost()
    _, entries["block", path, index, "bypass"] = _count(twin.bypass, index, stream.hidden, stream.cond, skip)
    for part in REUSED_IN_BLOCK:
        held = {name: tensors for name, tensors in kept.stored.items() if name.rsplit(".", 1)[-1] == part}
        cost = full  # no attention inside: the part saves nothing
        if held:
            _, cost = _count(block, stream.hidden, stream.cond, skip, Slot(part, frozenset(), held))
        entries["block", path, index, part] = cost
    result: Tensor = after
    return result


def meta_twin(backbone: Network) -> Network:
    """A copy on the meta device, without copying any weight."""
    memo: dict[int, Any] = {}
    for parameter in backbone.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in backbone.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(backbone, memo)


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _Layers(TorchFunctionMode):
    """Adds up what runs in layers: `F.linear`, and convolutions with a parameter for a weight."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if func not in _CONVOLUTIONS or not isinstance(weight, nn.Parameter):
                return func(*args, **kwargs)
        before = self.counter.get_total_flops()
        result = func(*args, **kwargs)
        self.flops += self.counter.get_total_flops() - before
        return result


def _count(call: Callable[..., Any], *arguments: Any) -> tuple[Any, Cost]:
    counter = FlopCounterMode(display=False)
    layers = _Layers(counter)
    with counter, layers:
        result = call(*arguments)
    return result, Cost(layers.flops // 2, (counter.get_total_flops() - layers.flops) // 2)
