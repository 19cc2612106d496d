"""Depth by noise level (ASE, arXiv 2408.05927)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from gearshift.diffusion.bins import NoiseBins
from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.plan import StepPlan
from gearshift.policies.base import Policy, RunInfo, check_depths
from gearshift.runtime.errors import UsageError


def scaled(count: int, stated_for: int | None, actual: int) -> int:
    """``count`` blocks out of ``stated_for``, on a network that has ``actual``; halves round up."""
    return count if stated_for is None else (2 * count * actual + stated_for) // (2 * stated_for)


@dataclass(frozen=True)
class ExitSchedule(Policy):
    """Piecewise-constant depth over noise level; the depths of ASE's tables read from data to noise.

    The depth of a call is read at its own noise level, by position in the run, so every solver that visits a level
    gets the same depth there, whatever it calls its times; solvers that visit a level twice get it twice.

    Attributes:
        depths: depth of each bin, the bin closest to the data first.
        domain: "training_index" (0..999, index 0 closest to the data) or "log_snr" (falls towards noise).
        edges: inner bin edges, len(depths) - 1 of them, from data to noise: rising for training_index, falling for
            log_snr. None: equal bins of the training index. The lower edge belongs to the bin (floor to bin); see
            `NoiseBins` for levels beyond the ends.
        of: number of blocks of the network that `depths` are stated for. Networks of another depth L then use
            depth * L / of, halves rounded up, at least 1. None: depths are taken as they are.
        monotone: refuse depths that grow towards noise.
    """

    depths: list[int] = field(default_factory=list)
    domain: str = "training_index"
    edges: list[float] | None = None
    of: int | None = None
    monotone: bool = False

    def __post_init__(self) -> None:
        if not self.depths:
            raise UsageError("policy ExitSchedule has no depths; give one per bin, the bin closest to the data first")
        if self.of is not None and not all(1 <= depth <= self.of for depth in self.depths):
            raise UsageError(
                f"policy ExitSchedule: depths {list(self.depths)} are stated for a network of {self.of} blocks (of), "
                f"so each must be 1..{self.of}"
            )
        if self.monotone and list(self.depths) != sorted(self.depths, reverse=True):
            raise UsageError(
                f"policy ExitSchedule: depths {list(self.depths)} grow towards noise somewhere, which monotone=true "
                "rules out; reorder them (the bin closest to the data first), or set monotone=false"
            )
        self.bins  # noqa: B018  # checks the edges

    @cached_property
    def bins(self) -> NoiseBins:
        return NoiseBins(len(self.depths), self.domain, self.edges, owner="policy ExitSchedule")

    @property
    def name(self) -> str:
        mean = f"mean depth {sum(self.depths) / len(self.depths):.1f}"
        return f"schedule ({mean})" if self.of is None else f"schedule ({mean} of {self.of})"

    def depths_on(self, network: Network) -> list[int]:
        """Depth of each bin on this network."""
        blocks = max(network.num_blocks(path) for path in range(len(network.paths)))
        if self.of is None:
            return list(self.depths)
        return [max(scaled(depth, self.of, blocks), 1) for depth in self.depths]

    def fits(self, network: Network) -> None:
        check_depths(network, self.depths_on(network), "policy ExitSchedule")

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        return StepPlan(depth=self.depths_on(state.network)[self.bins.of(call.training_index, call.log_snr)])
