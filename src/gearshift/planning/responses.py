"""How the images answer to single decisions, and what that predicts for whole schedules.

Each decision is tried alone, at full compute elsewhere, and leaves a difference in the images. To first order the
differences of several decisions add up, as vectors: those that cancel are found to cancel. So one Gram matrix of the
differences predicts the loss of any schedule without running it.

A skipped stretch is one decision (the call it holds on to, its length, held or extrapolated). What else a call computes
(fewer branches, less depth, parts from memory) is measured where the next call computes; a stretch held on to it
stretches its difference by the lengths of the steps in sigma / alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gearshift.planning.choices import Choice, Menu, Schedule
from gearshift.planning.kept import KeptResponses
from gearshift.planning.problem import Problem
from gearshift.policies.adaptive_skip import place

Key = tuple[int, Choice, int]
"""Position, what the call computes, and how many calls after it are skipped; the choice says whether they forecast."""


@dataclass(frozen=True)
class Responses:
    """Differences in the images, by decision.

    Attributes:
        number: row of each decision in `gram`.
        gram: inner products of the differences over their number of entries, so that the diagonal is the loss of each.
        ratio: sigma / alpha of every call, and of where the last step arrives.
        longest: most calls after one that were tried skipped.
        paths: blocks of the path that each call takes.
    """

    number: dict[Key, int]
    gram: NDArray[np.float64]
    ratio: NDArray[np.float64]
    longest: int
    paths: tuple[tuple[int, ...], ...]

    def terms(self, schedule: Schedule) -> list[tuple[int, float]] | None:
        """Decisions of a schedule with their weights; None where it holds one that was not tried."""
        found: list[tuple[int, float]] = []
        history = History()
        position = 0
        while position < len(schedule):
            choice = schedule[position]
            if not choice.branches:
                return None  # a run does not begin with a skipped call
            end = position + 1
            while end < len(schedule) and not schedule[end].branches:
                end += 1
            segment = self.segment(position, choice, schedule[position + 1 : end], history)
            if segment is None:
                return None
            found += segment
            history = history.after(position, choice, schedule[0].branches, self.paths[position])
            position = end
        return found

    def segment(
        self, position: int, choice: Choice, skipped: Sequence[Choice], history: History
    ) -> list[tuple[int, float]] | None:
        """Decisions of one call and the skipped ones after it, with the weights that come from what went before."""
        found: list[tuple[int, float]] = []
        length = len(skipped)
        if skipped:
            key = (position, Choice(0, forecast=skipped[0].forecast), length)
            if key not in self.number or any(other.forecast != skipped[0].forecast for other in skipped):
                return None
            # The line through the last two predictions strays further the further these lie apart.
            apart = position - history.computed if skipped[0].forecast else 1
            found.append((self.number[key], (length + apart) / (length + 1)))
        weight = self._stretch(position, length)
        for single in singles(choice):
            row = self.number.get((position, single, 0))
            if row is None:
                return None
            found.append((row, weight * history.age(position, single)))
        return found

    def _stretch(self, position: int, skipped: int) -> float:
        """How much further than one step a prediction goes that is held on to."""
        first = self.ratio[position] - self.ratio[position + 1]
        whole = self.ratio[position] - self.ratio[position + 1 + skipped]
        return float(whole / first) if first else 1.0

    def loss(self, terms: Sequence[tuple[int, float]]) -> float:
        """Predicted mean squared error of decisions together."""
        if not terms:
            return 0.0
        rows, weights = np.array([row for row, _ in terms]), np.array([weight for _, weight in terms])
        return float(max(weights @ self.gram[np.ix_(rows, rows)] @ weights, 0.0))

    def predict(self, schedule: Schedule) -> float | None:
        """Predicted loss of a schedule; None where it holds what was not tried."""
        terms = self.terms(schedule)
        return None if terms is None else self.loss(terms)


@dataclass(frozen=True)
class History:
    """What a schedule did before a call, as far as it decides how old what is taken from memory is.

    Attributes:
        computed: the last call that evaluated anything.
        branches: the last call that evaluated every branch.
        blocks, attention: by block, the call that what it left behind goes back to. A block that runs on what came from
            memory goes back to where that came from.
    """

    computed: int = -1
    branches: int = -1
    blocks: Mapping[int, int] = field(default_factory=dict)
    attention: Mapping[int, int] = field(default_factory=dict)

    def after(self, position: int, choice: Choice, branches: int, path: Sequence[int]) -> History:
        """With one more computed call, on the blocks of `path`."""
        blocks, attention = dict(self.blocks), dict(self.attention)
        origin, taken = position, dict(choice.reuse)
        ran = path[: choice.depth or len(path)]
        whole = [k for k, block in enumerate(ran) if taken.get(block) == "block"]
        if whole:
            origin = self.block(ran[whole[-1]])
            ran = ran[whole[-1] + 1 :]
        for block in ran:
            blocks[block] = origin
            if block not in taken:
                attention[block] = origin
        return History(position, position if choice.branches == branches else self.branches, blocks, attention)

    def block(self, block: int) -> int:
        return self.blocks.get(block, self.computed)

    def age(self, position: int, single: Choice) -> float:
        """How much further a decision strays than where it was tried, one call after full compute: what is taken from
        memory in proportion to its age in calls, what is extrapolated with its square."""
        if single.branches >= 0:
            calls = position - self.branches
            return calls * (calls + 1) / 2 if single.forecast else calls
        if single.reuse:
            found = (
                self.block(b) if part == "block" else self.attention.get(b, self.computed) for b, part in single.reuse
            )
            return position - min(found)
        return 1.0


def singles(choice: Choice) -> list[Choice]:
    """The decisions a choice is made of, each as a choice with nothing else in it but the branches."""
    found = [Choice(choice.branches, forecast=choice.forecast)]
    found += [Choice(-1, depth=choice.depth)] if choice.depth else []
    found += [Choice(-1, reuse=choice.reuse)] if choice.reuse else []
    return found


def tried(problem: Problem, menu: Menu, longest: int) -> list[Key]:
    """The decisions to try."""
    total, full = len(problem.calls), menu.full
    keys: list[Key] = []
    for position in range(total):
        if menu.skips:
            for length in range(1, min(longest, total - 1 - position) + 1):
                # Without a call before, there is no line to continue.
                for forecast in (False, True) if position else (False,):
                    keys.append((position, Choice(0, forecast=forecast), length))
        if position == 0:
            continue  # is always computed in full
        here = problem.menu_at(menu, position)
        for branches in menu.branches[1:]:
            keys += [(position, Choice(branches, forecast=forecast), 0) for forecast in (False, True)]
        keys += [(position, Choice(-1, depth=depth), 0) for depth in here.depths if depth]
        keys += [(position, Choice(-1, reuse=reuse), 0) for reuse in here.reuse if reuse]
    return [key for key in keys if key[1] != full]


def measure_responses(
    problem: Problem,
    menu: Menu,
    longest: int,
    on_done: Callable[[int], None] = lambda done: None,
    kept: KeptResponses | None = None,
) -> Responses:
    """Try every decision of `menu` alone: about half a run of the batch each. What `kept` holds is not tried again."""
    keys = tried(problem, menu, longest)
    gram = _gram(problem, keys, menu.full, on_done, kept) if kept is None or kept.gram is None else kept.gram
    calls = problem.calls
    run = problem.run
    ends = [place(run, call.alpha, call.sigma) for call in calls]
    ends.append(place(run, calls[-1].next_alpha, calls[-1].next_sigma))
    paths = tuple(problem.run.network.paths[path] for path in problem.paths)
    # What changes nothing has no row of its own: full compute at a call.
    number = {key: row for row, key in enumerate(keys)}
    return Responses(_with_nothing(number, calls, menu.full), _bordered(gram), np.array(ends), longest, paths)


def _gram(
    problem: Problem,
    keys: Sequence[Key],
    full: Choice,
    on_done: Callable[[int], None],
    kept: KeptResponses | None,
) -> NDArray[np.float64]:
    errors: list[Tensor] = [] if kept is None else list(kept.errors)
    if errors:
        on_done(len(errors))
    try:
        for done, (position, choice, skipped) in enumerate(keys[len(errors) :], len(errors)):
            if skipped:
                images = problem.deviating(position, [full] + [choice] * skipped)
            else:
                branches = full.branches if choice.branches < 0 else choice.branches
                images = problem.deviating(position, [replace(choice, branches=branches)])
            errors.append(problem.error(images).flatten().double().cpu())
            if kept is not None:
                kept.add(errors[-1])
            on_done(done + 1)
    finally:  # also when it is stopped
        if kept is not None:
            kept.save()
    matrix = torch.stack(errors) if errors else torch.zeros(0, 1, dtype=torch.float64)
    gram: NDArray[np.float64] = (matrix @ matrix.T / matrix.shape[1]).numpy()
    if kept is not None:
        kept.close(gram)
    return gram


def _with_nothing(number: dict[Key, int], calls: Sequence[object], full: Choice) -> dict[Key, int]:
    nothing = len(number)
    return {**number, **{(position, Choice(full.branches), 0): nothing for position in range(len(calls))}}


def _bordered(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """With a row of zeros for what changes nothing."""
    return np.pad(gram, ((0, 1), (0, 1)))
