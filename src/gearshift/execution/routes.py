"""Which path of the network each row takes."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.execution.network import Network
from gearshift.execution.plan import StepPlan
from gearshift.execution.present import Mask
from gearshift.execution.stream import Rows
from gearshift.runtime.errors import UsageError


class Routes:
    """Paths of a run's rows under a plan.

    Attributes:
        used: paths that some row takes, ascending.
        only: the one path that all rows take, or None.

    Raises:
        UsageError: several paths and no expert, or an expert that is no path.
    """

    def __init__(self, backbone: Network, plan: StepPlan, rows: Rows) -> None:
        self.backbone, paths = backbone, len(backbone.paths)
        if plan.expert is None and paths > 1:
            raise UsageError(f"{backbone.name} has {paths} paths; the plan must route its rows")
        expert = 0 if plan.expert is None else plan.expert
        self.used = [expert] if isinstance(expert, int) else sorted(set(expert[rows.host()].tolist()))
        for path in self.used:
            if path not in range(paths):
                raise UsageError(f"expert {path} does not exist; {backbone.name} has {paths}")
        self.only = self.used[0] if len(self.used) == 1 else None
        self._expert = expert

    def split(self, rows: Rows, mask: Mask = True) -> list[tuple[int, Tensor | None]]:
        """(path, positions in `rows`) for each path that some row (of those in `mask`) takes; None where these are all
        of the rows."""
        if mask is False:
            return []
        if self.only is not None and mask is True:
            return [(self.only, None)]
        positions = torch.arange(len(rows)) if mask is True else mask.nonzero().flatten()
        if isinstance(self._expert, int) or self.only is not None:
            return [(self.used[0], _unless_all(positions, rows))] if len(positions) else []
        paths = self._expert[rows.host()[positions]]
        return [(path, _unless_all(positions[paths == path], rows)) for path in sorted(set(paths.tolist()))]

    def targets(self, rows: Rows, wanted: int | Tensor | None) -> int | Tensor:
        """Depth at which each row leaves at the latest, where a plan wants `wanted`: one for all, or host int64 [n].

        Raises:
            UsageError: a depth that is no exit of a row's path.
        """
        backbone = self.backbone
        deepest = max(backbone.num_blocks(path) for path in range(len(backbone.paths)))
        parts = self.split(rows)
        if len(parts) == 1:
            return self._target(parts[0][0], rows, wanted, deepest)
        targets = torch.empty(len(rows), dtype=torch.int64)
        for path, here in parts:
            assert here is not None  # of several paths none has all rows
            targets[here] = self._target(path, rows.take(here), wanted, deepest)
        first = int(targets[0])
        return first if bool((targets == first).all()) else targets

    def _target(self, path: int, rows: Rows, wanted: int | Tensor | None, deepest: int) -> int | Tensor:
        """`targets` of rows that all take `path`."""
        full = self.backbone.num_blocks(path)
        if wanted is None:
            return full
        asked = wanted if isinstance(wanted, int) else wanted[rows.host()]
        depths = {asked} if isinstance(asked, int) else set(asked.tolist())
        for depth in depths:
            # One number for all paths may be more than a short one has: that row runs to its end.
            if not full < depth <= deepest:
                self.backbone.check_depth(depth, path)
        return min(*depths, full) if isinstance(asked, int) or len(depths) == 1 else asked.clamp(max=full)


def _unless_all(positions: Tensor, rows: Rows) -> Tensor | None:
    return None if len(positions) == len(rows) else positions
