"""The rows of an evaluation: which sampler each one is, what it is compared with, and what decides its images."""

from __future__ import annotations

import hashlib
import importlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import gearshift
from gearshift.assembly import build_policy, build_solver
from gearshift.evaluation.conditions import is_compiled
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.policies import Full, NetworkSwitch
from gearshift.runtime.errors import UsageError, UserError
from gearshift.runtime.files import slug
from gearshift.sampling.loop import Sampler

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: shown, and unique.
        solver: name of its entry under `solvers`.
        full: name of the row of full compute it is compared with; its own name for that row.
        equal_macs_to: the row whose MACs it was made to match, for baselines.
        also_against: further rows that it is set against.
        baseline: which of `settings.BASELINES` it is; None for rows that were asked for.
        note: what must be said of a baseline.
        grid: the spacing of its steps, where that is not the solver's own.
    """

    name: str
    solver: str
    full: str
    sampler: Sampler
    equal_macs_to: str | None = None
    baseline: str | None = None
    note: str | None = None
    grid: str | None = None
    also_against: tuple[str, ...] | None = None

    @property
    def is_full(self) -> bool:
        return self.name == self.full


def plan_rows(settings: EvaluationConfig, make_sampler: Callable[..., Sampler]) -> list[Row]:
    """Every configured row, full compute of each solver first.

    Everything is built and checked, so that a mistake shows before anything is computed. Raises UsageError.
    """
    rows = []
    for name, node in settings.solvers.items():
        solver = build_solver(node)
        suffix = suffix_of(settings, name)
        full = f"full{suffix}"
        rows.append(Row(full, name, full, sampler_of(settings, make_sampler, Full(), solver)))
        for title, policy_node in settings.policies.items():
            policy = build_policy(policy_node)
            if not isinstance(policy, Full):
                sampler = sampler_of(settings, make_sampler, policy, solver)
                rows.append(Row(f"{title}{suffix}", name, full, sampler))
    if settings.equal_macs and settings.shallow is not None:  # its baselines are made after hours of sampling
        for solver_node in settings.solvers.values():
            try:
                sampler_of(settings, make_sampler, NetworkSwitch(settings.shallow), build_solver(solver_node))
            except UserError as error:
                raise type(error)(f"evaluation.shallow={settings.shallow}: {error}") from error
    files: dict[str, str] = {}
    for row in rows:
        if (other := files.setdefault(slug(row.name), row.name)) != row.name or not slug(row.name):
            raise UsageError(
                f"the rows {other!r} and {row.name!r} would share the file name {slug(row.name)!r}; rename one"
            )
    return rows


def sampler_of(settings: EvaluationConfig, make_sampler: Callable[..., Sampler], policy: Any, solver: Any) -> Sampler:
    """The checked sampler of one row."""
    labels: str | int = int(settings.labels) if settings.labels.isdigit() else settings.labels
    between = settings.guidance_interval
    return make_sampler(
        policy,
        solver,
        seed=settings.seed,
        guidance=settings.guidance,
        guidance_channels=settings.guidance_channels,
        guidance_interval=None if between is None else (between[0], between[1]),
        labels=labels,
        chunk=settings.chunk,
    )


def suffix_of(settings: EvaluationConfig, solver: str) -> str:
    """What tells rows of one policy under several solvers apart."""
    return f" @ {solver}" if len(settings.solvers) > 1 else ""


def fingerprint(row: Row, full: Row, weights: str, observed: str) -> str:
    """16 hexadecimal digits over what decides a row's arrays: weights (of all networks that it runs, and of full
    compute), sampler, full computation, what is observed, the program's own text and the version of torch.

    A policy or solver that cannot say what it is gets a new one every time, so its work is never taken for another's.
    """
    text = json.dumps(
        {
            "format": FORMAT,
            "weights": weights,
            "code": code_digest(),
            "torch": torch.__version__,
            "sampler": identity_of(row.sampler),
            "full": identity_of(full.sampler),
            "observed": observed,
        },
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def code_digest() -> str:
    """SHA-256 over the program's own modules: a change anywhere makes work anew rather than mix two versions."""
    root = Path(gearshift.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def identity_of(sampler: Sampler) -> dict[str, str]:
    """What decides the images of a sampler besides the weights, as text."""
    parts = {"solver": sampler.solver, "policy": sampler.policy, "process": sampler.denoiser.process}
    plain = [field.name for field in fields(sampler) if field.name not in ("denoiser", *parts)]
    return {
        **{name: _named(part) for name, part in parts.items()},
        **{name: repr(getattr(sampler, name)) for name in plain},
        "device": sampler.device.type,
        "compiled": str(is_compiled(sampler.denoiser.network)),
    }


def _named(part: Any) -> str:
    """A part by its class, its settings, and the file it was written in."""
    kind = type(part)
    text = repr(part) if is_dataclass(part) else repr(getattr(part, "config", part))
    if " at 0x" in text:  # an address, which says nothing of what it is
        text = uuid.uuid4().hex
    # Classes of other packages are not in the program's own digest.
    source = getattr(importlib.import_module(kind.__module__), "__file__", None)
    outside = source and not kind.__module__.startswith("gearshift.")
    written = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] if outside and source else ""
    return f"{kind.__module__}.{kind.__qualname__} {text} {written}"
