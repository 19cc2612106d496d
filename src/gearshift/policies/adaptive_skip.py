"""Skipping calls where the trajectory is straight (AdaptiveDiffusion, arXiv 2410.09873), decided online.

All steps of the solver are made; at some the network is not called, and the last prediction that was computed is used
again, before guidance. Three criteria say where (the statistic of each is compared with the threshold):

- `displacement_magnitude`, the official code's. With d_n = mean |L_n - L_{n-1}| over the latents after steps n and
  n - 1, step n + 1 is skipped where |(d_n + d_{n-2}) / 2 - d_{n-1}| / d_{n-1} <= threshold. Published thresholds are
  for it.
- `third_difference`, the paper's equation. With D_n = L_n - L_{n-1}, step n + 1 is computed where
  ||D_n - 2 D_{n-1} + D_{n-2}|| / ||D_{n-1}|| >= threshold. The paper's norm and indices could not be verified; the
  norm here is Euclidean, and the indices are those of the code.
- `embedded_error`, not from the paper. With s = sigma / alpha, and eps_k, eps_{k-1} the last two predictions that were
  computed, going on with eps_k to s' makes a local error of about |s' - s_k|^2 / 2 * ||eps_k - eps_{k-1}|| /
  |s_k - s_{k-1}|; the step is computed where that exceeds atol + threshold * ||x||, in the frame x_0 + s eps, root mean
  squares. Unlike the other two it does not look at steps that were skipped, so skips do not beget skips.

Both published criteria measure the solver's grid as much as the data: their thresholds hold for one solver, spacing and
number of steps, and under stochastic solvers they measure the noise. A step is a call of the network: solvers that call
twice decide twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.plan import FULL, StepPlan
from gearshift.execution.stream import to_device
from gearshift.policies.base import Observed, Policy, RunInfo
from gearshift.runtime.errors import UsageError

CRITERIA = ("displacement_magnitude", "third_difference", "embedded_error")
DECISIONS = ("batch_mean", "batch_any", "per_sample")
OFFICIAL_WARMUP = 4


def place(run: RunInfo, alpha: float, sigma: float) -> float:
    """The variable along which what is held is the slope of x: of eps in x_0 + s eps, of a velocity in (1 - sigma) x_0
    + sigma eps, of v in alpha x_0 + sigma eps (arXiv 2202.00512, appendix D)."""
    if run.held == "velocity":
        return sigma
    return math.atan2(sigma, alpha) if run.held == "v" else sigma / alpha


@dataclass(frozen=True)
class SkipState:
    """What a run has shown so far; the host's tensors have an entry per group, which is the batch or each sample.

    Attributes:
        reuse: whether the next call is skipped, host bool [G].
        computed: calls that were evaluated, host int64 [G].
        streak: calls skipped since, host int64 [G].
        level: half the log-SNR of the last call that was evaluated, host float64 [G].
        moves: the last three displacements: means [B] or [] of their size, or the tensors [B, C, H, W].
        ratios, predictions: sigma / alpha (host float64 [B]) and eps [B, C, H, W] of the last two computed predictions.
        flags: of the official control flow, True where a step was to be computed.
        statistics: of every call, [B] or [] on the device; nan where there was none yet.
    """

    run: RunInfo
    reuse: Tensor
    computed: Tensor
    streak: Tensor
    level: Tensor
    moves: tuple[Tensor, ...] = ()
    ratios: tuple[Tensor, ...] = ()
    predictions: tuple[Tensor, ...] = ()
    flags: tuple[bool, ...] = ()
    statistics: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class AdaptiveSkip(Policy):
    """Skip the calls at which the statistic of the criterion is small.

    Attributes:
        threshold: delta, at least 0; 0 skips nothing, whatever the criterion. The official scripts use 0.01 for
            images.
        max_skip_steps: most calls skipped in a row; 0 skips none, null sets no limit. Official: 4.
        max_skip_span_lambda: greatest distance in half log-SNR from a computed call to the end of the last step that
            uses its prediction; null sets no limit. The step to the data itself has no end on this axis.
        warmup_steps: calls that are computed before the first skip, at least 3 for the published criteria.
        tail_steps: last calls that are always computed. Official: 0.
        criterion: one of `CRITERIA`.
        decision: "batch_mean" (one decision on the mean over the batch, as in the official code), "batch_any" (one
            decision, computing where any sample asks for it) or "per_sample" (rows that compute are packed).
        extrapolate: continue the line through the last two predictions instead of holding the last one.
        atol: absolute tolerance of `embedded_error`.
        upstream_quirks: the official control flow: four computed steps, no tail, a cap that acts from the sixth flag
            on, so that five calls may be skipped at first whatever max_skip_steps says, and 0 looks at all flags.
    """

    threshold: float = 0.01
    max_skip_steps: int | None = 4
    max_skip_span_lambda: float | None = None
    warmup_steps: int = OFFICIAL_WARMUP
    tail_steps: int = 1
    criterion: str = "displacement_magnitude"
    decision: str = "batch_mean"
    extrapolate: bool = False
    atol: float = 0.0
    upstream_quirks: bool = False

    static: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise UsageError(f"policy AdaptiveSkip: criterion {self.criterion!r} is not one of {', '.join(CRITERIA)}")
        if self.decision not in DECISIONS:
            raise UsageError(f"policy AdaptiveSkip: decision {self.decision!r} is not one of {', '.join(DECISIONS)}")
        for name in ("threshold", "max_skip_steps", "max_skip_span_lambda", "tail_steps", "atol"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"policy AdaptiveSkip: {name}={value} must be at least 0")
        least = 2 if self.criterion == "embedded_error" else 3
        if self.warmup_steps < least:
            raise UsageError(
                f"policy AdaptiveSkip: warmup_steps={self.warmup_steps}, but {self.criterion} needs {least} computed "
                "calls to look back at"
            )
        official = ("displacement_magnitude", "batch_mean", OFFICIAL_WARMUP)
        if self.upstream_quirks and (self.criterion, self.decision, self.warmup_steps) != official:
            raise UsageError(
                f"policy AdaptiveSkip: upstream_quirks is the official {official[0]}, {official[1]} with "
                f"warmup_steps={official[2]}, not {self.criterion}, {self.decision} with {self.warmup_steps}"
            )
        if self.upstream_quirks and self.max_skip_steps is None:
            raise UsageError("policy AdaptiveSkip: upstream_quirks needs a max_skip_steps; the official value is 4")
        if self.upstream_quirks and self.max_skip_span_lambda is not None:
            raise UsageError(
                f"policy AdaptiveSkip: the official flow has no cap on the span, so max_skip_span_lambda="
                f"{self.max_skip_span_lambda} would do nothing under upstream_quirks; leave out one of them"
            )

    @property
    def name(self) -> str:
        short = {
            "displacement_magnitude": "skip",
            "third_difference": "skip (3rd diff.)",
            "embedded_error": "skip (error)",
        }
        how = " extrapolated" if self.extrapolate else ""
        return f"{short[self.criterion]} < {self.threshold:g}{how}"

    @property
    def forecasts(self) -> bool:
        return self.extrapolate

    def begin(self, run: RunInfo) -> SkipState:
        groups = run.batch if self.decision == "per_sample" else 1
        none = torch.zeros(groups, dtype=torch.int64)
        level = torch.full((groups,), math.nan, dtype=torch.float64)
        return SkipState(run, none.bool(), none, none, level)

    def plan(self, state: SkipState, call: Call) -> StepPlan:
        if self.threshold == 0 or not bool(state.reuse.any()):
            return FULL
        forecast = int(self.extrapolate)
        if bool(state.reuse.all()):
            return StepPlan(call=False, forecast=forecast)
        return StepPlan(call=(~state.reuse).repeat(state.run.branches), forecast=forecast)

    def observe(self, state: SkipState, call: Call, before: Tensor, after: Tensor, prediction: Observed) -> SkipState:
        if self.threshold == 0:
            return state
        state = self._looked(self._counted(state, call, prediction), call, before, after, prediction)
        following = call.position + 1
        if following == len(state.run.calls):
            return state
        statistic = self._statistic(state, state.run.calls[following], after / self._scale(state, call.next_alpha))
        state = replace(state, statistics=(*state.statistics, statistic.detach()))
        if self.upstream_quirks:
            return self._official(state, statistic)
        return replace(state, reuse=self._allowed(state, state.run.calls[following]) & self._small(statistic))

    def record(self, state: SkipState) -> Mapping[str, Tensor]:
        if not state.statistics:
            return {}
        nothing = torch.full_like(state.statistics[0], math.nan)
        # A statistic is known after its step and governs the next one.
        return {"skip_statistic": torch.stack([nothing, *state.statistics]).float().cpu()}

    # What was seen ---------------------------------------------------------------------------------------------------

    def _counted(self, state: SkipState, call: Call, prediction: Observed) -> SkipState:
        ran = prediction.called.reshape(state.run.branches, state.run.batch)[: prediction.branches].all(0)
        if len(state.reuse) == 1:
            ran = ran.any().reshape(1)
        return replace(
            state,
            computed=state.computed + ran,
            streak=torch.where(ran, 0, state.streak + 1),
            level=torch.where(ran, 0.5 * call.log_snr, state.level),
        )

    def _looked(self, state: SkipState, call: Call, before: Tensor, after: Tensor, prediction: Observed) -> SkipState:
        if self.criterion != "embedded_error":
            # In the solver's own frame: that is where the official code looks.
            move = after.float() / self._scale(state, call.next_alpha) - before.float() / self._scale(state, call.alpha)
            if self.criterion == "displacement_magnitude":
                move = move.abs().mean() if self.decision == "batch_mean" else move.abs().flatten(1).mean(1)
            return replace(state, moves=(*state.moves, move)[-3:])
        called = prediction.called.reshape(state.run.branches, state.run.batch)[: prediction.branches].all(0)
        if not bool(called.any()):
            return state
        eps = prediction.eps.float()
        ratio = torch.full((state.run.batch,), place(state.run, call.alpha, call.sigma), dtype=torch.float64)
        if bool(called.all()) or not state.predictions:
            return replace(state, ratios=(*state.ratios, ratio)[-2:], predictions=(*state.predictions, eps)[-2:])
        mine = to_device(called, eps.device).view(-1, *[1] * (eps.ndim - 1))
        last, at = state.predictions[-1], state.ratios[-1]
        older, older_at = state.predictions[0], state.ratios[0]
        return replace(
            state,
            predictions=(torch.where(mine, last, older), torch.where(mine, eps, last)),
            ratios=(torch.where(called, at, older_at), torch.where(called, ratio, at)),
        )

    @staticmethod
    def _scale(state: SkipState, alpha: float) -> float:
        return alpha if state.run.sigma_frame else 1.0

    # What follows from it --------------------------------------------------------------------------------------------

    def _statistic(self, state: SkipState, following: Call, x: Tensor) -> Tensor:
        """[B], or [] where the batch is one; nan as long as there is too little to look back at."""
        nothing = x.new_full(() if self.decision == "batch_mean" else (len(x),), math.nan, dtype=torch.float32)
        if self.criterion == "embedded_error":
            return self._error(state, following, x) if len(state.predictions) == 2 else nothing
        if len(state.moves) < 3:
            return nothing
        oldest, middle, newest = state.moves
        if self.criterion == "displacement_magnitude":
            return (0.5 * (newest + oldest) - middle).abs() / middle
        bend = newest - 2 * middle + oldest
        if self.decision == "batch_mean":
            return bend.norm() / middle.norm()
        return bend.flatten(1).norm(dim=1) / middle.flatten(1).norm(dim=1)

    def _error(self, state: SkipState, following: Call, x: Tensor) -> Tensor:
        """The estimated error over what is tolerated, times the threshold, so that it is compared with it."""
        stop = place(state.run, following.next_alpha, following.next_sigma)
        reach = 0.5 * (stop - state.ratios[1]) ** 2 / (state.ratios[1] - state.ratios[0]).abs()
        moved = (state.predictions[1] - state.predictions[0]).square().flatten(1).mean(1)
        # In the frame in which what is held is the slope of x, wherever the solver steps.
        if state.run.held == "eps":
            clean = x if state.run.sigma_frame else x / following.alpha
        else:
            clean = x * following.alpha if state.run.sigma_frame else x
        size = clean.float().square().flatten(1).mean(1)
        factor: float | Tensor
        if self.decision == "batch_mean":
            moved, size, factor = moved.mean(), size.mean(), float(reach.mean())
        else:
            factor = to_device(reach.to(torch.float32), x.device)
        error = factor * moved.sqrt() / (self.atol + self.threshold * size.sqrt())
        return self.threshold * error

    def _small(self, statistic: Tensor) -> Tensor:
        """Host bool [G]: whether the statistic lets a group skip. The one wait for the device of a call."""
        # A trajectory that stands still has no curvature: 0 / 0 is nan there, and computes.
        within = statistic < self.threshold if self.criterion == "third_difference" else statistic <= self.threshold
        if self.decision == "batch_any":
            within = within.all()
        return within.reshape(-1).cpu()

    def _allowed(self, state: SkipState, following: Call) -> Tensor:
        """Host bool [G]: whether warm-up, tail and caps let a group skip."""
        allowed = state.computed >= self.warmup_steps
        if following.position >= len(state.run.calls) - self.tail_steps:
            return torch.zeros_like(allowed)
        if self.max_skip_steps is not None:
            allowed = allowed & (state.streak < self.max_skip_steps)
        if self.max_skip_span_lambda is not None:
            span = (0.5 * following.next_log_snr - state.level).abs()
            allowed = allowed & (span <= self.max_skip_span_lambda)
        return allowed

    def _official(self, state: SkipState, statistic: Tensor) -> SkipState:
        """The control flow of the official code, its off-by-ones included."""
        done = len(state.statistics)
        if done < OFFICIAL_WARMUP:
            return state
        latest = state.flags[-self.max_skip_steps :] if self.max_skip_steps else state.flags
        forced = len(state.flags) > OFFICIAL_WARMUP and not any(latest)
        compute = forced or not bool(self._small(statistic)[0])
        return replace(state, flags=(*state.flags, compute), reuse=torch.tensor([not compute]))
