"""What a network with several paths costs: per stage, and on average under a named weighting.

A stage is a path that rows take by their noise level. There is no such thing as *the* cost of such a network: the
average depends on how often each stage is computed, and training, sampling and "share of the time axis" weigh stages
very differently (paper arXiv 2312.09181 prints one number and not its weights). Every average here has a name and says
what its shares are of. MACs are multiply-accumulates of one image (flops = 2 MACs); "conv+linear" leaves out attention
products and other products without a layer, and is what papers mostly print as "GFLOPs".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gearshift.backbones.base import Backbone
from gearshift.backbones.staging import StageRouter
from gearshift.diffusion.process import VPSDE, Process, VPSDEConfig
from gearshift.diffusion.solvers.base import Call
from gearshift.execution.cost import Cost, CostTable
from gearshift.execution.parameters import parameters_used
from gearshift.runtime.errors import UsageError

BACKWARD = 2
"""MACs of the backward pass of a layer that learns, over those of its forward pass: one product for the gradient of its
weights and one for that of its input."""


@dataclass(frozen=True)
class Stage:
    """One path.

    Attributes:
        path: its number; path 0 is next to the data.
        sigma: ratios sigma/alpha it holds, (low, high]; low is 0 and high inf at the ends; None where it is not said.
        params: active parameters: those a full-depth prediction uses.
        params_own: those of them that no other path uses (the decoder, of networks that share their encoder).
        cost: forward MACs of one image at full depth.
    """

    path: int
    sigma: tuple[float, float] | None
    params: int
    params_own: int
    cost: Cost

    def as_json(self) -> dict[str, Any]:
        low_high = None if self.sigma is None else [end if math.isfinite(end) else None for end in self.sigma]
        return {
            "path": self.path,
            "sigma": low_high,
            "params_active": self.params,
            "params_own": self.params_own,
            "gmacs": self.cost.macs / 1e9,
            "gmacs_conv_linear": self.cost.linear / 1e9,
        }


@dataclass(frozen=True)
class Mix:
    """How often each stage is computed.

    Attributes:
        name: of the average.
        of: what the shares are shares of.
        shares: one per stage, in [0, 1], with sum 1.
    """

    name: str
    of: str
    shares: tuple[float, ...]

    def average(self, values: Sequence[float]) -> float:
        """Weighted mean of one value per stage."""
        return sum(share * value for share, value in zip(self.shares, values, strict=True))

    def as_json(self, costs: Sequence[Cost]) -> dict[str, Any]:
        return {
            "of": self.of,
            "shares": list(self.shares),
            "gmacs": self.average([cost.macs for cost in costs]) / 1e9,
            "gmacs_conv_linear": self.average([cost.linear for cost in costs]) / 1e9,
        }


# Stages ---------------------------------------------------------------------------------------------------------------


def stages_of(backbone: Backbone, table: CostTable) -> tuple[list[Stage], int]:
    """Every path of the network, at full depth; and the number of parameters that all of them use."""
    sizes = [parameter.numel() for parameter in backbone.parameters()]
    used = [path.all for path in parameters_used(backbone)]
    shared = frozenset.intersection(*used)
    uses = Counter(position for own in used for position in own)
    count = len(backbone.paths)
    ends: list[float] | None = [0.0, *backbone.boundaries, math.inf] if len(backbone.boundaries) == count - 1 else None
    stages = [
        Stage(
            path=path,
            sigma=None if ends is None else (ends[path], ends[path + 1]),
            params=sum(sizes[position] for position in own),
            params_own=sum(sizes[position] for position in own if uses[position] == 1),
            cost=table.full(backbone, path),
        )
        for path, own in enumerate(used)
    ]
    return stages, sum(sizes[position] for position in shared)


def stored(backbone: Backbone) -> dict[str, int]:
    """Parameters of all paths together, and the other numbers that a checkpoint holds (fixed filters and the like)."""
    params = sum(parameter.numel() for parameter in backbone.parameters())
    return {
        "params_stored": params,
        "buffers_stored": sum(value.numel() for value in backbone.state_dict().values()) - params,
    }


def interval(sigma: Sequence[float | None] | None) -> str:
    """The ratios of a stage, as `Stage.as_json` gives them, in words."""
    if sigma is None:
        return "by the network"
    low, high = sigma
    return f"above {low:g}" if high is None else f"{low or 0:g} to {high:g}"


# Weightings -----------------------------------------------------------------------------------------------------------


def uniform_mix(count: int) -> Mix:
    """Every stage alike."""
    return Mix("uniform", "every stage alike", (1 / count,) * count)


def mass_mix(boundaries: Sequence[float], process: Process) -> Mix:
    """By the probability of a stage under the training times of the process, where training leaves them as they are."""
    return Mix("mass", f"training times of process {process.name}", _between(boundaries, process))


def interval_mix(boundaries: Sequence[float], process: Process) -> Mix:
    """By the length of a stage on the time axis: the process's own where training times are uniform on it, else the t
    of the VP-SDE, since ratios have no natural length."""
    axis = process if process.evenly_timed else VPSDE(VPSDEConfig())
    return Mix("interval_length", f"length in t of {axis.name}", _between(boundaries, axis))


def calls_mix(network: Backbone, calls: Sequence[Call], solver: str) -> Mix:
    """By the solver's network calls that fall into each stage."""
    counts = calls_per_stage(network, calls)
    shares = tuple(count / len(calls) for count in counts)
    return Mix("solver_calls", f"calls of {solver}: {' / '.join(map(str, counts))} of {len(calls)}", shares)


def calls_per_stage(network: Backbone, calls: Sequence[Call]) -> list[int]:
    """Calls of a solver by the path they take."""
    levels = torch.tensor([call.log_snr for call in calls], dtype=torch.float64)
    found: list[int] = torch.bincount(network.route(levels), minlength=len(network.paths)).tolist()
    return found


def given_mix(name: str, of: str, weights: Iterable[float]) -> Mix:
    """From weights in any scale.

    Raises:
        UsageError: a weight below 0, or none above it.
    """
    given = [float(weight) for weight in weights]
    if min(given, default=-1) < 0 or not sum(given) > 0:
        raise UsageError(f"{name}: the weights of the stages are {given}; none may be below 0, and one must be above")
    return Mix(name, of, tuple(weight / sum(given) for weight in given))


def _between(boundaries: Sequence[float], process: Process) -> tuple[float, ...]:
    """Probability of every stage under the training times of a process."""
    router = StageRouter(boundaries)
    if process.continuous:
        inside = process.cdf(process.time_of_log_snr(router.log_snr))
    else:  # by the routing itself: a boundary may be a level of the table but for rounding
        table = process.time_of_index(torch.arange(process.num_steps))
        counts = torch.bincount(router.route(process.log_snr(table)), minlength=router.num_stages)
        inside = counts.cumsum(0)[:-1].double() / process.num_steps
    below = torch.cat([torch.zeros(1).double(), inside, torch.ones(1).double()])
    shares: list[float] = below.diff().tolist()
    return tuple(shares)


# All of it ------------------------------------------------------------------------------------------------------------


def account(
    network: Backbone,
    table: CostTable,
    process: Process,
    solvers: Mapping[str, Sequence[Call]],
    training: Mix | None = None,
) -> dict[str, Any]:
    """Stages and averages as one dict, for JSON.

    Args:
        solvers: calls by the name of the solver; one average each.
        training: what training really samples, where it is known; besides the process's own times.

    Returns:
        `stages` (`Stage.as_json`), `params_stored`, `buffers_stored`, `params_shared` (used by every path), and
        `averages`: name to `of`, `shares`, `gmacs` and `gmacs_conv_linear`. Names are `uniform`, and, where stages
        are bounded by noise ratios, `mass` and `interval_length`; `training` where it was given; and `solver_calls`, or
        `solver_calls: SOLVER` for several.
    """
    stages, shared = stages_of(network, table)
    costs = [stage.cost for stage in stages]
    mixes = [uniform_mix(len(stages))]
    if len(network.boundaries) == len(stages) - 1:
        mixes += [mass_mix(network.boundaries, process), interval_mix(network.boundaries, process)]
    averages = {mix.name: mix.as_json(costs) for mix in mixes}
    if training is not None:
        averages["training"] = training.as_json(costs)
    for solver, calls in solvers.items():
        name = "solver_calls" if len(solvers) == 1 else f"solver_calls: {solver}"
        averages[name] = calls_mix(network, calls, solver).as_json(costs)
    return {
        "stages": [stage.as_json() for stage in stages],
        **stored(network),
        "params_shared": shared,
        "averages": averages,
    }
