"""Denoiser: backbone + process + guidance, one noise level per row.

Guidance scale is `w` (1 = off): eps = eps_u + w (eps_c - eps_u), on all channels or on the first few (the official DiT
guides 3 of 4; arXiv 2212.09748), at all noise levels or within an interval of log-SNR (arXiv 2404.07724). Outside of it
only the conditional branch is run. A skipped row keeps the eps (and variance) of its own branch from before guidance;
x0 is derived again at the current x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.diffusion.forecast import Held, forecast, renewed
from gearshift.diffusion.process import Process
from gearshift.execution.executor import execute
from gearshift.execution.memory import Memory
from gearshift.execution.outputs import PACK, Event, Outputs, Packing
from gearshift.execution.plan import FULL, StepPlan
from gearshift.execution.stream import Rows, gather
from gearshift.runtime.errors import UsageError


@dataclass(slots=True)
class Prediction:
    """What one call gives.

    Attributes:
        eps: after guidance, [B, C, H, W] fp32.
        x0: derived from eps at the current x, [B, C, H, W] fp32.
        variance: of the conditional branch, [B, C, H, W], or None.
        held: per row, before guidance; what a later skipped call reuses.
        called: which rows were evaluated in this call, host bool [R].
        forecast: which of the others were extrapolated, host bool [R]; the rest was held.
        depth: blocks run per row, 0 where it was not evaluated; host int64 [R].
        branches: branches that eps is made of: 1 outside the interval of guidance (the conditional one), else all.
        taps, uncertainty: heads at the tapped depths, [R, ...].
        trace: what ran.
    """

    eps: Tensor
    x0: Tensor
    variance: Tensor | None
    held: Held
    called: Tensor
    forecast: Tensor
    depth: Tensor
    branches: int
    taps: dict[int, Tensor] = field(default_factory=dict)
    uncertainty: dict[int, Tensor] = field(default_factory=dict)
    trace: list[Event] = field(default_factory=list)


class Denoiser(nn.Module):
    """Predicts eps at a noise level of a process.

    Args:
        network: a backbone, usually with exits; its output has C channels, or 2C where it predicts a variance.
        process: gives alpha, sigma and the time value the network is fed.

    Raises:
        UsageError: heads of the network follow timesteps that the process does not have.
    """

    def __init__(self, network: Backbone, process: Process) -> None:
        super().__init__()
        network.check_timesteps(None if process.continuous else process.num_steps, process.t_min, process.name)
        self.network = network
        self.process = process

    @staticmethod
    def num_branches(guidance: float) -> int:
        """Rows per sample: guidance off costs one."""
        return 1 if guidance == 1.0 else 2

    def rows(
        self,
        x: Tensor,
        time: float | Tensor,
        cond: Tensor | None,
        plan: StepPlan = FULL,
        *,
        memory: Memory | None = None,
        packing: Packing = PACK,
        subset: Rows | None = None,
        augment: Tensor | None = None,
    ) -> Outputs:
        """Run the network on rows [n, C, H, W] at `time` (process time: a number, or one per row).

        `subset` says which of the run's rows these are, where they are not all of them; `augment` [n, augment_dim] how
        the images were augmented, for networks that take it. Where the process preconditions the network, the
        prediction and the taps come out as eps all the same (any further channels as the network gives them).
        """
        n = len(x)
        if isinstance(time, Tensor):
            fed = self.process.network_time(time).to(device=x.device, dtype=torch.float32)
        else:
            fed = torch.full((n,), float(self.process.network_time(time)), device=x.device)
        plan = self._routed(plan, time, subset or Rows(n))
        seen = self.process.precondition(x, time) if self.process.preconditioned else x
        if augment is None:
            stream = self.network.embed(seen, fed, cond)
        else:
            stream = self.network.embed_augmented(seen, fed, cond, augment)
        if subset is not None:
            stream.belong_to(subset)
        outputs = execute(self.network, stream, plan, memory, packing=packing)
        if self.process.preconditioned:
            outputs.prediction = self._to_eps(outputs.prediction, x, time)
            outputs.taps = {depth: self._to_eps(tap, x, time) for depth, tap in outputs.taps.items()}
        return outputs

    def _to_eps(self, output: Tensor, x: Tensor, time: float | Tensor) -> Tensor:
        """Noise prediction from what a preconditioned network says of all the rows `x`."""
        channels = x.shape[1]
        eps = self.process.to_eps(output[:, :channels], x, time)
        return eps if output.shape[1] == channels else torch.cat([eps, output[:, channels:].float()], dim=1)

    def _routed(self, plan: StepPlan, time: float | Tensor, rows: Rows) -> StepPlan:
        """Fill in the expert of each row from its noise level, where the network has several."""
        if plan.expert is not None or len(self.network.paths) == 1:
            return plan
        # In float64 from the caller's time: the network-fed value is rounded.
        levels = self.process.log_snr(time.double().cpu() if isinstance(time, Tensor) else time)
        expert = torch.zeros(rows.total, dtype=torch.int64)
        expert[rows.host()] = self.network.route(torch.as_tensor(levels).double().expand(len(rows)))
        return replace(plan, expert=expert)

    def predict(
        self,
        x: Tensor,
        time: float,
        cond: Tensor | None,
        *,
        plan: StepPlan = FULL,
        guidance: float = 1.0,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        memory: Memory | None = None,
        held: Held | None = None,
        level: tuple[float, float] | None = None,
        packing: Packing = PACK,
        keep_earlier: bool = False,
    ) -> Prediction:
        """One call of a sampler.

        Args:
            x: noisy images [B, C, H, W] fp32 in the frame alpha x0 + sigma eps.
            time: process time of the call.
            cond: labels [B], text [B, L, D], or None.
            plan: per-row tensors have R = branches * B entries, branch-major.
            guidance: w.
            guidance_channels: guide the first so many channels; the others are the conditional branch's. None is all.
            guidance_interval: least and greatest log-SNR at which samples are guided; elsewhere the unconditional rows
                are not called, whatever the plan says of them. None is everywhere.
            level: alpha and sigma of x where the solver knows them better than `time` does (grids between table
                entries); None takes those of `time`.
            held: the last prediction; rows without a valid one are evaluated even where the plan skips them.
            keep_earlier: hold on to the last but one prediction too, which plans that forecast look at.
        """
        batch, branches = len(x), self.num_branches(guidance)
        total = batch * branches
        alpha, sigma = level or (float(self.process.alpha(time)), float(self.process.sigma(time)))
        wanted = branches if _within(guidance_interval, alpha, sigma) else 1
        called = _called(plan, held, batch, branches, wanted)
        if bool(called.any()):
            subset = None if bool(called.all()) else called.nonzero().flatten()
            # Rows are picked from the wanted branches, where usually all are called.
            picked = None if int(called.sum()) == wanted * batch else subset
            x_rows = x if wanted == 1 else x.repeat(wanted, *[1] * (x.ndim - 1))
            cond_rows = self._branch_cond(cond, batch, wanted, x.device)
            outputs = self.rows(
                gather(x_rows, picked),
                time,
                None if cond_rows is None else gather(cond_rows, picked),
                plan,
                memory=memory,
                packing=packing,
                subset=None if subset is None else Rows(total, subset),
            )
            if wanted < branches:
                # What their other branch left behind is now older than the sample's own prediction.
                outdated = called.nonzero().flatten() + batch
                if held is not None:
                    held = replace(held, valid=held.valid.index_fill(0, outdated, False))
                if memory is not None:
                    memory.forget(outdated)
            eps, variance = _split(outputs.prediction, x.shape[1])
            now = renewed(held, eps, variance, called, sigma / alpha, keep_earlier)
            depth = torch.zeros(total, dtype=torch.int64)
            depth[outputs.rows.host()] = outputs.depth
            taps, uncertainty, trace = outputs.taps, outputs.uncertainty, outputs.trace
        else:
            assert held is not None  # a row without a valid prediction is called
            now, depth = held, torch.zeros(total, dtype=torch.int64)
            taps, uncertainty, trace = {}, {}, []
        per_row, extrapolated = now.eps, torch.zeros_like(called)
        if plan.forecast:
            # What is mixed is of one kind: a sample is extrapolated where all of its branches can be, or were called.
            can = (called | now.two()).reshape(branches, batch)[:wanted].all(0).repeat(branches)
            per_row, extrapolated = forecast(now, ~called & can, sigma / alpha)
        eps = per_row[:batch]
        if wanted == 2:
            eps = _guided(eps, per_row[batch:], guidance, guidance_channels)
        variance = None if now.variance is None else now.variance[:batch]
        return Prediction(
            eps=eps,
            x0=(x - sigma * eps) / alpha,
            variance=variance,
            held=now,
            called=called,
            forecast=extrapolated,
            depth=depth,
            branches=wanted,
            taps=taps,
            uncertainty=uncertainty,
            trace=trace,
        )

    def _branch_cond(self, cond: Tensor | None, batch: int, branches: int, device: torch.device) -> Tensor | None:
        if branches == 1:
            return cond
        null = self.network.null_cond(batch, device)
        if cond is None or null is None:
            raise UsageError(f"guidance needs {self.network.cond_kind} conditioning for {self.network.name}, got none")
        return torch.cat([cond, null.to(cond.dtype)])


def _split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Noise and variance, in fp32."""
    output = output.float()
    return (output, None) if output.shape[1] == channels else (output[:, :channels], output[:, channels:])


def _within(interval: tuple[float, float] | None, alpha: float, sigma: float) -> bool:
    """Whether the log-SNR of a level lies in the closed interval."""
    if interval is None:
        return True
    log_snr = 2 * (math.log(alpha) - math.log(sigma)) if alpha > 0 and sigma > 0 else math.copysign(math.inf, -sigma)
    return interval[0] <= log_snr <= interval[1]


def _called(plan: StepPlan, held: Held | None, batch: int, branches: int, wanted: int) -> Tensor:
    """Rows that are evaluated, host bool [R]: in the wanted branches, those of the plan and those that hold nothing."""
    called = torch.zeros(branches, batch, dtype=torch.bool)
    if held is None:
        called[:wanted] = True
        return called.flatten()
    asked = torch.as_tensor(plan.call).expand(branches * batch).reshape(branches, batch)
    valid = held.valid.reshape(branches, batch)
    # A sample whose guidance starts here is evaluated in both branches: what is mixed is of one call.
    called[:wanted] = asked[:wanted] | ~valid[:wanted].all(0)
    return called.flatten()


def _guided(conditional: Tensor, unconditional: Tensor, guidance: float, channels: int | None) -> Tensor:
    mixed = torch.lerp(unconditional[:, :channels], conditional[:, :channels], guidance)
    return mixed if channels is None else torch.cat([mixed, conditional[:, channels:]], dim=1)
