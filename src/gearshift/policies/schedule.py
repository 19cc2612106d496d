"""Policies that depend on the position of the call alone: full, fixed depth, skipped calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.plan import FULL, StepPlan
from gearshift.policies.base import Policy, RunInfo, check_depths
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class Full(Policy):
    """Everything at every call."""


@dataclass(frozen=True)
class FixedDepth(Policy):
    """Read out after `depth` blocks at every call."""

    depth: int

    @property
    def name(self) -> str:
        return f"depth {self.depth}"

    def fits(self, network: Network) -> None:
        check_depths(network, [self.depth], f"policy FixedDepth(depth={self.depth})")

    def plan(self, state: Any, call: Call) -> StepPlan:
        return StepPlan(depth=self.depth)


@dataclass(frozen=True)
class SkipEvery(Policy):
    """Do not call the network at every k-th call (positions k-1, 2k-1, ...): the last prediction is held.

    Attributes:
        k: at least 2; the first call is always computed.
        keep_last: compute the last call whatever k says.
        extrapolate: continue the line through the last two predictions instead of holding the last one.
    """

    k: int
    keep_last: bool = True
    extrapolate: bool = False

    def __post_init__(self) -> None:
        if self.k < 2:
            raise UsageError(f"policy SkipEvery(k={self.k}) would skip every call; k is at least 2")

    @property
    def name(self) -> str:
        return f"skip every {self.k}" + (" extrapolated" if self.extrapolate else "")

    @property
    def forecasts(self) -> bool:
        return self.extrapolate

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        skipped = call.position % self.k == self.k - 1
        if self.keep_last and call.position == len(state.calls) - 1:
            skipped = False
        return StepPlan(call=False, forecast=int(self.extrapolate)) if skipped else FULL
