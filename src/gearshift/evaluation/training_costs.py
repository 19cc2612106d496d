"""What one training image costs under an objective, forward and with the backward pass. Counted, not timed.

An objective decides which stage an image runs and how deep; the cost of an image is the mean over its draws. The
backward pass is counted by a rule: a layer costs twice its forward MACs there, once for the gradient of its weights and
once for that of its input. A frozen layer costs the second alone, and nothing where nothing before it learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from omegaconf import DictConfig

from gearshift.assembly import build_objective
from gearshift.backbones.base import Backbone
from gearshift.diffusion.process import Process
from gearshift.evaluation.stage_costs import BACKWARD, Mix, given_mix, mass_mix
from gearshift.execution.cost import Cost, CostTable
from gearshift.execution.parameters import PathParameters, parameters_used
from gearshift.objectives.base import Objective
from gearshift.objectives.deediff import DeeDiff
from gearshift.objectives.scheduled import Scheduled
from gearshift.objectives.simple import Simple
from gearshift.objectives.staged import Staged

RULE = "backward = 2 x forward MACs"
FROZEN_RULE = f"{RULE}; of frozen layers 1 x where something before them learns, else 0"
GRID = 1 << 16
"""Midpoints of the unit interval that stand for the draws of a time where no closed form is known."""


@dataclass(frozen=True)
class Share:
    """A part of the training images that compute the same.

    Attributes:
        weight: of all images, in (0, 1].
        path, depth: what they run; depth None is all of the path.
        bypass: blocks they drop.
        all_heads: whether every exit and uncertainty head is read, not the last readout alone.
    """

    weight: float
    path: int = 0
    depth: int | None = None
    bypass: frozenset[int] = frozenset()
    all_heads: bool = False


@dataclass(frozen=True)
class TrainedBy:
    """How a run was trained.

    Attributes:
        objective: what was minimised.
        images: that it has seen, repeats counted; None where that is not known.
        frozen: patterns over the names of parameters that did not learn.
        before: name of the training that it started from, whose cost is its own.
    """

    objective: Objective
    images: int | None
    frozen: tuple[str, ...] = ()
    before: str | None = None

    @classmethod
    def of(cls, cfg: DictConfig, network: Backbone, images: int | None) -> TrainedBy | None:
        """From the configuration of a run; None where it was not trained by this program (imported weights)."""
        if not cfg.get("objective") or not cfg.get("trainer"):
            return None
        before = cfg.get("pretrain") or cfg.get("init")
        return cls(
            build_objective(cfg, network),
            images,
            tuple(cfg.trainer.get("freeze") or ()),
            None if before is None else str(before),
        )


@dataclass(frozen=True)
class TrainingCost:
    """Means over training images.

    Attributes:
        forward, backward: MACs.
        forward_linear, backward_linear: those of them in convolutions and linear layers.
        rule: of the backward pass.
        mix: how often each stage is computed; None for networks of one path.
    """

    forward: float
    backward: float
    forward_linear: float
    backward_linear: float
    rule: str
    mix: Mix | None

    @property
    def macs(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def as_json(self, by: TrainedBy) -> dict[str, Any]:
        """The entry `training` of metrics.json."""
        images = by.images
        return {
            "objective": type(by.objective).__name__,
            "images": images,
            "gmacs_forward": self.forward / 1e9,
            "gmacs_forward_conv_linear": self.forward_linear / 1e9,
            "gmacs": self.macs / 1e9,
            "gmacs_conv_linear": (self.forward_linear + self.backward_linear) / 1e9,
            "pmacs": None if images is None else images * self.macs / 1e15,
            "rule": self.rule,
            **({} if self.mix is None else {"stages": {"of": self.mix.of, "shares": list(self.mix.shares)}}),
            **({} if by.before is None else {"before": by.before}),
        }


# What images compute --------------------------------------------------------------------------------------------------


def shares_of(network: Backbone, process: Process, objective: Objective) -> list[Share] | None:
    """What an objective has training images compute; None where it is not known how it draws."""
    if isinstance(objective, Scheduled):
        return _scheduled(network, process, objective)
    if isinstance(objective, DeeDiff):
        return [Share(1.0, all_heads=True)]
    mix = training_mix(network, process, objective)
    return None if mix is None else [Share(weight, path) for path, weight in enumerate(mix.shares) if weight > 0]


def training_mix(network: Backbone, process: Process, objective: Objective) -> Mix | None:
    """How often training computes each stage; None where it is not known.

    `Staged` chooses its stages; the others leave the training times of the process as they are.
    """
    if isinstance(objective, Staged):
        of = f"images under objective Staged, choice={objective.config.choice}"
        return given_mix("training", of, objective.stages(network, process).shares.tolist())
    if not isinstance(objective, (Simple, Scheduled, DeeDiff)):
        return None
    of = f"training times of process {process.name}"
    if len(network.boundaries) == len(network.paths) - 1:
        return Mix("training", of, mass_mix(network.boundaries, process).shares)
    return given_mix("training", of, torch.bincount(_paths(network, process), minlength=len(network.paths)).tolist())


def _paths(network: Backbone, process: Process) -> torch.Tensor:
    return network.route(process.log_snr(_times(process)))


def _times(process: Process) -> torch.Tensor:
    return process.times_from_uniform((torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID)


def _scheduled(network: Backbone, process: Process, objective: Scheduled) -> list[Share]:
    paths = _paths(network, process).tolist()
    plan = objective.plan(network, objective.bins_of(process, _times(process)))
    depths: list[int | None] = [None] * GRID if plan.depth is None else torch.as_tensor(plan.depth).tolist()
    dropped = [frozenset[int]()] * GRID
    for block in plan.bypass:
        mask = plan.bypass[block].tolist() if not isinstance(plan.bypass, frozenset) else [True] * GRID
        dropped = [have | {block} if drops else have for have, drops in zip(dropped, mask, strict=True)]
    counts = Counter(zip(paths, depths, dropped, strict=True))
    return [Share(count / GRID, path, depth, drops) for (path, depth, drops), count in counts.items()]


# What that costs ------------------------------------------------------------------------------------------------------


def training_cost(
    network: Backbone, table: CostTable, process: Process, objective: Objective, frozen: Sequence[str] = ()
) -> TrainingCost | None:
    """Mean cost of a training image; None where the objective does not say what it computes.

    Args:
        frozen: patterns over the names of parameters that do not learn (`trainer.freeze`).
    """
    shares = shares_of(network, process, objective)
    if shares is None:
        return None
    names = [name for name, _ in network.named_parameters()]
    learns = {k for k, name in enumerate(names) if not any(fnmatchcase(name, pattern) for pattern in frozen)}
    # Where everything learns, nobody has to find out what uses what.
    used = parameters_used(network) if len(learns) < len(names) else None
    costs = [
        (share.weight, *_of_share(network, table, share, None if used is None else used[share.path], learns))
        for share in shares
    ]
    mix = training_mix(network, process, objective) if len(network.paths) > 1 else None
    rule = RULE if used is None else FROZEN_RULE
    return TrainingCost(
        forward=sum(weight * forward.macs for weight, forward, _ in costs),
        backward=sum(weight * backward.macs for weight, _, backward in costs),
        forward_linear=sum(weight * forward.linear for weight, forward, _ in costs),
        backward_linear=sum(weight * backward.linear for weight, _, backward in costs),
        rule=rule,
        mix=mix,
    )


def _of_share(
    network: Backbone, table: CostTable, share: Share, used: PathParameters | None, learns: set[int]
) -> tuple[Cost, Cost]:
    """Forward and backward cost of one image; `used` None where everything learns."""
    path, blocks = share.path, network.paths[share.path]
    depth = len(blocks) if share.depth is None else min(share.depth, len(blocks))
    forward = backward = Cost()
    flows = False  # whether a gradient has to reach what comes before

    def add(cost: Cost, parameters: frozenset[int] | None) -> None:
        nonlocal forward, backward, flows
        learning = parameters is None or bool(parameters & learns)
        flows = flows or learning
        forward = forward + cost
        # Attention products have no weights: both of their inputs are activations.
        times = BACKWARD if learning else int(flows)
        backward = backward + Cost(times * cost.linear, (BACKWARD if flows else 0) * cost.attention)

    add(table.entries["embed", path, 0, "full"], None if used is None else used.embed)
    for block in blocks[:depth]:
        mode = "bypass" if block in share.bypass else "full"
        add(table.entries["block", path, block, mode], None if used is None else used.blocks[block])
    read = network.exits(path) if share.all_heads else (depth,)
    for exit_depth in read:
        add(table.entries["readout", path, exit_depth, "full"], None if used is None else used.readout)
        head = table.entries.get(("uncertainty", path, exit_depth, "full"))
        if share.all_heads and head is not None:
            forward, backward = forward + head, backward + Cost(BACKWARD * head.linear, BACKWARD * head.attention)
    return forward, backward
