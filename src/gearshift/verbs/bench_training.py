"""`gearshift bench training=true`: what an objective adds to a training step, or saves of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig

from gearshift.diffusion.denoiser import Denoiser
from gearshift.evaluation.conditions import conditions
from gearshift.evaluation.throughput import interleave
from gearshift.objectives.base import Batch, Draws, Objective
from gearshift.objectives.deediff import DeeDiff, DeeDiffConfig
from gearshift.objectives.scheduled import Scheduled, ScheduledConfig
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.policies.base import Policy
from gearshift.runtime import keys
from gearshift.runtime.progress import Progress, note
from gearshift.verbs.bench_common import is_busy


def run(
    denoiser: Denoiser, policy: Policy | None, cfg: DictConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Seconds of a training step (forward and backward, no optimiser) per step at full depth.

    With a schedule as `policy`, of fine-tuning under it; else of DeeDiff's objective over every exit. Every repeat
    draws other times, the same for both.
    """
    network = denoiser.network.train().requires_grad_(True)
    shape = (network.in_channels, network.image_size, network.image_size)
    slot = torch.arange(cfg.batch, device=device)
    images = keys.normal(cfg.seed, "bench_images", slot, 0, shape).clamp(-1, 1)
    cond = network.example_cond(cfg.batch, device)
    depths: list[float] = []

    def step(objective: Objective) -> Callable[[], None]:
        objective.check(network)
        done = 0

        def once() -> None:
            nonlocal done
            batch = Batch(images, cond, slot, done)
            done += 1
            network.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                terms = objective.loss(denoiser, batch, Draws(cfg.seed, batch))
            terms["loss"].backward()
            if "depth" in terms and done > cfg.warmup:
                depths.append(float(terms["depth"]))

        return once

    name = "every exit" if policy is None else "under the schedule"
    tried: Objective = (
        DeeDiff(DeeDiffConfig()) if policy is None else Scheduled(ScheduledConfig(schedule=policy, label_dropout=0.0))
    )
    methods = {"plain": step(Simple(SimpleConfig())), name: step(tried)}
    with Progress(2 * (cfg.repeats + cfg.warmup), "bench, training steps", unit="steps") as progress:
        timings, others = interleave(
            methods, cfg.repeats, device, warmup=cfg.warmup, on_run=lambda _: progress.update(1)
        )
    busy = is_busy(others)
    ratio = timings[name].ratio_of(timings["plain"])
    numbers: dict[str, Any]
    if policy is None:
        said = f"every exit adds {ratio - 1:.1%}"
        numbers = {"added_by_exits": ratio - 1, "every_exit_ms": 1000 * timings[name].median}
    else:
        share = sum(depths) / len(depths) / network.num_blocks()
        said = f"{policy.name} takes {ratio:.3f} of it with {share:.3f} of the blocks"
        numbers = {"ratio": ratio, "blocks_run": share, "schedule_ms": 1000 * timings[name].median}
    note(
        f"training step at batch {cfg.batch}: {1000 * timings['plain'].median:.1f} ms, {said}"
        + (f" (other processes used {others:.0%} of the CPU time: measure again)" if busy else "")
    )
    return {
        **numbers,
        "plain_ms": 1000 * timings["plain"].median,
        "spread": max(timing.spread for timing in timings.values()),
        "other_processes": others,
        "busy": busy,
        "conditions": {**conditions(device, dtype, network), "batch": cfg.batch, "repeats": cfg.repeats},
    }
