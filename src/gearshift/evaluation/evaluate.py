"""Several policies and solvers of one run, side by side: the same noise, the same labels, one table.

Sampling, rounding to uint8 and everything that looks at an image happen in one pass over chunks of the index range.
Processes take whole chunks and leave what they saw in files (`shards`); the main process puts them together in order,
so one process and many give the same bits, and a run that was interrupted goes on where it stopped.

Every row is compared with the full computation of its own solver at all its steps. What the same MACs buy without the
method (fewer steps, schedules made by hand) is added at the price of the best rows, see `baselines`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from gearshift.data.dataset import ImageDataset
from gearshift.data.decoding import ToPixels
from gearshift.evaluation import baselines, reduce
from gearshift.evaluation.baselines import Target, baselines_of
from gearshift.evaluation.batches import all_cores
from gearshift.evaluation.calibration import (
    BATCH,
    Split,
    calibrate,
    measure,
    obstacle,
    thresholds_of,
    training_times,
)
from gearshift.evaluation.instruments import Instruments
from gearshift.evaluation.keep import keep_samples
from gearshift.evaluation.reference import Statistics
from gearshift.evaluation.rows import Row, fingerprint, plan_rows
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.evaluation.shards import Shards
from gearshift.evaluation.speed import SpeedSettings, measure_scaling, measure_speed, saving_realised
from gearshift.evaluation.weights import Unavailable, weights_digest
from gearshift.execution.cost import CostTable
from gearshift.runtime import peers
from gearshift.runtime.launch import is_main, rank, world_size
from gearshift.runtime.progress import Progress, note
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Sampler

SHOWN_IMAGES = 100
# From here on metrics take long enough to be watched.
MANY_IMAGES = 5_000


@dataclass
class Done:
    """What a row came to: numbers, ledger, arrays over images, and the first pictures uint8 [n, C, H, W]."""

    row: Row
    numbers: dict[str, Any]
    ledger: LedgerData
    per_image: dict[str, NDArray[Any]]
    images: NDArray[Any]


class Evaluator:
    """Runs an evaluation. Every process makes one and calls `run`; the main process then has the rows.

    Args:
        settings: what is compared.
        make_sampler: (policy, solver, settings) to a checked sampler of the run.
        instruments: metrics, extractors and their references.
        reference: the split whose statistics samples are held against.
        to_pixels: how samples become images.
        held_out: what the network sees of images that its uncertainty heads are held against (`calibration.held_out`);
            None takes those of `reference`.
        folder: of the evaluation; shards and kept samples go below it. Every process must see it.

    Raises UsageError where settings, network and metrics do not go together, before anything is sampled.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        make_sampler: Callable[..., Sampler],
        instruments: Instruments,
        reference: ImageDataset,
        device: torch.device,
        folder: str | Path,
        to_pixels: ToPixels = ToPixels(),  # noqa: B008  # frozen and without a decoder
        held_out: Split | None = None,
    ) -> None:
        self.settings, self.instruments, self.reference, self.device = settings, instruments, reference, device
        self.folder, self.to_pixels = Path(folder), to_pixels
        self._make_sampler = make_sampler
        self.planned = plan_rows(settings, make_sampler)
        network = self.planned[0].sampler.denoiser.network
        self.table = self.planned[0].sampler.cost_table()
        self.weights = weights_digest(network)
        own = self.planned[0].sampler.denoiser
        # By identity, which holds as long as what it is the identity of is kept beside.
        self._known: dict[int, tuple[Any, CostTable, str]] = {id(own): (own, self.table, self.weights)}
        self._fulls = {row.name: row for row in self.planned if row.is_full}
        self._distances: list[tuple[Any, Sequence[Statistics]]] = []
        self.rows: dict[str, Done] = {}
        self.others: float | None = None
        self.scaling: dict[str, Any] | None = None
        self.held_out: Split = reference if held_out is None else held_out
        self.calibration: dict[str, Any] | None = None
        reason = obstacle(network, self.held_out) if settings.calibration_images else None
        self.unavailable = [
            *instruments.unavailable,
            *([] if reason is None else [Unavailable("calibration", reason, "")]),
        ]
        self._calibrates = settings.calibration_images > 0 and reason is None

    def run(self) -> None:
        """Sample what is not there yet, compare, add the baselines at equal MACs, and take the times. Collective."""
        peers.meet()
        if is_main():
            with all_cores():
                self._distances = self.instruments.with_references(self.reference)
        self._evaluate(self.planned)
        if self.settings.equal_macs:
            self._evaluate(self._baselines())
        if self._calibrates and is_main():
            self._calibrate()
        if self.settings.timing_images:
            self._time()
        if is_main():
            self._tidy()
        peers.barrier("times were taken")

    # Images ----------------------------------------------------------------------------------------------------------

    def _evaluate(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._sample(row)
        peers.barrier("its chunks were sampled")
        if is_main():
            for row in rows:
                self.rows[row.name] = self._reduce(row)

    def shards(self, row: Row) -> Shards:
        """The files of a row."""
        full = self._fulls[row.full]
        _, weights = self._network_of(row.sampler)
        key = fingerprint(row, full, weights, f"{self.instruments.observer.fingerprint} {self.to_pixels.describe()}")
        return Shards(self.folder / "shards", key)

    def _network_of(self, sampler: Sampler) -> tuple[CostTable, str]:
        """Of all that a row runs, most rows the run's network alone: what it costs, and the digest of the weights."""
        denoiser = sampler.denoiser
        if id(denoiser) not in self._known:
            self._known[id(denoiser)] = denoiser, sampler.cost_table(), weights_digest(denoiser.network)
        _, table, weights = self._known[id(denoiser)]
        return table, weights

    def _table_of(self, sampler: Sampler) -> CostTable:
        return self._network_of(sampler)[0]

    def _sample(self, row: Row) -> None:
        """This process's share of the chunks of a row, except those that are there already."""
        s = self.settings
        shards, full = self.shards(row), self.shards(self._fulls[row.full])
        chunks = row.sampler.chunks(s.start, s.stop)[rank() :: world_size()]
        names = ["ledger/macs", *self.instruments.observer.names()]
        todo = []
        for index in chunks:
            number = int(index[0]) // s.chunk
            needed = [*names, "images"] if self._keeps_images(row, number) else names
            if not shards.has(number, needed):
                todo.append((number, index))
        if len(todo) < len(chunks):
            note(f"{row.name}: {len(chunks) - len(todo)} of {len(chunks)} chunks are there already")
        if not todo:
            return
        calls = len(row.sampler.calls())
        table = self._table_of(row.sampler)
        with Progress(len(todo) * calls, row.name, unit="calls") as progress:
            for number, index in todo:
                chunk = row.sampler.generate(index, table, on_call=lambda _: progress.update(1))
                images = self.to_pixels(chunk.images)
                if row.is_full:
                    reference = images
                else:
                    reference = torch.from_numpy(full.load(number, ["images"])["images"]).to(images.device)
                arrays = self.instruments.observer(images, reference)
                if chunk.cond is not None and chunk.cond.ndim == 1:
                    arrays["labels"] = chunk.cond.cpu().numpy()
                arrays |= {f"ledger/{name}": getattr(chunk.ledger, name) for name in chunk.ledger.__dataclass_fields__}
                if self._keeps_images(row, number):
                    arrays["images"] = images.cpu().numpy()
                shards.save(number, arrays)

    def _keeps_images(self, row: Row, number: int) -> bool:
        """Whether a chunk's images are kept: to compare others with, to show, or because they were asked for."""
        s = self.settings
        return row.is_full or s.keep_samples != "none" or number * s.chunk < s.start + SHOWN_IMAGES

    def _reduce(self, row: Row) -> Done:
        s = self.settings
        arrays = reduce.RowArrays(self.shards(row), s, list(self.instruments.observer.lpips))
        ledger = arrays.ledger()
        reference = ledger if row.is_full else self.rows[row.full].ledger
        with all_cores(), contextlib.ExitStack() as stack:
            bars = []
            if s.num_images >= MANY_IMAGES:
                total = s.repeats * len(self._distances)
                bars.append(stack.enter_context(Progress(total, f"{row.name}: metrics", unit="metrics")))

            def tell(name: str) -> None:
                for bar in bars:
                    bar.update(1, last=name)

            quality = reduce.quality_numbers(arrays, s.repeats, self._distances, tell)
        images = reduce.per_image(ledger, arrays.column().read("squared_error"))
        numbers = {
            "name": row.name,
            "policy": row.sampler.policy.name,
            "solver": row.sampler.solver.name,
            **reduce.cost_numbers(ledger, reference, len(row.sampler.calls())),
            **quality,
            "num_images": s.num_images,
            "repeats": s.repeats,
            "distribution": reduce.distribution(images),
        }
        told = {name: getattr(row, name) for name in ("equal_macs_to", "also_against", "baseline", "note", "grid")}
        numbers |= {name: value for name, value in told.items() if value is not None}
        if s.keep_samples != "none":
            keep_samples(self.folder / "samples", row.name, arrays.column(), s.keep_samples)
        return Done(row, numbers, ledger, images, arrays.images(SHOWN_IMAGES))

    def _tidy(self) -> None:
        if not self.settings.keep_shards:
            shutil.rmtree(self.folder / "shards", ignore_errors=True)

    # Baselines -------------------------------------------------------------------------------------------------------

    def _baselines(self) -> list[Row]:
        """What the best rows are set against; the main process says which these are."""
        chosen = peers.broadcast({full: self._targets(full) for full in self._fulls} if is_main() else {})
        return [
            row
            for full, targets in chosen.items()
            for row in baselines_of(
                self.settings, self._make_sampler, self.table, self._fulls[full], targets, self.planned, self._table_of
            )
        ]

    def _targets(self, full: str) -> list[Target]:
        """The best exit row under a solver, and the best row that skips or reuses, where there are such. Rows of
        further networks are rivals of both."""
        mine = [row for row in self.planned if row.full == full and not row.sampler.policy.others()]
        names = [row.name for row in mine if not row.is_full]
        exits = [name for name in names if self._leaves_early(name)]
        others = [name for name in names if name not in exits]
        found = [self.best(exits, full), self._best(others, full)]
        return [Target(name, self.rows[name].numbers["macs_per_image"]) for name in found if name is not None]

    def best(self, names: Sequence[str], full_name: str) -> str | None:
        """The exit row that saves most MACs among those within the tolerance of full compute; None if none saves."""
        return self._best([name for name in names if self._leaves_early(name)], full_name)

    def _best(self, names: Sequence[str], full: str) -> str | None:
        numbers = {name: done.numbers for name, done in self.rows.items()}
        return baselines.best(numbers, names, full, self.settings.tolerance)

    def _leaves_early(self, name: str) -> bool:
        """Whether a row saves by depth alone: it makes the calls of full compute, by the run's own network, and takes
        nothing from memory."""
        if self.rows[name].row.sampler.policy.others():
            return False
        own, full = self.rows[name].ledger, self.rows[self.rows[name].row.full].ledger
        return bool((own.called == full.called).all()) and not own.reused.any()

    # Uncertainty heads -----------------------------------------------------------------------------------------------

    def _calibrate(self) -> None:
        s, sampler = self.settings, self.planned[0].sampler
        count = min(s.calibration_images, len(self.held_out))
        rows = count * len(training_times(sampler.denoiser.process, s.calibration_times))
        with Progress(rows, "uncertainty heads", unit="rows") as progress:
            records = measure(
                sampler.denoiser,
                self.held_out,
                s.calibration_images,
                s.calibration_times,
                seed=s.seed,
                batch=min(s.chunk, BATCH),
                dtype=sampler.dtype,
                on_rows=progress.update,
            )
        thresholds = thresholds_of(done.row.sampler.policy for done in self.rows.values())
        self.calibration = calibrate(records, self.held_out, thresholds)

    # Time ------------------------------------------------------------------------------------------------------------

    def _time(self) -> None:
        s = self.settings
        speed = SpeedSettings(
            images=s.timing_images,
            rounds=s.timing_rounds,
            sweep=tuple(s.timing_sweep),
            latency_repeats=s.latency_repeats,
        )
        if is_main():
            samplers = {name: done.row.sampler for name, done in self.rows.items()}
            reference_of = {name: done.row.full for name, done in self.rows.items()}
            with Progress(speed.passes(len(samplers)), "timing, interleaved", unit="passes") as progress:
                measured = measure_speed(
                    samplers,
                    reference_of,
                    {name: self._table_of(sampler) for name, sampler in samplers.items()},
                    speed,
                    start=s.start,
                    on_pass=lambda name: progress.update(1, row=name),
                )
            self.others = measured.others
            for name, numbers in measured.rows.items():
                own = self.rows[name].numbers
                own.update(numbers, saving_realised=saving_realised(numbers["time_saved"], own["macs_saved"]))
        peers.barrier("times were taken")
        self.scaling = measure_scaling(next(iter(self._fulls.values())).sampler, self.table, speed)

    # Result ----------------------------------------------------------------------------------------------------------

    def distances(self) -> Mapping[str, tuple[Any, Sequence[Statistics]]]:
        """By name, the distribution metrics that were measured and their references."""
        return {metric.name: (metric, reference) for metric, reference in self._distances}
