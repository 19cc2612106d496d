"""Problems small enough to search through in full."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers.base import Solver
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.planning.choices import SPACES, Menu
from gearshift.planning.problem import Problem
from gearshift.policies import Full
from gearshift.sampling.loop import Sampler

from ..contract import build, cost_table

SOLVER = DDIM(DDIMConfig(steps=7))


def sampler(name: str = "exits-uvit", solver: Solver = SOLVER, **fields: Any) -> Sampler:
    return Sampler(Denoiser(build(name), Discrete(DiscreteConfig())), solver, Full(), chunk=3, **fields)


def problem(
    name: str = "exits-uvit", space: tuple[str, ...] = SPACES, solver: Solver = SOLVER, **fields: Any
) -> tuple[Problem, Menu]:
    s = sampler(name, solver, **fields)
    menu = Menu.of(s.denoiser.network, s.branches, space)
    return Problem(s, torch.arange(3), cost_table(s.denoiser.network), menu.keys, clip=False), menu


@functools.cache
def shared(name: str = "exits-uvit", space: tuple[str, ...] = SPACES, guidance: float = 1.0) -> tuple[Problem, Menu]:
    """The same for several tests; what it holds changes nothing."""
    return problem(name, space, guidance=guidance)
