"""Decoder blocks dropped by noise level: the exit schedule of networks with long skips (ASE, arXiv 2408.05927)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from gearshift.diffusion.bins import NoiseBins
from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.plan import StepPlan
from gearshift.policies.base import Policy, RunInfo
from gearshift.policies.exit_schedule import scaled
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class BypassSchedule(Policy):
    """Piecewise-constant number of dropped decoder blocks over noise level.

    A decoder block is one that merges a long skip. What remains of a dropped one is that merge, so every skip is still
    consumed once and in order. The last `n` of the decoder are dropped, next to the readout, as an early exit would;
    which end the paper drops could not be verified.

    Attributes:
        dropped: decoder blocks dropped in each bin, the bin closest to the data first.
        domain, edges: bins, as in `ExitSchedule`.
        of: number of decoder blocks of the network that `dropped` is stated for; others are scaled, halves rounded up.
            None: numbers are taken as they are.
    """

    dropped: list[int] = field(default_factory=list)
    domain: str = "training_index"
    edges: list[float] | None = None
    of: int | None = None

    def __post_init__(self) -> None:
        if not self.dropped:
            raise UsageError(
                "policy BypassSchedule drops nothing; give a number of decoder blocks per bin under dropped, the bin "
                "closest to the data first"
            )
        if min(self.dropped) < 0 or (self.of is not None and max(self.dropped) > self.of):
            most = "" if self.of is None else f", and at most the {self.of} blocks they are stated for (of)"
            raise UsageError(f"policy BypassSchedule: dropped={list(self.dropped)}; each must be at least 0{most}")
        self.bins  # noqa: B018  # checks the edges

    @cached_property
    def bins(self) -> NoiseBins:
        return NoiseBins(len(self.dropped), self.domain, self.edges, owner="policy BypassSchedule")

    @property
    def name(self) -> str:
        return f"bypass (mean {sum(self.dropped) / len(self.dropped):.1f} decoder blocks)"

    def blocks_on(self, network: Network) -> list[frozenset[int]]:
        """Blocks dropped in each bin on this network."""
        decoders = [[block for block in path if block in network.pops] for path in network.paths]
        return [
            frozenset(
                block
                for decoder in decoders
                for block in decoder[len(decoder) - scaled(count, self.of, len(decoder)) :]
            )
            for count in self.dropped
        ]

    def fits(self, network: Network) -> None:
        fewest = min(sum(block in network.pops for block in path) for path in network.paths)
        if fewest == 0:
            raise UsageError(
                f"policy BypassSchedule drops decoder blocks, but {network.name} has none that merge a long skip; "
                "take policy ExitSchedule"
            )
        if self.of is None and max(self.dropped) > fewest:
            raise UsageError(
                f"policy BypassSchedule drops {max(self.dropped)} decoder blocks, but {network.name} has {fewest}"
            )

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        return StepPlan(bypass=self.blocks_on(state.network)[self.bins.of(call.training_index, call.log_snr)])
