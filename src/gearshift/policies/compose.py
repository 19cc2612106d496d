"""Several policies at once: call = all agree, depth = the least, bypass and reuse = the union, one exit rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.plan import StepPlan, join
from gearshift.policies.base import Observed, Policy, RunInfo
from gearshift.runtime.config import build
from gearshift.runtime.errors import UsageError


@dataclass
class ComposeConfig:
    """Schema of `Compose`: the parts, each a policy node with its own `_target_`."""

    policies: list[Any] = field(default_factory=list)


class Compose(Policy):
    """The composition of policies, in any order.

    Args:
        policies: policies, or a `ComposeConfig` of nodes to build.

    Raises:
        UsageError: no parts, or (when a plan is made) two of them bring an exit rule or different experts.
    """

    Config = ComposeConfig

    def __init__(self, policies: Sequence[Policy] | ComposeConfig) -> None:
        parts = [build(node) for node in policies.policies] if isinstance(policies, ComposeConfig) else list(policies)
        if not parts:
            raise UsageError("policy Compose has no parts; list at least one policy under policies")
        for part in parts:
            if not isinstance(part, Policy):
                raise UsageError(f"policy Compose: {type(part).__name__} is not a policy")
        self.parts: tuple[Policy, ...] = tuple(parts)

    def __repr__(self) -> str:
        return f"Compose({list(self.parts)})"

    @property
    def static(self) -> bool:  # type: ignore[override]  # the parts decide
        return all(part.static for part in self.parts)

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.parts)

    def others(self) -> tuple[str, ...]:
        """Those of the one part that has any. Raises UsageError where two parts name different ones."""
        found = dict.fromkeys(others for part in self.parts if (others := part.others()))
        if len(found) > 1:
            named = " and ".join(", ".join(others) for others in found)
            raise UsageError(f"policy Compose: two parts route rows to different networks ({named}); keep one of them")
        return next(iter(found), ())

    def fits(self, network: Network) -> None:
        for part in self.parts:
            part.fits(network)

    def check(self, run: RunInfo) -> None:
        for part in self.parts:
            part.check(run)
        if run.calls:  # two exit rules show in the first plan, before any image is made
            self.plan(self.begin(run), run.calls[0])

    def begin(self, run: RunInfo) -> tuple[Any, ...]:
        return tuple(part.begin(run) for part in self.parts)

    def plan(self, state: tuple[Any, ...], call: Call) -> StepPlan:
        return self.amend(state, join(part.plan(own, call) for part, own in zip(self.parts, state, strict=True)))

    def amend(self, state: tuple[Any, ...], plan: StepPlan) -> StepPlan:
        for part, own in zip(self.parts, state, strict=True):
            plan = part.amend(own, plan)
        return plan

    def observe(
        self, state: tuple[Any, ...], call: Call, before: Tensor, after: Tensor, prediction: Observed
    ) -> tuple[Any, ...]:
        return tuple(
            part.observe(own, call, before, after, prediction) for part, own in zip(self.parts, state, strict=True)
        )

    @property
    def forecasts(self) -> bool:
        return any(part.forecasts for part in self.parts)

    def record(self, state: tuple[Any, ...]) -> Mapping[str, Tensor]:
        return {
            f"{number}.{name}" if len(self.parts) > 1 else name: value
            for number, (part, own) in enumerate(zip(self.parts, state, strict=True))
            for name, value in part.record(own).items()
        }

    def resolved(self, run: RunInfo) -> Compose:
        return Compose([part.resolved(run) for part in self.parts])

    def memory_keys(self, run: RunInfo) -> frozenset[tuple[int, str]]:
        return frozenset().union(*(part.memory_keys(run) for part in self.parts))
