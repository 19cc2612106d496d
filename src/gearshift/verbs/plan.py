"""`gearshift plan`: what every call should compute under a budget, found on calibration noise, as a policy file.

With a policy that has a threshold, the threshold is found that meets the budget. Otherwise schedules are searched, and
what they have to beat is measured at the same budget: fewer steps, schedules made by hand, skipped steps alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from gearshift import api
from gearshift.assembly import build_policy, build_solver
from gearshift.planning.choices import SPACES
from gearshift.planning.kept import KeptMeasures
from gearshift.planning.planner import SEARCHES
from gearshift.planning.problem import mean_squared_error, psnr
from gearshift.planning.rivals import images_of
from gearshift.planning.threshold import ROUNDS, Tuned, check_threshold, tune
from gearshift.planning.threshold_bins import Measured, check_binned, runs_of, tune_bins
from gearshift.policies import Policy
from gearshift.policies.attention_reuse import OPERATORS
from gearshift.policies.threshold_exit import ThresholdExit
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.files import atomic_write, slug
from gearshift.runtime.progress import Progress, note
from gearshift.sampling.loop import Sampler
from gearshift.verbs.plan_files import kept_at, threshold_text
from gearshift.verbs.plan_search import Search
from gearshift.verbs.sample import guidance_scale, interval, label_setting

UNITS = ("macs", "ms")
STARTS = ("even", "hurry")


def run(cfg: DictConfig) -> dict[str, Any]:
    began = time.monotonic()
    _check(cfg)
    loaded: Any = api.load(cfg.run, ema=cfg.ema, device=cfg.device, compile=cfg.compile)
    more: dict[str, Any] = {}
    if cfg.prompts is not None or loaded.takes_text:
        more["prompts"] = loaded.prompts(cfg.prompts or "data")
    if loaded.is_pipeline:
        more["latents"] = True
        if cfg.unit != "macs":
            raise UsageError(
                f"unit={cfg.unit}: single calls of a pipeline cannot be timed by themselves; take unit=macs"
            )
    sampler = loaded.sampler(
        "full",
        build_solver(cfg.solver),
        precision=cfg.precision,
        seed=cfg.seed,
        guidance=guidance_scale(cfg.guidance, None),
        guidance_channels=cfg.guidance_channels,
        guidance_interval=interval(cfg.guidance_interval),
        labels=label_setting(cfg.labels),
        chunk=cfg.images,
        **more,
    )
    place = _place(cfg, loaded.folder.path)
    if cfg.get("policy"):
        answer = _threshold(cfg, loaded.folder.path, sampler, place, clip=loaded.to_pixels().samples_pixels)
    else:
        answer = Search(cfg, loaded, sampler, place).run()
    seconds = time.monotonic() - began
    note(f"{answer['policy']}  ({seconds:.0f} s)")
    return {"run": str(loaded.folder.path), **answer, "seconds": seconds}


def _check(cfg: DictConfig) -> None:
    if cfg.unit not in UNITS:
        raise UsageError(f"unit={cfg.unit} is not one of {', '.join(UNITS)}")
    if not cfg.budget > 0 or not math.isfinite(cfg.budget) or (cfg.unit == "macs" and cfg.budget > 1):
        most = "a share of full compute, above 0 and at most 1" if cfg.unit == "macs" else "milliseconds, above 0"
        raise UsageError(f"budget={cfg.budget} with unit={cfg.unit} must be {most}")
    if cfg.search not in SEARCHES:
        raise UsageError(f"search={cfg.search} is not one of {', '.join(SEARCHES)}")
    if cfg.start not in STARTS:
        raise UsageError(f"start={cfg.start} is not one of {', '.join(STARTS)}")
    unknown = [name for name in cfg.space if name not in SPACES]
    if unknown or not cfg.space:
        raise UsageError(f"space={list(cfg.space)}: name some of {', '.join(SPACES)}")
    if cfg.operator not in OPERATORS:
        raise UsageError(f"operator={cfg.operator} is not one of {', '.join(OPERATORS)}")
    for name in ("images", "trial_images", "validation", "evaluations", "timing_batch", "timing_rounds"):
        if cfg[name] < 1:
            raise UsageError(f"{name}={cfg[name]} must be at least 1")
    if cfg.trial_images > cfg.images:
        raise UsageError(f"trial_images={cfg.trial_images} are some of images={cfg.images}; make them fewer")
    if cfg.restarts < 0 or (cfg.longest is not None and cfg.longest < 1):
        raise UsageError(f"restarts={cfg.restarts} must be at least 0, and longest={cfg.longest} null or at least 1")
    if cfg.bins is not None and not cfg.get("policy"):
        raise UsageError(
            f"bins={cfg.bins} are of a policy with thresholds; add policy=uncertainty_exit, or leave them out"
        )
    if cfg.get("policy") and cfg.unit != "macs":
        raise UsageError(f"unit={cfg.unit} is for schedules; the threshold of a policy is tuned with unit=macs")


def _place(cfg: DictConfig, run: Path) -> Path:
    """Where the plan goes; a folder that cannot be made is said before anything is searched."""
    if cfg.output is not None:
        place = Path(cfg.output)
        if place.suffix not in (".yaml", ".yml"):
            raise UsageError(f"output={cfg.output} must end in .yaml")
    else:
        plain = {key: value for key, value in config.plain(cfg).items() if key not in ("run", "output", "device")}
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]
        what = "plan" if not cfg.get("policy") else str(cfg.policy[config.TARGET]).rsplit(".", 1)[-1]
        place = run / "plans" / f"{slug(what)}-{slug(f'{cfg.budget:g}{cfg.unit}')}-{digest}.yaml"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output={place}: its folder cannot be made ({error.strerror or error})") from error
    return place


def command() -> str:
    """The command line, for the header of what it leaves."""
    return shlex.join(["gearshift", "plan", *sys.argv[2:]] if len(sys.argv) > 1 else ["gearshift", "plan"])


def _threshold(cfg: DictConfig, run: Path, sampler: Sampler, place: Path, *, clip: bool) -> dict[str, Any]:
    """The threshold of `policy`, or one for each of `bins` of the noise level, that meets the budget; images are
    compared within [-1, 1] with `clip`, latents as they are."""
    policy = build_policy(cfg.policy)
    check_threshold(policy)
    if cfg.bins is not None:
        check_binned(policy, cfg.bins)
    table = sampler.cost_table()
    index = torch.arange(cfg.images, device=sampler.device)
    full_images, full = images_of(sampler, index, table)
    replace(sampler, policy=policy).check()

    def once(candidate: Policy) -> tuple[float, float]:
        images, macs = images_of(replace(sampler, policy=candidate), index, table)
        return macs / full, mean_squared_error(images, full_images, clip)

    measure = KeptMeasures(kept_at(run, "thresholds.json", sampler, cfg.images), once)
    with Progress(ROUNDS + 1, "threshold", unit="runs") as bar:
        tuned: Tuned = tune(
            policy, lambda one: measure(one)[0], cfg.budget, on_round=lambda threshold: bar.update(1, at=threshold)
        )
    best = Measured(tuned.policy, *measure(tuned.policy))
    answer: dict[str, Any] = {"threshold": tuned.threshold}
    if cfg.bins is not None:
        assert isinstance(policy, ThresholdExit)
        with Progress(runs_of(cfg.bins), "thresholds", unit="runs") as bar:
            best, uniform = tune_bins(
                policy, tuned, measure, cfg.budget, cfg.bins, on_round=lambda said: bar.update(1, at=said)
            )
        answer["psnr_calibration_one_threshold"] = _finite(psnr(uniform.loss))
        found: Any = best.policy
        answer["threshold"], answer["thresholds"] = found.threshold, found.thresholds
    closeness = psnr(best.loss)
    text = threshold_text(config.plain(cfg.policy), best.policy, command(), cfg.budget, best.cost, closeness)
    atomic_write(place, text)
    further = torch.arange(cfg.images, cfg.images + cfg.validation, device=sampler.device)
    reference, full = images_of(sampler, further, table)
    images, macs = images_of(replace(sampler, policy=best.policy), further, table)
    return {
        "policy": str(place),
        "name": best.policy.name,
        "budget": cfg.budget,
        "macs_fraction": best.cost,
        **answer,
        "psnr_calibration": _finite(closeness),
        "macs_fraction_validation": macs / full,
        "psnr": _finite(psnr(mean_squared_error(images, reference, clip))),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
