"""Going on from the middle of a generation: what a search of schedules needs of a pipeline, whose loop is its own.

The pipeline is called anew, but on the steps before the point its denoisers are not: they give zeros, and when the last
of these steps is made, the scheduler and the latents are put to where they stood.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.memory import Key, Memory
from gearshift.execution.plan import StepPlan
from gearshift.integrations.diffusers import trees
from gearshift.integrations.diffusers.held import Remembered
from gearshift.policies.base import Policy, RunInfo

if TYPE_CHECKING:
    from gearshift.integrations.diffusers.sampler import PipelineSampler
    from gearshift.integrations.diffusers.session import Session

Memories = dict[str | int, tuple[Any, Memory]]


@dataclass(frozen=True)
class Place:
    """Where a generation stands before a call; the beginning has no latents.

    Attributes:
        made: steps made.
        latents: after them.
        scheduler: what the scheduler keeps, by name of its attributes.
        remembered, memories: what is held, by branch.
    """

    made: int = 0
    latents: Tensor | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    remembered: dict[str | int, Remembered] = field(default_factory=dict)
    memories: Memories = field(default_factory=dict)

    def fork(self) -> Place:
        """The same place, to go on from on another way; no tensor is copied."""
        memories = {key: (signature, memory.fork()) for key, (signature, memory) in self.memories.items()}
        return replace(self, remembered=dict(self.remembered), memories=memories)


class Replay:
    """Of one generation: where it begins, and at which places it is noted down.

    Args:
        start: where it begins.
        wanted: whether the place after so many steps is to be noted.
        outputs: by denoiser, the structure that it returns, on the meta device.
        helpers: the same of the models beside it.
    """

    def __init__(
        self, start: Place, wanted: Callable[[int], bool], outputs: dict[int, Any], helpers: dict[int, Any]
    ) -> None:
        self.start, self.wanted, self.outputs, self.helpers = start, wanted, outputs, helpers
        self.found: dict[int, Place] = {}

    def replays(self, made: int) -> bool:
        """Whether the call after so many steps was made before."""
        return made < self.start.made

    def note(self, session: Session, latents: Tensor) -> None:
        """After a step."""
        made = session.clock.made
        if made > self.start.made and self.wanted(made):
            place = Place(made, latents.clone(), state_of(session.scheduler), session.remembered, session.kept)
            self.found[made] = place.fork()

    def resume(self, session: Session, result: Any) -> Any:
        """The result of the last step that was made before, as it was then; the scheduler with it."""
        start = self.start.fork()
        assert start.latents is not None  # only the beginning has none
        restore(session.scheduler, start.scheduler)
        session.remembered, session.kept = start.remembered, start.memories
        latents = start.latents.clone()
        if isinstance(result, tuple):
            return (latents, *result[1:])
        result.prev_sample = latents
        return result


def state_of(scheduler: Any) -> dict[str, Any]:
    """What a scheduler keeps of a generation."""
    kept = {}
    for name, value in vars(scheduler).items():
        if callable(value) or name in ("_internal_dict", "config"):
            continue
        kept[name] = list(value) if isinstance(value, list) else value.clone() if isinstance(value, Tensor) else value
    return kept


def restore(scheduler: Any, state: dict[str, Any]) -> None:
    """Put a scheduler to where `state_of` found it."""
    for name, value in copy.copy(state).items():
        kept = list(value) if isinstance(value, list) else value.clone() if isinstance(value, Tensor) else value
        setattr(scheduler, name, kept)


@dataclass(frozen=True, eq=False)
class Listed(Policy):
    """What a search tries: a plan for every call; `keys` is what any of them might take from memory."""

    plans: Sequence[StepPlan]
    keys: frozenset[Key]

    # What is kept must not depend on the plans: others go on from what these leave.
    static: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "a schedule"

    @property
    def forecasts(self) -> bool:
        return True

    def memory_keys(self, run: RunInfo) -> frozenset[Key]:
        return self.keys

    def plan(self, state: Any, call: Call) -> StepPlan:
        return self.plans[call.position]


class PipelineStepper:
    """Takes the images `index` of a sampler through schedules; see `sampling.stepping.Stepper`."""

    def __init__(self, sampler: PipelineSampler, index: Tensor, keys: frozenset[Key]) -> None:
        self.sampler, self.index, self.reusable = sampler, index, keys
        self.calls = sampler.calls()
        self.run = sampler.info(self.calls, index)
        self.shape = sampler.denoiser.latent_shape

    def begin(self) -> Place:
        """Before the first call."""
        return Place()

    def finish(
        self, plans: Sequence[StepPlan], points: dict[int, Place], stride: int, on_step: Callable[[], None]
    ) -> Tensor:
        """Latents fp32 after all calls under `plans`, from the last of `points`; those on the way are added to it."""
        model, total = self.sampler.denoiser, len(plans)
        start = points[max(points)]

        def wanted(made: int) -> bool:
            return made < total and made % stride == 0 and made not in points

        replay = Replay(start, wanted, model.outputs, model.helper_outputs)
        latents: list[Tensor] = []
        steps = [0]

        def until(record: Any, after: Tensor) -> bool:
            steps[0] += 1
            if steps[0] > start.made:
                on_step()
            latents[:] = [after]
            return steps[0] == total

        model.attached.replay = replay
        try:
            model.run(self.sampler.asked(self.index), self.sampler.solver, Listed(plans, self.reusable), until=until)
        finally:
            model.attached.replay = None
        points |= replay.found
        return self.sampler.flat(latents[0], len(self.index))


def zeros(like: Any, device: torch.device) -> Any:
    """Zeros of a structure on the meta device."""
    return trees.mapped(like, lambda one: torch.zeros(one.shape, dtype=one.dtype, device=device))
