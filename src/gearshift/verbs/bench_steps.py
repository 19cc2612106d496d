"""`gearshift bench steps=true`: what single steps of a sampler cost that skip the network or reuse parts of it.

A step is timed whole: prediction, guidance, the solver's step, the ledger, and the policy's own work where it looks at
the outcome. Each comes at calls that lie evenly over the run, after a trajectory of full compute whose last call filled
the memory, so a step that reuses has something to reuse. All take turns in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Call, Solver
from gearshift.evaluation.conditions import conditions
from gearshift.evaluation.speed import saving_realised
from gearshift.evaluation.throughput import Timing, interleave
from gearshift.execution.cost import CostTable
from gearshift.execution.memory import Key
from gearshift.execution.parts import attention_of, kept_bytes
from gearshift.execution.plan import FULL, StepPlan
from gearshift.policies import AdaptiveSkip, DeepFeatureReuse, Full
from gearshift.policies.adaptive_skip import CRITERIA
from gearshift.policies.attention_reuse import OPERATORS
from gearshift.policies.base import RunInfo
from gearshift.runtime.errors import UsageError
from gearshift.runtime.progress import Progress
from gearshift.sampling.ledger import Ledger, LedgerData
from gearshift.sampling.stepping import Point, Stepper
from gearshift.verbs.bench_common import is_busy, tokens, verdict
from gearshift.verbs.bench_sampling import cond_of, sampler_of

LOOK_BACK = 4
"""Calls before the first that is timed: the criteria of skipping look at three displacements."""
SKIP_SHARE = 0.02
"""Of a computed step, the most that a skipped one should take."""


@dataclass(frozen=True)
class Step:
    """One way to make a step.

    Attributes:
        plan: what the call computes.
        policy: decides anew after the step; the plan is then what it had decided before.
        judged: how: "skip" by its share of a computed step, "saving" by the saving that shows in time, "" not at all.
    """

    name: str
    plan: StepPlan
    policy: AdaptiveSkip | None = None
    judged: str = ""

    @property
    def forecasts(self) -> bool:
        return self.plan.forecast > 0


def run(
    denoiser: Denoiser, solver: Solver, cfg: DictConfig, table: CostTable, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The answer: one row per kind of step, and conditions."""
    bench = _Bench(denoiser, solver, cfg, table, device, dtype)
    rows, others = bench.run()
    busy = is_busy(others)
    for row in rows:
        judged = row.pop("judged")
        met = row["share"] <= SKIP_SHARE if judged == "skip" else (row["saving_realised"] or 0.0) >= cfg.target
        row["verdict"] = verdict(met, busy) if judged else None
    answer = {
        "rows": rows,
        "target": cfg.target,
        "skip_target": SKIP_SHARE,
        "other_processes": others,
        "busy": busy,
        "conditions": {
            **conditions(device, dtype, denoiser.network),
            "batch": cfg.batch,
            "rows": bench.info.num_rows,
            "guidance": cfg.guidance,
            "tokens": tokens(denoiser),
            "solver": solver.name,
            "steps": len(bench.every),
            "calls": [call.position for call in bench.calls],
            "repeats": cfg.repeats,
            "warmup": cfg.warmup,
            "includes": "guidance, solver, ledger, and what the policy looks at",
            "weights": "random" if cfg.run is None else str(cfg.run),
        },
    }
    _show(answer)
    return answer


def steps_of(info: RunInfo) -> list[Step]:
    """Every kind of step that the network allows, the computed one first."""
    network = info.network
    found = [
        Step("computed", FULL),
        Step("skipped, held", StepPlan(call=False), judged="skip"),
        Step("skipped, extrapolated", StepPlan(call=False, forecast=1), judged="skip"),
    ]
    for criterion in CRITERIA:
        # The threshold decides nothing here, but at 0 the policy would not look.
        policy = AdaptiveSkip(criterion=criterion)
        found.append(Step(f"skipped, by {criterion}", StepPlan(call=False), policy, "skip"))
    attending = sorted(attention_of(network))
    for operator in OPERATORS if attending else ():
        plan = StepPlan(reuse=frozenset((block, operator) for block in attending))
        found.append(Step(f"attention {operator}", plan, judged="saving" if operator != "map" else ""))
    try:
        cut = DeepFeatureReuse(interval=2).blocks_on(network)
        found.append(Step("deep features, branch 0", StepPlan(reuse=frozenset((block, "block") for block in cut))))
    except UsageError:  # no long skips
        pass
    every = frozenset((block, "block") for path in network.paths for block in path)
    return [*found, Step("every block", StepPlan(reuse=every))]


class _Bench:
    """Times steps at the calls `calls` of the run."""

    def __init__(
        self,
        denoiser: Denoiser,
        solver: Solver,
        cfg: DictConfig,
        table: CostTable,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.cfg, self.table, self.device = cfg, table, device
        self.sampler = sampler_of(denoiser, solver, Full(), cfg, dtype)
        self.every = self.sampler.calls()
        index = torch.arange(cfg.batch, device=device)
        self.info = self.sampler.info(self.every, index)
        self.steps = steps_of(self.info)
        self.keys: frozenset[Key] = frozenset().union(*(step.plan.reuse for step in self.steps))
        example = cond_of(denoiser)
        cond = self.sampler.cond(index) if example is None else example(index)
        # What looks back at nothing has no earlier prediction to carry on.
        self.steppers = {earlier: Stepper(self.sampler, index, cond, self.keys, earlier) for earlier in (False, True)}
        # The last call has no next one to decide on.
        usable = self.every[LOOK_BACK:-1]
        if not usable:
            raise UsageError(
                f"steps=true times calls that have {LOOK_BACK} before them and one behind, and {solver.name} makes "
                f"{len(self.every)}; set solver.steps for {LOOK_BACK + 2} calls or more"
            )
        count = min(cfg.strata, len(usable))
        self.calls = [usable[int((i + 0.5) * len(usable) / count)] for i in range(count)]

    @torch.inference_mode()
    def run(self) -> tuple[list[dict[str, Any]], float | None]:
        """A row per kind of step, and the share of CPU time that other processes took."""
        times: dict[str, list[Timing]] = {step.name: [] for step in self.steps}
        macs = dict.fromkeys(times, 0)
        busiest: float | None = None
        total = len(self.calls) * len(self.steps) * (self.cfg.repeats + self.cfg.warmup) + self.calls[-1].position
        wanted = {call.position for call in self.calls}
        stepper = self.steppers[True]
        point, states = stepper.begin(), self._begin()
        with Progress(total, "bench, interleaved", unit="steps") as progress:
            for call in self.every[: self.calls[-1].position + 1]:
                if call.position in wanted:
                    methods = {step.name: self._method(step, call, point, states[step.name]) for step in self.steps}
                    for name, method in methods.items():
                        macs[name] += int(method().macs.sum())
                    timings, others = interleave(
                        methods,
                        self.cfg.repeats,
                        self.device,
                        warmup=self.cfg.warmup,
                        on_run=lambda _: progress.update(1),
                    )
                    busiest = others if busiest is None else max(busiest, others or 0.0)
                    for name, timing in timings.items():
                        times[name].append(timing)
                if call.position == self.calls[-1].position:
                    break
                # Storing costs memory: the call before one that is timed is early enough.
                store = self.keys if call.position + 1 in wanted else frozenset()
                after, x, prediction = stepper.step(point, call, FULL, store)
                for step in self.steps:
                    if step.policy is not None:
                        result = self.sampler.solver.result(after.solved)
                        states[step.name] = step.policy.observe(states[step.name], call, x, result, prediction)
                point = after
                progress.update(1)
        return self._rows(times, macs), busiest

    def _begin(self) -> dict[str, Any]:
        return {step.name: None if step.policy is None else step.policy.begin(self.info) for step in self.steps}

    def _method(self, step: Step, call: Call, point: Point, state: Any) -> Callable[[], LedgerData]:
        """One step from `point`, which it leaves as it is."""
        held = point.held if step.forecasts or point.held is None else replace(point.held, earlier=None)
        start = replace(point, held=held, memory=point.memory if step.plan.reuse else None)
        stepper = self.steppers[step.forecasts]
        if step.policy is not None:  # whatever it saw, this call is skipped
            state = replace(state, reuse=torch.ones_like(state.reuse))

        def make() -> LedgerData:
            own = start.fork()
            plan = step.plan if step.policy is None else step.policy.plan(state, call)
            after, x, prediction = stepper.step(own, call, plan, frozenset())
            if step.policy is not None:
                step.policy.observe(state, call, x, self.sampler.solver.result(after.solved), prediction)
            ledger = Ledger(self.table, [0] * len(self.every), self.info.branches, self.info.batch)
            ledger.record(call, prediction, 0 if after.memory is None else after.memory.num_bytes)
            return ledger.close()

        return make

    def _rows(self, times: Mapping[str, list[Timing]], macs: Mapping[str, int]) -> list[dict[str, Any]]:
        name = self.steps[0].name
        reference = [timing.median for timing in times[name]]
        rows = []
        for step in self.steps:
            own = times[step.name]
            # Each call's paired ratio, weighted by what the computed step takes there.
            ratios = [timing.ratio_of(ref) for timing, ref in zip(own, times[name], strict=True)]
            share = sum(r * s for r, s in zip(ratios, reference, strict=True)) / sum(reference)
            saved = 1 - macs[step.name] / macs[name]
            rows.append(
                {
                    "policy": step.name,
                    "ms_per_step": 1000 * sum(timing.median for timing in own) / len(own),
                    "share": share,
                    "macs_saved": saved,
                    "time_saved": 1 - share,
                    "saving_realised": saving_realised(1 - share, saved),
                    "spread": max(timing.spread for timing in own),
                    "kept_bytes_per_image": self.info.branches * kept_bytes(self.info.network, step.plan.reuse),
                    "judged": step.judged,
                }
            )
        return rows


def _show(answer: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    c = answer["conditions"]
    console.print(
        f"{c['device']}, {c.get('threads', '-')} threads, {c['dtype']}, batch {c['batch']}, {c['tokens']} tokens, "
        f"{c['solver']} in {c['steps']} calls, {c['repeats']} paired repeats at {len(c['calls'])} of them"
    )
    table = Table("step", "ms/step", "share", "MACs saved", "time saved", "realised", "verdict")
    for row in answer["rows"]:
        realised = row["saving_realised"]
        table.add_row(
            row["policy"],
            f"{row['ms_per_step']:.4g}",
            f"{row['share']:.2%}",
            f"{row['macs_saved']:.1%}",
            f"{row['time_saved']:.1%}",
            "-" if realised is None else f"{realised:.0%}",
            row["verdict"] or "-",
        )
    console.print(table)
    print(
        f"verdicts: a skipped step takes at most {answer['skip_target']:.0%} of a computed one; attention qk and "
        f"output show {answer['target']:.0%} of their saving in time",
        file=sys.stderr,
    )
    if answer["busy"]:
        print(
            f"other processes used {answer['other_processes']:.0%} of the CPU time; measure again on a quiet machine",
            file=sys.stderr,
        )
