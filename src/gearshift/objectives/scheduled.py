"""Fine-tuning under a schedule of the noise level: ASE's objective (arXiv 2408.05927).

    L = mean_i lambda(t_i) (||eps_hat_i - eps_i||^2 + VLB_i),   read out of the one shared head at depth S(t_i)

Each sample is read out exactly once. The samples of a micro-batch are put in the order of the work they need, most
first, so every block runs on the first rows of the batch, which is a view: the shrinking batch. Outputs and gradients
are those of running every block on all rows and picking one depth for each.

The schedule is the very policy that is sampled with, so both read depths in the same way. A schedule that drops decoder
blocks of a network with long skips works alike: the rows that drop a block run what remains of it.

Times are drawn on the host, where decisions are made: some ten host operations on B numbers, and small copies to the
device that nobody waits for. They are the bits that the device would draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.bins import NoiseBins
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Process
from gearshift.execution.network import Network
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import to_device
from gearshift.objectives.base import Batch, Draws, drop_condition, noised
from gearshift.objectives.simple import weighted
from gearshift.objectives.variational import noise_losses
from gearshift.runtime import config as configuration
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError

WEIGHTINGS = ("constant", "per_bin", "inverse_depth", "cycle")
UNIT = 1 << 24
"""Uniform draws are multiples of 1 / UNIT."""


@runtime_checkable
class DepthSchedule(Protocol):
    """A depth for each bin of the noise level (`policies.ExitSchedule`)."""

    @property
    def bins(self) -> NoiseBins: ...
    def check(self, run: Any) -> None: ...
    def depths_on(self, network: Network) -> list[int]: ...


@runtime_checkable
class DropSchedule(Protocol):
    """Dropped blocks for each bin of the noise level (`policies.BypassSchedule`)."""

    @property
    def bins(self) -> NoiseBins: ...
    def check(self, run: Any) -> None: ...
    def blocks_on(self, network: Network) -> list[frozenset[int]]: ...


@dataclass
class ScheduledConfig:
    """Schema of `Scheduled`. The defaults are those of the released code of ASE, which ships lambda = 1 alone.

    Attributes:
        schedule: the policy to train for: `policies.ExitSchedule`, `policies.BypassSchedule`, or a node that names one.
        weighting: lambda. constant: 1 | per_bin: `weights` | inverse_depth: L / S(t), which gives every block the same
            expected gradient; of a bypass schedule S counts the blocks that are not dropped | cycle: `weights` in the
            first half of each `cycle` micro-batches and `other_weights` in the second.
        weights, other_weights: lambda of each bin, the bin closest to the data first.
        cycle: C, even. Algorithm 1 of the paper lists lambda(t) and a re-weighting cycle C as inputs, and uses C
            nowhere; two tables that take turns are our reading.
        one_bin_per_micro_batch: draw the times of a micro-batch, in all processes, from one bin: every block runs on
            the whole batch or not at all, shapes never change, and no process waits for a deeper one. Times stay
            uniform over training: K micro-batches in a row (K bins) draw their bins from the K equal parts of the time
            distribution, in random order. A gradient then sees few noise levels; accumulate K micro-batches or more.
        label_dropout: probability of the null condition.
    """

    schedule: Any = None
    weighting: str = "constant"
    weights: list[float] = field(default_factory=list)
    other_weights: list[float] = field(default_factory=list)
    cycle: int = 2
    one_bin_per_micro_batch: bool = False
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise UsageError(f"objective.weighting={self.weighting!r} is not one of {list(WEIGHTINGS)}")
        bins = len(self.policy().bins.keys) + 1
        wanted = {"weights": self.weighting in ("per_bin", "cycle"), "other_weights": self.weighting == "cycle"}
        for name, needed in wanted.items():
            table = getattr(self, name)
            if len(table) != (bins if needed else 0):
                raise UsageError(
                    f"objective.{name} has {len(table)} entries; weighting={self.weighting} with a schedule of {bins} "
                    f"bins takes {bins if needed else 'none'}"
                )
            if any(not 0 <= weight < float("inf") for weight in table):
                raise UsageError(f"objective.{name}={list(table)}: every weight must be at least 0")
        if self.cycle < 2 or self.cycle % 2:
            raise UsageError(f"objective.cycle={self.cycle} must be even: half for each table")

    def policy(self) -> DepthSchedule | DropSchedule:
        """The schedule as an object."""
        made = configuration.build(self.schedule) if isinstance(self.schedule, Mapping) else self.schedule
        if not isinstance(made, (DepthSchedule, DropSchedule)):
            raise UsageError(
                f"objective.schedule is {type(made).__name__}, which sets no depth by noise level; name "
                "policies.ExitSchedule or policies.BypassSchedule"
            )
        return made


class Scheduled:
    """One exit per sample, by its time."""

    Config = ScheduledConfig
    # A batch without a time near the data leaves the deepest blocks out. They get no gradient then and are not moved,
    # on one process or on several: DDP looks for them, and averages those that any process has used.
    may_leave_unused = True

    def __init__(self, config: ScheduledConfig) -> None:
        self.config = config
        self.schedule = config.policy()
        self._spans: tuple[Process, Tensor] | None = None  # of the process last seen

    def check(self, network: Backbone) -> None:
        """Raises UsageError where the schedule does not fit the network, or labels cannot be dropped."""
        # A policy is checked against a run; of this one only the network is known.
        self.schedule.check(SimpleNamespace(calls=(), network=network, batch=1, branches=1, num_rows=1))
        if self.config.label_dropout > 0 and network.cond_kind != "none":
            network.null_cond(1, next(network.parameters()).device)

    def loss(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Terms: `loss`; `depth`, the mean number of blocks a sample ran whole; `mse` and `vlb` as in `Simple`."""
        network, process, device = denoiser.network, denoiser.process, batch.images.device
        full = max(network.num_blocks(path) for path in range(len(network.paths)))
        times = self.times(process, draws)
        bins = self.bins_of(process, times)
        run = self.blocks_run(network, full)
        work = run[bins]
        if bool((work[1:] > work[:-1]).any()):  # not in order yet, as batches of one bin are
            order = torch.sort(work, descending=True, stable=True).indices
            batch, times, bins = batch.take(order), times[order], bins[order]
            draws = Draws(draws.seed, batch)
        time, noise, noisy = noised(denoiser, batch, draws, to_device(times, device))
        cond = drop_condition(network, batch.cond, draws, self.config.label_dropout)
        output = denoiser.rows(noisy, time, cond, self.plan(network, bins)).prediction
        squared, bound = noise_losses(process, time, batch.images, noise, output)
        weight = to_device(self.table(run, full, batch.micro_batch)[bins], device)
        terms = weighted(process.loss_weight(time) * weight, squared, bound)
        return {**terms, "depth": torch.full((), float(work.double().mean()), device=device)}

    def times(self, process: Process, draws: Draws) -> Tensor:
        """Times of the micro-batch, float64 [B] on the host."""
        uniform = draws.host_uniform("time")
        if self.config.one_bin_per_micro_batch:
            start, stop = self._span(process, self._shared_bin(process, draws))
            uniform = (start + (uniform.double() * (stop - start)).floor()) / UNIT
        return process.times_from_uniform(uniform)

    def bins_of(self, process: Process, times: Tensor) -> Tensor:
        """Bin of each time, host int64 [B]."""
        return self.schedule.bins.of_all(process.training_index(times), process.log_snr(times))

    def blocks_run(self, network: Network, full: int) -> Tensor:
        """Blocks that a sample of each bin runs whole, host int64 [K]."""
        if isinstance(self.schedule, DepthSchedule):
            return torch.tensor(self.schedule.depths_on(network))
        return full - torch.tensor([len(blocks) for blocks in self.schedule.blocks_on(network)])

    def plan(self, network: Network, bins: Tensor) -> StepPlan:
        """What rows of these bins (host int64 [B]) compute."""
        if isinstance(self.schedule, DepthSchedule):
            return StepPlan(depth=torch.tensor(self.schedule.depths_on(network))[bins])
        dropped = self.schedule.blocks_on(network)
        return StepPlan(
            bypass={
                block: torch.tensor([block in blocks for blocks in dropped])[bins]
                for block in sorted(frozenset().union(*dropped))
            }
        )

    def table(self, run: Tensor, full: int, micro_batch: int) -> Tensor:
        """lambda of each bin in a micro-batch, host float32 [K]."""
        if self.config.weighting == "constant":
            return torch.ones(len(run))
        if self.config.weighting == "inverse_depth":
            return full / run.to(torch.float32)
        first = self.config.weighting == "per_bin" or micro_batch % self.config.cycle < self.config.cycle // 2
        return torch.tensor(self.config.weights if first else self.config.other_weights)

    # One bin per micro-batch -----------------------------------------------------------------------------------------

    def _shared_bin(self, process: Process, draws: Draws) -> int:
        """The bin that all processes draw the times of this micro-batch from: as likely as it is under uniform times.

        K micro-batches in a row take one point of each K-th of the time distribution, in an order of their own.
        """
        count = len(self.schedule.bins.keys) + 1
        lap, position = divmod(draws.batch.micro_batch, count)
        part = int(keys.permutation(draws.seed, "bin_order", lap, count)[position])
        within = keys.uniform(draws.seed, "bin", torch.zeros(1, dtype=torch.int64), draws.batch.micro_batch)
        return int(self.bins_of(process, process.times_from_uniform((part + within.double()) / count)))

    def _span(self, process: Process, number: int) -> tuple[int, int]:
        """Uniforms u = k / UNIT, start <= k < stop, whose time is in a bin."""
        if self._spans is None or self._spans[0] is not process:
            self._spans = process, self._all_spans(process)
        start, stop = self._spans[1][number].tolist()
        return start, stop

    def _all_spans(self, process: Process) -> Tensor:
        """Start and stop of every bin, int64 [K, 2], by bisection: a time, and so its bin, is monotone in u."""
        count = len(self.schedule.bins.keys) + 1
        ends = self.bins_of(process, process.times_from_uniform(torch.tensor([0.0, 1 - 1 / UNIT])))
        rises = bool(ends[0] <= ends[1])
        # Bin b begins at the first k whose bin is at least b; where bins fall with u, count them from the other end.
        low, high = torch.zeros(count + 1, dtype=torch.int64), torch.full((count + 1,), UNIT)
        wanted = torch.arange(count + 1)
        while bool((low < high).any()):
            middle = (low + high) // 2
            found = self.bins_of(process, process.times_from_uniform(middle.clamp(max=UNIT - 1).double() / UNIT))
            reached = (found if rises else count - 1 - found) >= wanted
            low, high = torch.where(reached, low, middle + 1).minimum(high), torch.where(reached, middle, high)
        spans = torch.stack([low[:-1], low[1:]], dim=1)
        return spans if rises else spans.flip(0)
