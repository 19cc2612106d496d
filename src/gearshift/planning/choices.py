"""What one call may compute, and a schedule: one choice for every call of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gearshift.execution.memory import Key
from gearshift.execution.network import Network
from gearshift.execution.parts import attention_of, parts_of
from gearshift.execution.plan import StepPlan
from gearshift.policies import Planned
from gearshift.policies.base import RunInfo
from gearshift.runtime.errors import UsageError

SPACES = ("steps", "branches", "depth", "attention", "blocks")
"""What a search may decide: skipped calls; guidance branches that are not evaluated; depth; attention from memory;
blocks from memory."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one call computes.

    Attributes:
        branches: guidance branches that are evaluated, the conditional one first; 0 skips the call.
        depth: blocks run; 0 is all of them.
        reuse: (block, part) pairs taken from memory.
        forecast: branches that are not evaluated extrapolate instead of holding their last prediction.
    """

    branches: int
    depth: int = 0
    reuse: frozenset[Key] = frozenset()
    forecast: bool = False

    def plan(self, run: RunInfo) -> StepPlan:
        """As a plan of a run."""
        call: bool | Tensor = self.branches > 0
        if 0 < self.branches < run.branches:
            call = torch.arange(run.num_rows) < self.branches * run.batch
        reuse = self.reuse if self.branches else frozenset()
        return StepPlan(call=call, depth=self.depth or None, reuse=reuse, forecast=int(self.forecast))


Schedule = tuple[Choice, ...]


@dataclass(frozen=True)
class Menu:
    """The values each part of a choice may take: those of full compute first."""

    branches: tuple[int, ...]
    depths: tuple[int, ...]
    reuse: tuple[frozenset[Key], ...]
    skips: bool

    @classmethod
    def of(cls, network: Network, branches: int, space: Sequence[str], operator: str = "output") -> Menu:
        """What `space` allows on a network.

        Reuse comes in whole sets, so that a search has few to try: attention of every block (`operator`, and as queries
        and keys), and everything up to a block, whose output is then the one thing taken from memory.

        Raises:
            UsageError: a space that does not exist, or in which the network has nothing to decide.
        """
        unknown = [name for name in space if name not in SPACES]
        if unknown or not space:
            raise UsageError(f"space={list(space)}: name some of {', '.join(SPACES)}")
        exits = sorted({depth for path in range(len(network.paths)) for depth in network.exits(path)})
        deepest = max(len(path) for path in network.paths)
        depths = [0, *(depth for depth in reversed(exits) if depth < deepest)] if "depth" in space else [0]
        reuse: list[frozenset[Key]] = [frozenset()]
        attending = sorted(attention_of(network))
        if "attention" in space and attending:
            there = parts_of(network)
            for part in dict.fromkeys(("qk", operator)):
                sets = [frozenset((b, part) for b in path if (b, part) in there) for path in network.paths]
                reuse += [taken for taken in dict.fromkeys(sets) if taken]
        if "blocks" in space:
            last = {path[-1] for path in network.paths}
            blocks = sorted({b for path in network.paths for b in path if (b, "block") in parts_of(network)} - last)
            reuse += [frozenset({(block, "block")}) for block in blocks]
        fewer = tuple(range(branches, 0, -1)) if "branches" in space else (branches,)
        found = cls(fewer, tuple(depths), tuple(reuse), "steps" in space)
        if not found.skips and (len(found.branches), len(found.depths), len(found.reuse)) == (1, 1, 1):
            raise UsageError(
                f"space={list(space)} leaves nothing to decide: {network.name} runs {branches} branch(es), can be read "
                f"out at depths {exits} and has attention in blocks {attending}"
            )
        return found

    def on(self, network: Network, path: int) -> Menu:
        """What of it a call on one path may choose: depths that are exits there, parts of blocks that run there."""
        blocks, exits = network.paths[path], network.exits(path)
        return replace(
            self,
            depths=tuple(depth for depth in self.depths if not depth or depth in exits[:-1]),
            reuse=tuple(taken for taken in self.reuse if all(_lies_in(key, blocks) for key in taken)),
        )

    @property
    def full(self) -> Choice:
        return Choice(self.branches[0], self.depths[0], self.reuse[0])

    def computing(self) -> list[Choice]:
        """Every choice that evaluates something, full compute first; none of them forecasts."""
        return [Choice(g, d, r) for g in self.branches for d in self.depths for r in self.reuse if _possible(d, r)]

    def all(self) -> list[Choice]:
        """Every choice."""
        some = self.computing()
        partly = [Choice(c.branches, c.depth, c.reuse, True) for c in some if c.branches < self.branches[0]]
        return some + partly + ([Choice(0), Choice(0, forecast=True)] if self.skips else [])

    @property
    def keys(self) -> frozenset[Key]:
        """Everything that some choice takes from memory."""
        return frozenset().union(*self.reuse)


def _lies_in(key: Key, blocks: Sequence[int]) -> bool:
    """Whether a part is one of a path's; its last block is not taken whole, which would leave the readout alone."""
    block, part = key
    return block in blocks and not (part == "block" and block == blocks[-1])


def _possible(depth: int, reuse: frozenset[Key]) -> bool:
    """Whether something is left to compute between what comes from memory and the readout; else skip the call."""
    return not depth or all(block < depth - 1 or part != "block" for block, part in reuse)


def as_policy(schedule: Schedule, run: RunInfo, solver: str) -> Planned:
    """The schedule as a policy for this run."""
    return Planned(
        network=run.network.name,
        blocks=len(run.network.blocks),
        solver=solver,
        log_snr=[float(call.log_snr) for call in run.calls],
        branches=run.branches,
        call=[choice.branches for choice in schedule],
        depth=[choice.depth if choice.branches else 0 for choice in schedule],
        reuse=[dict(sorted(choice.reuse)) if choice.branches else {} for choice in schedule],
        forecast=[int(choice.forecast and choice.branches < run.branches) for choice in schedule],
    )


def describe(choice: Choice, full: Choice) -> str:
    """A few words: "full", "skip", "1 branch, depth 4"."""
    if choice.branches == 0:
        return "extrapolate" if choice.forecast else "skip"
    parts = [f"{choice.branches} branch"] if choice.branches < full.branches else []
    parts += [f"depth {choice.depth}"] if choice.depth else []
    kinds = sorted({part for _, part in choice.reuse})
    for kind in kinds:
        blocks = sorted(block for block, part in choice.reuse if part == kind)
        parts.append(f"{kind} of {blocks[0]}" if len(blocks) == 1 else f"{kind} of {len(blocks)} blocks")
    return ", ".join(parts) or "full"
