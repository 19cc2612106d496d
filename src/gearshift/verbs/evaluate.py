"""`gearshift evaluate`: policies x solvers of one run, with a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gearshift import api
from gearshift.assembly import build_data, dtype_of
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.launch import world_size
from gearshift.runtime.progress import Progress


def run(cfg: DictConfig) -> dict[str, Any]:
    from gearshift.evaluation.classifier import Classifier, get_classifier
    from gearshift.evaluation.evaluate import Evaluation, Evaluator, cache_folder, plan_rows
    from gearshift.evaluation.report import write_report
    from gearshift.evaluation.table import format_table

    if world_size() > 1:
        raise UsageError(f"evaluate works on one process for now, and {world_size()} were started; start one")
    evaluation: Evaluation = config.build(cfg.evaluation)
    loaded = api.load(cfg.run, ema=cfg.ema, device=cfg.device)
    device = next(loaded.denoiser.parameters()).device
    source = loaded.config
    if cfg.data_path is not None:
        source = source.copy()
        OmegaConf.update(source, "data.path", cfg.data_path, force_add=True)
    if not source.get("data"):
        raise UsageError(f"run={cfg.run} was imported without data=; evaluate needs the data to compare with")

    def make(policy: Any, solver: Any, **settings: Any) -> Any:
        return loaded.sampler(policy, solver, precision=cfg.precision, **settings)

    plan_rows(evaluation.config, make)  # what cannot be is refused before a classifier is trained
    data = build_data(source, loaded.denoiser.network)
    train = data.load("train")
    classifier: Classifier | None = None
    if train.labels is not None and "classifier" in evaluation.config.metrics:
        test = data.load("test")
        with Progress(0, f"classifier on {train.name}", unit="steps") as progress:

            def tell(done: int, total: int) -> None:
                progress.total = total
                progress.update(done - progress.done)

            classifier = get_classifier(train, test, cache_folder(), device, tell)

    evaluator = Evaluator(evaluation.config, make, train, classifier, device)
    evaluator.run()
    results = evaluator.results(str(loaded.folder.path), dtype_of(cfg.precision))
    name = evaluation.config.name
    folder = Path(cfg.out) if cfg.out is not None else loaded.folder.path / "evaluations" / name
    images, depths = evaluator.pictures()
    report = write_report(folder, results, images, depths)
    (folder / "ledgers").mkdir(exist_ok=True)
    for title, row in evaluator.rows.items():
        slug = "".join(c if c.isalnum() else "-" for c in title)
        row.ledger.save(folder / "ledgers" / f"{slug}.npz")
    print(format_table(results["rows"]), file=sys.stderr)
    for line in results["warnings"]:
        print(f"note: {line}", file=sys.stderr)
    for missing in results["unavailable"]:
        print(f"left out: {missing['name']} ({missing['reason']})", file=sys.stderr)
    print(f"report: {report}", file=sys.stderr)
    return {"run": str(loaded.folder.path), "report": str(report), "rows": results["rows"]}
