"""The contract of a policy, and what it is told about the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gearshift.diffusion.denoiser import Prediction
from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.plan import FULL, StepPlan
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A sampling run: its calls, its network and its shape. Row r is sample r % batch of branch r // batch."""

    calls: tuple[Call, ...]
    network: Network
    batch: int
    branches: int

    @property
    def num_rows(self) -> int:
        return self.batch * self.branches


class Policy:
    """Base class: full compute. Subclasses are frozen dataclasses, which are their own config schema.

    Attributes:
        static: the plans do not depend on data; they are listed before the loop.
    """

    static: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return type(self).__name__

    def check(self, run: RunInfo) -> None:
        """Raises UsageError where the policy does not fit the network or the calls."""

    def begin(self, run: RunInfo) -> Any:
        """State of a new run."""
        return run

    def plan(self, state: Any, call: Call) -> StepPlan:
        """What `call` computes."""
        return FULL

    def observe(self, state: Any, call: Call, before: Tensor, after: Tensor, prediction: Prediction) -> Any:
        """State after the call. `before` and `after` are the sampler's x [B, C, H, W] around the step."""
        return state

    def memory_keys(self, run: RunInfo) -> frozenset[tuple[int, str]]:
        """(block, part) pairs that plans of this run may reuse; for static policies, those its plans name."""
        if not self.static:
            return frozenset()
        state = self.begin(run)
        return frozenset().union(*(self.plan(state, call).reuse for call in run.calls))


def check_depths(network: Network, depths: Sequence[int], owner: str) -> None:
    """Raises UsageError where one of `depths` is an exit of no path of the network."""
    exits = sorted({depth for path in range(len(network.paths)) for depth in network.exits(path)})
    for depth in depths:
        if depth not in exits:
            raise UsageError(f"{owner} asks for depth {depth}, but {network.name} can be read out at depths {exits}")
