"""The optimiser, and its rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW

from gearshift.training.config import TrainerConfig


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
