"""Policies that depend on the call alone: full, fixed depth, depth by time (ASE, arXiv 2408.05927), skipped calls."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from gearshift.diffusion.solvers.base import Call
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

    def check(self, run: RunInfo) -> None:
        check_depths(run.network, [self.depth], f"policy FixedDepth(depth={self.depth})")

    def plan(self, state: Any, call: Call) -> StepPlan:
        return StepPlan(depth=self.depth)


@dataclass(frozen=True)
class ExitSchedule(Policy):
    """Piecewise-constant depth over noise level; the depths of ASE's tables read from data to noise.

    Attributes:
        depths: depth of each bin, the bin closest to the data first.
        domain: "training_index" (0..999, index 0 closest to the data) or "log_snr" (falls towards noise).
        edges: inner bin edges, len(depths) - 1 of them, from data to noise: rising for training_index, falling for
            log_snr. None: equal bins of the training index. The lower edge belongs to the bin (floor to bin).
    """

    depths: list[int] = field(default_factory=list)
    domain: str = "training_index"
    edges: list[float] | None = None

    def __post_init__(self) -> None:
        if not self.depths:
            raise UsageError("policy ExitSchedule has no depths; give one per bin, the bin closest to the data first")
        if self.domain not in ("training_index", "log_snr"):
            raise UsageError(f"policy ExitSchedule: domain {self.domain!r} is neither 'training_index' nor 'log_snr'")
        if self.edges is None and self.domain == "log_snr":
            raise UsageError("policy ExitSchedule: equal bins exist over training_index only; give edges for log_snr")
        if self.edges is not None:
            keys = [self._key(edge) for edge in self.edges]
            if len(keys) != len(self.depths) - 1 or keys != sorted(keys):
                raise UsageError(
                    f"policy ExitSchedule: {len(self.depths)} depths need {len(self.depths) - 1} edges ordered from "
                    f"data to noise, got {self.edges} over {self.domain}"
                )

    def _key(self, value: float) -> float:
        return value if self.domain == "training_index" else -value

    @property
    def name(self) -> str:
        return f"schedule (mean depth {sum(self.depths) / len(self.depths):.1f})"

    def check(self, run: RunInfo) -> None:
        check_depths(run.network, self.depths, "policy ExitSchedule")

    def depth_at(self, call: Call) -> int:
        """Depth of a call, by its noise level."""
        if self.edges is None:
            width = 1000 / len(self.depths)
            # Times between or beyond the training indices (fractional grids, t -> 0 of an SDE) floor to a bin.
            position = int(max(call.training_index, 0.0) // width)
            return self.depths[min(position, len(self.depths) - 1)]
        level = call.training_index if self.domain == "training_index" else call.log_snr
        return self.depths[bisect_right([self._key(edge) for edge in self.edges], self._key(level))]

    def plan(self, state: Any, call: Call) -> StepPlan:
        return StepPlan(depth=self.depth_at(call))


@dataclass(frozen=True)
class SkipEvery(Policy):
    """Do not call the network at every k-th call (positions k-1, 2k-1, ...): the last prediction is held.

    Attributes:
        k: at least 2; the first call is always computed.
        keep_last: compute the last call whatever k says.
    """

    k: int
    keep_last: bool = True

    def __post_init__(self) -> None:
        if self.k < 2:
            raise UsageError(f"policy SkipEvery(k={self.k}) would skip every call; k is at least 2")

    @property
    def name(self) -> str:
        return f"skip every {self.k}"

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        skipped = call.position % self.k == self.k - 1
        if self.keep_last and call.position == len(state.calls) - 1:
            skipped = False
        return StepPlan(call=False) if skipped else FULL
