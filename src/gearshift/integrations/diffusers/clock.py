"""Where a generation stands in the timesteps of its scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gearshift.integrations.diffusers.compat import begin_index
from gearshift.integrations.diffusers.rows import timestep_of

SAME = 1e-3
"""Difference up to which two timesteps are one."""


class Clock:
    """The timesteps of a scheduler, and how many steps were made.

    Attributes:
        first: position in the timesteps at which the pipeline began (image to image begins late).
        made: steps made since.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.times = [float(time) for time in scheduler.timesteps]
        self.first = self.made = 0

    def guess_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first step is made: from what the scheduler was told, or from what the denoiser is called with."""
        told = begin_index(self.scheduler)
        self.first = told if told is not None else self._find(timestep_of(args, kwargs)) or 0

    def settle_first(self, timestep: Any) -> str | None:
        """When the first step is made; what is wrong with it, if anything."""
        if self.is_now(timestep):
            return None
        found = self._find(number(timestep))
        if found is None:
            return f"the scheduler stepped at {number(timestep):g}, which is none of its timesteps"
        self.first = found
        return None

    def is_now(self, timestep: Any) -> bool:
        """Whether a step is at the timestep that is next; waits for no device."""
        place = self.first + self.made
        if place >= len(self.times):
            return False
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            known = self.scheduler.timesteps
            if timestep.untyped_storage().data_ptr() != known.untyped_storage().data_ptr():
                return True  # to know its value would take a wait
            return int(timestep.storage_offset()) == int(known.storage_offset() + place * known.stride(0))
        return abs(self.times[place] - number(timestep)) < SAME

    @property
    def now(self) -> float:
        """The timestep that is next."""
        return self.times[self.first + self.made]

    def _find(self, time: float | None) -> int | None:
        return next((k for k, known in enumerate(self.times) if time is not None and abs(known - time) < SAME), None)


def number(timestep: Any) -> float:
    """A timestep as a number."""
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
