"""Where a generation stands in the timesteps of its scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gearshift.integrations.diffusers.compat import begin_index
from gearshift.integrations.diffusers.rows import timestep_argument, timestep_of

SAME = 1e-3
"""Difference up to which two timesteps are one."""


class Clock:
    """The timesteps of a scheduler, and how many steps were made.

    Attributes:
        first: position in the timesteps at which the pipeline began (image to image begins late).
        made: steps made since.
    """

    _told: str | None = None
    """How the denoiser is told the time: by its "value", by a "view" of the scheduler's timesteps on a device, or in
    some way of the model's own (None)."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.times: list[float] = scheduler.timesteps.double().tolist()  # one wait for the device, for all of them
        self.first = self.made = 0

    def guess_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first step is made: from what the scheduler was told, or from what the denoiser is called with."""
        told, time = begin_index(self.scheduler), timestep_argument(args, kwargs)
        self.first = told if told is not None else self._find(timestep_of(args, kwargs)) or 0
        if isinstance(time, Tensor) and time.device.type != "cpu":
            self._told = "view" if self._is_view(time) else None
        elif time is not None and abs(self.now - number(time)) < SAME:
            self._told = "value"

    def is_ours(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a denoiser may be called for the step that is next, as far as that can be told without waiting for a
        device: not where it is called with another time, or by somebody else's scheduler."""
        time = timestep_argument(args, kwargs)
        if self._told is None or time is None or self.first + self.made >= len(self.times):
            return True
        on_device = isinstance(time, Tensor) and time.device.type != "cpu"
        if self._told == "view":
            return on_device and self._is_view(time) and self.is_now(time)
        return on_device or abs(self.now - number(time)) < SAME or self._may_have_begun_later(number(time))

    def _is_view(self, time: Any) -> bool:
        known = self.scheduler.timesteps
        return bool(time.untyped_storage().data_ptr() == known.untyped_storage().data_ptr())

    def began_later(self, timestep: Any) -> bool:
        """When the second step is made: whether the first was at the second of two equal timesteps (PNDM has such)."""
        later = self._may_have_begun_later(number(timestep))
        self.first += later
        return later

    def _may_have_begun_later(self, time: float) -> bool:
        first = self.first
        twice = first + 2 < len(self.times) and abs(self.times[first] - self.times[first + 1]) < SAME
        return self.made == 1 and twice and abs(self.times[first + 2] - time) < SAME

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
            if not self._is_view(timestep):
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
