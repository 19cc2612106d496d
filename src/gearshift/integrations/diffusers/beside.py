"""Models whose outputs only the denoisers read (ControlNets): left out where nobody will read them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from gearshift.execution.plan import FULL, StepPlan
from gearshift.execution.stream import Rows
from gearshift.integrations.diffusers import trees
from gearshift.integrations.diffusers.costs import Seen
from gearshift.integrations.diffusers.ports import filler
from gearshift.integrations.diffusers.replay import zeros
from gearshift.integrations.diffusers.rows import Signature, first_tensor, signature_of
from gearshift.runtime.errors import RunError

if TYPE_CHECKING:
    from gearshift.integrations.diffusers.compat import Forward
    from gearshift.integrations.diffusers.session import Session


class Beside:
    """The helpers of one generation."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._signatures: dict[int, Signature] = {}
        self._shapes: dict[int, Any] = {}
        self._left_out: StepPlan | None = None

    def begin_step(self) -> None:
        """Nothing was left out of this step yet."""
        self._left_out = None

    def call(
        self, number: int, module: nn.Module, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a helper, or give something of the shape of its output."""
        session = self._session
        if session.replays and session.replay is not None:
            session.decide(None, args, kwargs)
            return zeros(session.replay.helpers[number], first_tensor(args, kwargs).device)
        filling = session.safely(lambda: self._without(number, args, kwargs))
        if filling is not None:
            return filling
        output = inner(*args, **kwargs)
        session.safely(lambda: self._seen(number, module, args, kwargs, output))
        return output

    def _without(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What nobody will read, in the place of the output; None where it is needed."""
        session = self._session
        plan = session.decide(None, args, kwargs)
        signature = signature_of(args, kwargs)
        if self._signatures.get(number, signature) != signature:
            session.compute_all("the inputs changed their shape", forget=True)
            plan = FULL
        self._signatures[number] = signature
        shape = self._shapes.get(number)
        if plan.call is False and shape is not None and session.remembered:
            self._left_out = plan
            session.record.hits[session.attached.helper_names[number]] += 1
            device = first_tensor(args, kwargs).device
            return trees.mapped(shape, lambda like: filler(like, device))
        if session.inner is not None:
            possible = self._possible(plan)
            session.inner.for_helpers(possible, session.path or 0)
            self._left_out = possible if possible.reuse else None
        return None

    def _possible(self, plan: StepPlan) -> StepPlan:
        """The plan as far as the memory of every branch allows."""
        assert self._session.inner is not None
        memories = self._session.memories()
        if not memories:
            return replace(plan, reuse=frozenset())
        for memory in memories:
            plan = self._session.inner.possible(plan, memory, Rows(memory.num_rows))
        return plan

    def _seen(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record, name = self._session.record, self._session.attached.helper_names[number]
        self._shapes[number] = trees.describing(output)
        self._session.attached.helper_outputs[number] = self._shapes[number]
        if name not in record.helpers:
            record.helpers[name] = Seen.of(module, args, kwargs, first_tensor(args, kwargs).shape[0])

    def check(self, plan: StepPlan) -> None:
        """Raises RunError where a denoiser is about to read what was left out."""
        expected = self._left_out
        if expected is not None and (expected.call is False or not expected.reuse <= plan.reuse):
            raise RunError(
                f"{', '.join(self._session.attached.helper_names)} was left out of this step, at least in part, and "
                f"then {self._session.network.name} turned out to need it; nothing was made of it"
            )
