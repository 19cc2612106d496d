"""An evaluation as one dict: what metrics.json holds and tables, reports and comparisons are made from.

Two runs of one evaluation, on any number of processes, differ in `TIMING_ROWS` and `TIMING` only.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gearshift.evaluation.classifier import Classifier
from gearshift.evaluation.conditions import conditions, versions
from gearshift.evaluation.evaluate import Evaluator
from gearshift.evaluation.paired import PSNR_PROTOCOL, ssim_protocol
from gearshift.evaluation.report import Pictures
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.evaluation.stage_costs import account
from gearshift.evaluation.throughput import BUSY
from gearshift.evaluation.training_costs import TrainedBy, training_cost, training_mix
from gearshift.evaluation.weights import Unavailable, weights_digest
from gearshift.sampling.ledger import LedgerData

FORMAT = 2
TIMING_ROWS = ("images_per_s", "speedup", "time_saved", "saving_realised", "seconds_spread", "speed")
"""Entries of a row that are measured with a clock."""
TIMING = ("conditions", "scaling", "timing_warnings", "command")
"""Entries of the whole that say how and when it was run."""


def results(
    evaluator: Evaluator,
    run: str,
    dtype: torch.dtype,
    classifier: Classifier | None,
    overrides: Sequence[str] = (),
    *,
    ema: bool | None = True,
    trained: TrainedBy | None = None,
) -> dict[str, Any]:
    """The dict, ready for JSON; `overrides` are those of the command line, `ema` whether weights are the averaged
    ones (None: there are no others), `trained` how they came about, where that is known."""
    s = evaluator.settings
    some = next(iter(evaluator.rows.values()))
    data = evaluator.reference
    prompts = some.row.sampler.prompts
    labels = None
    if prompts is None:
        labels = some.row.sampler.cond(torch.zeros(1, dtype=torch.int64, device=some.row.sampler.device))
    protocol: dict[str, Any] = {
        "images": f"{s.num_images}, indices {s.start}..{s.stop - 1}"
        + (f" in {s.repeats} disjoint repeats of {s.num_images}, mean and sd over them" if s.repeats > 1 else ""),
        "seed": s.seed,
        "chunk": s.chunk,
        "labels": prompts.describe() if prompts is not None else "none" if labels is None else s.labels,
        "guidance": _guidance(s),
        "ema": ema,
        "weights": f"sha256 {evaluator.weights[:16]}",
        "dtype": str(dtype).removeprefix("torch."),
        "data": data.provenance,
        "rounding": "uint8, to nearest, before every comparison",
        "macs": "multiply-accumulates per image over all calls, guidance branches and heads; flops = 2 macs",
        "ssim": ssim_protocol(data.image_size),
        "psnr": PSNR_PROTOCOL,
    }
    if beside := _other_networks(evaluator):
        protocol["other_networks"] = beside
    if (decoded := evaluator.to_pixels.describe()) is not None:
        size = some.row.sampler.denoiser.network.image_size
        protocol["decoding"] = f"{decoded}; {evaluator.to_pixels.macs(size):,} MACs per image, not among the macs"
    if classifier is not None:
        protocol["classifier"] = classifier.describe()
    protocol |= evaluator.instruments.protocols(s, list(evaluator.distances().values()))
    warnings = [line for metric, _ in evaluator.distances().values() if (line := metric.note(s.num_images))]
    if s.min_images is not None:
        warnings.append(
            f"evaluation.min_images={s.min_images} replaces the metrics' own least numbers: a trial, not a measurement"
        )
    if evaluator.calibration is not None and evaluator.calibration["split"] == "train":
        warnings.append(
            "the uncertainty heads are held against images of the train split, on which they do better than on others, "
            "because there is no other split (of latents, data_path=FOLDER takes those of the test split)"
        )
    timing_warnings = []
    if evaluator.others is not None and evaluator.others > BUSY:
        timing_warnings.append(
            f"other processes used {evaluator.others:.0%} of the CPU time while times were taken; "
            "measure again on a quiet machine before quoting a speed"
        )
    measured = {
        **conditions(evaluator.device, dtype, some.row.sampler.denoiser.network),
        "batch": s.timing_images,
        "rounds": f"{s.timing_rounds}, interleaved, one warm-up; medians, ratios within rounds",
        "batch_policy": "rows that leave are packed out",
        "other_processes": None if evaluator.others is None else f"{evaluator.others:.1%} of CPU time",
    }
    unavailable = [missing.as_row() for missing in evaluator.unavailable]
    if labels is None and "label_agreement" in s.metrics and all(m["name"] != "label_agreement" for m in unavailable):
        unavailable.append(Unavailable("label_agreement", "the network takes no labels to agree with", "").as_row())
    out: dict[str, Any] = {
        "format": FORMAT,
        "run": run,
        "name": s.name,
        "protocol": protocol,
        "conditions": measured if s.timing_images else {},
        "rows": [done.numbers for done in evaluator.rows.values()],
        "warnings": warnings,
        "timing_warnings": timing_warnings,
        "unavailable": unavailable,
        "command": shlex.join(["gearshift", "evaluate", *overrides]),
        "versions": versions(),
    }
    if evaluator.scaling is not None:
        out["scaling"] = evaluator.scaling
    if evaluator.calibration is not None:
        out["calibration"] = evaluator.calibration
    return out | costs(evaluator, trained)


def costs(evaluator: Evaluator, trained: TrainedBy | None) -> dict[str, Any]:
    """`stages`, of networks with several paths: parameters, MACs and averages, one of them under the calls of each
    solver; and `training`, where it is known what the objective computes."""
    denoiser = next(iter(evaluator.rows.values())).row.sampler.denoiser
    network, process, table = denoiser.network, denoiser.process, evaluator.table
    out: dict[str, Any] = {}
    if len(network.paths) > 1:
        full = [done.row for done in evaluator.rows.values() if done.row.is_full]
        solvers = {row.solver: row.sampler.calls() for row in full}
        mix = None if trained is None else training_mix(network, process, trained.objective)
        out["stages"] = account(network, table, process, solvers, mix)
    cost = None if trained is None else training_cost(network, table, process, trained.objective, trained.frozen)
    if trained is not None and cost is not None:
        out["training"] = cost.as_json(trained)
    return out


def _other_networks(evaluator: Evaluator) -> dict[str, str]:
    """Runs whose networks some row takes besides the run's own, and the digests of their weights."""
    found: dict[str, str] = {}
    for done in evaluator.rows.values():
        network: Any = done.row.sampler.denoiser.network
        for path, other in enumerate(done.row.sampler.policy.others(), start=1):
            if other not in found:
                found[other] = f"sha256 {weights_digest(network.network(path))[:16]}"
    return found


def _guidance(s: EvaluationConfig) -> str:
    text = f"w = {s.guidance:g}"
    if s.guidance == 1:
        return f"{text} (off)"
    if s.guidance_channels is not None:
        text += f" on the first {s.guidance_channels} channels"
    if s.guidance_interval is not None:
        text += f" at log-SNR {s.guidance_interval[0]:g} to {s.guidance_interval[1]:g}"
    return text


def pictures(evaluator: Evaluator) -> Pictures:
    """What the report draws."""
    rows = evaluator.rows
    return Pictures(
        samples={name: done.images for name, done in rows.items()},
        depths={name: _asked(done.ledger, done.ledger.depth) for name, done in rows.items()},
        called={name: _asked(done.ledger, done.ledger.called) for name, done in rows.items()},
        reused={name: _asked(done.ledger, done.ledger.reused) for name, done in rows.items()},
        per_image={name: done.per_image for name, done in rows.items()},
        full_of={name: done.row.full for name, done in rows.items()},
    )


def _asked(ledger: LedgerData, values: NDArray[Any]) -> NDArray[Any]:
    """An array [K, G, N] of the ledger as [K, G * N]. A branch that guidance does not ask for at a call has skipped
    nothing: the conditional one stands in its place, so shares and means are those of the branches that were asked."""
    asked = np.arange(values.shape[1]) < ledger.branches[:, None]
    return np.where(asked[..., None], values, values[:, :1]).reshape(len(values), -1)
