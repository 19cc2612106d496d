"""`attach`: a policy on a pipeline of `diffusers`, until it is detached.

Nothing is subclassed or copied. The instance of the scheduler is wrapped, which is clock and source of latents; hooks
stand before the denoisers and before what only they read; where a policy reaches further in, hooks before blocks and
attention processors do.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from gearshift.execution.cost import CostTable
from gearshift.execution.memory import Key
from gearshift.integrations.diffusers.compat import (
    Hook,
    Interposed,
    enabled_cache,
    is_wholly_compiled,
    is_wrapped_by_compiler,
    renew,
)
from gearshift.integrations.diffusers.inner import Inner, needs
from gearshift.integrations.diffusers.layout import PipelineNetwork
from gearshift.integrations.diffusers.ports import Shapes
from gearshift.integrations.diffusers.record import Generation
from gearshift.integrations.diffusers.replay import Replay
from gearshift.integrations.diffusers.rows import can_be_picked
from gearshift.integrations.diffusers.session import Session
from gearshift.integrations.diffusers.wrapping import Mark, Wrapped
from gearshift.policies import AdaptiveSkip, Compose, Full, Planned, Policy
from gearshift.runtime.errors import RunError, UsageError

log = logging.getLogger("gearshift")
DENOISERS = ("unet", "transformer", "transformer_2")
HELPERS = ("controlnet",)
BRANCHES = ("DiTPipeline",)
"""Pipelines that hand the latents of both branches of guidance to the scheduler."""


def attach(pipe: Any, policy: Policy | Sequence[Policy]) -> Attached:
    """Put a policy, or the composition of several, on a pipeline.

    Args:
        pipe: a pipeline of `diffusers` with a `unet` or a `transformer`, and a `scheduler`.
        policy: of `gearshift.policies`.

    Returns:
        A handle: `detach()` it, or use it as a context manager. After each generation `ledger` says what fired.

    Raises:
        UsageError: the pipeline has no denoiser or scheduler of these names, already has a policy or another cache, or
            the policy does not fit its model.
    """
    if not isinstance(policy, Policy | list | tuple):
        raise UsageError(f"{type(policy).__name__} is not a policy; take one, or several, of gearshift.policies")
    return Attached(pipe, policy if isinstance(policy, Policy) else Compose(list(policy)))


def network_of(pipe: Any) -> PipelineNetwork:
    """The denoisers of a pipeline, as policies see them.

    Raises:
        UsageError: it has none, or one that is not in the pipeline itself but what `torch.compile` made of it.
    """
    kind = type(pipe).__name__
    found = {name: model for name in DENOISERS if isinstance(model := getattr(pipe, name, None), nn.Module)}
    if not found:
        raise UsageError(
            f"{kind} has no denoiser that is called {', '.join(DENOISERS[:-1])} or {DENOISERS[-1]}, so there is "
            "nothing to put a policy on"
        )
    for name, model in found.items():
        if is_wrapped_by_compiler(model):
            raise UsageError(
                f"{kind}.{name} is what torch.compile returned, and decisions have to be made outside of it; compile "
                f"its blocks instead (pipe.{name}.compile_repeated_blocks()), or pipe.{name}.compile()"
            )
    return PipelineNetwork(found, getattr(pipe, "config", {}).get("boundary_ratio") if len(found) > 1 else None)


class _Root(Hook):
    """Before a denoiser."""

    def __init__(self, owner: Attached, path: int) -> None:
        super().__init__()
        self._owner, self._path = owner, path

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session = self._owner.session(args, kwargs)
        if session is None:
            return self.inner(*args, **kwargs)
        return session.denoise(self._path, module, self.branch, self.inner, args, kwargs)


class _Helper(Hook):
    """Before a model whose outputs only the denoisers read."""

    def __init__(self, owner: Attached, number: int) -> None:
        super().__init__()
        self._owner, self._number = owner, number

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session = self._owner.session(args, kwargs)
        if session is None:
            return self.inner(*args, **kwargs)
        return session.beside.call(self._number, module, self.inner, args, kwargs)


class Attached:
    """A policy on a pipeline.

    Attributes:
        pipe, policy: what was attached.
        network: the pipeline's denoisers as policies see them; `network.blocks` names every block.
        tells: warn of generations in which the policy never fired.
        on_step: told the ledger and the latents after every step.
        table: costs, where they were measured before; None counts when the ledger is asked.
        replay: of the next generation, where it does not begin at the beginning.
        outputs, helper_outputs: structure of what denoisers and helpers return, on the meta device.
    """

    def __init__(self, pipe: Any, policy: Policy, network: PipelineNetwork | None = None) -> None:
        self.pipe, self.policy = pipe, policy
        self.table: CostTable | None = None
        self.replay: Replay | None = None
        self.outputs: dict[int, Any] = {}
        self.helper_outputs: dict[int, Any] = {}
        self.tells = True
        self._shapes: dict[nn.Module, Shapes] = {}
        self.on_step: Callable[[Generation, Tensor], None] | None = None
        kind = type(pipe).__name__
        scheduler: Any = getattr(pipe, "scheduler", None)
        self.scheduler = scheduler
        self.network = network_of(pipe) if network is None else network
        if not all(hasattr(self.scheduler, name) for name in ("set_timesteps", "step")):
            raise UsageError(
                f"{kind} has no scheduler with set_timesteps and step, which tell the policy where a generation is"
            )
        self._helpers = {name: model for name in HELPERS if isinstance(model := getattr(pipe, name, None), nn.Module)}
        self.denoiser_names, self.helper_names = list(self.network.denoisers), list(self._helpers)
        held = next((found for thing in (self.scheduler, *self._models()) if (found := Mark.on(thing))), None)
        if held is not None:
            raise UsageError(
                f"{kind} already has the policy {held!r}, and {policy.name!r} is to be attached; detach the first, or "
                "attach both at once: attach(pipe, [first, second])"
            )
        for name, model in self.network.denoisers.items():
            _check_cache(model, f"{kind}.{name}", policy)
        policy.fits(self.network)  # type: ignore[arg-type]  # it is run by its own library
        _check_rows(policy, self.network)
        self.steps_with_branches = kind in BRANCHES
        self._inner: Inner | None = None
        self._session: Session | None = None
        self._last: Generation | None = None
        self._pending = False
        self._lost = False
        self._attached = True
        self._interposed: list[Interposed] = []
        try:
            for path, model in enumerate(self.network.denoisers.values()):
                self._interposed.append(Interposed(model, _Root(self, path)))
            for number, model in enumerate(self._helpers.values()):
                self._interposed.append(Interposed(model, _Helper(self, number)))
        except BaseException:
            for one in reversed(self._interposed):
                one.withdraw()
            raise
        for model in self._models():
            renew(model)
            Mark(model, policy.name)
        Mark(self.scheduler, policy.name)
        self._step_names = list(inspect.signature(scheduler.step).parameters)
        self._wrapped = Wrapped(self.scheduler, {"set_timesteps": self._began, "step": self._stepped})

    def _components(self) -> Iterable[tuple[str, nn.Module]]:
        yield from self.network.denoisers.items()
        yield from self._helpers.items()

    def _models(self) -> Iterable[nn.Module]:
        return (model for _, model in self._components())

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        return self  # a copied model is not to bring the pipeline with it

    # The scheduler ---------------------------------------------------------------------------------------------------

    def _began(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """The scheduler was given timesteps: nothing of the last generation is left, however that ended."""
        self._finish()
        for one in self._interposed:
            one.settle()
        if self._inner is not None:
            self._inner.settle()
        for name, model in self.network.denoisers.items():
            _check_cache(model, name, self.policy)
            if self._inner is not None:
                _check_compiled(model, name, self.policy)
        gone = [name for name, model in self._components() if getattr(self.pipe, name, None) is not model]
        self._pending = not gone
        if gone:
            self._last = None
            self._tell_lost(f"{gone[0]} of the pipeline was exchanged")
        return result

    def _stepped(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """The scheduler has made a step."""
        session = self._session
        if session is None:
            return result
        given = {**dict(zip(self._step_names, args, strict=False)), **kwargs}
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        session.stepped(given["sample"], given["model_output"], given["timestep"], after)
        replay = session.replay
        if replay is not None and session.clock.made == replay.start.made:
            result = replay.resume(session, result)
        if session.over:
            self._finish()
        if self.on_step is not None:
            self.on_step(session.record, after)
        return result

    def _finish(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.close()
        self._last = session.record
        if self.tells and session.over and not session.record.fired and _should_fire(self.policy):
            log.warning(
                "%s never fired: all %d steps were computed in full", session.record.policy, len(session.record.steps)
            )

    def session(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Session | None:
        """The generation that a call belongs to; None where it belongs to none."""
        if self._pending:
            self._pending = False
            self._session = Session(self)
        exchanged = getattr(self.pipe, "scheduler", None) is not self.scheduler
        if self._session is not None and (exchanged or not self._session.expects(args, kwargs)):
            self._finish()
        if self._session is None:
            self._tell_lost("the scheduler of the pipeline was exchanged" if exchanged else "")
        return self._session

    def _tell_lost(self, reason: str) -> None:
        if not self._lost:
            self._lost = True
            why = f" ({reason}: detach, and attach again)" if reason else ""
            name = self.policy.name
            log.warning("%s: a model was called outside of a generation, and computed in full%s", name, why)

    def guided(self) -> Any:
        """Whether the pipeline guides at this moment, where it says so."""
        try:
            return getattr(self.pipe, "do_classifier_free_guidance", None)
        except Exception:  # a property that is only defined while the pipeline runs
            return None

    # Inside of the models --------------------------------------------------------------------------------------------

    def inner_for(self, reuse: Iterable[Key], deep: bool) -> Inner | None:
        """What a run needs inside of the denoisers; made when it is first needed."""
        attention, blocks = needs(reuse)
        blocks = blocks or deep
        if not attention and not blocks:
            return self._inner
        if self._inner is not None and not (self._inner.attention >= attention and self._inner.ports >= blocks):
            attention, blocks = attention | self._inner.attention, blocks or self._inner.ports
            self._inner.withdraw()
            self._inner = None
        if self._inner is None:
            for name, model in self.network.denoisers.items():
                _check_compiled(model, name, self.policy)
            helpers = [net for helper in self._helpers.values() for net in _nets(helper)]
            self._inner = Inner(self.network, helpers, attention, blocks, self._shapes)
            for model in self._models():
                renew(model)
        return self._inner

    # The handle ------------------------------------------------------------------------------------------------------

    @property
    def ledger(self) -> Generation:
        """What the last generation took; of the one under way while it is.

        Raises:
            RunError: nothing was generated yet.
        """
        found = self._last if self._session is None else self._session.record
        if found is None:
            raise RunError(f"{self.policy.name}: nothing was generated yet; call the pipeline, then look at its ledger")
        return found

    @property
    def attached(self) -> bool:
        return self._attached

    def exchange(self, policy: Policy, *, stay: bool = False) -> None:
        """Another policy from the next generation on; `stay` inside of the models, as far as the last one went.

        Raises:
            UsageError: it does not fit the model.
        """
        policy.fits(self.network)  # type: ignore[arg-type]
        _check_rows(policy, self.network)
        self._finish()
        if self._inner is not None and not stay:  # the next one may need less of it
            self._inner.withdraw()
            self._inner = None
        self.policy = policy

    def detach(self) -> None:
        """Put everything back as it was; the ledger stays.

        Raises:
            UsageError: a model was wrapped by something else since.
        """
        if not self._attached:
            return
        self._wrapped.check()
        self._finish()
        self._pending = False
        if self._inner is not None:
            self._inner.withdraw()
            self._inner = None
        for one in reversed(self._interposed):
            one.withdraw()
        self._wrapped.withdraw()
        Mark.off(self.scheduler)
        for model in self._models():
            renew(model)
            Mark.off(model)
        self._attached = False

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attached({self.policy.name} on {type(self.pipe).__name__}{'' if self._attached else ', detached'})"


def _check_cache(model: nn.Module, name: str, policy: Policy) -> None:
    """Raises UsageError where a model already has another cache."""
    cache = enabled_cache(model)
    if cache is not None:
        how = f" (pipe.{name.rpartition('.')[2]}.disable_cache())" if hasattr(model, "disable_cache") else ""
        raise UsageError(
            f"{name} already has the cache {cache}, and {policy.name!r} would reuse on top of it; take one of them away"
            f"{how}"
        )


def _check_compiled(model: nn.Module, name: str, policy: Policy) -> None:
    """Raises UsageError where nothing can be decided inside of a model."""
    if is_wholly_compiled(model):
        raise UsageError(
            f"policy {policy.name} reaches into {name}, which is compiled as a whole; compile its blocks instead "
            f"(pipe.{name}.compile_repeated_blocks())"
        )


def _check_rows(policy: Policy, network: PipelineNetwork) -> None:
    """Raises UsageError where a policy wants to call a model for some of its rows that cannot be."""
    for part in policy.parts if isinstance(policy, Compose) else [policy]:
        other = [model for model in network.denoisers.values() if not can_be_picked(model)]
        if isinstance(part, AdaptiveSkip) and part.decision == "per_sample" and other:
            raise UsageError(
                f"policy AdaptiveSkip: decision=per_sample needs a model that can be called for some of its samples, "
                f"and {type(other[0]).__name__} cannot; take decision=batch_mean or batch_any"
            )
        if isinstance(part, Planned) and any(0 < evaluated < part.branches for evaluated in part.call):
            raise UsageError(
                "policy Planned evaluates one branch of guidance alone at some calls, and pipelines differ in which "
                "comes first; make a plan for this pipeline (gearshift plan)"
            )


def _should_fire(policy: Policy) -> bool:
    return not isinstance(policy, Full) and type(policy) is not Policy


def _nets(helper: nn.Module) -> list[nn.Module]:
    """The models in a helper that may be several."""
    nets = getattr(helper, "nets", None)
    return list(nets) if isinstance(nets, nn.ModuleList) else [helper]
