"""Heads whose answers are known, and images on which they are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.data.dataset import ImageDataset
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.evaluation.calibration import measure
from gearshift.evaluation.calibration_numbers import Records, summarise
from gearshift.execution.stream import Rows, Stream

from .evaluations import network

GREY = 128 / 127.5 - 1  # of images in [-1, 1] that are 128 everywhere
PROCESS = Discrete(DiscreteConfig())
Says = Callable[[Tensor, Tensor, int], Tensor]


class Plus(nn.Module):
    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        return hidden


class Scripted(Backbone):
    """Two blocks that do nothing; predicts no noise at all, and of its error what it is told to."""

    in_channels = out_channels = 1
    image_size = 8
    has_uncertainty = True
    paths = ((0, 1),)

    def __init__(self, says: Says, cond_kind: str = "none") -> None:
        super().__init__()
        self.says, self.cond_kind = says, cond_kind
        self.weight = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList([Plus(), Plus()])
        self.seen: list[Tensor | None] = []
        self.autocast: set[bool] = set()

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return (1, 2)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        self.seen.append(cond)
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return Stream(x, time, Rows(len(x)), {})

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        return torch.zeros_like(hidden)

    def uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        return self.says(hidden, time, depth)


def oracle(x: Tensor, time: Tensor, depth: int) -> Tensor:
    """The map tanh|noise| of grey images: the true error of who predicts nothing."""
    alpha, sigma = (one(time)[:, None, None, None].float() for one in (PROCESS.alpha, PROCESS.sigma))
    noise = (x - alpha * GREY) / sigma
    return noise.abs().tanh()


def clock(x: Tensor, time: Tensor, depth: int) -> Tensor:
    return (time / 1000 * 0.5 + 0.25).float()


def grey(count: int = 64, split: str = "test") -> ImageDataset:
    images = torch.full((count, 1, 8, 8), 128, dtype=torch.uint8)
    return ImageDataset(images, torch.arange(count) % 3, 3, (), "grey", split, "0", "grey images")


def with_heads(labels: bool) -> EarlyExit:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EarlyExit(ExitsConfig(), network(labels, False)).eval().requires_grad_(False)


def measured(says: Says, times: int = 8, **options: Any) -> Records:
    return measure(Denoiser(Scripted(says), PROCESS), grey(), 48, times, **options)


def exits_of(uncertainty: Any, error: Any) -> dict[str, Any]:
    """Of one exit, from arrays [times, images]."""
    one, other = (np.asarray(values, dtype=np.float64)[:, None] for values in (uncertainty, error))
    times = np.arange(len(one), dtype=np.float64)
    [found] = summarise(Records((3,), times, -times, one, other))
    return found
