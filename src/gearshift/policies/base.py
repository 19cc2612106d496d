"""The contract of a policy, and what it is told about the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.plan import FULL, StepPlan
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A sampling run: its calls, its network and its shape. Row r is sample r % batch of branch r // batch.

    Attributes:
        sigma_frame: the solver steps in x_0 + (sigma / alpha) eps, and not in alpha x_0 + sigma eps as x is shown.
        backend: the kind of the network's device, "cpu" or "cuda".
        held: what a skipped call holds, "eps"; elsewhere than in our own sampler also "velocity" (of flow matching,
            along sigma with alpha = 1 - sigma) or "v" (arXiv 2202.00512, along the angle of alpha and sigma).
    """

    calls: tuple[Call, ...]
    network: Network
    batch: int
    branches: int
    sigma_frame: bool = False
    backend: str = "cpu"
    held: str = "eps"

    @property
    def num_rows(self) -> int:
        return self.batch * self.branches


class Observed(Protocol):
    """What a policy sees of a call's outcome; `diffusion.denoiser.Prediction` has more."""

    @property
    def eps(self) -> Tensor:
        """After guidance, [B, C, H, W]."""
        ...

    @property
    def called(self) -> Tensor:
        """Rows that were evaluated, host bool [R]."""
        ...

    @property
    def branches(self) -> int:
        """Branches that eps is made of."""
        ...


class Policy:
    """Base class: full compute. Subclasses are frozen dataclasses, which are their own config schema.

    Attributes:
        static: the plans do not depend on data; they are listed before the loop.
        forecasts: some plan extrapolates predictions, so the last two of them are kept.
    """

    static: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def forecasts(self) -> bool:
        return False

    def others(self) -> tuple[str, ...]:
        """Run folders of further networks that plans route rows to: expert k is the k-th of them, 0 the run's own."""
        return ()

    def fits(self, network: Network) -> None:
        """Raises UsageError where the policy does not fit the network, whatever the calls."""

    def check(self, run: RunInfo) -> None:
        """Raises UsageError where the policy does not fit the network or the calls."""
        self.fits(run.network)

    def begin(self, run: RunInfo) -> Any:
        """State of a new run."""
        return run

    def plan(self, state: Any, call: Call) -> StepPlan:
        """What `call` computes."""
        return FULL

    def amend(self, state: Any, plan: StepPlan) -> StepPlan:
        """What this policy has to say of a plan that is its own joined with those of others (`Compose`)."""
        return plan

    def observe(self, state: Any, call: Call, before: Tensor, after: Tensor, prediction: Observed) -> Any:
        """State after the call. `before` and `after` are the sampler's x [B, C, H, W] around the step."""
        return state

    def record(self, state: Any) -> Mapping[str, Tensor]:
        """What led to the decisions of a run that is over: tensors by name, [K, ...] over its calls."""
        return {}

    def resolved(self, run: RunInfo) -> Policy:
        """This policy with what it leaves to the network and the device settled (`auto`), so that its name says it."""
        return self

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
