"""`gearshift bench features=true`: what reading features and accumulating their moments adds to sampling.

A pass samples a batch, alone or followed by quantising, Inception and mean and covariance of its features. The formula
of the Fréchet distance, which runs once per evaluation, is timed apart. Nothing is extrapolated.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift.assembly import build_policy
from gearshift.data.pixels import to_u8
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Solver
from gearshift.evaluation.conditions import conditions, versions
from gearshift.evaluation.features import FeatureExtractor, build_extractor
from gearshift.evaluation.frechet import frechet_distance
from gearshift.evaluation.moments import moments
from gearshift.evaluation.throughput import interleave, seconds_of
from gearshift.evaluation.weights import Unavailable
from gearshift.execution.cost import CostTable
from gearshift.policies import Full
from gearshift.runtime import keys
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.progress import Progress, note
from gearshift.sampling.loop import sample_chunk
from gearshift.verbs.bench_common import is_busy, verdict
from gearshift.verbs.bench_sampling import cond_of, sampler_of

LIMIT = 0.10
"""Share of the sampling time that features and moments may add on a GPU."""
DIM = 2048
RANDOM = "inception_random_weights"


def run(
    denoiser: Denoiser, solver: Solver, cfg: DictConfig, table: CostTable, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The answer: share added per batch, seconds of the formula, conditions.

    Raises UsageError for networks that do not make images of one or three channels, and for a batch of one.
    """
    network = denoiser.network
    if network.in_channels not in (1, 3):
        raise UsageError(
            f"features=true reads images of 1 or 3 channels, but {network.name} makes {network.in_channels} (latents); "
            "choose a backbone that makes images"
        )
    if cfg.batch < 2:
        raise UsageError(f"features=true needs batch=2 or more for a covariance, got batch={cfg.batch}")
    policy = build_policy(cfg.policy) if cfg.get("policy") else Full()
    sampler = sampler_of(denoiser, solver, policy, cfg, dtype)
    extractor = inception(cfg.inception, device, network.image_size, cfg.seed)
    index = torch.arange(cfg.batch, device=device)
    given = cond_of(denoiser)
    cond = None if given is None else given(index)

    def sampling() -> Tensor:
        return sample_chunk(sampler, index, table, cond=cond).images

    def accumulating() -> None:
        features = extractor.read(to_u8(sampling()), ("features",))["features"]
        moments(features, device=device)

    methods = {"sampling": sampling, "with features": accumulating}
    with Progress(2 * (cfg.rounds + cfg.warmup), "bench, features", unit="passes") as progress:
        timings, others = interleave(
            methods, cfg.rounds, device, warmup=cfg.warmup, on_run=lambda name: progress.update(1, row=name)
        )
    formula = formula_seconds(DIM, cfg.seed, repeats=min(3, cfg.rounds))
    busy = is_busy(others)
    added = timings["with features"].ratio_of(timings["sampling"]) - 1
    answer = {
        "extractor": extractor.name,
        "metric": extractor.name != RANDOM,  # the time is the same with any weights, a distance is not
        "added": added,
        "limit": LIMIT,
        "verdict": verdict(added < LIMIT, busy) if device.type == "cuda" else "not measured on a GPU, no verdict",
        "sampling_ms": 1000 * timings["sampling"].median,
        "with_features_ms": 1000 * timings["with features"].median,
        "spread": max(timing.spread for timing in timings.values()),
        "peak_memory_bytes": {name: timing.peak_memory_bytes for name, timing in timings.items()},
        "formula": {"dim": DIM, "seconds": formula},
        "other_processes": others,
        "busy": busy,
        "conditions": {
            **conditions(device, dtype, network),
            "batch": cfg.batch,
            "guidance": cfg.guidance,
            "image_size": network.image_size,
            "solver": solver.name,
            "policy": policy.name,
            "steps": len(sampler.calls()),
            "rounds": cfg.rounds,
            "warmup": cfg.warmup,
            "features": extractor.protocol,
            "weights": "random" if cfg.run is None else str(cfg.run),
        },
        "versions": versions(),
    }
    note(
        f"{extractor.name}: a batch of {cfg.batch} takes {answer['sampling_ms']:.1f} ms to sample, features and "
        f"moments add {added:.1%}; the Fréchet formula at d={DIM} takes {formula:.2f} s"
        + (f" (other processes used {others:.0%} of the CPU time: measure again)" if busy else "")
    )
    return answer


def inception(path: str | None, device: torch.device, image_size: int, seed: int) -> FeatureExtractor:
    """Inception with the released weights, or with random ones under a name that no metric has.

    Raises UsageError where `path` was given and does not hold the released file.
    """
    found = build_extractor(
        "inception", image_size=image_size, data_name="samples", device=device, weights={"inception": path}
    )
    if not isinstance(found, Unavailable):
        return found[0]
    if path is not None:
        raise UsageError(f"inception={path}: {found.reason}; leave it out to time random weights")
    note(f"{found.reason}: random weights take its place, which take the same time and measure nothing")
    return random_inception(seed, device)


def random_inception(seed: int, device: torch.device) -> FeatureExtractor:
    """Inception's layers with He-normal weights and idle normalisation: the time of the real one, none of its
    numbers."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from gearshift.evaluation.pretrained import InceptionExtractor

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """The layers are wanted for their shapes."""

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save({}, file)
        with torch.device("meta"):
            layers = Blank("inception-v3-compat", ["2048", "logits_unbiased"], str(file))
        state = {
            name: _drawn(name, value, number, seed) for number, (name, value) in enumerate(layers.state_dict().items())
        }
        torch.save(state, file)
        extractor = InceptionExtractor(file, device)
    extractor.name = RANDOM
    extractor.protocol = f"the layers of inception-2015-12-05 with random weights (seed {seed}): time only, no metric"
    return extractor


def _drawn(name: str, value: Tensor, number: int, seed: int) -> Tensor:
    if value.dim() > 1:  # of a layer
        draw = keys.normal(seed, "bench_inception", torch.tensor([number]), 0, tuple(value.shape))[0]
        return draw * math.sqrt(2 / math.prod(value.shape[1:]))
    if name.endswith((".running_var", "bn.weight")):
        return torch.ones(value.shape, dtype=value.dtype)
    return torch.zeros(value.shape, dtype=value.dtype)


def formula_seconds(dim: int, seed: int, repeats: int) -> float:
    """Median seconds of one Fréchet distance between two full-rank Gaussians of width `dim`, on the host.

    Raises RunError where the distance is not finite.
    """
    host = torch.device("cpu")
    rows = torch.arange(2 * dim)
    sets = [moments(keys.normal(seed, f"bench_gaussian_{side}", rows, 0, (dim,)), device=host) for side in (1, 2)]
    (mean1, cov1), (mean2, cov2) = sets
    distances: list[float] = []

    def formula() -> None:
        distances.append(frechet_distance(mean1, cov1, mean2, cov2))

    taken = statistics.median(seconds_of(formula, host) for _ in range(repeats))
    if not all(map(math.isfinite, distances)):
        raise RunError(f"the Fréchet distance of two Gaussians of width {dim} came out as {distances}")
    return taken
