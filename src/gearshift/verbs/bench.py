"""`gearshift bench`: does a saving in MACs show in seconds? One process, interleaved, paired medians.

The calls that are timed lie evenly over the solver's, each at the x the full computation has there. Where a run is
given, its own heads decide who leaves; else weights are random and depths are drawn, and the heads are still paid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift import api
from gearshift.assembly import build_denoiser, build_policy, build_solver, device_of, dtype_of
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Call, Solver
from gearshift.evaluation.conditions import conditions
from gearshift.evaluation.throughput import BUSY, Timing, interleave
from gearshift.execution.cost import CostTable
from gearshift.execution.exits import ExitView
from gearshift.execution.plan import FULL, StepPlan
from gearshift.objectives.base import Batch, Draws, Objective
from gearshift.objectives.deediff import DeeDiff, DeeDiffConfig
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.policies import FixedDepth, Full, Policy
from gearshift.policies.base import RunInfo
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.runtime.progress import Progress, note


@dataclass(frozen=True)
class DrawnExits(Policy):
    """Every row leaves at an exit drawn uniformly; uncertainty heads are evaluated as if they decided."""

    seed: int = 0

    @property
    def name(self) -> str:
        return "per-row exits, drawn"

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        exits = torch.tensor(state.network.exits())
        rows = torch.arange(state.num_rows)
        drawn = exits[keys.integers(self.seed, "bench_exit", rows, call.position, len(exits))]
        return StepPlan(exit=_Drawn(drawn, state.network.has_uncertainty))


@dataclass(frozen=True)
class _Drawn:
    depth: Tensor
    pays: bool

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return exits[:-1]

    def begin(self, num_rows: int) -> None:
        return None

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        chosen = self.depth[view.rows.host()] <= view.depth
        if not self.pays:
            return chosen
        # As a threshold rule does: the head's mean goes to the host.
        measured = view.uncertainty().cpu()
        return chosen & (measured >= 0)


def run(cfg: DictConfig) -> dict[str, Any]:
    for name in ("batch", "strata", "repeats"):
        if cfg[name] < 1:
            raise UsageError(f"{name}={cfg[name]} must be at least 1")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    device, dtype = device_of(cfg.device), dtype_of(cfg.precision)
    solver = build_solver(cfg.solver)
    denoiser = _denoiser(cfg, device)
    network = denoiser.network
    table = CostTable.measure(network)
    policies: dict[str, Policy] = {}
    if cfg.get("policy"):
        policies["policy"] = build_policy(cfg.policy)
    else:
        exits = network.exits()
        policies["fixed"] = FixedDepth(exits[len(exits) // 2])
        policies["drawn"] = DrawnExits(cfg.seed)
    if cfg.training:
        return _training(denoiser, cfg, device, dtype)
    bench = _Bench(denoiser, solver, cfg, table, device, dtype)
    rows, others = bench.run(policies)
    busy = others is not None and others > BUSY
    for row in rows:
        met = row["saving_realised"] is not None and row["saving_realised"] >= cfg.target
        row["verdict"] = "machine busy, no verdict" if busy else "met" if met else "missed"
    answer = {
        "rows": rows,
        "target": cfg.target,
        "other_processes": others,
        "busy": busy,
        "conditions": {
            **conditions(device, dtype),
            "batch": cfg.batch,
            "rows": cfg.batch * denoiser.num_branches(cfg.guidance),
            "guidance": cfg.guidance,
            "tokens": _tokens(denoiser),
            "strata": [round(call.time, 4) for call in bench.calls],
            "repeats": cfg.repeats,
            "weights": "random" if cfg.run is None else str(cfg.run),
        },
    }
    _show(answer)
    return answer


def _training(denoiser: Denoiser, cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of a training step (forward and backward) with DeeDiff's objective over every exit, per plain step."""
    network = denoiser.network.train().requires_grad_(True)
    shape = (network.in_channels, network.image_size, network.image_size)
    slot = torch.arange(cfg.batch, device=device)
    images = keys.normal(cfg.seed, "bench_images", slot, 0, shape).clamp(-1, 1)
    cond = network.example_cond(cfg.batch, device)
    batch = Batch(images, cond, slot, 0)

    def step(objective: Objective) -> Callable[[], None]:
        objective.check(network)

        def run() -> None:
            network.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = objective.loss(denoiser, batch, Draws(cfg.seed, batch))["loss"]
            loss.backward()

        return run

    methods = {"plain": step(Simple(SimpleConfig())), "every exit": step(DeeDiff(DeeDiffConfig()))}
    with Progress(2 * (cfg.repeats + cfg.warmup), "bench, training steps", unit="steps") as progress:
        timings, others = interleave(
            methods, cfg.repeats, device, warmup=cfg.warmup, on_run=lambda _: progress.update(1)
        )
    busy = others is not None and others > BUSY
    added = timings["every exit"].ratio_of(timings["plain"]) - 1
    note(
        f"training step at batch {cfg.batch}: {1000 * timings['plain'].median:.1f} ms, every exit adds {added:.1%}"
        + (f" (other processes used {others:.0%} of the CPU time: measure again)" if busy else "")
    )
    return {
        "added_by_exits": added,
        "plain_ms": 1000 * timings["plain"].median,
        "every_exit_ms": 1000 * timings["every exit"].median,
        "spread": max(timing.spread for timing in timings.values()),
        "other_processes": others,
        "busy": busy,
        "conditions": {**conditions(device, dtype), "batch": cfg.batch, "repeats": cfg.repeats},
    }


def _denoiser(cfg: DictConfig, device: torch.device) -> Denoiser:
    if cfg.run is not None:
        return api.load(cfg.run, device=cfg.device).denoiser
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        return build_denoiser(cfg).to(device).eval().requires_grad_(False)


def _tokens(denoiser: Denoiser) -> int | None:
    network = denoiser.network
    try:
        return int((network.image_size // network.patch(network.exits()[0])) ** 2)
    except NotImplementedError:
        return None


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
                    "saving_realised": (1 - ratio) / macs_saved if macs_saved > 0.01 else None,
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
