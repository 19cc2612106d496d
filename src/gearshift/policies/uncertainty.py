"""Exit where the uncertainty head falls below a threshold (DeeDiff / AdaDiff, arXiv 2309.17074)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.exits import ExitView
from gearshift.execution.network import Network
from gearshift.execution.plan import StepPlan
from gearshift.policies.base import Policy, RunInfo, check_depths
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class BelowThreshold:
    """Rows leave where their uncertainty is below `threshold`.

    Attributes:
        statistic: "sample" decides each row by its own mean, "batch" all rows by the mean over the batch.
        joint: both guidance branches of a sample leave together, on the mean of their uncertainties.
        batch: B, to tell which rows are branches of one sample.
        patience, patience_depth: up to that depth a row leaves at its `patience`-th hit, not necessarily consecutive;
            deeper it leaves at any hit.
    """

    threshold: float
    statistic: str
    joint: bool
    batch: int
    allowed: frozenset[int] | None
    patience: int = 1
    patience_depth: int = 0

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        if self.threshold <= 0:  # u < 0 never happens
            return ()
        return [depth for depth in exits[:-1] if self.allowed is None or depth in self.allowed]

    def begin(self, num_rows: int) -> dict[str, Tensor]:
        # Hits of every row of the run; on the rows' device from the first look on.
        return {"hits": torch.zeros(num_rows, dtype=torch.int64)}

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        values = view.uncertainty()
        if self.statistic == "batch":
            values = values.mean().expand(len(values))
        elif self.joint:
            sample = view.rows.on(values.device) % self.batch
            sums = values.new_zeros(self.batch).index_add_(0, sample, values)
            counts = values.new_zeros(self.batch).index_add_(0, sample, torch.ones_like(values))
            values = (sums / counts)[sample]
        # A saturated sigmoid gives exactly 1, and threshold 1 lets everybody leave.
        hit = values < self.threshold if self.threshold < 1 else torch.ones_like(values, dtype=torch.bool)
        if self.patience == 1 or view.depth > self.patience_depth:
            return hit
        rows = view.rows.on(hit.device)
        state["hits"] = state["hits"].to(hit.device).index_add(0, rows, hit.long())
        return hit & (state["hits"][rows] >= self.patience)


@dataclass(frozen=True)
class UncertaintyExit(Policy):
    """Each row leaves after the first block whose predicted uncertainty is below `threshold`.

    Attributes:
        threshold: in [0, 1]; 0 never leaves early, 1 leaves at the first exit. The papers' certainty is 1 - threshold.
        statistic: "sample", or "batch" (official code: the whole batch leaves together).
        joint: the branches of a guided sample decide together (False: each for itself, as in the official code).
        depths: exits where leaving is allowed; None is all of them.
        patience: hits it takes to leave up to `patience_depth`; deeper, one is enough. The official pixel models wait
            for a second hit in the encoder half (patience 2, patience_depth = encoder blocks).
        patience_depth: last depth where patience counts.
    """

    threshold: float
    statistic: str = "sample"
    joint: bool = False
    depths: list[int] | None = None
    patience: int = 1
    patience_depth: int = 0

    static: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"policy UncertaintyExit: threshold {self.threshold} is outside [0, 1]")
        if self.patience < 1 or self.patience_depth < 0:
            raise UsageError(
                f"policy UncertaintyExit: patience {self.patience} must be at least 1 and patience_depth "
                f"{self.patience_depth} at least 0"
            )
        if self.statistic not in ("sample", "batch"):
            raise UsageError(f"policy UncertaintyExit: statistic {self.statistic!r} is neither 'sample' nor 'batch'")

    @property
    def name(self) -> str:
        return f"uncertainty < {self.threshold:g}"

    def fits(self, network: Network) -> None:
        if not network.has_uncertainty:
            raise UsageError(
                f"policy UncertaintyExit needs uncertainty heads, and this {network.name} has none; "
                "train with exits.uncertainty=pixel_map or token_mean"
            )
        if self.depths is not None:
            check_depths(network, self.depths, "policy UncertaintyExit")

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        allowed = None if self.depths is None else frozenset(self.depths)
        patience = (self.patience, self.patience_depth)
        return StepPlan(
            exit=BelowThreshold(self.threshold, self.statistic, self.joint, state.batch, allowed, *patience)
        )
