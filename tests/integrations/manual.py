"""What policies on pipelines should do, by hand and without the code under test: outputs are kept and given back."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tiny import Case


@dataclass
class Trace:
    """A generation so far.

    Attributes:
        mask: of every step, whether it was computed; a step is there from its first call on.
        latents: of the scheduler, before the first step and after each.
        outputs: what the scheduler was given at each step.
        calls: how often each model was really called.
    """

    mask: list[Any] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def step(self) -> int:
        """The step under way."""
        return len(self.outputs)


Kept = list[tuple[int, Any]]
"""Of one call within a step: the outputs that were computed, each with its step."""


def changed(tree: Any, change: Callable[..., Tensor], *others: Any) -> Any:
    """An output of a denoiser, a tuple or an output class, with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree, *others)
    if isinstance(tree, dict):
        return type(tree)(**{key: changed(value, change, *(o[key] for o in others)) for key, value in tree.items()})
    return tuple(changed(value, change, *(o[k] for o in others)) for k, value in enumerate(tree))


def held(step: int, kept: Kept) -> Any:
    """The last output that was computed."""
    return changed(kept[-1][1], lambda tensor: tensor.clone())


@contextmanager
def by_hand(
    case: Case,
    pipe: Any,
    computes: Callable[[Trace], Any] = lambda trace: True,
    instead: Callable[[int, Kept], Any] = held,
) -> Iterator[Trace]:
    """Runs what is called inside with some outputs of the denoisers replaced by earlier ones.

    Args:
        computes: whether a step is computed, asked once, before its first call; or a flag per sample, and then all of
            them are computed, and where the flag is unset nothing is made of the output.
        instead: what a call gives that is not computed, from the step and the outputs of this call at earlier steps.
    """
    trace = Trace()
    made: Counter[str] = Counter()
    kept: dict[tuple[str, int], Kept] = {}
    scheduler = pipe.scheduler
    step, signature = scheduler.step, inspect.signature(scheduler.step)

    def replace(name: str, module: Any) -> None:
        forward = module.forward

        @functools.wraps(forward)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if len(trace.mask) == trace.step:
                trace.mask.append(computes(trace))
            before = kept.setdefault((name, made[name]), [])
            made[name] += 1
            mask = trace.mask[-1]
            if not before:
                trace.mask[-1] = mask = True
            if mask is False:
                return instead(trace.step, before)
            trace.calls[name] += 1
            output = forward(*args, **kwargs)
            before.append((trace.step, changed(output, lambda tensor: tensor.clone())))
            if isinstance(mask, Tensor):
                return mixed(trace, mask, before, instead)
            return output

        module.forward = replaced

    def stepping(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        result = step(*args, **kwargs)
        if not trace.latents:
            trace.latents.append(given["sample"].clone())
        trace.latents.append((result[0] if isinstance(result, tuple) else result.prev_sample).clone())
        trace.outputs.append(given["model_output"].clone())
        made.clear()
        return result

    for name in case.denoisers:
        replace(name, getattr(pipe, name))
    scheduler.step = functools.wraps(step)(stepping)
    try:
        yield trace
    finally:
        for name in case.denoisers:
            del getattr(pipe, name).forward
        del scheduler.step


def mixed(trace: Trace, mask: Tensor, kept: Kept, instead: Callable[[int, Kept], Any]) -> Any:
    """The last output for samples with a flag, and for the others what their own earlier outputs say."""

    def rows(*outputs: Tensor) -> Tensor:
        found = []
        for row, new in enumerate(outputs[0]):
            sample = row % len(mask)
            flags = [torch.as_tensor(trace.mask[step]).expand(len(mask))[sample] for step, _ in kept]
            own = [(kept[k][0], output[row]) for k, output in enumerate(outputs[1:]) if flags[k]]
            found.append(new if mask[sample] else instead(trace.step, own))
        return torch.stack(found)

    return changed(kept[-1][1], rows, *(output for _, output in kept))
