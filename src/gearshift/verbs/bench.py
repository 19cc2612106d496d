"""`gearshift bench`: does a saving in MACs show in seconds? One process, interleaved, paired medians.

Single calls are timed by `bench_calls`. Where a run is given, its own heads decide who leaves; else weights are random
and depths are drawn, and the heads are still paid. Training steps (training=true), whole generations (sampling=true),
what features add to them (features=true), batches of mixed stages (stages=true) and steps that skip or reuse
(steps=true) are in modules of their own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from omegaconf import DictConfig

from gearshift.assembly import build_objective, build_solver, device_of, dtype_of
from gearshift.evaluation.conditions import conditions
from gearshift.execution.cost import CostTable
from gearshift.runtime.errors import UsageError
from gearshift.runtime.run import RunFolder
from gearshift.verbs.bench_calls import CallBench
from gearshift.verbs.bench_common import denoiser_of, is_busy, policies_of, tokens, verdict
from gearshift.verbs.bench_features import run as bench_features
from gearshift.verbs.bench_sampling import run as bench_sampling
from gearshift.verbs.bench_stages import run as bench_stages
from gearshift.verbs.bench_steps import run as bench_steps
from gearshift.verbs.bench_training import run as bench_training


def run(cfg: DictConfig) -> dict[str, Any]:
    for name in ("batch", "strata", "repeats", "rounds"):
        if cfg[name] < 1:
            raise UsageError(f"{name}={cfg[name]} must be at least 1")
    kinds = [name for name in ("training", "sampling", "features", "stages", "steps") if cfg.get(name)]
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
    if cfg.get("steps"):
        return bench_steps(denoiser, solver, cfg, table, device, dtype)
    policies = policies_of(cfg, network)
    if cfg.training:
        return bench_training(denoiser, policies.get("policy"), cfg, device, dtype)
    if cfg.sampling:
        return bench_sampling(denoiser, solver, policies, cfg, table, device, dtype)
    if cfg.features:
        return bench_features(denoiser, solver, cfg, table, device, dtype)
    bench = CallBench(denoiser, solver, cfg, table, device, dtype)
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
