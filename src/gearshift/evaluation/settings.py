"""What an evaluation compares, as a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gearshift.evaluation.metrics import METRICS as DISTRIBUTION
from gearshift.evaluation.metrics import PAIRED
from gearshift.evaluation.weights import FILES
from gearshift.runtime.errors import UsageError

METRICS: Mapping[str, str] = {**PAIRED, **DISTRIBUTION}
"""Every metric that can be named; PSNR and SSIM to the full computation are always there."""
KEEP = ("none", "npz", "png")
BASELINES = ("fewer_steps", "other_grid", "hurry", "deep_features", "fixed_depth", "duodiff", "small_network")
"""What is added at the MACs of the best rows, see `evaluation.baselines`."""


@dataclass
class EvaluationConfig:
    """Schema of `Evaluation`.

    Attributes:
        name: of the folder the report goes into.
        policies: by name, policy nodes; null leaves one out. A row of full compute is always there.
        solvers: by name, solver nodes; null leaves one out.
        num_images: images of one repeat.
        repeats: disjoint index ranges of `num_images`, one after the other from `start`; from 2 on every quality is a
            mean with its standard deviation over them.
        start, seed, chunk, labels, guidance, guidance_channels, guidance_interval: as for sampling.
        metrics: keys of `METRICS`; fd, kd, precision_recall and density_coverage take an extractor (`fd@classifier`).
        min_images: replaces the fewest images that each metric asks for, for trials. Null keeps the metrics' own.
        split: of the data, reference of the distribution metrics.
        references: by extractor, files of reference statistics (`gearshift reference`, or published ones); an
            extractor that is not named, or as null, is run over the split, once, and its statistics are kept in the
            cache.
        weights: by network (inception, vgg16, alexnet), files of weights; null looks elsewhere.
        extractors: by name, further extractors as nodes with a `_target_`.
        keep_samples: "none", "npz" (one file per row in the layout of ADM's evaluator) or "png" (a folder per row).
        keep_shards: keep what a rerun with more rows or images can go on from.
        timing_images: images per timed pass; 0 leaves times out.
        timing_rounds: interleaved rounds.
        timing_sweep: further batch sizes to time.
        latency_repeats: single images timed for percentiles of the latency; 0 leaves them out.
        calibration_images: images of a held-out split that uncertainty heads are held against, see
            `evaluation.calibration`; all where it has fewer, 0 leaves it out.
        calibration_times: noise levels they are held against it at.
        equal_macs: add baselines at the MACs of each solver's best exit row and best row that skips or reuses.
        baselines: which ones, of `BASELINES`: full compute with fewer steps on the solver's own grid and on another,
            late reuse of attention (HURRY) and deep features at an interval (DeepCache), one exit at every call, where
            the network allows it; the network of `shallow` at the first calls (DuoDiff) and at every call.
        shallow: run folder of a smaller network that was trained from scratch, for `duodiff` and `small_network`,
            which are left out without one.
        tolerance: points of label agreement a row may lose and still count as best (without labels: PSNR decides).
    """

    name: str = "default"
    policies: dict[str, Any] = field(default_factory=dict)
    solvers: dict[str, Any] = field(default_factory=dict)
    num_images: int = 512
    repeats: int = 1
    start: int = 0
    seed: int = 0
    chunk: int = 256
    labels: str = "balanced"
    guidance: float = 1.0
    guidance_channels: int | None = None
    guidance_interval: list[float] | None = None
    metrics: list[str] = field(default_factory=lambda: ["label_agreement", "fd@classifier", "fd@random_vgg16", "lpips"])
    min_images: int | None = None
    split: str = "train"
    references: dict[str, str | None] = field(default_factory=dict)
    weights: dict[str, str | None] = field(default_factory=dict)
    extractors: dict[str, Any] = field(default_factory=dict)
    keep_samples: str = "none"
    keep_shards: bool = True
    timing_images: int = 256
    timing_rounds: int = 5
    timing_sweep: list[int] = field(default_factory=list)
    latency_repeats: int = 0
    calibration_images: int = 0
    calibration_times: int = 20
    equal_macs: bool = True
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    shallow: str | None = None
    tolerance: float = 3.0

    def __post_init__(self) -> None:
        # Null takes away what another file has put there.
        self.policies = {name: node for name, node in self.policies.items() if node is not None}
        self.solvers = {name: node for name, node in self.solvers.items() if node is not None}
        if not self.solvers:
            raise UsageError("evaluation.solvers is empty; name at least one solver")
        least = {"num_images": 2, "repeats": 1, "start": 0, "chunk": 1, "timing_images": 0, "timing_rounds": 1}
        for name, bound in {**least, "latency_repeats": 0, "calibration_images": 0, "calibration_times": 1}.items():
            if getattr(self, name) < bound:
                raise UsageError(f"evaluation.{name}={getattr(self, name)} must be at least {bound}")
        if self.calibration_images == 1:
            raise UsageError(
                "evaluation.calibration_images=1 tells nothing apart; take at least 2, or 0 to leave it out"
            )
        if self.min_images is not None and self.min_images < 2:
            raise UsageError(f"evaluation.min_images={self.min_images} must be at least 2, or null")
        if any(batch < 1 for batch in self.timing_sweep):
            raise UsageError(f"evaluation.timing_sweep={self.timing_sweep}: every batch size must be at least 1")
        if self.name in ("", ".", "..") or "/" in self.name:
            raise UsageError(f"evaluation.name={self.name!r} is no name of a folder; out= takes a path")
        for name, path in self.weights.items():
            if name not in FILES:
                raise UsageError(f"evaluation.weights.{name}={path}: no such network; there are {', '.join(FILES)}")
        if self.keep_samples not in KEEP:
            raise UsageError(f"evaluation.keep_samples={self.keep_samples!r} is not one of {', '.join(KEEP)}")
        unknown = [name for name in self.baselines if name not in BASELINES]
        if unknown:
            known = ", ".join(BASELINES)
            raise UsageError(f"evaluation.baselines={list(self.baselines)}: {unknown[0]!r} is not one of {known}")
        if self.shallow is not None and not {"duodiff", "small_network"} & set(self.baselines):
            raise UsageError(
                f"evaluation.shallow={self.shallow} would not be read: evaluation.baselines={list(self.baselines)} has "
                "neither duodiff nor small_network; add one, or leave it out"
            )
        if self.guidance_interval is not None and len(self.guidance_interval) != 2:
            raise UsageError(
                f"evaluation.guidance_interval={list(self.guidance_interval)} is not a pair; give the least and the "
                "greatest log-SNR"
            )
        if self.split not in ("train", "test"):
            raise UsageError(f"evaluation.split={self.split!r} is neither train nor test")

    @property
    def stop(self) -> int:
        """One past the last image index."""
        return self.start + self.repeats * self.num_images

    def ranges(self) -> list[tuple[int, int]]:
        """The index ranges of the repeats, disjoint and in order."""
        n = self.num_images
        return [(self.start + r * n, self.start + (r + 1) * n) for r in range(self.repeats)]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, composed. `Config` is its schema."""

    config: EvaluationConfig

    Config = EvaluationConfig
