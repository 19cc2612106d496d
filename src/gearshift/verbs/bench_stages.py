"""`gearshift bench stages=true`: what mixing stages in a batch costs over running every stage on its own.

The ideal of a mixed batch of N images, n_k of them in stage k, is what the same images would take in whole batches of
one stage each: sum_k n_k t_k / N, with t_k the time of N images of stage k. The ratio of the measured time to this
ideal is 1 where grouping and scattering are free and smaller groups are as efficient as whole ones. The ideal in MACs
is what each image computes, c_k, at the seconds per MAC of the stage with the most of them, d: sum_k n_k c_k t_d /
(N c_d). It is not reached where narrow stages run less efficiently than wide ones, mixed or not.

In the forward pass the images of a mixed batch stand in no order, so groups are gathered and scattered; in the training
step they stand in the order of their stages, as objective Staged puts them. Stages are decided on the host in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.evaluation.conditions import conditions
from gearshift.evaluation.stage_costs import uniform_mix
from gearshift.evaluation.throughput import Timing, interleave
from gearshift.evaluation.training_costs import training_mix
from gearshift.execution.cost import CostTable
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import to_device
from gearshift.objectives.base import Objective
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.runtime.progress import Progress, note
from gearshift.verbs.bench_common import is_busy, verdict

LIMIT = 1.10
"""Largest time of a mixed batch over its ideal."""
MIXED = "mixed"


def run(
    denoiser: Denoiser,
    objective: Objective | None,
    cfg: DictConfig,
    table: CostTable,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The answer: forward and training step of a mixed batch against both ideals, stage times, conditions.

    The mix is that of `objective`, else a like share of every stage.

    Raises UsageError for networks of one path, and for batches with fewer images than stages.
    """
    network = denoiser.network
    count = len(network.paths)
    if count == 1:
        raise UsageError(
            f"stages=true mixes stages in a batch, and {network.name} has one path; choose a backbone with stages"
        )
    if cfg.batch < count:
        raise UsageError(
            f"batch={cfg.batch} cannot hold the {count} stages of {network.name}; set batch={count} or more"
        )
    mix = None if objective is None else training_mix(network, denoiser.process, objective)
    mix = mix or uniform_mix(count)
    times = times_by_stage(denoiser, cfg.batch)
    counts = apportion(mix.shares, cfg.batch)
    together = torch.cat([times[k][: counts[k]] for k in range(count)])
    scattered = together[keys.permutation(cfg.seed, "bench_stage_order", 0, cfg.batch)]
    single = {f"stage {k}": own for k, own in enumerate(times)}
    costs = [table.full(network, path).macs for path in range(count)]
    shape = (network.in_channels, network.image_size, network.image_size)
    x = keys.normal(cfg.seed, "bench_images", torch.arange(cfg.batch, device=device), 0, shape)
    cond = network.example_cond(cfg.batch, device)

    def passes(train: bool) -> dict[str, Callable[[], None]]:
        batches = {MIXED: together if train else scattered, **single}
        return {name: _pass(denoiser, x, own, cond, dtype, train) for name, own in batches.items()}

    answer: dict[str, Any] = {}
    busiest: float | None = None
    with Progress(2 * (count + 1) * (cfg.repeats + cfg.warmup), "bench, stages", unit="passes") as progress:
        for kind, train in (("forward", False), ("training_step", True)):
            network.train(train).requires_grad_(train)
            timings, others = interleave(
                passes(train), cfg.repeats, device, warmup=cfg.warmup, on_run=lambda _: progress.update(1)
            )
            busiest = others if busiest is None else max(busiest, others or 0.0)
            answer[kind] = against_ideal(timings, counts, costs)
    network.zero_grad(set_to_none=True)
    busy = is_busy(busiest)
    for kind in ("forward", "training_step"):
        own = answer[kind]
        own["verdict"] = verdict(own["over_ideal"] <= LIMIT, busy)
        note(
            f"{kind.replace('_', ' ')} of {cfg.batch} images in stages {' / '.join(map(str, counts))}: "
            f"{own['mixed_ms']:.1f} ms, {own['over_ideal']:.3f} of the ideal by stage times, "
            f"{own['over_ideal_macs']:.3f} of that by MACs: {own['verdict']}"
        )
    return {
        **answer,
        "limit": LIMIT,
        "mix": {"of": mix.of, "shares": list(mix.shares), "images": counts},
        "gmacs": [cost / 1e9 for cost in costs],
        "other_processes": busiest,
        "busy": busy,
        "conditions": {
            **conditions(device, dtype, network),
            "batch": cfg.batch,
            "repeats": cfg.repeats,
            "image_size": network.image_size,
            "weights": "random" if cfg.run is None else str(cfg.run),
        },
    }


def apportion(shares: tuple[float, ...], total: int) -> list[int]:
    """Images of each stage, at least one each, as near to the shares as whole numbers come (largest remainders)."""
    exact = [share * total for share in shares]
    counts = [max(1, int(value)) for value in exact]
    while (over := sum(counts) - total) != 0:
        step = -1 if over > 0 else 1
        able = [k for k in range(len(counts)) if step > 0 or counts[k] > 1]
        best = max(able, key=lambda k: step * (exact[k] - counts[k]))
        counts[best] += step
    return counts


def times_by_stage(denoiser: Denoiser, batch: int) -> list[Tensor]:
    """Process times of each stage, host float64 [batch] each: training times that are routed to it, spread evenly.

    Raises UsageError where no training time of the process falls into a stage.
    """
    network, process = denoiser.network, denoiser.process
    drawn = process.times_from_uniform((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16))
    stage = network.route(process.log_snr(drawn))
    found = []
    for path in range(len(network.paths)):
        own = drawn[stage == path]
        if not len(own):
            raise UsageError(f"no training time of process {process.name} falls into stage {path} of {network.name}")
        found.append(own[(torch.arange(batch) * len(own)) // batch])
    return found


def against_ideal(timings: dict[str, Timing], counts: list[int], costs: list[int]) -> dict[str, Any]:
    """Ratios formed within rounds, then medians.

    `over_ideal`: mixed time over sum_k n_k t_k / N; `over_ideal_macs`: over sum_k n_k c_k t_d / (N c_d).
    """
    total, dearest = sum(counts), costs.index(max(costs))
    rounds = list(zip(*(timings[f"stage {k}"].seconds for k in range(len(counts))), strict=True))
    by_time = [sum(n * t for n, t in zip(counts, seconds, strict=True)) / total for seconds in rounds]
    share = sum(n * c for n, c in zip(counts, costs, strict=True)) / (total * costs[dearest])
    by_macs = [share * seconds[dearest] for seconds in rounds]
    return {
        "mixed_ms": 1000 * timings[MIXED].median,
        "ideal_ms": 1000 * Timing(tuple(by_time)).median,
        "over_ideal": timings[MIXED].ratio_of(Timing(tuple(by_time))),
        "over_ideal_macs": timings[MIXED].ratio_of(Timing(tuple(by_macs))),
        "stage_ms": [1000 * timings[f"stage {k}"].median for k in range(len(counts))],
        "spread": max(timing.spread for timing in timings.values()),
    }


def _pass(
    denoiser: Denoiser, x: Tensor, times: Tensor, cond: Tensor | None, dtype: torch.dtype, train: bool
) -> Callable[[], None]:
    kind, on_device = x.device.type, to_device(times, x.device)
    plan = StepPlan(expert=denoiser.network.route(denoiser.process.log_snr(times)))

    def forward() -> Tensor:
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return denoiser.rows(x, on_device, cond, plan).prediction

    def once() -> None:
        if not train:
            with torch.inference_mode():
                forward()
            return
        denoiser.network.zero_grad(set_to_none=True)
        forward().float().square().mean().backward()

    return once
