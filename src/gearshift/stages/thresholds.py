"""From two similarity curves to two boundaries, and how sure they are.

    t_1 = the last tau before the mean of S0 over [0, tau] falls below alpha and stays there,
    t_2 = the first tau after the mean of S1 over [tau, 1] has been below alpha and stays above,

(arXiv 2312.09181, equation 7, which takes the greatest and least tau with a mean of at least alpha). S0 is U-shaped,
because near pure noise the optimal prediction is the noise again: its running mean may come back, and the greatest tau
would then jump to the end. "Stays there" is `sustain`, a share of the axis, or up to the end of the axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.runtime import keys
from gearshift.runtime.errors import RunError
from gearshift.stages.finder import Curves, Search

# Queries that are exchanged for one another in a replicate: so few that the curve hardly changes among them.
_NEIGHBOURS = 20


@dataclass(frozen=True)
class Found:
    """Boundaries as shares of the axis, ascending.

    Attributes:
        share: the boundaries.
        replicates: what replicates of the measurement give, float64 [replicates, boundaries].
        failed: replicates without boundaries, left out above.
    """

    share: tuple[float, ...]
    replicates: Tensor
    failed: int


def crossing(mean: Tensor, alpha: float, stretch: int) -> int | None:
    """The last entry of a running mean [K] before it is below `alpha` for `stretch` entries, or up to the end.

    None where it never is; -1 where it is so from the beginning.
    """
    below = mean < alpha
    # Position of the next entry that is not below, seen from every entry.
    ends = torch.where(below, len(mean), torch.arange(len(mean))).flip(0).cummin(0).values.flip(0)
    sustained = below & ((ends - torch.arange(len(mean)) >= stretch) | (ends == len(mean)))
    first = sustained.nonzero()
    return int(first[0]) - 1 if len(first) else None


def three_stages(curves: Curves, search: Search, sustain: float = 0.05, replicates: int = 200) -> Found:
    """The two boundaries, and replicates of them: every query is replaced by a random one of the 20 about it.

    `sustain` is the share of the axis over which a running mean has to stay below alpha.

    Raises:
        RunError: a mean never falls below alpha, or is below it throughout, or the two boundaries are out of order.
    """
    stretch = max(1, round(sustain * search.queries))
    ends = _ends(curves.near, curves.far, search.alpha, stretch)
    for name, mean, end in (
        ("S0 (from the data)", curves.running_near(), ends[0]),
        ("S1 (from pure noise)", curves.running_far(), ends[1]),
    ):
        seen = f"the running mean of {name} lies in [{float(mean.min()):.4f}, {float(mean.max()):.4f}]"
        if end is None:
            raise RunError(
                f"alpha={search.alpha:g}: {seen} and never falls below alpha for {sustain:g} of the axis, so there is "
                f"no boundary; raise alpha, lower eta={search.eta:g}, or average over another axis"
            )
        if end < 0:
            raise RunError(
                f"alpha={search.alpha:g}: {seen} and is below alpha from its beginning, so there is no boundary; "
                f"lower alpha, raise eta={search.eta:g}, or take more queries than {search.queries}"
            )
    first, second = _shares(curves, ends)
    if first >= second:
        raise RunError(
            f"alpha={search.alpha:g} and eta={search.eta:g} put the first boundary at {first:.4f} of the axis and the "
            f"second at {second:.4f}, so no stage is left between them; raise alpha or lower eta"
        )
    again: list[tuple[float, float]] = []
    for number in range(replicates):
        near, far = (values[_exchanged(search.queries, search.seed, number)] for values in (curves.near, curves.far))
        found = _ends(near, far, search.alpha, stretch)
        if all(end is not None and end >= 0 for end in found):
            again.append(_shares(curves, found))
    spread = torch.tensor(again, dtype=torch.float64).reshape(-1, 2)
    return Found((first, second), spread, replicates - len(again))


def _ends(near: Tensor, far: Tensor, alpha: float, stretch: int) -> tuple[int | None, int | None]:
    """`crossing` of both running means; the second counts from the noisy end."""
    count = torch.arange(1, len(near) + 1, dtype=torch.float64)
    return (
        crossing(near.cumsum(0) / count, alpha, stretch),
        crossing(far.flip(0).cumsum(0) / count, alpha, stretch),
    )


def _shares(curves: Curves, ends: tuple[int | None, int | None]) -> tuple[float, float]:
    first, second = ends
    assert first is not None and second is not None
    return float(curves.share[first]), float(curves.share[len(curves.share) - 1 - second])


def _exchanged(count: int, seed: int, replicate: int) -> Tensor:
    """For every query one of its block of neighbours, with replacement: int64 [count]."""
    entry = torch.arange(count)
    first = entry // _NEIGHBOURS * _NEIGHBOURS
    size = (count - first).clamp(max=_NEIGHBOURS)
    drawn = keys.uniform(seed, "stages: replicate", entry, replicate).double()
    return first + (drawn * size).long().clamp(max=_NEIGHBOURS - 1)
