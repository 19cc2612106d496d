"""Several policies and solvers of one run, side by side: the same noise, the same labels, one table.

Every row is compared with the full computation of its own solver at all its steps. Rows of full compute with fewer
steps, at the MACs of the best exit row, are the baseline an adaptive method has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gearshift.assembly import build_policy, build_solver
from gearshift.data.dataset import ImageDataset
from gearshift.data.pixels import to_u8
from gearshift.evaluation.classifier import Classifier
from gearshift.evaluation.conditions import conditions
from gearshift.evaluation.frechet import Accumulator, FrechetMetric, build_metrics, sample_warning
from gearshift.evaluation.paired import PairedSums, label_agreement, load_lpips, ssim_protocol
from gearshift.evaluation.throughput import BUSY, Timing, interleave
from gearshift.evaluation.weights import Unavailable
from gearshift.execution.cost import CostTable
from gearshift.policies import Full
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.progress import Progress, note
from gearshift.sampling.gather import gather_chunks
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Sampler, sample, sample_chunk

METRICS: Mapping[str, str] = {
    "classifier": "label agreement of a classifier trained on the data, and Fréchet distance on its features",
    "random_vgg16": "Fréchet distance on standardised random VGG16 features, mean over seeds (fd_random_vgg16_64)",
    "random_conv": "Fréchet distance on standardised random convolution features, mean over seeds",
    "inception": "FID on Inception 2015-12-05, where its weights are present",
    "lpips": "LPIPS (AlexNet) to the full computation, where its weights are present",
}
SHOWN_IMAGES = 100


@dataclass
class EvaluationConfig:
    """Schema of `Evaluation`.

    Attributes:
        name: of the folder the report goes into.
        policies: by name, policy nodes. A row of full compute is always there.
        solvers: by name, solver nodes.
        num_images, start, seed, chunk, labels, guidance: as for sampling.
        metrics: distribution and perceptual metrics, keys of `METRICS`.
        timing_images: images per timed pass; 0 leaves times out.
        timing_rounds: interleaved rounds.
        equal_macs: add full compute with fewer steps at the MACs of the best exit row of each solver.
        tolerance: points of label agreement an exit row may lose and still count as best (without labels: PSNR
        decides).
    """

    name: str = "default"
    policies: dict[str, Any] = field(default_factory=dict)
    solvers: dict[str, Any] = field(default_factory=dict)
    num_images: int = 512
    start: int = 0
    seed: int = 0
    chunk: int = 256
    labels: str = "balanced"
    guidance: float = 1.0
    metrics: list[str] = field(default_factory=lambda: ["classifier", "random_vgg16", "inception", "lpips"])
    timing_images: int = 256
    timing_rounds: int = 5
    equal_macs: bool = True
    tolerance: float = 3.0

    def __post_init__(self) -> None:
        if not self.solvers:
            raise UsageError("evaluation.solvers is empty; name at least one solver")
        for name, least in (("num_images", 2), ("chunk", 1), ("timing_images", 0), ("timing_rounds", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"evaluation.{name}={getattr(self, name)} must be at least {least}")
        unknown = [metric for metric in self.metrics if metric not in METRICS]
        if unknown:
            raise UsageError(f"evaluation.metrics names {unknown}; there are {', '.join(METRICS)}")


@dataclass
class Evaluated:
    """What one row gave: images uint8 [N, C, H, W] and labels on the host, ledger, and its numbers."""

    sampler: Sampler
    images: Tensor
    labels: Tensor | None
    ledger: LedgerData
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, composed. `Config` is its schema."""

    config: EvaluationConfig

    Config = EvaluationConfig


def plan_rows(settings: EvaluationConfig, make_sampler: Callable[..., Sampler]) -> list[tuple[str, str, Sampler]]:
    """(row name, solver name, sampler) of every configured row; full compute of each solver first.

    Everything is built and checked, so that a mistake shows before anything is computed. Raises UsageError.
    """
    several = len(settings.solvers) > 1
    rows = []
    for solver_name, solver_node in settings.solvers.items():
        solver = build_solver(solver_node)
        suffix = f" @ {solver_name}" if several else ""
        rows.append((f"full{suffix}", solver_name, _sampler(settings, make_sampler, Full(), solver)))
        for name, node in settings.policies.items():
            policy = build_policy(node)
            if not isinstance(policy, Full):
                rows.append((f"{name}{suffix}", solver_name, _sampler(settings, make_sampler, policy, solver)))
    return rows


def _sampler(settings: EvaluationConfig, make_sampler: Callable[..., Sampler], policy: Any, solver: Any) -> Sampler:
    labels: str | int = int(settings.labels) if settings.labels.isdigit() else settings.labels
    return make_sampler(
        policy, solver, seed=settings.seed, guidance=settings.guidance, labels=labels, chunk=settings.chunk
    )


class Evaluator:
    """Runs an evaluation.

    Args:
        settings: what is compared.
        make_sampler: (policy, solver, settings) to a checked sampler of the run.
        train: the training split, reference of the Fréchet distances.
        classifier: trained on the data, or None without labels.
        device, data_name: for extractors and protocols.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        make_sampler: Callable[..., Sampler],
        train: ImageDataset,
        classifier: Classifier | None,
        device: torch.device,
    ) -> None:
        self.settings, self.train, self.classifier, self.device = settings, train, classifier, device
        self._make_sampler = make_sampler
        names = [name for name in settings.metrics if name != "lpips"]
        self.distances, self.unavailable = build_metrics(
            names, image_size=train.image_size, data_name=train.name, classifier=classifier, device=device
        )
        self.lpips = load_lpips(device=device) if "lpips" in settings.metrics else None
        if isinstance(self.lpips, Unavailable):
            self.unavailable.append(self.lpips)
        self.rows: dict[str, Evaluated] = {}
        self.solver_of: dict[str, str] = {}  # by row, the name of its entry under `solvers`
        self._table: CostTable | None = None
        self._reference: dict[str, Sequence[Accumulator]] = {}

    def sampler(self, policy: Any, solver: Any) -> Sampler:
        return _sampler(self.settings, self._make_sampler, policy, solver)

    def run(self) -> None:
        """Sample every row, compare, add the equal-MACs baselines, and take the times."""
        planned = plan_rows(self.settings, self._make_sampler)
        self._table = CostTable.measure(planned[0][2].denoiser.network)
        full: dict[str, str] = {}
        for name, solver_name, sampler in planned:
            full.setdefault(solver_name, name)
            self.solver_of[name] = solver_name
            self.add(name, sampler, self.rows.get(full[solver_name]))
        if self.settings.equal_macs:
            for solver_name, full_name in full.items():
                mine = [name for name, own, _ in planned if own == solver_name and name != full_name]
                self._add_fewer_steps(solver_name, full_name, mine)
        if self.settings.timing_images:
            self._time(full)

    def add(self, name: str, sampler: Sampler, full: Evaluated | None) -> None:
        """One row: images, ledger, numbers. `full` is what it is compared with; None: it is the full run itself."""
        assert self._table is not None
        calls = len(sampler.calls())
        passes = len(sampler.chunks(self.settings.start, self.settings.start + self.settings.num_images))
        with Progress(passes * calls, name, unit="calls") as progress:
            chunks = list(
                sample(
                    sampler,
                    self.settings.num_images,
                    start=self.settings.start,
                    table=self._table,
                    on_call=lambda _: progress.update(1),
                )
            )
        gathered = gather_chunks(chunks)
        assert gathered is not None  # evaluation runs on one process
        images, ledger, labels = to_u8(gathered.images), gathered.ledger, gathered.labels
        reference = images if full is None else full.images
        paired = PairedSums(network=None if self.lpips is None or isinstance(self.lpips, Unavailable) else self.lpips)
        for at in range(0, len(images), self.settings.chunk):
            paired.update(images[at : at + self.settings.chunk], reference[at : at + self.settings.chunk])
        numbers: dict[str, Any] = {
            "name": name,
            "policy": sampler.policy.name,
            "solver": sampler.solver.name,
            "steps": calls,
            "calls": ledger.calls_per_image,
            "macs_per_image": ledger.macs_per_image,
            # Against the full computation at all steps, so that fewer steps show as a saving too.
            "macs_saved": 1 - ledger.macs_per_image / (ledger if full is None else full.ledger).full_macs_per_image,
            "mean_depth": float(ledger.depth[ledger.called].mean()),
            **paired.compute(),
        }
        if self.classifier is not None and labels is not None:
            numbers["label_agreement"] = label_agreement(self.classifier.predict(images.to(self.device)), labels)
        for metric in self.distances:
            sums = self._sums(metric, images)
            numbers[metric.name] = metric.distance(sums, self._reference_sums(metric))
        self.rows[name] = Evaluated(sampler, images, labels, ledger, numbers)

    def _sums(self, metric: FrechetMetric, images: Tensor) -> Sequence[Accumulator]:
        sums = metric.new()
        for at in range(0, len(images), self.settings.chunk):
            metric.update(sums, images[at : at + self.settings.chunk].to(self.device))
        return sums

    def _reference_sums(self, metric: FrechetMetric) -> Sequence[Accumulator]:
        if metric.name not in self._reference:
            note(f"{metric.name}: features of {len(self.train)} training images")
            self._reference[metric.name] = self._sums(metric, self.train.images_u8)
        return self._reference[metric.name]

    # Baselines -------------------------------------------------------------------------------------------------------

    def best(self, names: Sequence[str], full_name: str) -> str | None:
        """The exit row that saves most MACs among those within the tolerance of full compute; None if none saves."""
        full = self.rows[full_name].numbers
        exits = [name for name in names if self.rows[name].ledger.called.all()]  # skipped calls are no exits
        saving = [name for name in exits if self.rows[name].numbers["macs_saved"] > 0]
        within = [
            name
            for name in saving
            if "label_agreement" in full
            and self.rows[name].numbers["label_agreement"] >= full["label_agreement"] - self.settings.tolerance / 100
        ]
        if within:
            return max(within, key=lambda name: self.rows[name].numbers["macs_saved"])
        # Images equal to those of full compute have no finite PSNR and come first.
        return max(saving, key=lambda name: self.rows[name].numbers["psnr_to_full"] or float("inf"), default=None)

    def _add_fewer_steps(self, solver_name: str, full_name: str, names: Sequence[str]) -> None:
        best = self.best(names, full_name)
        if best is None:
            return
        full = self.rows[full_name]
        share = 1 - self.rows[best].numbers["macs_saved"]
        node = config.plain(self.settings.solvers[solver_name])
        if "steps" not in node:
            node["steps"] = len(full.sampler.calls())
        steps = max(1, round(node["steps"] * share))
        if steps >= node["steps"]:
            return
        sampler = self.sampler(Full(), build_solver({**node, "steps": steps}))
        suffix = f" @ {solver_name}" if len(self.settings.solvers) > 1 else ""
        name = f"full, {steps} steps{suffix}"
        self.solver_of[name] = solver_name
        self.add(name, sampler, full)
        self.rows[name].numbers["equal_macs_to"] = best

    # Time ------------------------------------------------------------------------------------------------------------

    def _time(self, full: Mapping[str, str]) -> None:
        assert self._table is not None
        table = self._table
        settings = self.settings

        def timed(sampler: Sampler) -> Callable[[], object]:
            index = torch.arange(settings.start, settings.start + settings.timing_images, device=self.device)
            return lambda: sample_chunk(replace(sampler, chunk=settings.timing_images), index, table)

        methods = {name: timed(row.sampler) for name, row in self.rows.items()}
        total = len(methods) * (settings.timing_rounds + 1)
        with Progress(total, "timing, interleaved", unit="passes") as progress:
            timings, others = interleave(
                methods, settings.timing_rounds, self.device, on_run=lambda name: progress.update(1, row=name)
            )
        self.others = others
        for name, row in self.rows.items():
            reference = full[self.solver_of[name]]
            row.numbers.update(self._time_numbers(timings[name], timings[reference], row.numbers["macs_saved"]))

    def _time_numbers(self, own: Timing, reference: Timing, macs_saved: float) -> dict[str, Any]:
        ratio = own.ratio_of(reference)
        return {
            "images_per_s": self.settings.timing_images / own.median,
            "speedup": 1 / ratio,
            "time_saved": 1 - ratio,
            "saving_realised": (1 - ratio) / macs_saved if macs_saved > 0.01 else None,
            "seconds_spread": own.spread,
        }

    others: float | None = None

    # Result ----------------------------------------------------------------------------------------------------------

    def results(self, run: str, dtype: torch.dtype) -> dict[str, Any]:
        """The dict behind JSON, table and report."""
        s = self.settings
        some = next(iter(self.rows.values()))
        warnings = [
            line for metric in self.distances if (line := sample_warning(metric.name, s.num_images, metric.dim))
        ]
        if self.others is not None and self.others > BUSY:
            warnings.append(
                f"other processes used {self.others:.0%} of the CPU time while times were taken; "
                "measure again on a quiet machine before quoting a speed"
            )
        protocol: dict[str, Any] = {
            "images": f"{s.num_images}, indices {s.start}..{s.start + s.num_images - 1}",
            "seed": s.seed,
            "chunk": s.chunk,
            "labels": s.labels if some.labels is not None else "none",
            "guidance": f"w = {s.guidance:g}" + (" (off)" if s.guidance == 1 else ""),
            "data": self.train.provenance,
            "rounding": "uint8, to nearest, before every comparison",
            "ssim": ssim_protocol(self.train.image_size),
            "psnr": "global: from the mean squared error over all images",
        }
        if self.classifier is not None:
            protocol["classifier"] = self.classifier.describe()
        for metric in self.distances:
            protocol[metric.name] = metric.protocol(s.num_images, f"{self.train.name}-train", len(self.train))
        measured = {
            **conditions(self.device, dtype),
            "batch": s.timing_images,
            "rounds": f"{s.timing_rounds}, interleaved, one warm-up; medians, ratios within rounds",
            "batch_policy": "rows that leave are packed out",
            "other_processes": None if self.others is None else f"{self.others:.1%} of CPU time",
        }
        return {
            "run": run,
            "protocol": protocol,
            "conditions": measured if s.timing_images else {},
            "rows": [row.numbers for row in self.rows.values()],
            "warnings": warnings,
            "unavailable": [missing.as_row() for missing in self.unavailable],
        }

    def pictures(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """By row: images uint8 [n, C, H, W] to show, and blocks run [calls, branches * samples]."""
        images = {name: row.images[:SHOWN_IMAGES].numpy() for name, row in self.rows.items()}
        depths = {name: row.ledger.depth.reshape(len(row.ledger.depth), -1) for name, row in self.rows.items()}
        return images, depths


def cache_folder() -> Path:
    """Where trained classifiers are kept between evaluations."""
    from gearshift.data.cache import cache_root

    return cache_root() / "classifiers"
