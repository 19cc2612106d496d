"""A planning problem: a sampler, calibration noise, and what a schedule costs and loses against full compute.

Losses are measured by sampling. Schedules that begin like the one before go on from where they part, so a search that
changes late calls pays for late calls only (prefix caching, as in BudCache, arXiv 2606.13496).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gearshift.execution.cost import CostTable
from gearshift.execution.memory import Key
from gearshift.execution.parts import kept_bytes
from gearshift.execution.plan import StepPlan
from gearshift.planning.choices import Choice, Menu, Schedule
from gearshift.sampling.loop import Sampler
from gearshift.sampling.stepping import Point

CACHE_BYTES = 2**30
"""What the prefix cache may hold of one schedule; three are held at a time."""

CostOf = Callable[[int, Choice], float]


@dataclass(frozen=True)
class Measured:
    """What a schedule came to: mean squared error of x0 to full compute, and its share of the full cost."""

    schedule: Schedule
    loss: float
    cost: float


class Problem:
    """One sampler on the images `index`.

    Args:
        sampler: of full compute; its policy is not looked at.
        index: calibration images, int64 [n].
        table: costs of the network.
        keys: what schedules may take from memory.
        cost_of: (position, choice) to a cost; None counts MACs.
        clip: compare images within [-1, 1], as they are looked at (not latents).

    Attributes:
        full: the schedule of full compute.
        reference: its images [n, C, H, W].
        runs: network calls made so far, in full runs of the batch; what a search has cost.
    """

    def __init__(
        self,
        sampler: Sampler,
        index: Tensor,
        table: CostTable,
        keys: frozenset[Key],
        *,
        cost_of: CostOf | None = None,
        clip: bool = True,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.sampler, self.table, self.clip = sampler, table, clip
        self.stepper = sampler.stepper(index, keys)
        self.run, self.calls = self.stepper.run, self.stepper.calls
        network = self.run.network
        levels = torch.tensor([call.log_snr for call in self.calls], dtype=torch.float64)
        self.paths: list[int] = network.route(levels).tolist()
        self._menus: dict[tuple[Menu, int], Menu] = {}
        self._macs: dict[tuple[int, int, frozenset[Key]], float] = {}
        self._given_cost, self._on_step = cost_of, on_step
        self.steps_made = 0
        whole = Choice(self.run.branches)
        self.full: Schedule = (whole,) * len(self.calls)
        self.full_cost = sum(self._cost_at(k, choice, frozenset()) for k, choice in enumerate(self.full))
        held = kept_bytes(network, keys) * self.run.num_rows + 4 * self.run.num_rows * math.prod(self.stepper.shape)
        self._stride = max(1, math.ceil(len(self.calls) * held / CACHE_BYTES))
        self.points = self._start()
        self.reference = self._finish(self.full, self.points)
        self._held = self._last = (self.full, self.points)

    def _start(self) -> dict[int, Point]:
        with torch.inference_mode():
            return {0: self.stepper.begin()}

    def menu_at(self, menu: Menu, position: int) -> Menu:
        """What a call may choose, on its path."""
        key = (menu, self.paths[position])
        if key not in self._menus:
            self._menus[key] = menu.on(self.run.network, self.paths[position])
        return self._menus[key]

    # Cost ------------------------------------------------------------------------------------------------------------

    def cost(self, schedule: Schedule) -> float:
        """Share of the cost of full compute. Parts that nobody has computed before cost what computing them does."""
        total = 0.0
        written: set[int] = set()  # paths that a call has run in full: whatever they leave is there
        for position, choice in enumerate(schedule):
            path = self.paths[position]
            total += self._cost_at(position, choice, choice.reuse if path in written else frozenset())
            if choice == self.full[0]:
                written.add(path)
        return total / self.full_cost

    def cost_at(self, position: int, choice: Choice) -> float:
        """Share that one call has in the cost of full compute, if all it reuses is there."""
        return self._cost_at(position, choice, choice.reuse) / self.full_cost

    def _cost_at(self, position: int, choice: Choice, there: frozenset[Key]) -> float:
        if self._given_cost is not None:
            return self._given_cost(position, choice if there == choice.reuse else replace(choice, reuse=there))
        if not choice.branches:
            return 0.0
        key = (self.paths[position], choice.depth, there)
        if key not in self._macs:
            plan = StepPlan(depth=choice.depth or None, reuse=there)
            self._macs[key] = float(self.table.of_plan(self.run.network, plan, key[0]).macs)
        return choice.branches * self._macs[key]

    # Loss ------------------------------------------------------------------------------------------------------------

    def measure(self, schedule: Schedule) -> Measured:
        """Run a schedule from where it parts from the one held."""
        return Measured(schedule, self.loss_of(self.images(schedule)), self.cost(schedule))

    def images(self, schedule: Schedule) -> Tensor:
        """Images [n, C, H, W] under a schedule."""
        if len(schedule) != len(self.calls):
            raise ValueError(f"the schedule has {len(schedule)} calls, the run {len(self.calls)}")
        base, points = self._held
        parted = next((k for k, (a, b) in enumerate(zip(schedule, base, strict=True)) if a != b), len(schedule))
        known = {k: point for k, point in points.items() if k <= parted}
        found = self._finish(schedule, known)
        self._last = (schedule, known)
        return found

    def hold(self, schedule: Schedule) -> None:
        """What is measured next begins like `schedule`; free for the one measured last."""
        if self._last[0] != schedule:
            self.images(schedule)
        self._held = self._last

    def deviating(self, position: int, choices: Sequence[Choice]) -> Tensor:
        """Images under full compute except for `choices` at the calls from `position` on."""
        schedule = (*self.full[:position], *choices, *self.full[position + len(choices) :])
        known = {k: point for k, point in self.points.items() if k <= position}
        return self._finish(schedule, known)

    def _finish(self, schedule: Schedule, points: dict[int, Point]) -> Tensor:
        """Images of a schedule from the last of `points`, which are its own; those on the way are added."""
        plans = [choice.plan(self.run) for choice in schedule]
        return self.stepper.finish(plans, points, self._stride, self._count)

    def _count(self) -> None:
        self.steps_made += 1
        if self._on_step is not None:
            self._on_step()

    def error(self, images: Tensor) -> Tensor:
        """Difference to full compute, [n, C, H, W]."""
        return difference(images, self.reference, self.clip)

    def loss_of(self, images: Tensor) -> float:
        """Mean squared error to full compute."""
        return mean_squared_error(images, self.reference, self.clip)

    @property
    def runs(self) -> float:
        return self.steps_made / len(self.calls)


def difference(images: Tensor, reference: Tensor, clip: bool) -> Tensor:
    """Images minus reference [n, C, H, W]: within [-1, 1], as images are looked at, with `clip`."""
    return images.clamp(-1, 1) - reference.clamp(-1, 1) if clip else images - reference


def mean_squared_error(images: Tensor, reference: Tensor, clip: bool) -> float:
    """Mean square of `difference`."""
    return float(difference(images, reference, clip).double().square().mean())


def psnr(loss: float, peak: float = 2.0) -> float:
    """Decibels of a mean squared error of images in [-1, 1]; infinite where they are equal."""
    return math.inf if loss == 0 else 10 * math.log10(peak**2 / loss)
