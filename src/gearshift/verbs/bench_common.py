"""What the kinds of `gearshift bench` share: the network, the policies it is tried with, and the verdict."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift import api
from gearshift.assembly import build_denoiser, build_policy
from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Call
from gearshift.evaluation.throughput import BUSY
from gearshift.execution.compiling import compile_blocks
from gearshift.execution.exits import ExitView
from gearshift.execution.plan import StepPlan
from gearshift.policies import FixedDepth, Policy
from gearshift.policies.base import RunInfo
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class DrawnExits(Policy):
    """Every row leaves at an exit drawn uniformly; uncertainty heads are evaluated as if they decided."""

    seed: int = 0

    @property
    def name(self) -> str:
        return "per-row exits, drawn"

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        exits = torch.tensor(state.network.exits())
        rows = torch.arange(state.num_rows)
        drawn = exits[keys.integers(self.seed, "bench_exit", rows, call.position, len(exits))]
        return StepPlan(exit=_Drawn(drawn, state.network.has_uncertainty))


@dataclass(frozen=True)
class _Drawn:
    depth: Tensor
    pays: bool

    @property
    def asks_heads(self) -> bool:
        return self.pays

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return exits[:-1]

    def begin(self, num_rows: int) -> None:
        return None

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        chosen = self.depth[view.rows.host()] <= view.depth
        if not self.pays:
            return chosen
        # As a threshold rule does: the head's mean goes to the host.
        measured = view.uncertainty().cpu()
        return chosen & (measured >= 0)


def denoiser_of(cfg: DictConfig, device: torch.device) -> Denoiser:
    """The run's network with its weights, or the one that is composed with random weights; beside it those that the
    policy names.

    Raises:
        UsageError: other networks without a run, or in a benchmark that times one network alone.
    """
    policy = build_policy(cfg.policy) if cfg.get("policy") else Policy()
    alone = [name for name in ("training", "features", "stages", "steps") if cfg.get(name)]
    if policy.others() and (cfg.run is None or alone):
        named = f"policy {policy.name} takes a second network (of {', '.join(policy.others())})"
        if alone:
            raise UsageError(f"{named}, and {alone[0]}=true times one; leave out the policy, or take sampling=true")
        raise UsageError(f"{named}, which is set beside that of a run; name it by run=RUN")
    if cfg.run is not None:
        return api.load_run(cfg.run, device=cfg.device, compile=cfg.compile).beside(policy.others())
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        denoiser = build_denoiser(cfg).to(device).eval().requires_grad_(False)
    if cfg.compile:
        compile_blocks(denoiser.network)
    return denoiser


def policies_of(cfg: DictConfig, network: Backbone) -> dict[str, Policy]:
    """The policy that was asked for, or a fixed middle depth and drawn exits."""
    if cfg.get("policy"):
        return {"policy": build_policy(cfg.policy)}
    exits = network.exits()
    return {"fixed": FixedDepth(exits[len(exits) // 2]), "drawn": DrawnExits(cfg.seed)}


def tokens(denoiser: Denoiser) -> int | None:
    """Tokens of one image, where the network has patches."""
    network = denoiser.network
    try:
        return int((network.image_size // network.patch(network.exits()[-1])) ** 2)
    except NotImplementedError:
        return None


def is_busy(others: float | None) -> bool:
    """Whether other processes took so much CPU time that times are not to be trusted."""
    return others is not None and others > BUSY


def verdict(met: bool, busy: bool) -> str:
    return "machine busy, no verdict" if busy else "met" if met else "missed"
