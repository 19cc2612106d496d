"""Milliseconds of single calls, for plans under a budget of time, and of whole plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from gearshift.evaluation.throughput import interleave
from gearshift.execution.cost import CostTable
from gearshift.execution.plan import FULL
from gearshift.planning.choices import Choice, Menu
from gearshift.runtime.progress import Progress
from gearshift.sampling.loop import Sampler


class TimedCosts:
    """What every choice of a menu takes at one call of each path, in milliseconds per image: medians, interleaved.

    The network's work does not depend on the noise level, so one call stands for all that take its path.
    """

    def __init__(self, sampler: Sampler, menu: Menu, batch: int, rounds: int, bar: Progress) -> None:
        index = torch.arange(batch, device=sampler.device)
        stepper = replace(sampler, chunk=batch).stepper(index, menu.keys)
        run, calls = stepper.run, stepper.calls
        levels = torch.tensor([call.log_snr for call in calls], dtype=torch.float64)
        self.paths: list[int] = run.network.route(levels).tolist()
        choices = menu.all()
        stands = {path: max(k for k, own in enumerate(self.paths) if own == path) for path in set(self.paths)}
        bar.total = len(choices) * len(stands) * (rounds + 1)
        self._ms: dict[tuple[int, Choice], float] = {}
        with torch.inference_mode():
            point = stepper.begin()
            for call in calls:
                path = self.paths[call.position]
                if call.position == stands[path] and call.position > 0:
                    here = point.fork()

                    def method(choice: Choice) -> Callable[[], object]:
                        plan = choice.plan(run)
                        return lambda: stepper.step(here.fork(), call, plan)  # noqa: B023  # timed before the next call

                    methods = {str(k): method(choice) for k, choice in enumerate(choices)}
                    timings, _ = interleave(methods, rounds, sampler.device, warmup=1, on_run=lambda _: bar.update(1))
                    for k, choice in enumerate(choices):
                        self._ms[path, choice] = 1000 * timings[str(k)].median / batch
                point, _, _ = stepper.step(point, call, FULL)

    def cost_of(self, position: int, choice: Choice) -> float:
        """Milliseconds per image of one call; a choice whose parts are not there costs what full compute does."""
        path = self.paths[position]
        known = self._ms.get((path, choice))
        if known is None:
            known = self._ms.get((path, replace(choice, forecast=False)))
        if known is None:
            known = max(ms for (own, _), ms in self._ms.items() if own == path)
        return known


def ms_per_image(sampler: Sampler, table: CostTable, batch: int, rounds: int) -> float:
    """Median milliseconds per image of whole generations."""
    index = torch.arange(batch, device=sampler.device)
    own = replace(sampler, chunk=batch)
    timings, _ = interleave({"plan": lambda: own.generate(index, table)}, rounds, sampler.device, warmup=1)
    return 1000 * timings["plan"].median / batch
