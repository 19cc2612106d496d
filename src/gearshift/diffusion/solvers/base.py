"""What a solver is: a list of calls known before the loop, and a step over the whole batch.

The loop is always ``for call in solver.calls(process)``: feed the network ``network_input(state, call)`` at
``call.time``, hand its noise prediction to ``advance``. Calls go by position, because some solvers visit a time
twice. A solver object holds no run: everything that changes is in the ``State``, which ``advance`` replaces and never
mutates, so a run can be saved, restored, or forked at any call.

Own solvers compute their coefficients on the host in float64 from the call, and the device never has to answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gearshift.diffusion.process import Process


@dataclass(frozen=True, kw_only=True)
class Call:
    """One network call. ``next_*`` is the level its step arrives at; ``next_time`` None is the data itself.

    ``time`` is a process time (what ``Process.network_time`` takes), ``alpha`` and ``sigma`` the amplitudes of the
    input in the VP frame, ``training_index`` its place in [0, 999], ``order`` the order of the step, ``substep``
    counts within a step.
    """

    position: int
    step: int
    substep: int = 0
    time: float
    next_time: float | None
    alpha: float
    sigma: float
    log_snr: float
    next_alpha: float
    next_sigma: float
    next_log_snr: float
    training_index: float
    needs_noise: bool
    order: int = 1


@dataclass(frozen=True)
class State:
    """A run at one point: ``x`` [B, C, H, W] in the solver's own frame, calls made, the solver's history.

    ``x`` is fp32, or float64 where a solver says so; what leaves the solver is fp32.
    """

    x: Tensor
    position: int = 0
    history: Mapping[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, None, and lists and dicts of them: loads with ``weights_only=True``."""
        return {"x": self.x, "position": self.position, "history": dict(self.history)}

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any]) -> State:
        """Inverse of :meth:`state_dict`."""
        return cls(x=saved["x"], position=int(saved["position"]), history=dict(saved["history"]))


class Solver(ABC):
    """Turns noise into data by calling a noise predictor.

    Attributes:
        name: what messages and tables call it.
        stochastic: whether some call needs fresh noise.
        restart_at_switch: whether a change of depth starts the history again; without it ``advance`` need not be told.
        sigma_frame: whether ``State.x`` is in the frame x_0 + (sigma / alpha) eps.
    """

    Config: ClassVar[type[Any]]
    name: str
    stochastic: bool = False
    restart_at_switch: bool = False
    sigma_frame: bool = False

    @abstractmethod
    def check(self, process: Process) -> None:
        """Raise UsageError if this solver cannot run on ``process``."""

    @abstractmethod
    def calls(self, process: Process) -> tuple[Call, ...]:
        """All network calls, in order. Raises UsageError as :meth:`check`."""

    @abstractmethod
    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """The next x and history; arguments are as for :meth:`advance`, checked, in fp32."""

    def _restarted(self, state: State, switched: bool | Tensor) -> State:
        """``state`` as if nothing had gone before, for the samples in ``switched``: one flag, or one per sample [B]."""
        raise NotImplementedError(f"{self.name} sets restart_at_switch, so it must say how its history starts again")

    def begin(self, process: Process, noise: Tensor) -> State:
        """State before the first call, from standard normal ``noise`` [B, C, H, W]."""
        self.check(process)
        return State(x=noise.to(torch.float32))

    def network_input(self, state: State, call: Call) -> Tensor:
        """x [B, C, H, W] fp32 in the VP frame ``alpha x_0 + sigma eps`` at ``call.time``."""
        return state.x

    def advance(
        self,
        state: State,
        call: Call,
        eps: Tensor,
        *,
        variance: Tensor | None = None,
        noise: Tensor | None = None,
        fresh: bool | Tensor = True,
        switched: bool | Tensor = False,
    ) -> State:
        """Use a noise prediction.

        Args:
            state: as left by the call before.
            call: the call at ``state.position``.
            eps: guided noise prediction [B, C, H, W], any float type.
            variance: the network's variance channels [B, C, H, W] (about -1..1), for solvers that have a use for them.
            noise: standard normal [B, C, H, W]; needed where ``call.needs_noise``.
            fresh: whether ``eps`` was computed at this call or is an earlier one reused; one flag, or one per sample
                [B].
            switched: whether ``eps`` comes from another depth (or other blocks dropped) than the last computed one;
                one flag, or one per sample [B]. Makes a difference only under ``restart_at_switch``.

        Raises:
            ValueError: wrong call, wrong shape, or no noise where it is needed.
        """
        if call.position != state.position:
            raise ValueError(f"{self.name}: state stands at call {state.position}, but call {call.position} was given")
        for given, what in ((eps, "noise prediction"), (variance, "variance"), (noise, "noise")):
            if given is not None and given.shape != state.x.shape:
                raise ValueError(
                    f"{self.name}: {what} has shape {tuple(given.shape)} but x has {tuple(state.x.shape)}; "
                    "split a network output that also holds variance channels before the solver"
                )
        if call.needs_noise and noise is None:
            raise ValueError(f"{self.name}: call {call.position} draws noise, but none was given")
        if self.restart_at_switch and switched is not False:
            # An earlier prediction used again has switched nothing, whatever the plan says.
            state = self._restarted(state, switched & fresh)
        x, history = self._step(
            state,
            call,
            eps.to(torch.float32),
            None if variance is None else variance.to(torch.float32),
            noise.to(torch.float32) if call.needs_noise and noise is not None else None,
            fresh,
        )
        return State(x=x, position=state.position + 1, history=history)

    def result(self, state: State) -> Tensor:
        """The sample [B, C, H, W] fp32, after the last call."""
        return state.x


def make_calls(
    process: Process,
    times: Sequence[float],
    end: float | None = None,
    *,
    stochastic: bool = False,
    orders: Sequence[int] | None = None,
) -> tuple[Call, ...]:
    """One call per time; each step arrives at the next, the last at ``end`` (None: the data, with no noise drawn)."""
    visited = torch.tensor([*times] if end is None else [*times, end], dtype=torch.float64)
    alpha, sigma = process.alpha(visited).tolist(), process.sigma(visited).tolist()
    log_snr, index = process.log_snr(visited).tolist(), process.training_index(visited).tolist()
    following: list[float | None] = [*times[1:], end]
    if end is None:
        alpha, sigma, log_snr = [*alpha, 1.0], [*sigma, 0.0], [*log_snr, float("inf")]
    return tuple(
        Call(
            position=i,
            step=i,
            time=time,
            next_time=following[i],
            alpha=alpha[i],
            sigma=sigma[i],
            log_snr=log_snr[i],
            next_alpha=alpha[i + 1],
            next_sigma=sigma[i + 1],
            next_log_snr=log_snr[i + 1],
            training_index=index[i],
            needs_noise=stochastic and following[i] is not None,
            order=1 if orders is None else orders[i],
        )
        for i, time in enumerate(times)
    )


def predict_x0(x: Tensor, eps: Tensor, call: Call, clip: bool = False) -> Tensor:
    """Data prediction (x - sigma eps) / alpha, held within [-1, 1] if ``clip``."""
    x0 = (x - call.sigma * eps) / call.alpha
    return x0.clamp(-1, 1) if clip else x0


def affine(x: Tensor, x_scale: float, eps: Tensor, eps_scale: float) -> Tensor:
    """``x_scale x + eps_scale eps`` in two kernels."""
    return (x * x_scale).add_(eps, alpha=eps_scale)
