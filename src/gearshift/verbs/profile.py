"""`gearshift profile`: parameters and MACs of a network, per exit, per part, per stage, and under a policy; and whether
it saves training or sampling against another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from gearshift.api import other_run, side_by_side
from gearshift.assembly import build_denoiser, build_objective, build_policy, build_solver
from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Solver
from gearshift.evaluation.stage_costs import account, interval, stored
from gearshift.evaluation.training_costs import training_mix
from gearshift.execution.cost import Cost, CostTable
from gearshift.execution.parts import kept_bytes
from gearshift.objectives.base import Objective
from gearshift.policies.base import Policy, RunInfo
from gearshift.runtime.progress import note
from gearshift.runtime.run import RunFolder
from gearshift.verbs.profile_baseline import against, path_of

if TYPE_CHECKING:
    from rich.console import Console


def run(cfg: DictConfig) -> dict[str, Any]:
    source = cfg if cfg.run is None else RunFolder.open(cfg.run).config
    with torch.device("meta"):
        denoiser = build_denoiser(source)
    network = denoiser.network
    table = CostTable.measure(network)
    # Of several paths the dearest: where stages differ, `stages` has them all.
    full = max((table.full(network, path) for path in range(len(network.paths))), key=lambda cost: cost.macs)
    params = sum(p.numel() for p in network.parameters())
    answer: dict[str, Any] = {
        "backbone": network.name,
        "params": params,
        "params_active": sum(p.numel() for p in _active(network)),
        "params_stored": params,
        "gmacs": full.macs / 1e9,
        "gmacs_conv_linear": full.linear / 1e9,
        "gflops": full.flops / 1e9,
        "exits": _exits(network, table),
        "parts": _parts(network, table),
    }
    solver = build_solver(cfg.solver)
    policy, beside = build_policy(cfg.policy), denoiser
    if policy.others():
        beside = _beside(denoiser, "the composed network" if cfg.run is None else f"run={cfg.run}", policy)
    own = table if beside is denoiser else CostTable.measure(beside.network)
    answer["policy"] = _under(beside, policy, solver, own, cfg.guidance)
    objective = build_objective(source, network) if source.get("objective") else None
    if len(network.paths) > 1:
        answer |= _staged(denoiser, solver, table, objective)
    elif buffers := stored(network)["buffers_stored"]:
        note(f"a checkpoint also holds {buffers:,} numbers that are no parameters (fixed filters and the like)")
    if cfg.get("baseline") is not None:
        answer["baseline"] = against(cfg, source, denoiser, table, objective, answer["policy"])
    _show(answer)
    return answer


def _active(network: Backbone) -> list[torch.nn.Parameter]:
    """Parameters that the plain full-depth prediction uses: no uncertainty heads, no heads of earlier exits."""
    idle = [m for name in ("uncertainty_heads", "exit_heads") if (m := getattr(network, name, None)) is not None]
    unused = {id(p) for module in idle for p in module.parameters()}
    return [p for p in network.parameters() if id(p) not in unused]


def _staged(denoiser: Denoiser, solver: Solver, table: CostTable, objective: Objective | None) -> dict[str, Any]:
    """What networks of several paths have besides: `account`, with the active parameters of the largest stage."""
    network, process = denoiser.network, denoiser.process
    training = None if objective is None else training_mix(network, process, objective)
    found = account(network, table, process, {solver.name: solver.calls(process)}, training)
    return {**found, "params_active": max(stage["params_active"] for stage in found["stages"])}


def _exits(network: Backbone, table: CostTable) -> list[dict[str, Any]]:
    rows = []
    for path, blocks in enumerate(network.paths):
        full = table.full(network, path)
        for depth in network.exits(path):
            cost = table.path_cost(path, depth, blocks=blocks)
            head = table.entries["readout", path, depth, "full"]
            uncertainty = table.entries.get(("uncertainty", path, depth, "full"), Cost())
            rows.append(
                {
                    "path": path,
                    "depth": depth,
                    "gmacs": cost.macs / 1e9,
                    "gmacs_conv_linear": cost.linear / 1e9,
                    "gflops": cost.flops / 1e9,
                    "fraction": cost.macs / full.macs,
                    "head_macs": head.macs,
                    "uncertainty_macs": uncertainty.macs,
                }
            )
    return rows


def _parts(network: Backbone, table: CostTable) -> list[dict[str, Any]]:
    """What each block costs in full, and what is left of it in every other mode."""
    rows = []
    for path, blocks in enumerate(network.paths):
        for block in blocks:
            modes = {
                mode: cost.macs
                for (kind, p, index, mode), cost in table.entries.items()
                if (kind, p, index) == ("block", path, block)
            }
            rows.append({"path": path, "index": block, **modes})
    return rows


def _beside(denoiser: Denoiser, name: str, policy: Policy) -> Denoiser:
    """The network with those of the runs that the policy names."""
    with torch.device("meta"):
        others = {other: build_denoiser(other_run(other).config) for other in policy.others()}
    return side_by_side(denoiser, name, others)


def _under(denoiser: Denoiser, policy: Policy, solver: Any, table: CostTable, guidance: float) -> dict[str, Any]:
    """MACs of one image under a static policy; a policy that looks at data has no cost before it runs."""
    calls = solver.calls(denoiser.process)
    branches = denoiser.num_branches(guidance)
    network = denoiser.network
    info = RunInfo(calls, network, 1, branches)
    policy.check(info)
    policy = policy.resolved(info)
    full = branches * sum(table.full(network, path_of(network, call)).macs for call in calls)
    answer: dict[str, Any] = {
        "name": policy.name,
        "solver": solver.name,
        "calls": len(calls) * branches,
        "full_gmacs_per_image": full / 1e9,
    }
    if not policy.static:
        return {**answer, "gmacs_per_image": None, "why": "depends on data: sample or evaluate a run"}
    state = policy.begin(info)
    macs = called = 0
    for call in calls:
        plan = policy.plan(state, call)
        rows = int(torch.as_tensor(plan.call).expand(branches).sum())
        called += rows
        if rows:
            macs += rows * table.of_plan(network, plan, path_of(network, call)).macs
    return {
        **answer,
        "calls": called,
        "gmacs_per_image": macs / 1e9,
        # Skipped calls count: what a step of the solver costs on average, in each branch.
        "gmacs_per_call": macs / 1e9 / (len(calls) * branches),
        "macs_saved": 1 - macs / full,
        # What a sample keeps between calls, were everything kept that some call reuses.
        "kept_bytes_per_image": branches * kept_bytes(network, policy.memory_keys(info)),
    }


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, soft_wrap=True)
    console.print(
        f"{answer['backbone']}: {answer['params']:,} parameters, {answer['gmacs']:.5g} GMACs "
        f"({answer['gmacs_conv_linear']:.4g} without attention products)"
    )
    if "stages" in answer:
        _show_stages(answer, console)
    several = "stages" in answer
    table = Table(*["stage"] * several, "exit depth", "GMACs", "GFLOPs", "of full", "head MACs", "uncertainty MACs")
    for row in answer["exits"]:
        table.add_row(
            *[str(row["path"])] * several,
            str(row["depth"]),
            f"{row['gmacs']:.4g}",
            f"{row['gflops']:.4g}",
            f"{row['fraction']:.1%}",
            f"{row['head_macs']:,}",
            f"{row['uncertainty_macs']:,}",
        )
    console.print(table)
    under = answer.get("policy")
    if under is not None and under["gmacs_per_image"] is not None:
        console.print(
            f"{under['name']} with {under['solver']}: {under['gmacs_per_call']:.4g} GMACs per call on average, "
            f"{under['macs_saved']:.1%} saved over {under['calls']} calls"
        )
    for line in answer.get("baseline", {}).get("verdicts", ()):
        console.print(line)


def _show_stages(answer: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table("stage", "sigma / alpha", "active parameters", "its own", "GMACs", "conv+linear")
    for stage in answer["stages"]:
        table.add_row(
            str(stage["path"]),
            interval(stage["sigma"]),
            f"{stage['params_active']:,}",
            f"{stage['params_own']:,}",
            f"{stage['gmacs']:.4g}",
            f"{stage['gmacs_conv_linear']:.4g}",
        )
    console.print(table)
    console.print(
        f"{answer['params_stored']:,} parameters stored, {answer['params_shared']:,} of them in every stage; a "
        f"checkpoint also holds {answer['buffers_stored']:,} other numbers (fixed filters and the like)"
    )
    table = Table("average over", "shares", "GMACs", "conv+linear")
    for name, average in answer["averages"].items():
        shares = " / ".join(f"{share:.4g}" for share in average["shares"])
        table.add_row(
            f"{name} ({average['of']})", shares, f"{average['gmacs']:.4g}", f"{average['gmacs_conv_linear']:.4g}"
        )
    console.print(table)
