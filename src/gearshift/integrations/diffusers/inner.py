"""Carrying out a plan inside of a model: which port and which attention operator does what in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.execution.memory import Key, Memory
from gearshift.execution.plan import PARTS, SCOPED, StepPlan, strongest
from gearshift.execution.reach import embedded_skips, unread
from gearshift.execution.stream import Rows
from gearshift.integrations.diffusers import trees
from gearshift.integrations.diffusers.attention import (
    Reusing,
    can_be_taken_apart,
    gives,
    projections_of,
    reusing,
    stock_of,
)
from gearshift.integrations.diffusers.compat import Interposed, is_compiled
from gearshift.integrations.diffusers.layout import Block, PipelineNetwork, blocks_of
from gearshift.integrations.diffusers.ports import GIVE, IDLE, KEEP, PASS, RUN, Port, Shapes
from gearshift.runtime.errors import UsageError


class Inner:
    """Ports and processors inside the denoisers of a pipeline, and what runs beside them.

    Args:
        network: its denoisers.
        helpers: models whose outputs only the denoisers read (ControlNets); their blocks are left out with the
            denoiser's blocks of the same names.
        attention: parts that are kept of attention operators.
        blocks: put ports before the blocks.
        shapes: what ports have learned of their modules, and learn.
    """

    def __init__(
        self,
        network: PipelineNetwork,
        helpers: Sequence[nn.Module],
        attention: frozenset[str],
        blocks: bool,
        shapes: dict[nn.Module, Shapes],
    ) -> None:
        self.network, self.attention, self.ports, self._shapes = network, attention, blocks, shapes
        self.processors: list[Reusing | None] = [None] * len(network.sites)
        self.projections: list[list[Port]] = [[] for _ in network.sites]
        self.block_ports: list[list[Port]] = [[] for _ in network.blocks]
        self.stage_ports: list[Port] = []
        self.helper_ports: list[tuple[list[str], list[list[Port]]]] = []
        self._interposed: list[Interposed] = []
        self._stock: list[tuple[Any, Any]] = []
        self._first_site = {}
        count = 0
        for number, block in enumerate(network.blocks):
            self._first_site[number] = count
            count += len(block.sites)
        try:
            self._reach_in(helpers)
        except BaseException:
            self.withdraw()
            raise

    def _reach_in(self, helpers: Sequence[nn.Module]) -> None:
        network, attention = self.network, self.attention
        if self.ports:
            self.block_ports = [self._ports(block) for block in network.blocks]
            self.stage_ports = [self._port(stage.module) for stage in network.stages]
            for helper in helpers:
                found = [block for block, _ in blocks_of(helper)]
                self.helper_ports.append(([b.name for b in found], [self._ports(b) for b in found]))
        if attention:
            for number, site in enumerate(network.sites):
                made = reusing(stock_of(site.module))
                if made is not None:
                    module: Any = site.module
                    self._stock.append((module, module.processor))
                    module.processor = made
                    self.processors[number] = made
                if "qk" in attention and not can_be_taken_apart(site.module):
                    self.projections[number] = [self._port(m, copies=False) for m in projections_of(site.module)]
        self._check_compiled()

    def _check_compiled(self) -> None:
        """Raises UsageError where a projection lies in a compiled block, which would be compiled anew for each."""
        chosen = {id(site.module) for site, ports in zip(self.network.sites, self.projections, strict=True) if ports}
        for model in self.network.denoisers.values() if chosen else ():
            for name, module in model.named_modules():
                if is_compiled(module) and any(id(part) in chosen for part in module.modules()):
                    raise UsageError(
                        f"operator=qk keeps what {name} of {self.network.name} projects, and {name} is compiled; take "
                        "operator=output, or leave it uncompiled"
                    )

    def _ports(self, block: Block) -> list[Port]:
        return [self._port(module, block.passed) for module in block.modules]

    def _port(self, module: nn.Module, passed: Any = None, copies: bool = True) -> Port:
        port = Port(self._shapes.setdefault(module, {}), passed, copies)
        self._interposed.append(Interposed(module, port))
        return port

    def settle(self) -> None:
        """Follow blocks that were compiled since."""
        for one in self._interposed:
            one.settle()
        self._check_compiled()

    def withdraw(self) -> None:
        """Put everything back."""
        for one in reversed(self._interposed):
            one.withdraw()
        for module, processor in self._stock:
            module.processor = processor
        self._interposed, self._stock = [], []

    def of_block(self, block: int) -> int:
        """The number of a block in the memory."""
        return len(self.network.sites) + block

    def memory_keys(self, reuse: Iterable[Key]) -> frozenset[Key]:
        """What the memory must hold for a plan to reuse `reuse`."""
        found = set()
        for block, part in reuse:
            if part == "block":
                found.add((self.of_block(block), part))
            else:
                own = part.rpartition(".")[2]
                sites = self.network.sites
                found |= {(number, own) for number in self.sites_of(block, part) if gives(sites[number].module, own)}
        return frozenset(found)

    def sites_of(self, block: int, part: str = "") -> list[int]:
        kind, first = part.rpartition(".")[0], self._first_site[block]
        sites = self.network.blocks[block].sites
        return [first + k for k, site in enumerate(sites) if not kind or site.kind == kind]

    # One call --------------------------------------------------------------------------------------------------------

    def possible(self, plan: StepPlan, memory: Memory | None, rows: Rows) -> StepPlan:
        """The plan without what would be taken from memory but is not there."""
        if not plan.reuse:
            return plan
        there = {
            key
            for key in plan.reuse
            if memory is not None and all(bool(memory.valid(one, rows).all()) for one in self.memory_keys([key]))
        }
        return plan if len(there) == len(plan.reuse) else replace(plan, reuse=frozenset(there))

    def left_out(self, plan: StepPlan, path: int) -> tuple[frozenset[int], frozenset[int]]:
        """Blocks of a path whose output nobody reads, and blocks that are passed by."""
        blocks = self.network.paths[path]
        depth = len(blocks) if plan.depth is None else int(plan.depth)
        whole = {block for block, part in plan.reuse if part == "block"}
        idle = unread(self.network, blocks[:depth], whole, embedded_skips(self.network, blocks))  # type: ignore[arg-type]
        passed = {block for block in blocks[:depth] if block in plan.bypass} | set(blocks[depth:])
        return idle, frozenset(passed)

    def set(self, plan: StepPlan, path: int, memory: Memory | None, rows: Rows) -> list[str]:
        """Tell ports and processors what the next call of a denoiser does; the names of what it does not compute."""
        idle, passed = self.left_out(plan, path)
        hits = []
        whole = {block for block, part in plan.reuse if part == "block"}
        for block in self.network.paths[path]:
            ports, about = self.block_ports[block], self.network.blocks[block]
            gone = block in idle or block in passed or block in whole
            if gone:
                hits.append(about.name)
            for place, port in enumerate(ports):
                last = place == len(ports) - 1
                port.learns = not plan.reuse and self.network.has_stages
                if block in whole and block not in idle and last:
                    assert memory is not None  # `possible` has looked
                    port.mode = GIVE
                    port.given = _read(memory, (self.of_block(block), "block"), rows)
                elif gone and block not in passed and self.network.has_stages:
                    port.mode = IDLE
                elif gone:
                    port.mode = PASS
                else:
                    wanted = last and memory is not None and "block" in memory.wanted(self.of_block(block))
                    port.mode = KEEP if wanted else RUN
            if not gone:
                hits += self._attention(plan, block, memory, rows)
        for stage, port in zip(self.network.stages, self.stage_ports, strict=False):  # none, or all
            port.learns = not plan.reuse
            port.mode = IDLE if all(block in idle for block in stage.blocks) else RUN
        return hits

    def for_helpers(self, plan: StepPlan, path: int) -> None:
        """Tell the ports of the helpers, which are called before the denoiser."""
        idle, _ = self.left_out(plan, path)
        whole = {block for block, part in plan.reuse if part == "block"}
        names = {self.network.blocks[block].name for block in idle - whole}
        for blocks, ports in self.helper_ports:
            # A helper's blocks read each other, so it runs up to the last one that is wanted.
            last = max((k for k, name in enumerate(blocks) if name not in names), default=-1)
            for k, some in enumerate(ports):
                for port in some:
                    port.mode = RUN if k <= last else IDLE
                    port.learns = not idle

    def _attention(self, plan: StepPlan, block: int, memory: Memory | None, rows: Rows) -> list[str]:
        hits = []
        asked = [part for index, part in plan.reuse if index == block]
        for number in self.sites_of(block):
            processor, site = self.processors[number], self.network.sites[number]
            ports = self.projections[number]
            part = strongest(asked, site.kind)
            given: tuple[Tensor, ...] = ()
            if part is not None and not gives(site.module, part):
                part = None  # it computes, whatever its block does
            if part is not None:
                assert memory is not None
                given = _read(memory, (number, part), rows)
                hits.append(site.name)
            keeps = memory.wanted(number) if memory is not None else frozenset()
            for place, port in enumerate(ports):
                if part == "qk":
                    port.mode, port.given = GIVE, (given[place],)
                else:
                    port.mode = KEEP if "qk" in keeps else RUN
            if processor is not None:
                processor.reset()
                if part is not None and not (ports and part == "qk"):
                    processor.takes, processor.given = part, given
                processor.keeps = tuple(sorted(keeps - {"qk"} if ports else keeps))
        return hits

    def harvest(self, path: int, memory: Memory | None, rows: Rows) -> None:
        """Put what a call has kept into the memory, and let go of everything else."""
        for block in self.network.paths[path]:
            for port in self.block_ports[block]:
                if port.mode == KEEP and memory is not None:
                    values = tuple(trees.tensors(port.kept))
                    _write(memory, (self.of_block(block), "block"), rows, values)
                port.kept, port.given, port.mode = None, (), RUN
            for number in self.sites_of(block):
                processor, ports = self.processors[number], self.projections[number]
                if memory is not None and ports and all(port.mode == KEEP and port.kept is not None for port in ports):
                    _write(memory, (number, "qk"), rows, tuple(port.kept for port in ports))
                for port in ports:
                    port.kept, port.given, port.mode = None, (), RUN
                if processor is None:
                    continue
                for part in processor.keeps:
                    kept = processor.kept(part)
                    if kept is not None and memory is not None:
                        _write(memory, (number, part), rows, kept)
                processor.reset()
        for port in self.stage_ports:
            port.mode = RUN

    def calm(self) -> None:
        """Everything computes, and nothing is held."""
        every = [
            *self.block_ports,
            *self.projections,
            self.stage_ports,
            *(ports for _, some in self.helper_ports for ports in some),
        ]
        for port in (port for ports in every for port in ports):
            port.mode, port.kept, port.given = RUN, None, ()
        for processor in self.processors:
            if processor is not None:
                processor.reset()


def check_plan(plan: StepPlan, network: PipelineNetwork) -> None:
    """Raises UsageError where a plan asks for what cannot be done to a model of another library."""
    per_row = [name for name in ("depth", "expert") if isinstance(getattr(plan, name), Tensor)]
    if per_row or not isinstance(plan.bypass, frozenset):
        raise UsageError(
            f"the policy gives every sample its own {per_row[0] if per_row else 'bypass'}, and {network.name} runs all "
            "samples of a batch alike; take a policy that depends on the noise level alone"
        )
    if plan.exit is not None:
        raise UsageError(
            f"the policy leaves {network.name} by a rule that looks at its hidden states, and it has no heads for "
            "that (gearshift train makes them); take ExitSchedule or FixedDepth"
        )
    fixed = [block for block in plan.bypass if network.blocks[block].passed is None]
    if fixed:
        raise UsageError(
            f"the policy drops blocks {fixed} of {network.name}, which cannot be passed by; take DeepFeatureReuse"
        )


def awaited(inner: Inner, plans: Sequence[StepPlan], path_of: Callable[[int], int]) -> list[frozenset[Key]]:
    """For every call, what of the memory a later call reads before it is written again."""
    open_: frozenset[Key] = frozenset()
    wanted: list[frozenset[Key]] = []
    for position in reversed(range(len(plans))):
        plan, path = plans[position], path_of(position)
        wanted.append(open_)
        if plan.call is False:
            continue
        idle, passed = inner.left_out(plan, path)
        written = set()
        taken = inner.memory_keys(plan.reuse)
        for block in inner.network.paths[path]:
            whole = (inner.of_block(block), "block")
            if block in idle or block in passed or whole in taken:
                continue
            written.add(whole)
            asked = [part for index, part in plan.reuse if index == block]
            for number in inner.sites_of(block):
                part = strongest(asked, inner.network.sites[number].kind)
                # What runs writes what it computes: everything, or what lies behind the part that it takes.
                computed = PARTS[:-1] if part is None else PARTS[PARTS.index(part) + 1 : -1]
                written |= {(number, one) for one in computed if part is None or one == "output"}
        open_ = frozenset(open_ - written) | taken
    return wanted[::-1]


def _write(memory: Memory, key: Key, rows: Rows, values: tuple[Tensor, ...]) -> None:
    """Keep tensors [rows, ...] as they are, or [rows * m, ...] as [rows, m, ...]: models of video lay frames or places
    beside the rows."""
    count = len(rows)
    if any(value.shape[0] % count for value in values):
        raise LookupError(f"what is kept has {values[0].shape[0]} entries for {count} rows")
    if all(value.shape[0] == count for value in values):
        memory.write(key, rows, {"rows": values})
    else:
        split = tuple(value.reshape(count, value.shape[0] // count, *value.shape[1:]) for value in values)
        memory.write(key, rows, {"rows and more": split})


def _read(memory: Memory, key: Key, rows: Rows) -> tuple[Tensor, ...]:
    [(name, values)] = memory.read(key, rows).items()
    return values if name == "rows" else tuple(value.flatten(0, 1) for value in values)


def needs(reuse: Iterable[Key]) -> tuple[frozenset[str], bool]:
    """The parts of attention that plans which reuse these keys take, and whether they take blocks."""
    parts = {part for _, part in reuse}
    return frozenset(part.rpartition(".")[2] for part in parts if part in (*PARTS[:-1], *SCOPED)), "block" in parts


def host(mask: Any, rows: int) -> Tensor:
    """A flag or a mask as host bool [rows]."""
    return torch.as_tensor(mask).expand(rows).clone()
