"""`gearshift list`: what can be named, with one line each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir

GROUPS = (
    "experiment",
    "backbone",
    "exits",
    "process",
    "objective",
    "data",
    "solver",
    "policy",
    "evaluation",
    "trainer",
    "logger",
    "launcher",
    "debug",
)


def run(cfg: DictConfig) -> dict[str, Any]:
    if cfg.group is not None and cfg.group not in (*GROUPS, "metric"):
        raise UsageError(f"there is no group {cfg.group!r}; the groups are {', '.join((*GROUPS, 'metric'))}")
    found: dict[str, dict[str, str]] = {}
    for group in GROUPS:
        folder = conf_dir() / group
        found[group] = {
            str(file.relative_to(folder).with_suffix("")): _first_line(file) for file in sorted(folder.rglob("*.yaml"))
        }
    from gearshift.evaluation.settings import METRICS

    found["metric"] = dict(METRICS)
    chosen = found if cfg.group is None else {cfg.group: found[cfg.group]}
    for group, names in chosen.items():
        print(f"\n{group}", file=sys.stderr)
        width = max(map(len, names), default=0)
        for name, line in names.items():
            print(f"  {name:<{width}}  {line}", file=sys.stderr)
    return dict(chosen)


def _first_line(file: Path) -> str:
    """The first comment of a file says what it is."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""
