"""Which samples are computed at another depth than at their last call: what multistep solvers extrapolate over."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Prediction
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import to_device


class DepthWatch:
    """Follows a run of `branches` x `batch` rows call by call, on the host."""

    def __init__(self, branches: int, batch: int) -> None:
        self._shape = (branches, batch)
        self._depth = torch.full((branches * batch,), -1)  # not called yet; 0 is the depth of the embedding
        self._bypass: frozenset[int] | None = None
        self._expert: int | Tensor | None = None

    def switched(self, plan: StepPlan, prediction: Prediction, device: torch.device) -> bool | Tensor:
        """Whether this call is the first after a switch: for all samples at once, or bool [batch] on `device`.

        A call that was skipped switches nothing; other dropped blocks are another depth, and so is another network that
        the plan names.
        """
        called = prediction.called
        changed = called & (self._depth >= 0) & (prediction.depth != self._depth)
        if self._bypass is not None and plan.bypass != self._bypass:
            changed = changed | called
        if self._expert is not None and plan.expert is not None:
            changed = changed | (called & (torch.as_tensor(plan.expert) != torch.as_tensor(self._expert)))
        if bool(called.any()):
            self._bypass, self._expert = frozenset(plan.bypass), plan.expert
        self._depth = torch.where(called, prediction.depth, self._depth)
        samples = changed.reshape(self._shape).any(0)
        some = bool(samples.any())
        return to_device(samples, device) if some and not bool(samples.all()) else some
