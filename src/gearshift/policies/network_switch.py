"""Another network for the first calls of a run, the run's own after them (DuoDiff, arXiv 2410.09633).

The early exits of DeeDiff, seen over time, are close to a step: shallow while there is mostly noise, full depth after.
DuoDiff makes the step itself the method: a shallow network, trained on its own on all noise levels, makes the first
t_s calls from pure noise, the deep one all others. Nothing is shared, nothing is estimated, and a batch stays together.
With the other network at all calls it is the plainest rival of any method that leaves early: a smaller network, trained
from scratch.

It is exactly t_s calls under every solver, also where a step takes several; the official code switches one late under
DDIM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.plan import StepPlan
from gearshift.policies.base import Policy, RunInfo
from gearshift.runtime.errors import UsageError

OWN, OTHER = 0, 1
"""Paths of the two networks side by side: the run's own is full compute."""


@dataclass(frozen=True)
class NetworkSwitch(Policy):
    """The network of the run `other` makes the first calls, the run's own the rest.

    Attributes:
        other: folder of a run of ours with the same process, shape of images and conditioning.
        calls: how many calls it makes, from pure noise on; None: all of them, unless `share` says how many.
        share: of the calls that it makes, in [0, 1], rounded to whole calls; instead of `calls`.
    """

    other: str
    calls: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.calls is not None and self.share is not None:
            raise UsageError(
                f"policy NetworkSwitch: calls={self.calls} and share={self.share} both say how many calls the other "
                "network makes; set one of them to null"
            )
        if self.calls is not None and self.calls < 0:
            raise UsageError(f"policy NetworkSwitch: calls={self.calls} must be at least 0")
        if self.share is not None and not 0 <= self.share <= 1:
            raise UsageError(f"policy NetworkSwitch: share={self.share} is outside [0, 1]")

    @property
    def name(self) -> str:
        if self.share is not None:
            return f"DuoDiff, first {100 * self.share:g} % of calls"
        return "other network" if self.calls is None else f"DuoDiff, first {self.calls} calls"

    def others(self) -> tuple[str, ...]:
        return (self.other,)

    def calls_of(self, total: int) -> int:
        """How many of a run's calls the other network makes."""
        if self.share is not None:
            return int(self.share * total + 0.5)
        return total if self.calls is None else self.calls

    def fits(self, network: Network) -> None:
        if len(network.paths) < 2 or not getattr(network, "by_plan", False):
            raise UsageError(
                f"policy NetworkSwitch switches from the network of {self.other} to another one, and there is "
                f"{network.name} alone; sample, evaluate, profile or bench a run of ours (run=RUN), whose network is "
                "then set beside it"
            )

    def check(self, run: RunInfo) -> None:
        self.fits(run.network)
        if self.calls is not None and self.calls > len(run.calls):
            raise UsageError(
                f"policy NetworkSwitch: the other network makes the first {self.calls} calls, and this run has "
                f"{len(run.calls)}; set calls to 0..{len(run.calls)}, or share"
            )

    def resolved(self, run: RunInfo) -> NetworkSwitch:
        if self.share is None:
            return self
        return replace(self, calls=self.calls_of(len(run.calls)), share=None)

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        return StepPlan(expert=OTHER if call.position < self.calls_of(len(state.calls)) else OWN)

    def amend(self, state: RunInfo, plan: StepPlan) -> StepPlan:
        """Exit rules ask the heads of one of the two networks alone where the other has none."""
        if plan.exit is None or not isinstance(plan.expert, int) or not getattr(plan.exit, "asks_heads", False):
            return plan
        network = state.network
        heads = any(network.predicts_error(depth, plan.expert) for depth in network.exits(plan.expert))
        return plan if heads or not network.has_uncertainty else replace(plan, exit=None)
