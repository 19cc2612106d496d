"""Runs on networks of which only the number of blocks matters."""

from __future__ import annotations

from collections.abc import Sequence

from gearshift.diffusion.solvers import Call
from gearshift.policies import RunInfo

from ..toys import Isotropic


def of_depth(blocks: int, calls: Sequence[Call]) -> RunInfo:
    """A run on an isotropic network that can be read out after each of its blocks."""
    return RunInfo(tuple(calls), Isotropic(depth=blocks), batch=1, branches=1)
