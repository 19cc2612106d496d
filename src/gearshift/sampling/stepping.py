"""One chunk through its calls, one call at a time; between two calls a run can be forked.

The loop of `sampling.loop` goes from first call to last; searches for plans go on from the middle, many times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Held, Prediction
from gearshift.diffusion.solvers.base import Call, State
from gearshift.execution.memory import Key, Memory
from gearshift.execution.plan import PARTS, StepPlan
from gearshift.execution.reach import embedded_skips, unread
from gearshift.execution.stream import to_device
from gearshift.policies.base import RunInfo
from gearshift.runtime import keys
from gearshift.sampling.switching import DepthWatch

if TYPE_CHECKING:
    from gearshift.sampling.loop import Sampler


@dataclass(frozen=True)
class Point:
    """Where a run stands before a call: all that the calls before it left behind."""

    solved: State
    held: Held | None
    memory: Memory | None
    watch: DepthWatch | None

    def fork(self) -> Point:
        """The same point, to go on from on another way; no tensor is copied."""
        return replace(
            self,
            memory=None if self.memory is None else self.memory.fork(),
            watch=copy.deepcopy(self.watch),
        )


class Stepper:
    """Takes the images `index` (int64 [B]) of a sampler through its calls.

    Args:
        cond: their conditioning, see `Sampler.cond`.
        reusable: the (block, part) pairs that some plan of this run may take from memory.
        keep_earlier: some plan of this run forecasts.
    """

    def __init__(
        self,
        sampler: Sampler,
        index: Tensor,
        cond: Tensor | None,
        reusable: frozenset[Key] = frozenset(),
        keep_earlier: bool = False,
    ) -> None:
        self.sampler, self.index, self.cond = sampler, index, cond
        self.reusable, self.keep_earlier = reusable, keep_earlier
        network = sampler.denoiser.network
        self.shape = (network.in_channels, network.image_size, network.image_size)
        self.calls = sampler.calls()
        self.run = sampler.info(self.calls, index)

    def begin(self) -> Point:
        """Before the first call."""
        sampler, run = self.sampler, self.run
        noise = keys.normal(sampler.seed, "init_noise", self.index, 0, self.shape)
        return Point(
            solved=sampler.solver.begin(sampler.denoiser.process, noise),
            held=None,
            memory=Memory(run.num_rows, self.reusable) if self.reusable else None,
            watch=DepthWatch(run.branches, run.batch) if sampler.solver.restart_at_switch else None,
        )

    def step(
        self, point: Point, call: Call, plan: StepPlan, store: frozenset[Key] | None = None
    ) -> tuple[Point, Tensor, Prediction]:
        """The point after `call`, what the network saw of x [B, C, H, W], and the prediction.

        `store` are the entries worth keeping, see `Memory.begin_call`. The point's memory goes on into the new one.
        """
        sampler, run = self.sampler, self.run
        if point.memory is not None:
            point.memory.begin_call(store)
        x = sampler.solver.network_input(point.solved, call)
        with torch.autocast(x.device.type, sampler.dtype, enabled=sampler.dtype != torch.float32):
            prediction = sampler.denoiser.predict(
                x,
                call.time,
                self.cond,
                plan=plan,
                guidance=sampler.guidance,
                guidance_channels=sampler.guidance_channels,
                guidance_interval=sampler.guidance_interval,
                memory=point.memory,
                held=point.held,
                level=(call.alpha, call.sigma),
                packing=sampler.packing,
                keep_earlier=self.keep_earlier,
            )
        noise = None
        if call.needs_noise:
            noise = keys.normal(sampler.seed, "step_noise", self.index, call.position, self.shape)
        # A forecast is a prediction of this level, which solvers may look back on; one that is held belongs to another.
        own = (prediction.called | prediction.forecast).reshape(run.branches, run.batch)
        fresh = own[: prediction.branches].all(0)
        some = bool(fresh.any()) and not bool(fresh.all())
        solved = sampler.solver.advance(
            point.solved,
            call,
            prediction.eps,
            variance=prediction.variance,
            noise=noise,
            fresh=to_device(fresh, x.device) if some else bool(fresh.all()),
            switched=False if point.watch is None else point.watch.switched(plan, prediction, x.device),
        )
        return replace(point, solved=solved, held=prediction.held), x, prediction

    def finish(
        self, plans: Sequence[StepPlan], points: dict[int, Point], stride: int, on_step: Callable[[], None]
    ) -> Tensor:
        """Images [B, C, H, W] fp32 after all calls under `plans`.

        Goes on from the last of `points`, which stand before the call of their number on the way of these plans; every
        `stride`-th on the way is added to them.
        """
        start = max(points)
        point = points[start].fork()
        with torch.inference_mode():
            for position in range(start, len(self.calls)):
                if position % stride == 0:
                    points.setdefault(position, point.fork())
                point, _, _ = self.step(point, self.calls[position], plans[position])
                on_step()
            return self.sampler.solver.result(point.solved)


def worth_storing(run: RunInfo, plans: Sequence[StepPlan]) -> list[frozenset[Key]] | None:
    """For every call, the entries that a later call will read before they are written again; None where the plans tell
    rows apart, when that depends on the rows."""
    if any(_per_row(plan) for plan in plans):
        return None
    levels = torch.tensor([call.log_snr for call in run.calls], dtype=torch.float64)
    paths = [run.network.paths[path] for path in run.network.route(levels).tolist()]
    awaited: set[Key] = set()  # read later, and not yet written on the way back
    wanted: list[frozenset[Key]] = []
    for plan, path in zip(reversed(plans), reversed(paths), strict=True):
        wanted.append(frozenset(awaited))
        if plan.call is False:
            continue
        depth = len(path) if plan.depth is None else int(plan.depth)
        taken = {block: plan.reused_part(block) for block in path[:depth] if block not in plan.bypass}
        whole = {block for block, part in taken.items() if part == "block"}
        idle = unread(run.network, path[:depth], whole, embedded_skips(run.network, path))
        for block, part in taken.items():
            # What surely runs writes what it surely computes: everything, or what lies behind the part that it takes.
            if block not in idle:
                written = PARTS if part is None else PARTS[max(PARTS.index(part) + 1, PARTS.index("output")) :]
                awaited -= {(block, one) for one in written}
            # Where an entry lacks for some row even an idle block may run, so it may read, too.
            if part is not None:
                awaited.add((block, part))
    return wanted[::-1]


def _per_row(plan: StepPlan) -> bool:
    per_row = isinstance(plan.call, Tensor) or isinstance(plan.depth, Tensor) or not isinstance(plan.bypass, frozenset)
    return per_row or plan.exit is not None or plan.expert is not None
