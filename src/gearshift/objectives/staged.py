"""Training of a network whose paths are stages of the noise level (multi-stage diffusion, arXiv 2312.09181).

    L = mean_i w_i lambda(t_i) (||eps_hat_i - eps_i||^2 + VLB_i),   eps_hat_i by the path of the stage of t_i

A stage is chosen for a micro-batch, for a group of its samples, or for each sample; then the time is drawn from the
process's own distribution of training times, restricted to the stage, by its inverse CDF. With p_k the probability of
stage k under that distribution and q_k the share it is chosen with, w = p_k / q_k keeps the expected loss of q = p, and
w = 1 changes what the network is trained for: then the density of a level is q_k / p_k times what it was. The released
code has q = 1/3 and w = 1 on VP, where that is 0.75, 1.77 and 0.90, and q = p on EDM: 0.961, 0.035 and 0.0035.

Samples of a mixed micro-batch are put in the order of their stages, so each path gets a view of the shared encoder's
output. All draws are on the host, as in `scheduled`, and the device is never waited for.

Steps differ in what they train. A parameter of a stage that a step leaves out has no gradient in it: the optimiser
leaves it and its state alone (no momentum, no decay of the weight), and on several processes DDP looks for parameters
that none of them has used; a gradient is the mean over all samples of a micro-batch, wherever their stages were run.
`trainer.clip_norm` is one norm over all parameters of a step, and stages differ in the size of their gradients: a norm
that suits one may clip another always or never, and in a mixed micro-batch the greatest decides for all. The average
of the weights goes by steps, so of a stage that is rarely chosen it remembers few updates; by `trainer.ema_clock=stage`
it goes by the steps in which a parameter got a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Process
from gearshift.execution.plan import FULL, StepPlan
from gearshift.execution.stream import to_device
from gearshift.objectives.base import Batch, Draws, drop_condition, noised
from gearshift.objectives.simple import check_reduction, per_sample, reduced, weighted
from gearshift.objectives.stage_order import point
from gearshift.objectives.variational import noise_losses
from gearshift.runtime.errors import UsageError

CHOICES = ("mass", "uniform", "custom")
BATCHINGS = ("per_batch", "per_group", "mixed")
HALF_STEP = 2.0**-25
"""Half of the distance between two uniform draws: added to one, it lies inside (0, 1)."""


@dataclass
class StagedConfig:
    """Schema of `Staged`.

    Attributes:
        choice: the share q of each stage. mass: as likely as its times are under the process | uniform: one K-th each |
            custom: `shares`.
        shares: q of each stage, the one next to the data first; custom only. 0 never trains a stage.
        importance: weight a sample by p / q, so that the expected loss is that of choice=mass.
        batching: per_batch: one stage for a micro-batch over all processes: no process waits for a dearer stage, and
            shapes never change | per_group: one for each `group_size` samples | mixed: each sample has its own. Both
            per_batch and per_group keep the shares exactly (`stage_order`), and a gradient sees one stage or a few:
            accumulate some micro-batches.
        group_size: samples of a group, which follow each other in the micro-batch (per_group). The samples of one
            process, batch_size / (accumulate * devices * num_nodes), give each process a stage of its own, balanced
            over the processes; what is computed does not depend on how many processes there really are.
        reduction: of the loss over pixels and channels, mean | sum, as in `Simple`.
        label_dropout: probability of the null condition.
    """

    choice: str = "mass"
    shares: list[float] = field(default_factory=list)
    importance: bool = False
    batching: str = "per_batch"
    group_size: int | None = None
    reduction: str = "mean"
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("choice", CHOICES), ("batching", BATCHINGS)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"objective.{name}={getattr(self, name)!r} is not one of {list(allowed)}")
        check_reduction(self.reduction)
        self._check_shares()
        if (self.group_size is None) is (self.batching == "per_group"):
            wanted = "a number of samples" if self.batching == "per_group" else "null"
            raise UsageError(
                f"objective.group_size={self.group_size} with objective.batching={self.batching}; "
                f"set group_size={wanted}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"objective.group_size={self.group_size} must be at least 1")

    def _check_shares(self) -> None:
        given = list(self.shares)
        if self.choice != "custom":
            if given:
                raise UsageError(f"objective.shares={given} with objective.choice={self.choice}; set choice=custom")
            return
        if any(not 0 <= share < math.inf for share in given) or abs(sum(given) - 1) > 1e-6:
            raise UsageError(
                f"objective.shares={given} add up to {sum(given):g}; give shares of at least 0 that add up to 1"
            )
        if self.importance and 0 in given:
            raise UsageError(
                f"objective.importance=true divides by the shares {given}, of which one is 0; make it greater, or set "
                "importance=false"
            )


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of a network under a process, from data to noise; float64 on the host.

    Attributes:
        edges: probability that a training time is below each end of a stage, [K + 1], from 0 to 1.
        shares: q, [K].
    """

    edges: Tensor
    shares: Tensor

    @property
    def mass(self) -> Tensor:
        """p, [K]."""
        return self.edges.diff()

    def pick(self, points: Tensor) -> Tensor:
        """Stage of each point [n] in [0, 1), int64 [n]."""
        return torch.bucketize(points.double(), self.shares.cumsum(0)[:-1], right=True)

    def levels(self, process: Process, stage: Tensor, uniform: Tensor) -> Tensor:
        """Times [n] within stages [n], from uniform draws [n]."""
        low, high = self.edges[stage], self.edges[stage + 1]
        return process.quantile(high - (uniform.double() + HALF_STEP) * (high - low))


class Staged:
    """Noise prediction by the path of each sample's stage."""

    Config = StagedConfig
    may_leave_unused = True

    def __init__(self, config: StagedConfig) -> None:
        self.config = config
        self._stages: tuple[Process, tuple[float, ...], Stages] | None = None  # of what was seen last

    def check(self, network: Backbone) -> None:
        """Raises UsageError where the network has no stages, the shares are not of its stages, or labels cannot be
        dropped."""
        paths, boundaries = len(network.paths), list(network.boundaries)
        if paths == 1 or len(boundaries) != paths - 1:
            raise UsageError(
                f"objective Staged needs a path for each stage between boundaries; {network.name} has {paths} "
                f"path{'s' * (paths > 1)} and boundaries={boundaries}; choose a backbone with stages, or "
                "objective=simple"
            )
        if self.config.choice == "custom" and len(self.config.shares) != paths:
            raise UsageError(
                f"objective.shares={list(self.config.shares)} are {len(self.config.shares)} shares; {network.name} has "
                f"{paths} stages (boundaries={boundaries})"
            )
        if self.config.label_dropout > 0 and network.cond_kind != "none":
            network.null_cond(1, next(network.parameters()).device)

    def stages(self, network: Backbone, process: Process) -> Stages:
        """The stages of a network under a process.

        Raises:
            UsageError: a boundary outside the noise levels of the process, or so near another that no level is between.
        """
        boundaries = network.boundaries
        if self._stages is None or self._stages[0] is not process or self._stages[1] != boundaries:
            self._stages = process, boundaries, self._found(network, process)
        return self._stages[2]

    def _found(self, network: Backbone, process: Process) -> Stages:
        ends = [math.exp(-0.5 * float(process.log_snr(t))) for t in (process.t_min, process.t_max)]
        inner = torch.tensor(network.boundaries, dtype=torch.float64)
        if bool(((inner < ends[0]) | (inner >= ends[1])).any()):
            raise UsageError(
                f"boundaries={inner.tolist()} of {network.name} are not all within the noise-to-signal ratios of "
                f"process {process.name}, {ends[0]:.6g} to {ends[1]:.6g}; choose other boundaries or another process"
            )
        if process.continuous:
            inside = process.cdf(process.time_of_log_snr(-2 * inner.log()))
        else:  # by the routing itself: a boundary may be a level of the table but for rounding
            table = process.time_of_index(torch.arange(process.num_steps))
            counts = torch.bincount(network.route(process.log_snr(table)), minlength=len(inner) + 1)
            inside = counts.cumsum(0)[:-1].double() / process.num_steps
        edges = torch.cat([torch.zeros(1), inside, torch.ones(1)]).double()
        mass = edges.diff()
        if bool((mass <= 0).any()):
            raise UsageError(
                f"boundaries={inner.tolist()} of {network.name} leave stage {int(mass.argmin())} without a noise level "
                f"of process {process.name}; move them apart"
            )
        if self.config.choice == "mass":
            return Stages(edges, mass)
        if self.config.choice == "uniform":
            return Stages(edges, torch.full_like(mass, 1 / len(mass)))
        shares = torch.tensor(self.config.shares, dtype=torch.float64)
        return Stages(edges, shares / shares.sum())

    def draw(self, network: Backbone, process: Process, draws: Draws) -> tuple[Tensor, Tensor]:
        """Times (float64 [B]) and stages (int64 [B]) of the micro-batch, on the host."""
        uniform = draws.host_uniform("time")
        stages = self.stages(network, process)
        if self.config.batching == "mixed" and self.config.choice == "mass":
            times = process.times_from_uniform(uniform)  # those of every other objective
            return times, network.route(process.log_snr(times))
        stage = stages.pick(self._points(draws, len(stages.shares)))
        return stages.levels(process, stage, uniform), stage

    def _points(self, draws: Draws, stages: int) -> Tensor:
        """What each sample chooses its stage by, in [0, 1), [B]."""
        if self.config.batching == "mixed":
            return draws.host_uniform("stage")
        if self.config.group_size is None:
            return torch.full((len(draws.batch.slot),), self._point(draws, 0, stages), dtype=torch.float64)
        slot = draws.batch.slot.cpu() if draws.batch.host_slot is None else draws.batch.host_slot
        groups, member = (slot // self.config.group_size).unique(return_inverse=True)
        points = [self._point(draws, group, stages) for group in groups.tolist()]
        return torch.tensor(points, dtype=torch.float64)[member]

    def _point(self, draws: Draws, group: int, stages: int) -> float:
        return point(draws.seed, draws.batch.micro_batch, group, stages)

    def loss(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Terms: `loss`; `mse` and `vlb` as in `Simple`; of stage K, `loss_stageK`, its part of `loss`, and
        `share_stageK`, the share of the samples it had: the mean loss of its samples is the first over the second, in
        any average of the two that saw the stage."""
        network, process, device = denoiser.network, denoiser.process, batch.images.device
        times, stage = self.draw(network, process, draws)
        if bool((stage[1:] < stage[:-1]).any()):
            order = torch.sort(stage, stable=True).indices
            batch, times, stage = batch.take(order), times[order], stage[order]
            draws = Draws(draws.seed, batch)
        time, noise, noisy = noised(denoiser, batch, draws, to_device(times, device))
        cond = drop_condition(network, batch.cond, draws, self.config.label_dropout)
        # The stage is handed over, so nothing has to be found out from times on the device.
        plan = StepPlan(expert=stage) if len(network.paths) > 1 else FULL
        output = denoiser.rows(noisy, time, cond, plan, augment=batch.augment).prediction
        losses = noise_losses(process, time, batch.images, noise, output)
        squared, bound = reduced(losses, self.config.reduction, batch.images)
        weight = process.loss_weight(time)
        if self.config.importance:
            stages = self.stages(network, process)
            weight = weight * to_device((stages.mass / stages.shares)[stage].float(), device)
        terms = weighted(weight, squared, bound)
        counts = stage.bincount(minlength=len(network.paths))
        parts = per_sample(weight, squared.detach(), None if bound is None else bound.detach()).split(counts.tolist())
        shares = to_device(counts / len(stage), device).unbind()
        return {
            **terms,
            **{f"loss_stage{k}": part.sum() / len(stage) for k, part in enumerate(parts)},
            **{f"share_stage{k}": share for k, share in enumerate(shares)},
        }
