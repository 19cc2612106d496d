"""What one generation of a pipeline took: per call and row, and per layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.cost import CostTable
from gearshift.execution.plan import StepPlan
from gearshift.execution.reach import embedded_skips, unread
from gearshift.integrations.diffusers.costs import Seen, measure
from gearshift.integrations.diffusers.layout import PipelineNetwork
from gearshift.runtime.errors import RunError
from gearshift.sampling.ledger import LedgerData


@dataclass
class Branch:
    """One call of a denoiser within a step: its rows, which of them were evaluated (host bool [rows]), and under what
    plan, as far as it could be carried out."""

    path: int
    called: Tensor
    plan: StepPlan


@dataclass
class Step:
    """One step of the scheduler."""

    call: Call
    branches: list[Branch] = field(default_factory=list)
    kept_bytes: int = 0
    forced: str | None = None


@dataclass
class Generation:
    """The ledger of one generation.

    Attributes:
        policy: its name.
        batch: latents that were made at once.
        expected, calls: steps that the scheduler had planned from where the pipeline began, and what they are.
        steps: those that were made.
        hits: by layer, how often it was taken from memory or left out (once per call of a denoiser).
        notes: what was not as expected; each of these computed in full.
        record: what the policy has to say of its decisions (`Policy.record`).
    """

    network: PipelineNetwork
    policy: str
    batch: int = 0
    expected: int = 0
    calls: tuple[Call, ...] = ()
    steps: list[Step] = field(default_factory=list)
    hits: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    record: Mapping[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    helpers: dict[str, Seen] = field(default_factory=dict)
    table: CostTable | None = None

    @property
    def complete(self) -> bool:
        """Whether every step was made; interrupted generations were not."""
        return bool(self.steps) and len(self.steps) == self.expected

    @property
    def mask(self) -> list[bool]:
        """For every step, whether a denoiser was evaluated for any row."""
        return [any(bool(branch.called.any()) for branch in step.branches) for step in self.steps]

    @property
    def calls_per_sample(self) -> float:
        """Evaluations per sample, each branch of guidance counted."""
        rows = sum(int(branch.called.sum()) for step in self.steps for branch in step.branches)
        return rows / self.batch if self.batch else 0.0

    @property
    def full_calls_per_sample(self) -> float:
        """What they would have been without a policy."""
        rows = sum(len(branch.called) for step in self.steps for branch in step.branches)
        return rows / self.batch if self.batch else 0.0

    @property
    def extra_bytes(self) -> int:
        """The most that was kept for later calls, in bytes."""
        return max((step.kept_bytes for step in self.steps), default=0)

    @property
    def fired(self) -> bool:
        """Whether the policy left anything out."""
        return bool(self.hits) or self.calls_per_sample < self.full_calls_per_sample

    @cached_property
    def costs(self) -> CostTable:
        """Costs of one row, counted when they are first asked for.

        Raises:
            RunError: the model cannot be run on the meta device.
        """
        if self.table is None:
            if not self.seen:
                raise RunError("no denoiser was evaluated in this generation, so there is nothing to count")
            self.table = measure(self.network, self.seen, list(self.helpers.values()))
        return self.table

    def data(self) -> LedgerData:
        """Arrays over calls, branches and samples, as our own sampler gives them."""
        if not self.steps or not self.batch:
            raise RunError("nothing was generated yet; call the pipeline, then look at its ledger")
        total = max(sum(len(branch.called) for branch in step.branches) for step in self.steps)
        branches = max(1, total // self.batch)
        shape = (len(self.steps), branches, self.batch)
        depth, called = np.zeros(shape, np.int16), np.zeros(shape, np.bool_)
        macs, reused = np.zeros(shape, np.int64), np.zeros(shape, np.int16)
        full_macs, wanted = [], []
        for k, step in enumerate(self.steps):
            flat = [array[k].reshape(-1) for array in (depth, called, macs, reused)]
            row = 0
            for branch in step.branches:
                here = slice(row, row + len(branch.called))
                ran = branch.called.numpy()
                blocks = self.network.paths[branch.path]
                plan = branch.plan
                cost = self.costs.of_plan(self.network, plan, branch.path).macs  # type: ignore[arg-type]
                of_depth = len(blocks) if plan.depth is None else int(plan.depth)
                taken = self._taken(plan, blocks[:of_depth], blocks)
                for array, value in zip(flat, (of_depth, True, cost, taken), strict=True):
                    array[here] = np.where(ran, value, 0)
                row += len(ran)
            path = step.branches[0].path if step.branches else 0
            full_macs.append(self.costs.full(self.network, path).macs)  # type: ignore[arg-type]
            wanted.append(max(1, row // self.batch))
        return LedgerData(
            depth,
            called,
            macs,
            reused,
            np.array(full_macs, np.int64),
            np.array([step.call.time for step in self.steps]),
            np.array([step.call.log_snr for step in self.steps]),
            np.array(wanted, np.int16),
            np.array([step.kept_bytes // self.batch for step in self.steps], np.int64),
        )

    def _taken(self, plan: StepPlan, ran: tuple[int, ...], path: tuple[int, ...]) -> int:
        """Blocks that take something from memory, those that nobody reads among them."""
        whole = {block for block, part in plan.reuse if part == "block"}
        network: Any = self.network
        idle = unread(network, ran, whole, embedded_skips(network, path))
        return len(idle | {block for block, _ in plan.reuse if block in ran})

    @property
    def macs_per_sample(self) -> float:
        return self.data().macs_per_image

    @property
    def macs_saved(self) -> float:
        """Fraction of the MACs of full compute."""
        return self.data().macs_saved

    def summary(self) -> str:
        """What fired, in a few lines."""
        made = f"{len(self.steps)} of {self.expected} steps" if not self.complete else f"{self.expected} steps"
        skipped = self.mask.count(False)
        lines = [
            f"{self.policy} on {self.network.name}: {made}, {skipped} without the denoiser; "
            f"{self.calls_per_sample:g} of {self.full_calls_per_sample:g} evaluations per sample; "
            f"{self.extra_bytes / 2**20:.1f} MiB kept at most",
        ]
        if not self.fired:
            lines.append("the policy never fired: everything was computed")
        if self.hits:
            most = ", ".join(f"{name} {count}" for name, count in self.hits.most_common(8))
            more = f", and {len(self.hits) - 8} more" if len(self.hits) > 8 else ""
            lines.append(f"taken from memory or left out: {most}{more}")
        return "\n".join([*lines, *self.notes])


def rows_of(branches: Sequence[Branch]) -> Tensor:
    """Which rows of a step were evaluated, branch after branch, host bool."""
    return torch.cat([branch.called for branch in branches]) if branches else torch.zeros(0, dtype=torch.bool)
