"""What could be had for the same MACs without the method: the baselines of an evaluation.

Under every solver two rows are matched, where there are such: the best that leaves early (an exit row: full compute's
calls, nothing taken from memory), and the best that skips calls or reuses. Best is what saves most MACs among the rows
within the tolerance of full compute, else what is closest to it; so every kind of method meets baselines at its own
price, and neither can hide behind the other's. For each of the two there are

- full compute with fewer steps, on the solver's own grid and on another: with eps-prediction, skipping calls of DDIM or
  Euler *is* fewer steps on a thinned grid, so these are what skipping has to beat;
- attention taken from memory at the last calls (HURRY, arXiv 2401.01008);
- deep features every N-th call (DeepCache, arXiv 2312.00858);
- one exit at every call, where the network has any: nothing is asked, so no uncertainty head runs;
- a smaller network, trained from scratch, at the first calls (DuoDiff, arXiv 2410.09633), where one is named.

That smaller network at every call is no schedule and is matched to nothing: it stands there at its own price.

The others cost what the matched row costs or less (steps are whole), never more; where a schedule cannot save as much,
its cheapest form is taken and its row says so. Costs are those of the plans, counted before anything is sampled.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gearshift.evaluation.rows import Row, sampler_of, suffix_of
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.execution.cost import CostTable
from gearshift.execution.parts import attention_of
from gearshift.policies import AttentionReuse, DeepFeatureReuse, FixedDepth, Full, NetworkSwitch, Policy
from gearshift.runtime.errors import UsageError
from gearshift.runtime.files import slug
from gearshift.sampling.costs import macs_of
from gearshift.sampling.fewer_steps import at_most, other_grid
from gearshift.sampling.loop import Sampler

EQUAL = 0.005
"""Relative difference up to which a number of steps has the MACs of the matched row: steps are whole, and a baseline
that is a step short for a difference nobody can see would be a weaker one."""


@dataclass(frozen=True)
class Target:
    """A row to be matched: its name, and MACs per image."""

    name: str
    macs: float


def best(numbers: Mapping[str, Mapping[str, Any]], names: Sequence[str], full: str, tolerance: float) -> str | None:
    """Of the rows `names`, the one that saves most MACs among those within `tolerance` points of label agreement of
    full compute; where none is or there are no labels, the one closest to full compute. None if none saves."""
    reference = numbers[full]
    saving = [name for name in names if numbers[name]["macs_saved"] > 0]
    within = [
        name
        for name in saving
        if "label_agreement" in reference
        and numbers[name]["label_agreement"] >= reference["label_agreement"] - tolerance / 100
    ]
    if within:
        return max(within, key=lambda name: numbers[name]["macs_saved"])
    # Images equal to those of full compute have no finite PSNR and come first.
    return max(saving, key=lambda name: numbers[name]["psnr_to_full"] or float("inf"), default=None)


def baselines_of(
    settings: EvaluationConfig,
    make_sampler: Callable[..., Sampler],
    table: CostTable,
    full: Row,
    targets: Sequence[Target],
    taken: Sequence[Row],
    table_of: Callable[[Sampler], CostTable] = Sampler.cost_table,
) -> list[Row]:
    """The rows to add under the solver of `full`; none that saves nothing or computes what one of `taken` computes.

    Args:
        table: costs of the network of `full`; `table_of` gives those of a sampler that runs another one beside it.
    """
    maker = _Maker(settings, make_sampler, table, full, table_of)
    known = {_signature(row.sampler): row for row in taken if row.full == full.name}
    names = {slug(row.name) for row in taken}
    made: dict[Any, Row] = {}
    for target in targets:
        for row in maker.rows(target):
            key = _signature(row.sampler)
            if key in known:
                continue
            if key in made:
                if made[key].equal_macs_to != row.equal_macs_to:
                    again = f"also against {target.name}"
                    # What is matched to nothing may cost less than one target and more than another.
                    own = row.note if row.baseline == "small_network" else None
                    also = (*(made[key].also_against or ()), target.name)
                    made[key] = replace(made[key], note=_joined(made[key].note, again, own), also_against=also)
                continue
            if slug(row.name) in names:
                row = replace(row, name=f"{row.name}, baseline")
            names.add(slug(row.name))
            made[key] = row
    return list(made.values())


class _Maker:
    """Makes the baselines of one solver."""

    def __init__(
        self,
        settings: EvaluationConfig,
        make_sampler: Callable[..., Sampler],
        table: CostTable,
        full: Row,
        table_of: Callable[[Sampler], CostTable],
    ) -> None:
        self.settings, self.make_sampler, self.table, self.full = settings, make_sampler, table, full
        self.table_of = table_of
        self.sampler = full.sampler
        self.info = self.sampler.info(self.sampler.calls())
        self.suffix = suffix_of(settings, full.solver)
        self.full_macs = self._macs(Full())

    def rows(self, target: Target) -> Iterator[Row]:
        """The baselines that were asked for, at the MACs of `target`, as far as they save anything."""
        makers = {
            "fewer_steps": self._fewer_steps,
            "other_grid": self._other_grid,
            "hurry": self._hurry,
            "deep_features": self._deep_features,
            "fixed_depth": self._fixed_depth,
            "duodiff": self._duodiff,
            "small_network": self._small_network,
        }
        for kind, make in makers.items():
            row = make(target) if kind in self.settings.baselines else None
            if row is not None and self._cost(row.sampler, row.sampler.policy) < self.full_macs:
                yield replace(row, baseline=kind)

    # Fewer steps -----------------------------------------------------------------------------------------------------

    def _fewer_steps(self, target: Target) -> Row | None:
        found = at_most(self.sampler, target.macs * (1 + EQUAL), self.table)
        return None if found is None else self._row(f"full, {found[0]} steps", found[1], target)

    def _other_grid(self, target: Target) -> Row | None:
        found = other_grid(self.sampler, target.macs * (1 + EQUAL), self.table)
        if found is None:
            return None
        spacing, steps, sampler = found
        return replace(self._row(f"full, {steps} steps, {spacing}", sampler, target), grid=spacing)

    # Schedules made by hand ------------------------------------------------------------------------------------------

    def _hurry(self, target: Target) -> Row | None:
        last = len(self.info.calls) - 1
        if last < 1 or not attention_of(self.info.network):
            return None

        def late(count: int) -> AttentionReuse:
            return AttentionReuse(last=count).resolved(self.info)

        counts = range(1, last + 1)
        # Later reuse disturbs less: the fewest calls that bring the MACs down far enough.
        place = bisect_left(counts, True, key=lambda count: self._macs(late(count)) <= target.macs)
        policy = late(counts[min(place, len(counts) - 1)])
        note = _short(last, len(self.info.calls)) if place == len(counts) else None
        return self._by_hand(f"HURRY, last {policy.last} ({policy.operator})", policy, target, note)

    def _deep_features(self, target: Target) -> Row | None:
        found = {policy: self._macs(policy) for policy in self._deep()}
        if not found:
            return None
        # The first of the dearest that are cheap enough has the smallest interval, then the fewest blocks.
        fitting = [policy for policy, macs in found.items() if macs <= target.macs]
        policy = max(fitting, key=lambda p: found[p]) if fitting else min(found, key=lambda p: found[p])
        note = None if fitting else _short(sum(policy.reusing(self.info)), len(self.info.calls))
        return self._by_hand(policy.name, policy, target, note)

    def _deep(self) -> Iterator[DeepFeatureReuse]:
        """Every schedule: of intervals that compute equally often, the smallest."""
        total, seen = len(self.info.calls), set()
        for interval in range(2, total + 1):
            computed = -(-total // interval)
            if computed in seen:
                continue
            seen.add(computed)
            for branch in range(len(self.info.network.blocks)):
                policy = DeepFeatureReuse(interval=interval, branch=branch)
                try:
                    policy.check(self.info)
                except UsageError:  # no such long skip
                    break
                yield policy

    def _fixed_depth(self, target: Target) -> Row | None:
        depths = self._exits()
        if not depths:
            return None
        fitting = [depth for depth in depths if self._macs(FixedDepth(depth)) <= target.macs]
        policy = FixedDepth(fitting[-1] if fitting else depths[0])
        note = None if fitting else "saves less, though it is the first exit"
        return self._by_hand(policy.name, policy, target, note)

    def _exits(self) -> list[int]:
        """Depths short of the full one at which every path can be read out; a shorter path runs to its end."""
        network = self.info.network
        paths = range(len(network.paths))
        deepest = max(network.num_blocks(path) for path in paths)
        found = sorted({depth for path in paths for depth in network.exits(path) if depth < deepest})
        return [d for d in found if all(d in network.exits(path) or d > network.num_blocks(path) for path in paths)]

    # Another network -------------------------------------------------------------------------------------------------

    def _duodiff(self, target: Target) -> Row | None:
        if self._beside is None:
            return None
        total = len(self.info.calls)
        # Every call of a smaller network saves: the fewest that bring the MACs down far enough.
        calls = bisect_left(range(total + 1), True, key=lambda count: self._switched(count) <= target.macs)
        if calls >= total and "small_network" in self.settings.baselines:
            return None  # which is that
        note = f"saves less, though {total} of {total} calls are the smaller network's" if calls > total else None
        return self._with_other(min(calls, total), target, note)

    def _small_network(self, target: Target) -> Row | None:
        if self._beside is None:
            return None
        note = f"costs more than {target.name}" if self._switched(None) > target.macs else None
        return self._with_other(None, target, note, "small network")

    def _with_other(self, calls: int | None, target: Target, note: str | None, name: str | None = None) -> Row | None:
        assert self.settings.shallow is not None
        policy = NetworkSwitch(self.settings.shallow, calls)
        return self._by_hand(name or policy.name, policy, target, note)

    def _switched(self, calls: int | None) -> int:
        """MACs per image where the smaller network makes the first `calls`; None: all of them."""
        assert self._beside is not None and self.settings.shallow is not None
        return self._cost(self._beside, NetworkSwitch(self.settings.shallow, calls))

    @cached_property
    def _beside(self) -> Sampler | None:
        """The sampler whose network has the smaller one beside it; None without one."""
        shallow = self.settings.shallow
        if shallow is None:
            return None
        return sampler_of(self.settings, self.make_sampler, NetworkSwitch(shallow), self.sampler.solver)

    # What they have in common ----------------------------------------------------------------------------------------

    def _by_hand(self, name: str, policy: Policy, target: Target, note: str | None) -> Row | None:
        try:
            sampler = sampler_of(self.settings, self.make_sampler, policy, self.sampler.solver)
        except UsageError:
            return None
        return self._row(name, sampler, target, note)

    def _macs(self, policy: Policy) -> int:
        return self._cost(self.sampler, policy)

    def _cost(self, sampler: Sampler, policy: Policy) -> int:
        table = self.table if sampler.denoiser is self.sampler.denoiser else self.table_of(sampler)
        macs = macs_of(sampler, policy, table)
        assert macs is not None, "every baseline is static"
        return macs

    def _row(self, name: str, sampler: Sampler, target: Target, note: str | None = None) -> Row:
        return Row(f"{name}{self.suffix}", self.full.solver, self.full.name, sampler, target.name, note=note)


def _short(calls: int, of: int) -> str:
    return f"saves less, though {calls} of {of} calls reuse"


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)


def _signature(sampler: Sampler) -> Any:
    """Equal for samplers of one evaluation that compute the same; policies that decide by data are like no other."""
    calls, policy = sampler.calls(), sampler.policy
    # Rounded, because two grids come to one level on different ways.
    levels = tuple(
        (round(call.log_snr, 3), round(call.next_log_snr, 3), call.order, call.needs_noise) for call in calls
    )
    state = policy.begin(sampler.info(calls)) if policy.static else None
    plans = tuple(policy.plan(state, call).key() for call in calls) if policy.static else ()
    if not plans or None in plans:
        return id(sampler)
    return id(sampler.denoiser), type(sampler.solver), levels, plans
