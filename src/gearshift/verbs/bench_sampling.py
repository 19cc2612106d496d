"""`gearshift bench sampling=true`: whole generations, full compute against a policy, over batch sizes.

Unlike single calls, a generation has everything in it that a user waits for: the solver, the noise, the policy's own
work, and the rows that leave at every call.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Solver
from gearshift.evaluation.conditions import conditions, versions
from gearshift.evaluation.speed import CondOf, Speed, SpeedSettings, measure_speed, saving_realised
from gearshift.execution.cost import CostTable
from gearshift.policies import Full, Policy
from gearshift.runtime.progress import Progress
from gearshift.sampling.loop import Sampler
from gearshift.verbs.bench_common import is_busy, tokens, verdict

LATENCY = ("p50", "p90", "p95", "p99", "min", "mean", "repeats")


def run(
    denoiser: Denoiser,
    solver: Solver,
    policies: Mapping[str, Policy],
    cfg: DictConfig,
    table: CostTable,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The answer: one row per policy and batch size; latencies and first passes per policy; conditions."""
    settings = SpeedSettings(
        images=cfg.batch,
        rounds=cfg.rounds,
        sweep=tuple(cfg.batches),
        latency_repeats=cfg.latency_repeats,
        warmup=cfg.warmup,
    )
    samplers = {
        name: sampler_of(denoiser, solver, policy, cfg, dtype) for name, policy in {"full": Full(), **policies}.items()
    }
    with Progress(settings.passes(len(samplers)), "bench, whole generations", unit="passes") as progress:
        measured = measure_speed(
            samplers,
            dict.fromkeys(samplers, "full"),
            table,
            settings,
            cond=cond_of(denoiser),
            on_pass=lambda name: progress.update(1, row=name),
        )
    busy = is_busy(measured.others)
    calls = next(iter(samplers.values())).calls()
    answer = {
        "rows": _rows(samplers, measured, settings, cfg.target, busy),
        "policies": [
            {
                "policy": sampler.policy.name,
                "first_pass_s": measured.rows[name]["speed"]["first_pass_s"],
                "latency_ms": measured.rows[name]["speed"]["latency_ms"],
            }
            for name, sampler in samplers.items()
        ],
        "target": cfg.target,
        "other_processes": measured.others,
        "busy": busy,
        "conditions": {
            **conditions(device, dtype, denoiser.network),
            "batch": cfg.batch,
            "guidance": cfg.guidance,
            "tokens": tokens(denoiser),
            "image_size": denoiser.network.image_size,
            "solver": solver.name,
            "steps": len(calls),
            "rounds": cfg.rounds,
            "warmup": cfg.warmup,
            "batch_policy": "rows that leave are packed out",
            "includes": "noise, solver, policy and ledger; not the decoding of latents, nor copies of images",
            "weights": "random" if cfg.run is None else str(cfg.run),
        },
        "versions": versions(),
    }
    _show(answer)
    return answer


def sampler_of(denoiser: Denoiser, solver: Solver, policy: Policy, cfg: DictConfig, dtype: torch.dtype) -> Sampler:
    """A checked sampler of the benchmark's settings, labels in turn. Raises UsageError where they do not fit."""
    sampler = Sampler(
        denoiser,
        solver,
        policy,
        seed=cfg.seed,
        chunk=cfg.batch,
        guidance=cfg.guidance,
        labels="balanced",
        dtype=dtype,
    )
    sampler.check()
    return sampler


def cond_of(denoiser: Denoiser) -> CondOf | None:
    """Example conditioning for networks that take something other than labels; None where the sampler has its own."""
    network = denoiser.network
    if network.cond_kind in ("none", "class"):
        return None

    def example(index: Tensor) -> Tensor | None:
        return network.example_cond(len(index), index.device)

    return example


def _rows(
    samplers: Mapping[str, Sampler], measured: Speed, settings: SpeedSettings, target: float, busy: bool
) -> list[dict[str, Any]]:
    """One row per policy and batch size, in rising order; full compute has no verdict."""
    rows = []
    for name, sampler in samplers.items():
        own = measured.rows[name]
        main = {
            "batch": settings.images,
            "images_per_s": own["images_per_s"],
            "speedup": own["speedup"],
            "spread": own["seconds_spread"],
            "peak_memory_bytes": own["speed"]["peak_memory_bytes"],
        }
        entries = [entry for entry in own["speed"]["sweep"] if entry["batch"] != settings.images]
        for entry in sorted([main, *entries], key=lambda entry: int(entry["batch"])):
            batch, ratio = entry["batch"], entry["speedup"]
            row = {"policy": sampler.policy.name, **entry, "macs_saved": None, "time_saved": None}
            row |= {"saving_realised": None, "verdict": None}
            if ratio is not None:
                row["macs_saved"] = 1 - measured.macs[name][batch] / measured.macs["full"][batch]
                row["time_saved"] = 1 - 1 / ratio
                row["saving_realised"] = saving_realised(row["time_saved"], row["macs_saved"])
                if name != "full":
                    realised = row["saving_realised"]
                    row["verdict"] = verdict(realised is not None and realised >= target, busy)
            rows.append(row)
    return rows


def _show(answer: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    c = answer["conditions"]
    console.print(
        f"{c['device']}, {c['threads']} threads, {c['dtype']}, {c['solver']} in {c['steps']} calls, "
        f"{c['tokens']} tokens, {c['rounds']} interleaved rounds"
    )
    table = Table("policy", "batch", "images/s", "speed-up", "MACs saved", "realised", "peak MiB", "verdict")
    for row in answer["rows"]:
        if row["images_per_s"] is None:
            table.add_row(row["policy"], str(row["batch"]), "-", "-", "-", "-", "-", "out of memory")
            continue
        peak, realised = row["peak_memory_bytes"], row["saving_realised"]
        table.add_row(
            row["policy"],
            str(row["batch"]),
            f"{row['images_per_s']:.4g}",
            f"{row['speedup']:.2f}",
            f"{row['macs_saved']:.1%}",
            "-" if realised is None else f"{realised:.0%}",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
            "-" if answer["busy"] or row["verdict"] is None else row["verdict"],
        )
    console.print(table)
    for reason in dict.fromkeys(row["reason"] for row in answer["rows"] if row["images_per_s"] is None):
        print(reason, file=sys.stderr)
    if all(row["peak_memory_bytes"] is None for row in answer["rows"]):
        print("peak memory: not measured on this device", file=sys.stderr)
    if any(policy["latency_ms"] for policy in answer["policies"]):
        latency = Table("latency of one image, ms", *LATENCY)
        for policy in answer["policies"]:
            latency.add_row(policy["policy"], *(f"{policy['latency_ms'][key]:.4g}" for key in LATENCY))
        console.print(latency)
    if answer["busy"]:
        print(
            f"other processes used {answer['other_processes']:.0%} of the CPU time; measure again on a quiet machine",
            file=sys.stderr,
        )
