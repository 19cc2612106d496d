"""`gearshift compare`: several evaluations joined into one table and one plot, with what differs between them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gearshift.runtime.errors import UsageError


def run(cfg: DictConfig) -> dict[str, Any]:
    from gearshift.evaluation.compare import compare, default_folder, write_comparison
    from gearshift.evaluation.stored import load
    from gearshift.evaluation.tabular import terminal

    paths = [str(path) for path in cfg.paths or ()]
    if not paths:
        raise UsageError("compare needs evaluations: run folders, folders of evaluations or metrics.json files")
    names = None if cfg.name is None else [str(name) for name in cfg.name]
    evaluations = load(paths, names)
    comparison = compare(evaluations)
    folder = Path(cfg.out) if cfg.out is not None else default_folder(evaluations)
    page = write_comparison(folder, comparison)
    width = shutil.get_terminal_size((160, 24)).columns
    print(terminal(comparison.table, width), file=sys.stderr)
    for line in comparison.savings:
        print(line, file=sys.stderr)
    for line in comparison.warnings:
        print(f"note: {line}", file=sys.stderr)
    print(f"comparison: {page}", file=sys.stderr)
    return {
        "comparison": str(page),
        "rows": len(comparison.rows),
        "evaluations": [item.label for item in evaluations],
        "warnings": list(comparison.warnings),
        "savings": list(comparison.savings),
    }
