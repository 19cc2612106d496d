"""Reuse of deep features: between computed calls only the outer levels of a U-Net run (DeepCache, arXiv 2312.00858).

At a call that reuses, the output of the last deep block is taken from memory; blocks before it run only as far as their
long skips are still popped by a later one. So everything inside branch b is left out, and what is kept is one tensor.
U-ViTs have the same shape and may be cut in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.plan import FULL, StepPlan
from gearshift.policies.base import RunInfo
from gearshift.policies.when import ScheduledReuse
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class DeepFeatureReuse(ScheduledReuse):
    """Take the deep features from memory at some calls.

    Attributes:
        branch: of the long skips, outermost first, the last that is still computed; 0 leaves the fewest blocks.
        last, interval, computed, window: when, see `ScheduledReuse`.
    """

    branch: int = 0

    def __post_init__(self) -> None:
        ScheduledReuse.__post_init__(self)
        if self.branch < 0:
            raise UsageError(
                f"policy DeepFeatureReuse: branch={self.branch} must be at least 0, the outermost long skip"
            )

    @property
    def name(self) -> str:
        return f"deep features {self.when}, branch {self.branch}"

    def fits(self, network: Network) -> None:
        self.blocks_on(network)

    def check(self, run: RunInfo) -> None:
        self.check_calls(run)
        self.fits(run.network)

    def blocks_on(self, network: Network) -> frozenset[int]:
        """The block, one per path, whose output is taken from memory.

        Raises:
            UsageError: the network has no such long skip.
        """
        found = set()
        for path in network.paths:
            merging = [position for position, block in enumerate(path) if block in network.pops]
            if not merging:
                raise UsageError(
                    f"policy DeepFeatureReuse cuts a network at its long skips, and {network.name} has none; reuse "
                    "attention instead (policy AttentionReuse)"
                )
            position = merging[-1 - self.branch] if self.branch < len(merging) else 0
            if position == 0 or self.branch >= len(merging):
                raise UsageError(
                    f"policy DeepFeatureReuse: branch={self.branch}, but {network.name} has {len(merging)} long skips, "
                    f"branches 0..{len(merging) - 1}, and something must lie inside the branch"
                )
            found.add(path[position - 1])
        return frozenset(found)

    def begin(self, run: RunInfo) -> tuple[list[bool], frozenset[tuple[int, str]]]:
        """When, and what."""
        return self.reusing(run), frozenset((block, "block") for block in self.blocks_on(run.network))

    def plan(self, state: tuple[list[bool], frozenset[tuple[int, str]]], call: Call) -> StepPlan:
        when, keys = state
        return StepPlan(reuse=keys) if when[call.position] else FULL
