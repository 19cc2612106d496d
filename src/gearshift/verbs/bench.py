"""`gearshift bench`: does a saving in MACs show in seconds? One process, interleaved, paired medians.

The calls that are timed lie evenly over the solver's, each at the x the full computation has there. Where a run is
given, its own heads decide who leaves; else weights are random and depths are drawn, and the heads are still paid.
Training steps (training=true), whole generations (sampling=true), what features add to them (features=true) and batches
of mixed stages (stages=true) are in modules of their own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift.assembly import build_objective, build_solver, device_of, dtype_of
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Call, Solver
from gearshift.evaluation.conditions import conditions
from gearshift.evaluation.speed import saving_realised
from gearshift.evaluation.throughput import Timing, interleave
from gearshift.execution.cost import CostTable
from gearshift.execution.plan import FULL, StepPlan
from gearshift.policies import Full, Policy
from gearshift.policies.base import RunInfo
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.runtime.progress import Progress
from gearshift.runtime.run import RunFolder
from gearshift.verbs.bench_common import denoiser_of, is_busy, policies_of, tokens, verdict
from gearshift.verbs.bench_features import run as bench_features
from gearshift.verbs.bench_sampling import run as bench_sampling
from gearshift.verbs.bench_stages import run as bench_stages
from gearshift.verbs.bench_training import run as bench_training


def run(cfg: DictConfig) -> dict[str, Any]:
    for name in ("batch", "strata", "repeats", "rounds"):
        if cfg[name] < 1:
            raise UsageError(f"{name}={cfg[name]} must be at least 1")
    kinds = [name for name in ("training", "sampling", "features", "stages") if cfg.get(name)]
    if len(kinds) > 1:
        raise UsageError(f"{'=true and '.join(kinds)}=true measure different things; choose one")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    device, dtype = device_of(cfg.device), dtype_of(cfg.precision)
    solver = build_solver(cfg.solver)
    denoiser = denoiser_of(cfg, device)
    network = denoiser.network
    table = CostTable.measure(network)
    if cfg.get("stages"):
        source = cfg if cfg.run is None else RunFolder.open(cfg.run).config
        objective = build_objective(source, network) if source.get("objective") else None
        return bench_stages(denoiser, objective, cfg, table, device, dtype)
    policies = policies_of(cfg, network)
    if cfg.training:
        return bench_training(denoiser, policies.get("policy"), cfg, device, dtype)
    if cfg.sampling:
        return bench_sampling(denoiser, solver, policies, cfg, table, device, dtype)
    if cfg.features:
        return bench_features(denoiser, solver, cfg, table, device, dtype)
    bench = _Bench(denoiser, solver, cfg, table, device, dtype)
    rows, others = bench.run(policies)
    busy = is_busy(others)
    for row in rows:
        row["verdict"] = verdict(row["saving_realised"] is not None and row["saving_realised"] >= cfg.target, busy)
    answer = {
        "rows": rows,
        "target": cfg.target,
        "other_processes": others,
        "busy": busy,
        "conditions": {
            **conditions(device, dtype, network),
            "batch": cfg.batch,
            "rows": cfg.batch * denoiser.num_branches(cfg.guidance),
            "guidance": cfg.guidance,
            "tokens": tokens(denoiser),
            "strata": [round(call.time, 4) for call in bench.calls],
            "repeats": cfg.repeats,
            "weights": "random" if cfg.run is None else str(cfg.run),
        },
    }
    _show(answer)
    return answer


class _Bench:
    """Times single calls at stratified noise levels."""

    def __init__(
        self,
        denoiser: Denoiser,
        solver: Solver,
        cfg: DictConfig,
        table: CostTable,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.denoiser, self.cfg, self.table, self.device, self.dtype = denoiser, cfg, table, device, dtype
        network = denoiser.network
        every = solver.calls(denoiser.process)
        self.info = RunInfo(every, network, cfg.batch, denoiser.num_branches(cfg.guidance))
        count = min(cfg.strata, len(every))
        # Middles of equal parts: no part of the trajectory stands for another.
        self.calls = [every[int((i + 0.5) * len(every) / count)] for i in range(count)]
        index = torch.arange(cfg.batch, device=device)
        shape = (network.in_channels, network.image_size, network.image_size)
        self.cond = network.example_cond(cfg.batch, device)
        if network.num_classes is not None:
            self.cond = index % network.num_classes
        # Inputs come from one full trajectory, so that exits are decided on what a sampler meets.
        self.inputs: dict[int, Tensor] = {}
        wanted = {call.position for call in self.calls}
        state = solver.begin(denoiser.process, keys.normal(cfg.seed, "init_noise", index, 0, shape))
        with torch.inference_mode(), Progress(len(every), "trajectory", unit="calls") as progress:
            for call in every:
                x = solver.network_input(state, call)
                if call.position in wanted:
                    self.inputs[call.position] = x
                noise = keys.normal(cfg.seed, "step_noise", index, call.position, shape) if call.needs_noise else None
                prediction = self._predict(call, x, FULL)
                state = solver.advance(state, call, prediction.eps, variance=prediction.variance, noise=noise)
                progress.update(1)

    def _predict(self, call: Call, x: Tensor, plan: StepPlan) -> Any:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.denoiser.predict(x, call.time, self.cond, plan=plan, guidance=self.cfg.guidance)

    @torch.inference_mode()
    def run(self, policies: dict[str, Policy]) -> tuple[list[dict[str, Any]], float | None]:
        everything: dict[str, Policy] = {"full": Full(), **policies}
        states = {}
        for key, policy in everything.items():
            policy.check(self.info)
            states[key] = policy.begin(self.info)
        macs = dict.fromkeys(everything, 0)
        times: dict[str, list[Timing]] = {key: [] for key in everything}
        busiest: float | None = None
        total = len(self.calls) * len(everything) * (self.cfg.repeats + self.cfg.warmup)
        with Progress(total, "bench, interleaved", unit="calls") as progress:
            for call in self.calls:
                x = self.inputs[call.position]
                plans = {key: policy.plan(states[key], call) for key, policy in everything.items()}
                for key, plan in plans.items():
                    macs[key] += self._macs(call, x, plan)
                methods = {key: lambda p=plan: self._predict(call, x, p) for key, plan in plans.items()}  # noqa: B023
                timings, others = interleave(
                    methods,
                    self.cfg.repeats,
                    self.device,
                    warmup=self.cfg.warmup,
                    on_run=lambda _: progress.update(1),
                )
                busiest = others if busiest is None else max(busiest, others or 0.0)
                for key, timing in timings.items():
                    times[key].append(timing)
        reference = [timing.median for timing in times["full"]]
        rows = []
        for key, policy in everything.items():
            # Each stratum's paired ratio, weighted by what the full call takes there.
            ratios = [own.ratio_of(ref) for own, ref in zip(times[key], times["full"], strict=True)]
            ratio = sum(r * s for r, s in zip(ratios, reference, strict=True)) / sum(reference)
            macs_saved = 1 - macs[key] / macs["full"]
            rows.append(
                {
                    "policy": policy.name,
                    "ms_per_call": 1000 * sum(t.median for t in times[key]) / len(self.calls),
                    "macs_saved": macs_saved,
                    "time_saved": 1 - ratio,
                    "speedup": 1 / ratio,
                    "saving_realised": saving_realised(1 - ratio, macs_saved),
                    "spread": max(t.spread for t in times[key]),
                }
            )
        return rows[1:], busiest

    def _macs(self, call: Call, x: Tensor, plan: StepPlan) -> int:
        trace = self._predict(call, x, plan).trace
        return sum(self.table.of(event).macs * len(event.rows) for event in trace)


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    c = answer["conditions"]
    console.print(
        f"{c['device']}, {c.get('threads', '-')} threads, {c['dtype']}, batch {c['batch']}, {c['tokens']} tokens, "
        f"{c['repeats']} paired repeats at {len(c['strata'])} noise levels"
    )
    table = Table("policy", "ms/call", "MACs saved", "time saved", "realised", "verdict")
    for row in answer["rows"]:
        realised = "-" if row["saving_realised"] is None else f"{row['saving_realised']:.0%}"
        table.add_row(
            row["policy"],
            f"{row['ms_per_call']:.2f}",
            f"{row['macs_saved']:.1%}",
            f"{row['time_saved']:.1%}",
            realised,
            row["verdict"],
        )
    console.print(table)
    if answer["busy"]:
        print(
            f"other processes used {answer['other_processes']:.0%} of the CPU time; measure again on a quiet machine",
            file=sys.stderr,
        )
