"""The search of `gearshift plan`: calibration, schedules, rivals at the same budget, and what is written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift.assembly import build_policy
from gearshift.planning import planner, rivals
from gearshift.planning.choices import Choice, Menu, Schedule, as_policy, describe
from gearshift.planning.kept import KeptResponses
from gearshift.planning.problem import CostOf, Problem, mean_squared_error, psnr
from gearshift.planning.responses import Responses, measure_responses, tried
from gearshift.planning.threshold import tune
from gearshift.policies import AdaptiveSkip, Planned
from gearshift.policies.adaptive_skip import CRITERIA
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.progress import Progress, note
from gearshift.sampling.costs import macs_of
from gearshift.sampling.loop import Sampler
from gearshift.verbs.plan_files import kept_at, plan_text
from gearshift.verbs.plan_timing import TimedCosts, ms_per_image

TIGHTENINGS = 3
"""How often a plan that proves slower than its parts is made again with less to spend."""


@dataclass(frozen=True)
class Line:
    """One way of sampling at the budget: its kind and name, share of full MACs, and closeness to full compute [dB]."""

    kind: str
    name: str
    sampler: Sampler
    macs_fraction: float
    calibration: float
    validation: float = math.nan

    def as_json(self) -> dict[str, Any]:
        numbers = {"psnr_calibration": self.calibration, "psnr": self.validation}
        shown = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {"kind": self.kind, "name": self.name, "macs_fraction": self.macs_fraction, **shown}


class Search:
    """One run of the verb.

    Args:
        sampler: of full compute.
        place: file of the plan; the picture goes beside it.
    """

    def __init__(self, cfg: DictConfig, loaded: Any, sampler: Sampler, place: Path) -> None:
        self.cfg, self.loaded, self.sampler, self.place = cfg, loaded, sampler, place
        self.network = sampler.denoiser.network
        self.table = sampler.cost_table()
        full = macs_of(sampler, sampler.policy, self.table)
        assert full is not None  # full compute decides by no data
        self.full_macs = float(full)
        # Pipelines call their branches as they please.
        space = [name for name in cfg.space if name != "branches" or not loaded.is_pipeline]
        self.menu = Menu.of(self.network, sampler.branches, space, cfg.operator)
        self.clip = loaded.to_pixels().samples_pixels
        # What cannot be graded is said before anything is searched.
        self.graded = [replace(sampler, policy=build_policy(name)) for name in cfg.grade]
        for own in self.graded:
            own.check()
        self.effort = planner.Effort(evaluations=cfg.evaluations, restarts=cfg.restarts)
        self.costs: TimedCosts | None = None
        self.predicted: float | None = None
        self.looked_at = 0

    # The whole -------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        cfg = self.cfg
        cost_of: CostOf | None = None
        if cfg.unit == "ms":
            with Progress(0, "timing of single calls", unit="passes") as bar:
                self.costs = TimedCosts(self.sampler, self.menu, cfg.timing_batch, cfg.timing_rounds, bar)
            cost_of = self.costs.cost_of
        self.problem = self._problem(torch.arange(cfg.images), cost_of)
        spend = self._share(cfg.budget)
        planner.check_budget(self.problem, self.menu, spend, self._shown)
        responses, trial = self._responses(cost_of, spend)
        lines: list[Line] = []
        alone: Schedule | None = None
        if cfg.rivals:
            lines, alone = self._rivals(responses, trial, spend)
        schedule, milliseconds = self._plan(responses, trial, spend, alone)
        policy = as_policy(schedule, self.problem.run, self.sampler.solver.name)
        found = self._line("plan", replace(self.sampler, policy=policy), "plan")
        lines = self._validated([found, *lines])
        plan = lines[0]
        if cfg.unit == "macs" and not planner.within(plan.macs_fraction, cfg.budget):
            raise RunError(f"the plan took {plan.macs_fraction:.4f} of the MACs, over budget={cfg.budget:g}")
        best = _best(lines[1:])
        picture = self.place.with_suffix(".png")
        self._write(policy, schedule, plan, best, picture)
        answer: dict[str, Any] = {
            "policy": str(self.place),
            "picture": str(picture),
            "budget": cfg.budget,
            "unit": cfg.unit,
            "macs_fraction": plan.macs_fraction,
            "psnr": {"plan": _finite(plan.validation), **{kind: _finite(one.validation) for kind, one in best.items()}},
            "psnr_calibration": _finite(plan.calibration),
            "psnr_predicted": None if self.predicted is None else _finite(psnr(self.predicted)),
            "rows": [line.as_json() for line in lines],
            "schedule": [describe(choice, self.menu.full) for choice in schedule],
            "schedules_measured": self.looked_at,
        }
        if milliseconds is not None:
            answer["ms_per_image"] = milliseconds
        if cfg.grade:
            answer["grades"] = self._grades()
        return answer

    def _problem(self, index: Tensor, cost_of: CostOf | None) -> Problem:
        index = index.to(self.sampler.device)
        chunk = replace(self.sampler, chunk=len(index))
        return Problem(chunk, index, self.table, self.menu.keys, cost_of=cost_of, clip=self.clip)

    def _share(self, budget: float) -> float:
        """The budget as a share of what full compute costs here."""
        return budget if self.costs is None else budget / (self.problem.full_cost)

    def _shown(self, share: float) -> str:
        return f"{share:.4g}" if self.costs is None else f"{share * self.problem.full_cost:.4g} ms per image"

    # Schedules -------------------------------------------------------------------------------------------------------

    def _responses(self, cost_of: CostOf | None, spend: float) -> tuple[Responses | None, Problem | None]:
        if self.cfg.search != "responses":
            return None, None
        trial = self._problem(torch.arange(self.cfg.trial_images), cost_of)
        longest = self.cfg.longest or min(len(trial.calls) - 1, math.ceil(1 / spend) + 1)
        count = len(tried(trial, self.menu, longest))
        menu = self.menu
        about = [menu.branches, menu.depths, [sorted(r) for r in menu.reuse], menu.skips]
        place = kept_at(
            self.loaded.folder.path, "decisions.npz", self.sampler, self.cfg.trial_images, menu=about, longest=longest
        )
        kept = KeptResponses(place)
        with Progress(count, "single decisions", unit="decisions") as bar:
            found = measure_responses(trial, self.menu, longest, lambda done: bar.update(done - bar.done), kept)
        return found, trial

    def _search(
        self,
        label: str,
        menu: Menu,
        responses: Responses | None,
        trial: Problem | None,
        spend: float,
        also: dict[str, Schedule] | None = None,
    ) -> planner.Outcome:
        cfg = self.cfg
        with Progress(cfg.evaluations, label, unit="schedules") as bar:

            def tell(loss: float) -> None:
                bar.update(1, psnr=psnr(loss))

            if responses is not None and trial is not None:
                found = planner.by_responses(
                    self.problem, menu, responses, trial, spend, self.effort, cfg.seed, also=also, on_round=tell
                )
            elif cfg.search == "greedy":
                if not menu.skips:
                    raise UsageError(f"search=greedy skips calls, which space={list(cfg.space)} leaves out; add steps")
                found, _ = planner.by_elimination(self.problem, spend, on_round=tell)
            else:
                start, options = self._annealed(menu, spend)
                found = planner.by_annealing(self.problem, start, options, spend, self.effort, cfg.seed, on_round=tell)
        self.looked_at += found.looked_at
        return found

    def _annealed(self, menu: Menu, spend: float) -> tuple[Schedule, list[list[Choice]]]:
        """Where annealing starts, and the two things each call may compute."""
        full = menu.full
        if self.cfg.start == "even":
            if not menu.skips:
                raise UsageError(f"start=even skips calls, which space={list(self.cfg.space)} leaves out; start=hurry")
            other = Choice(0)
            start = planner.evenly(self.problem, spend, other)
        else:
            if len(menu.reuse) == 1:
                raise UsageError(f"start=hurry reuses, and space={list(self.cfg.space)} has nothing to; add attention")
            other = min((replace(full, reuse=r) for r in menu.reuse), key=lambda c: self.problem.cost_at(1, c))
            start = planner.late_reuse(self.problem, other, spend)
        return start, [[full] if k == 0 else [full, other] for k in range(len(start))]

    def _plan(
        self, responses: Responses | None, trial: Problem | None, spend: float, alone: Schedule | None
    ) -> tuple[Schedule, float | None]:
        """The schedule, and its milliseconds per image where they are what is budgeted."""
        also = {} if alone is None else {"skipped steps alone": alone}
        for _ in range(TIGHTENINGS):
            found = self._search("plan", self.menu, responses, trial, spend, also)
            self.predicted = found.predicted
            schedule = found.best.schedule
            if self.costs is None:
                return schedule, None
            policy = as_policy(schedule, self.problem.run, self.sampler.solver.name)
            took = ms_per_image(
                replace(self.sampler, policy=policy), self.table, self.cfg.timing_batch, self.cfg.timing_rounds
            )
            if took <= self.cfg.budget:
                return schedule, took
            note(f"the plan takes {took:.4g} ms per image, over budget={self.cfg.budget:g}: planned again with less")
            spend *= 0.97 * self.cfg.budget / took
            planner.check_budget(self.problem, self.menu, spend, self._shown)
            also = {"the last": schedule}
        raise UsageError(
            f"budget={self.cfg.budget:g} ms per image: the plan still took {took:.4g} ms after {TIGHTENINGS} tries; "
            "times are too unsteady here, or the budget is too near the least"
        )

    # Rivals ----------------------------------------------------------------------------------------------------------

    def _rivals(
        self, responses: Responses | None, trial: Problem | None, spend: float
    ) -> tuple[list[Line], Schedule | None]:
        """Everything a plan has to beat, measured on the calibration images, and the best mask of skipped steps."""
        # By MACs, whatever the budget counts: as many as the share of time would be.
        share = min(1.0, spend)
        full = self.full_macs
        some = [("fewer_steps", r) for r in rivals.fewer_steps(self.sampler, share, full, self.table)]
        some += [("hand_made", r) for r in rivals.by_hand(self.sampler, share, full, self.table)]
        lines = []
        with Progress(len(some), "rivals", unit="runs") as bar:
            for kind, rival in some:
                lines.append(self._line(kind, rival.sampler, rival.name))
                bar.update(1)
        lines += self._tuned(share, full)
        alone: Schedule | None = None
        if responses is not None and self.menu.skips:
            menu = Menu.of(self.network, self.sampler.branches, ["steps"])
            alone = self._search("skipped steps alone", menu, responses, trial, spend).best.schedule
            policy = as_policy(alone, self.problem.run, self.sampler.solver.name)
            lines.append(self._line("step_skipping", replace(self.sampler, policy=policy), "planned skips"))
        return lines, alone

    def _tuned(self, share: float, full: float) -> list[Line]:
        """AdaptiveDiffusion's rule under each criterion, its threshold tuned to the budget: with the official warm-up
        and cap where these let it come down that far, else without a cap."""
        lines = []
        index = self.problem.stepper.index
        for criterion in CRITERIA:
            for extrapolate in (False, True):

                def cost(candidate: Any) -> float:
                    own = replace(self.sampler, policy=candidate)
                    return rivals.images_of(own, index, self.table)[1] / full

                for cap in (4, None):
                    policy = AdaptiveSkip(criterion=criterion, max_skip_steps=cap, extrapolate=extrapolate)
                    try:
                        found = tune(policy, cost, share, rounds=8)
                    except UsageError:
                        continue  # does not come down to this budget
                    sampler = replace(self.sampler, policy=found.policy)
                    lines.append(self._line("step_skipping", sampler, found.policy.name))
                    break
        return lines

    def _line(self, kind: str, sampler: Sampler, name: str) -> Line:
        """A way of sampling, on the calibration images."""
        images, macs = rivals.images_of(sampler, self.problem.stepper.index, self.table)
        return Line(kind, name, sampler, macs / self.full_macs, psnr(self.problem.loss_of(images)))

    def _validated(self, lines: Sequence[Line]) -> list[Line]:
        """With the closeness on further noise."""
        first = self.cfg.images
        index = torch.arange(first, first + self.cfg.validation, device=self.sampler.device)
        reference, _ = rivals.images_of(self.sampler, index, self.table)
        found = []
        with Progress(len(lines), "validation", unit="runs") as bar:
            for line in lines:
                images, _ = rivals.images_of(line.sampler, index, self.table)
                found.append(replace(line, validation=psnr(mean_squared_error(images, reference, self.clip))))
                bar.update(1)
        return found

    # Grades ----------------------------------------------------------------------------------------------------------

    def _grades(self) -> list[dict[str, Any]]:
        """Online rules against the greedy oracle at as many calls as they take, on the calibration images."""
        _, oracle = planner.by_elimination(self.problem, 1 / len(self.problem.calls))
        grades = []
        for own in self.graded:
            chunk = replace(own, chunk=self.cfg.images).generate(self.problem.stepper.index, self.table)
            calls = float(chunk.ledger.called.mean(axis=(1, 2)).sum())
            reached = psnr(self.problem.loss_of(chunk.images))
            best = psnr(oracle[min(max(oracle), math.ceil(calls))].loss)
            grades.append(
                {"policy": own.policy.name, "calls": calls, "psnr": _finite(reached), "psnr_of_oracle": _finite(best)}
            )
        return grades

    # What is left ----------------------------------------------------------------------------------------------------

    def _write(self, policy: Planned, schedule: Schedule, plan: Line, best: dict[str, Line], picture: Path) -> None:
        from gearshift.planning.plots import plan_png
        from gearshift.verbs.plan import command

        others = ", ".join(f"{kind.replace('_', ' ')} {one.validation:.2f}" for kind, one in best.items())
        header = [
            f"{plan.macs_fraction:.4f} of full MACs (budget {self.cfg.budget:g} {self.cfg.unit}); "
            f"{plan.validation:.2f} dB to full compute on {self.cfg.validation} images it was not made on"
            + (f"; at this budget: {others} dB" if others else ""),
            f"{command()}",
        ]
        atomic_write(self.place, plan_text(policy, header))
        predicted = None if self.predicted is None else psnr(self.predicted)
        losses = {"plan": (plan.validation, predicted)}
        losses |= {f"{kind.replace('_', ' ')}: {one.name}": (one.validation, None) for kind, one in best.items()}
        network, problem = self.network, self.problem
        one_call = statistics.fmean(problem.cost_at(k, self.menu.full) for k in range(len(schedule)))
        shares = [problem.cost_at(k, choice) / one_call for k, choice in enumerate(schedule)]
        title = f"{plan.macs_fraction:.1%} of full compute, {self.sampler.solver.name} with {len(schedule)} calls"
        levels = [call.log_snr for call in problem.calls]
        atomic_write(picture, plan_png(network, problem.paths, schedule, levels, shares, losses, title))


def _best(lines: Sequence[Line]) -> dict[str, Line]:
    """Of each kind the one that is best on the calibration images: nobody chooses by the images that are reported."""
    found: dict[str, Line] = {}
    for line in lines:
        if line.kind not in found or line.calibration > found[line.kind].calibration:
            found[line.kind] = line
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
