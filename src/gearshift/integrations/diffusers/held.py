"""The last predictions of a branch of guidance, before guidance, and what a call that is left out returns.

What is held is what the denoiser returned: eps, v or a velocity, whichever it predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.diffusion.forecast import Held, forecast, renewed
from gearshift.execution.memory import Memory
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import Rows
from gearshift.integrations.diffusers import trees
from gearshift.integrations.diffusers.rows import Signature


@dataclass
class Remembered:
    """The last prediction of one branch.

    Attributes:
        path: which denoiser made it.
        output: the structure that it was returned in, on the meta device.
        held: of each tensor.
    """

    path: int
    output: Any
    held: list[Held]

    @classmethod
    def of(
        cls,
        path: int,
        output: Any,
        before: Remembered | None,
        called: Tensor,
        at: float,
        channels: int,
        keep_earlier: bool,
    ) -> Remembered:
        """After a call.

        Args:
            output: of the rows `called` (host bool).
            before: of the call before; None where there is none.
            at: place of the call, see `policies.adaptive_skip.place`.
            channels: of the denoiser's input.

        Raises:
            LookupError: there is no tensor in the output.
        """
        held = []
        for number, tensor in enumerate(trees.tensors(output)):
            # Of its own: whoever called may write into what is returned.
            eps, variance = _split(tensor.detach().clone(), channels)
            held.append(
                renewed(None if before is None else before.held[number], eps, variance, called, at, keep_earlier)
            )
        if not held:
            raise LookupError("the denoiser returned no tensor")
        return cls(path, trees.describing(output), held)

    def reproduced(self, rows: Tensor, at: float, extrapolate: bool) -> Any:
        """The output that a call at `at` would return, in tensors of its own; `rows` (host bool) were not called."""
        values = []
        for held in self.held:
            eps = forecast(held, rows, at)[0] if extrapolate else held.eps
            values.append(eps.clone() if held.variance is None else torch.cat([eps, held.variance], dim=1))
        return trees.refilled(self.output, iter(values))

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        every = [one for held in self.held for one in (held, held.earlier) if one is not None]
        return sum(t.numel() * t.element_size() for one in every for t in (one.eps, one.variance) if t is not None)


@dataclass(frozen=True)
class Work:
    """One call of a denoiser.

    Attributes:
        key: of its branch.
        before: what is held of it.
        called: rows that are evaluated, host bool.
        args, kwargs, rows: what the denoiser is called with.
        hits: names of what is taken from memory or left out.
        output: what is returned without calling it.
    """

    path: int
    key: str | int
    signature: Signature
    plan: StepPlan
    before: Remembered | None
    called: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Rows
    memory: Memory | None = None
    hits: tuple[str, ...] = ()
    output: Any = None


def _split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Noise and variance, where a model predicts both; the variance is never extrapolated."""
    if output.ndim != 4 or output.shape[1] != 2 * channels:
        return output, None
    return output[:, :channels], output[:, channels:]
