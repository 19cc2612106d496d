"""The training and the evaluation behind a row of a paper's table, as command lines and folders."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from gearshift.assembly import build_network, build_solver, run_path
from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.evaluation.papers import PaperRow, PaperTable
from gearshift.execution.cost import CostTable
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir
from gearshift.runtime.run import RunFolder
from gearshift.verbs import settings

_NETWORK = ("backbone", "exits", "shrink")  # what decides it


@dataclass(frozen=True)
class Where:
    """Where runs lie, and overrides that every `train` and `evaluate` gets besides the table's."""

    runs_dir: str
    train: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """Parameters, MACs of one call at full compute, calls of the solver, guidance branches."""

    params: int
    macs: int
    calls: int
    branches: int


@cache  # rows of a table are often one network
def _network(text: str) -> tuple[Backbone, int]:
    """The network of a configuration on the meta device, and MACs of its full computation."""
    with torch.device("meta"):
        network = build_network(DictConfig(json.loads(text)))
    return network, CostTable.measure(network).full(network).macs


@dataclass(frozen=True)
class Job:
    """The training and the evaluation behind a row: their command lines (after the program's name) and where they leave
    things."""

    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    run: Path
    results: Path
    trained: DictConfig
    asked: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the training is done."""
        return (self.run / "config.yaml").is_file() and RunFolder(self.run).result is not None

    @property
    def steps(self) -> int | None:
        """The step of the newest checkpoint, None without one. Tensors are not read. Raises RunError on a damaged
        one."""
        from gearshift.training import checkpoint

        path = checkpoint.latest(RunFolder(self.run))
        if path is None:
            return None
        try:
            return int(torch.load(path, mmap=True, weights_only=True)[checkpoint.KEY]["step"])
        except Exception:
            return int(checkpoint.read(path)[checkpoint.KEY]["step"])  # which says what is wrong with it

    def size(self, row: str = "full") -> Size:
        """Counted on the meta device; `row` of the evaluation says which solver."""
        parts = {key: value for key, value in config.plain(self.trained).items() if key in _NETWORK}
        network, macs = _network(json.dumps(parts, sort_keys=True))
        denoiser = Denoiser(network, config.build(self.trained.process))
        evaluation = self.asked["evaluation"]
        solvers = evaluation["solvers"]
        named = row.partition(" @ ")[2]
        solver = build_solver(solvers[named if named in solvers else next(iter(solvers))])
        return Size(
            params=sum(p.numel() for p in network.parameters()),
            macs=macs,
            calls=len(solver.calls(denoiser.process)),
            branches=denoiser.num_branches(evaluation.get("guidance", 1.0)),
        )


def compose(verb: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a command line, checked by the verb's schema. Raises UsageError."""
    return _compose(verb, tuple(overrides)).copy()


@cache  # tables are looked at before and after their rows are run, and rows share evaluations
def _compose(verb: str, overrides: tuple[str, ...]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        if GlobalHydra.instance().is_initialized():  # within a verb
            composed = hydra_compose(verb, overrides=list(overrides))
        else:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                composed = hydra_compose(verb, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"{shlex.join([verb, *overrides])}: {str(error).splitlines()[0]}") from error
    return settings.check(verb, composed)


def job_of(table: PaperTable, row: PaperRow, where: Where) -> Job:
    """The job of a row with overrides."""
    train = (*row.overrides, _override("runs_dir", where.runs_dir), *where.train)
    trained = compose("train", train)
    run = run_path(trained)
    evaluate = (_override("run", str(run)), *table.evaluate, *row.evaluate, *where.evaluate)
    composed = compose("evaluate", evaluate)
    folder = Path(composed.out) if composed.out is not None else run / "evaluations" / str(composed.evaluation.name)
    asked = config.plain(composed)
    return Job(("train", *train), ("evaluate", *evaluate), run, folder / "metrics.json", trained, asked)


def _override(key: str, value: str) -> str:
    if re.fullmatch(r"[\w./@-]+", value):
        return f"{key}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


def line(arguments: Sequence[str]) -> str:
    """A command line to be copied into a shell."""
    return shlex.join(["gearshift", *arguments])
