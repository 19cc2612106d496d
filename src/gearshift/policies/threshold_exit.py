"""Leave where a number per row falls below a threshold: what exits by uncertainty and by saturation share.

How the published rules differ is settings: whose number decides (each row's, its sample's branches together, the whole
batch), how many hits it takes and up to which depth, at which exits, and whether one threshold holds for all noise
levels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from gearshift.diffusion.bins import NoiseBins
from gearshift.diffusion.denoiser import Prediction
from gearshift.diffusion.solvers.base import Call
from gearshift.execution.exits import ExitView
from gearshift.execution.network import Network
from gearshift.execution.plan import StepPlan
from gearshift.policies.base import Observed, Policy, RunInfo, check_depths
from gearshift.runtime.errors import UsageError

STATISTICS = ("sample", "batch")
ENCODER = "encoder"


@dataclass(frozen=True)
class BelowThreshold:
    """Rows leave where what `measure` says of them is below `threshold`.

    Attributes:
        measure: numbers in [0, 1] of the rows of a view, [n].
        statistic: "sample" decides each row by its own number, "batch" all rows of a guidance branch by their mean.
        joint: the guidance branches decide together, on the mean of their numbers.
        batch: B, to tell which rows are branches of one sample.
        allowed: depths where leaving is allowed; None is every exit.
        first: least depth that is looked at.
        patience, patience_depth: up to that depth (by path) a row leaves at its `patience`-th hit; deeper it leaves at
            any hit.
        consecutive: a miss starts the count again.
        left: depths at which somebody left at the last call, None where there was none: elsewhere nobody is expected
            to leave at this one.
        asks_heads: `measure` is what an uncertainty head says.
    """

    measure: Callable[[ExitView], Tensor]
    threshold: float
    statistic: str
    joint: bool
    batch: int
    allowed: frozenset[int] | None = None
    first: int = 0
    patience: int = 1
    patience_depth: tuple[int, ...] = (0,)
    consecutive: bool = False
    left: frozenset[int] | None = None
    asks_heads: bool = False

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        if self.threshold <= 0:  # nothing is below 0
            return ()
        return [d for d in exits[:-1] if d >= self.first and (self.allowed is None or d in self.allowed)]

    def quiet(self, exits: tuple[int, ...]) -> Collection[int]:
        left = self.left or ()
        # Beyond the deepest nobody came, which says nothing.
        return [depth for depth in self.depths(exits) if depth not in left and depth < max(left, default=0)]

    def begin(self, num_rows: int) -> dict[str, Any]:
        return {"rows": num_rows, "hits": None}

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        values = self.measure(view)
        if self.statistic == "batch" and self.joint:
            values = values.mean().expand(len(values))
        elif self.statistic == "batch" or self.joint:
            # Rows are branch-major: those of one branch decide together, or those of one sample.
            rows = view.rows.on(values.device)
            group = rows % self.batch if self.joint else rows // self.batch
            count = self.batch if self.joint else -(-view.rows.total // self.batch)
            sums = values.new_zeros(count).index_add_(0, group, values)
            counts = values.new_zeros(count).index_add_(0, group, torch.ones_like(values))
            values = (sums / counts)[group]
        # A saturated sigmoid gives exactly 1, and threshold 1 lets everybody leave.
        hit = values < self.threshold if self.threshold < 1 else torch.ones_like(values, dtype=torch.bool)
        if self.patience == 1 or view.depth > self.patience_depth[view.path]:
            return hit
        rows = view.rows.on(hit.device)
        if state["hits"] is None:  # of every row of the run, made where the rows are
            state["hits"] = torch.zeros(state["rows"], dtype=torch.int64, device=hit.device)
        hits = state["hits"]
        counted = hits[rows] + hit.long() if not self.consecutive else (hits[rows] + 1) * hit
        hits[rows] = counted
        return hit & (counted >= self.patience)


@dataclass(frozen=True, slots=True)
class ExitRun:
    """State of a run: what it is, and the depths at which somebody left at its last call."""

    run: RunInfo
    left: frozenset[int] | None = None


@dataclass(frozen=True)
class ThresholdExit(Policy):
    """Each row leaves after the first block where its number is below the threshold.

    Attributes:
        threshold: in [0, 1]; 0 never leaves early, 1 leaves at the first exit.
        thresholds: in place of `threshold`, one for each bin of the noise level, the bin closest to the data first.
        domain, edges: of the bins, as in `ExitSchedule`.
        statistic: "sample", or "batch" (the whole batch leaves together, as in the official code of AdaDiff).
        joint: the branches of a guided sample decide together (False: each for itself, as in that code).
        depths: exits where leaving is allowed; None is all of them.
        patience: hits it takes to leave up to `patience_depth`; deeper, one is enough. AdaDiff's official pixel models
            wait for a second hit in the encoder half: patience 2, patience_depth "encoder".
        patience_depth: last depth where patience counts, or "encoder": the last one after a block that leaves a long
            skip.
        consecutive: hits must follow each other (AdaDiff's need not).
    """

    threshold: float | None = None
    thresholds: list[float] | None = None
    domain: str = "training_index"
    edges: list[float] | None = None
    statistic: str = "sample"
    joint: bool = False
    depths: list[int] | None = None
    patience: int = 1
    patience_depth: Any = 0
    consecutive: bool = False

    static: ClassVar[bool] = False
    said: ClassVar[str] = "value"
    """What the number is, for names."""
    asks_heads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        own = f"policy {type(self).__name__}"
        if (self.threshold is None) == (self.thresholds is None):
            raise UsageError(
                f"{own}: threshold={self.threshold} and thresholds={self.thresholds}; give one of them, the other null"
            )
        values: list[Any] = [self.threshold] if self.thresholds is None else list(self.thresholds)
        if not values:
            raise UsageError(f"{own}: thresholds=[] has none; give one per bin, the bin closest to the data first")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{own}: threshold {value!r} is no number; give one in [0, 1]")
            if not 0 <= value <= 1:
                raise UsageError(f"{own}: threshold {value} is outside [0, 1]")
        if self.thresholds is not None:
            self.bins  # noqa: B018  # checks the edges
        depth = self.patience_depth
        if self.patience < 1 or not (depth == ENCODER or (isinstance(depth, int) and depth >= 0)):
            raise UsageError(
                f"{own}: patience {self.patience} must be at least 1 and patience_depth {depth!r} at least 0, "
                "or encoder"
            )
        if self.statistic not in STATISTICS:
            raise UsageError(f"{own}: statistic {self.statistic!r} is neither 'sample' nor 'batch'")

    @cached_property
    def bins(self) -> NoiseBins:
        """Bins of the noise level that `thresholds` stand for."""
        assert self.thresholds is not None
        return NoiseBins(len(self.thresholds), self.domain, self.edges, owner=f"policy {type(self).__name__}")

    @property
    def name(self) -> str:
        if self.thresholds is None:
            return f"{self.said} < {self.threshold:g}"
        return f"{self.said} < {', '.join(f'{value:.3g}' for value in self.thresholds)}"

    def fits(self, network: Network) -> None:
        if not network.takes_exit_rules:
            raise UsageError(
                f"policy {type(self).__name__} decides within a call, which {network.name} does not allow; take a "
                "fixed depth or a schedule"
            )
        if self.depths is not None:
            check_depths(network, self.depths, f"policy {type(self).__name__}")

    def measure(self, view: ExitView) -> Tensor:
        """What is compared with the threshold, [n] in [0, 1]."""
        raise NotImplementedError

    def first(self) -> int:
        """Least depth at which `measure` is defined."""
        return 0

    def begin(self, run: RunInfo) -> ExitRun:
        return ExitRun(run)

    def observe(self, state: ExitRun, call: Call, before: Tensor, after: Tensor, prediction: Observed) -> ExitRun:
        if not isinstance(prediction, Prediction) or not bool(prediction.called.any()):
            return state
        return replace(state, left=frozenset(prediction.depth[prediction.called].tolist()))

    def plan(self, state: ExitRun, call: Call) -> StepPlan:
        if self.thresholds is None:
            threshold = self.threshold or 0.0
        else:
            threshold = self.thresholds[self.bins.of(call.training_index, call.log_snr)]
        return StepPlan(exit=self.rule(state.run, threshold, state.left))

    def rule(self, run: RunInfo, threshold: float, left: frozenset[int] | None = None) -> BelowThreshold:
        """The rule of a call at which `threshold` holds, after one at which rows left at the depths `left`."""
        return BelowThreshold(
            self.measure,
            threshold,
            self.statistic,
            self.joint,
            run.batch,
            None if self.depths is None else frozenset(self.depths),
            self.first(),
            self.patience,
            tuple(self._patience_depth(run.network, path) for path in range(len(run.network.paths))),
            self.consecutive,
            left,
            self.asks_heads,
        )

    def _patience_depth(self, network: Network, path: int) -> int:
        if isinstance(self.patience_depth, int):
            return self.patience_depth
        return max((d for d, block in enumerate(network.paths[path], 1) if block in network.pushes), default=0)


def alias(owner: str, name: str, value: float | None, threshold: float | None) -> float | None:
    """The threshold that 1 - `value` is, where a rule is given by what it must reach; `threshold` where it is not.

    Raises UsageError where both are given, or `value` is outside [0, 1].
    """
    if value is None:
        return threshold
    if threshold is not None:
        raise UsageError(
            f"policy {owner}: threshold={threshold:g} and {name}={value:g} are two names of one thing "
            f"(threshold = 1 - {name}); set one of them to null"
        )
    if not 0 <= value <= 1:
        raise UsageError(f"policy {owner}: {name} {value} is outside [0, 1]")
    return round(1 - value, 12)  # 1 - 0.92 is not 0.08
