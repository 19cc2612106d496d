"""`gearshift profile baseline=NAME`: whether a network saves training, sampling or neither against another backbone."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from gearshift.assembly import build_denoiser, build_solver, named
from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers.base import Call
from gearshift.evaluation.savings import Bill, verdict
from gearshift.evaluation.stage_costs import BACKWARD, Mix, mass_mix, uniform_mix
from gearshift.evaluation.training_costs import RULE, training_cost, training_mix
from gearshift.execution.cost import CostTable
from gearshift.objectives.base import Objective
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.runtime.errors import UsageError


def path_of(network: Backbone, call: Call) -> int:
    """The path that a call's noise level is routed to."""
    return int(network.route(torch.tensor([call.log_snr], dtype=torch.float64))[0])


def against(
    cfg: DictConfig,
    source: DictConfig,
    denoiser: Denoiser,
    table: CostTable,
    objective: Objective | None,
    under: dict[str, Any],
) -> dict[str, Any]:
    """The network against backbone `cfg.baseline`, trained on the same process and sampled with the same solver.

    The baseline is trained plainly and sampled in full; ours with its objective, or, where none is named, under each
    weighting of its stages that training could have, and under the policy, where its cost is known beforehand.

    Args:
        source: configuration of `denoiser`, whose process and narrowing the baseline has too.
        under: cost under the policy, from `profile`.

    Returns:
        `name`, `params`, `gmacs`, `gmacs_conv_linear`, `gmacs_sampling`, `rule` and `verdicts`: one sentence for each
        weighting.

    Raises:
        UsageError: no such backbone, or a number of images below 1.
    """
    images = [cfg.get(name) for name in ("images", "baseline_images")]
    for name, value in zip(("images", "baseline_images"), images, strict=True):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value} must be at least 1 training image")
    node = OmegaConf.create({"backbone": named("backbone", cfg.baseline), "process": source.process})
    node.shrink = bool(source.get("shrink"))
    with torch.device("meta"):
        theirs = build_denoiser(node)
    calls = build_solver(cfg.solver).calls(denoiser.process)
    branches = denoiser.num_branches(cfg.guidance)
    their_table = CostTable.measure(theirs.network)
    plain = training_cost(theirs.network, their_table, theirs.process, Simple(SimpleConfig()))
    assert plain is not None
    sampled = branches * sum(their_table.full(theirs.network, path_of(theirs.network, call)).macs for call in calls)
    solver = f"{under['solver']}, {len(calls)} calls"
    base = Bill(str(cfg.baseline), plain.macs, images[1], sampled, solver)
    ours = under["gmacs_per_image"]
    verdicts = []
    frozen = tuple((source.get("trainer") or {}).get("freeze") or ())
    for name, macs in _training(denoiser, table, objective, frozen).items():
        bill = Bill(name, macs, images[0], None if ours is None else 1e9 * ours, solver)
        line = verdict(bill, base)
        verdicts += [] if line is None else [line]
    full = their_table.full(theirs.network)
    return {
        "name": str(cfg.baseline),
        "params": sum(p.numel() for p in theirs.network.parameters()),
        "gmacs": full.macs / 1e9,
        "gmacs_conv_linear": full.linear / 1e9,
        "gmacs_sampling": sampled / 1e9,
        "rule": RULE,
        "verdicts": verdicts,
    }


def _training(
    denoiser: Denoiser, table: CostTable, objective: Objective | None, frozen: tuple[str, ...]
) -> dict[str, float | None]:
    """MACs per training image, forward and backward, by a name that says how images are drawn."""
    network, process = denoiser.network, denoiser.process
    if objective is not None:
        cost = training_cost(network, table, process, objective, frozen)
        mix = training_mix(network, process, objective) if len(network.paths) > 1 else None
        return {_name(network, mix): None if cost is None else cost.macs}
    if len(network.paths) == 1:
        return {network.name: (1 + BACKWARD) * table.full(network).macs}
    costs = [table.full(network, path).macs for path in range(len(network.paths))]
    return {_name(network, mix): (1 + BACKWARD) * mix.average(costs) for mix in _mixes(network, process)}


def _mixes(network: Backbone, process: Process) -> list[Mix]:
    count = len(network.paths)
    known = [mass_mix(network.boundaries, process)] if len(network.boundaries) == count - 1 else []
    return [*known, uniform_mix(count)]


def _name(network: Backbone, mix: Mix | None) -> str:
    return network.name if mix is None else f"{network.name} (trained on {mix.of})"
