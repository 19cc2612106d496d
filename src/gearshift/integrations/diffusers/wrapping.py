"""The instance of a scheduler, wrapped: clock of a generation and source of its latents. And what says so on it."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

from gearshift.runtime.errors import UsageError

MARK = "_gearshift"
After = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]


class Mark:
    """On a component that has a policy: its name. A copy of the component has none."""

    def __init__(self, thing: Any, name: str) -> None:
        self._of, self.name = weakref.ref(thing), name
        setattr(thing, MARK, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    @classmethod
    def on(cls, thing: Any) -> str | None:
        """The policy that a component has."""
        found = vars(thing).get(MARK)
        return found.name if isinstance(found, Mark) and found._of() is thing else None

    @staticmethod
    def off(thing: Any) -> None:
        """Take it away."""
        vars(thing).pop(MARK, None)


class Wrapped:
    """Methods of one scheduler, each followed by something of ours; copies of the scheduler have their own, alone.

    Args:
        after: by the name of the method, what is called with its arguments and result, and gives the result.
    """

    def __init__(self, scheduler: Any, after: dict[str, After]) -> None:
        self._scheduler = scheduler
        self._before = {name: vars(scheduler).get(name) for name in after}
        self._ours = {name: self._wrapper(name, action) for name, action in after.items()}
        for name, method in self._ours.items():
            setattr(scheduler, name, method)

    def _wrapper(self, name: str, action: After) -> Any:
        scheduler, before, own = self._scheduler, self._before[name], getattr(type(self._scheduler), name)

        def wrapper(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not scheduler:  # a copy, which some pipelines make
                return own(this, *args, **kwargs)
            result = own(this, *args, **kwargs) if before is None else before(*args, **kwargs)
            return action(args, kwargs, result)

        # Pipelines look at what a method takes. And a bound method, unlike a function, is bound anew by a copy.
        plain = inspect.signature(getattr(scheduler, name))
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        wrapper.__signature__ = plain.replace(parameters=[first, *plain.parameters.values()])  # type: ignore[attr-defined]
        wrapper.__name__, wrapper.__doc__ = name, own.__doc__
        return types.MethodType(wrapper, scheduler)

    def check(self) -> None:
        """Raises UsageError where somebody has wrapped the scheduler since, which taking ours away would undo."""
        for name, ours in self._ours.items():
            if vars(self._scheduler).get(name) is not ours:
                raise UsageError(
                    f"{type(self._scheduler).__name__}.{name} got another wrapper after the policy was attached, which "
                    "detaching would throw away; undo that first, then detach"
                )

    def withdraw(self) -> None:
        """Put everything back."""
        for name, before in self._before.items():
            if before is None:
                vars(self._scheduler).pop(name, None)
            else:
                setattr(self._scheduler, name, before)
