"""What learns, the optimiser, and its rate as a pure function of the step."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.optim import AdamW

from gearshift.runtime.errors import UsageError
from gearshift.training.config import TrainerConfig


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters whose names match a pattern (`*`, `?`, `[...]`) need no gradient from here on.

    To be called before an optimiser or DDP sees the network: then they are neither updated nor sent between processes.

    Raises:
        UsageError: a pattern matches no parameter, or nothing is left that learns.
    """
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(f"trainer.freeze: no parameter is named {pattern!r}{_near_misses(pattern, parameters)}")
        for name in matched:
            parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise UsageError(f"trainer.freeze={list(patterns)} leaves nothing that learns")


def _near_misses(pattern: str, names: Iterable[str]) -> str:
    """Names, and prefixes of names, that look like the pattern or have its first word somewhere inside."""
    known: dict[str, None] = {}
    for name in names:
        words = name.split(".")
        known.update(dict.fromkeys([".".join([*words[:count], "*"]) for count in range(1, len(words))]))
        known[name] = None
    word = pattern.split(".")[0].strip("*?")
    inside = [name for name in known if word and f".{word}." in f".{name}"]
    close = list(dict.fromkeys([*inside, *difflib.get_close_matches(pattern, known, n=3)]))[:3]
    if not close:
        return f"; parts of the network are {', '.join(dict.fromkeys(name.split('.')[0] for name in known))}"
    return f"; did you mean {' or '.join(close)}?"


def learning_rate(config: TrainerConfig, step: int) -> float:
    """The rate of the update after `step` updates were made, so the first one is `learning_rate(config, 0)`.

    Warm-up is min(step / warmup_steps, 1) as in the official U-ViT code: with a warm-up the very first rate is zero.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    share = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def make_optimizer(config: TrainerConfig, parameters: Iterable[nn.Parameter]) -> AdamW:
    """AdamW over the parameters that learn."""
    return AdamW(
        [p for p in parameters if p.requires_grad],
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        # One kernel for all parameters. With loss scaling it would undo the scale itself, after clipping.
        fused=config.precision != "fp16",
    )
