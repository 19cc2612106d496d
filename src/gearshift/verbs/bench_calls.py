"""Single calls under a policy against full ones, at calls that stand for the whole run.

The solver's calls are cut into equal parts, and the middle of each is timed at the x the full computation has there,
with the prediction held and the memory filled by a full call before it. A policy whose plans are known beforehand may
plan several things within one part (every third call skipped): each is timed, and counts as often as it is planned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser, Held, Prediction
from gearshift.diffusion.solvers.base import Call, Solver
from gearshift.evaluation.speed import saving_realised
from gearshift.evaluation.throughput import Timing, interleave
from gearshift.execution.cost import CostTable
from gearshift.execution.memory import Key, Memory
from gearshift.execution.plan import FULL, StepPlan
from gearshift.policies import Full, Policy
from gearshift.policies.base import RunInfo
from gearshift.runtime import keys
from gearshift.runtime.progress import Progress
from gearshift.sampling.stepping import worth_storing


@dataclass(frozen=True)
class _Before:
    """What the full computation leaves for a call: its x, and call, x and prediction before it (at the first: its own).

    states: by policy, where it stands when all calls before were computed.
    """

    x: Tensor
    call: Call
    earlier_x: Tensor
    held: Held
    states: dict[str, Any]


@dataclass(frozen=True)
class _Share:
    """One plan of a policy within a part: at the middle call, counting for `count` calls."""

    plan: StepPlan
    store: frozenset[Key] | None
    count: int


class CallBench:
    """Times single calls.

    Attributes:
        calls: those that are timed.
        counts: how many calls of the run each of them stands for.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: Solver,
        cfg: DictConfig,
        table: CostTable,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.denoiser, self.solver, self.cfg, self.table = denoiser, solver, cfg, table
        self.device, self.dtype = device, dtype
        network = denoiser.network
        self.every = solver.calls(denoiser.process)
        branches = denoiser.num_branches(cfg.guidance)
        self.info = RunInfo(self.every, network, cfg.batch, branches, solver.sigma_frame, device.type)
        count = min(cfg.strata, len(self.every))
        # Middles of equal parts: no part of the trajectory stands for another.
        self.calls = [self.every[int((i + 0.5) * len(self.every) / count)] for i in range(count)]
        edges = [int(i * len(self.every) / count + 0.5) for i in range(count + 1)]
        self.parts = [self.every[low:high] for low, high in itertools.pairwise(edges)]
        self.index = torch.arange(cfg.batch, device=device)
        self.cond = network.example_cond(cfg.batch, device)
        if network.num_classes is not None:
            self.cond = self.index % network.num_classes

    def _predict(self, call: Call, x: Tensor, plan: StepPlan, **kept: Any) -> Prediction:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found: Prediction = self.denoiser.predict(
                x, call.time, self.cond, plan=plan, guidance=self.cfg.guidance, level=(call.alpha, call.sigma), **kept
            )
        return found

    def _trajectory(self, policies: dict[str, Policy], states: dict[str, Any]) -> dict[int, _Before]:
        """By position of the timed calls, what lies before them."""
        solver, network = self.solver, self.denoiser.network
        shape = (network.in_channels, network.image_size, network.image_size)
        state = solver.begin(self.denoiser.process, keys.normal(self.cfg.seed, "init_noise", self.index, 0, shape))
        wanted = {call.position for call in self.calls}
        earlier = any(policy.forecasts for policy in policies.values())
        found: dict[int, _Before] = {}
        last: tuple[Call, Tensor, Held] | None = None
        with Progress(len(self.every), "trajectory", unit="calls") as progress:
            for call in self.every:
                x, stood = solver.network_input(state, call), dict(states)
                noise = None
                if call.needs_noise:
                    noise = keys.normal(self.cfg.seed, "step_noise", self.index, call.position, shape)
                held = None if last is None else last[2]
                prediction = self._predict(call, x, FULL, held=held, keep_earlier=earlier)
                state = solver.advance(state, call, prediction.eps, variance=prediction.variance, noise=noise)
                for key, policy in policies.items():
                    if not policy.static:
                        states[key] = policy.observe(states[key], call, x, solver.result(state), prediction)
                now = (call, x, prediction.held)
                if call.position in wanted:
                    found[call.position] = _Before(x, *(last or now), stood)
                last = now
                progress.update(1)
        return found

    @torch.inference_mode()
    def run(self, policies: dict[str, Policy]) -> tuple[list[dict[str, Any]], float | None]:
        """A row per policy, and the share of CPU time that other processes took."""
        everything: dict[str, Policy] = {"full": Full(), **policies}
        states = {}
        for key, policy in everything.items():
            policy.check(self.info)
            everything[key] = policy.resolved(self.info)
            states[key] = everything[key].begin(self.info)
        before = self._trajectory(everything, dict(states))
        shares = {
            key: [
                self._shares(policy, states[key], k, before[call.position].states[key])
                for k, call in enumerate(self.calls)
            ]
            for key, policy in everything.items()
        }
        macs = dict.fromkeys(everything, 0)
        times: dict[str, list[list[Timing]]] = {key: [] for key in everything}
        busiest: float | None = None
        passes = sum(len(part) for parts in shares.values() for part in parts)
        with Progress(passes * (self.cfg.repeats + self.cfg.warmup), "bench, interleaved", unit="calls") as progress:
            for k, call in enumerate(self.calls):
                methods: dict[str, Callable[[], Prediction]] = {}
                for key, policy in everything.items():
                    memory = self._filled(before[call.position], policy)
                    for n, share in enumerate(shares[key][k]):
                        method = self._method(call, before[call.position], share, memory, policy.forecasts)
                        macs[key] += share.count * self._macs(method())
                        methods[_named(key, n)] = method
                timings, others = interleave(
                    methods,
                    self.cfg.repeats,
                    self.device,
                    warmup=self.cfg.warmup,
                    on_run=lambda _: progress.update(1),
                )
                busiest = others if busiest is None else max(busiest, others or 0.0)
                for key in everything:
                    times[key].append([timings[_named(key, n)] for n in range(len(shares[key][k]))])
        return [self._row(policy, key, shares, times, macs) for key, policy in policies.items()], busiest

    def _shares(self, policy: Policy, state: Any, part: int, here: Any) -> list[_Share]:
        """What a policy plans within a part; where its plans follow data or a rule, that of the middle call alone."""
        middle, calls = self.calls[part], self.parts[part]
        if not policy.static:
            return [_Share(policy.plan(here, middle), None, len(calls))]
        every = [policy.plan(state, call) for call in self.every]
        store = worth_storing(self.info, every)
        found: dict[Any, _Share] = {}
        for call in calls:
            key = every[call.position].key()
            if key is None:
                return [_Share(every[middle.position], None if store is None else store[middle.position], len(calls))]
            count = found[key].count + 1 if key in found else 1
            found[key] = _Share(every[call.position], None if store is None else store[call.position], count)
        return list(found.values())

    def _filled(self, before: _Before, policy: Policy) -> Memory | None:
        """The memory that a full call before this one leaves."""
        reusable = policy.memory_keys(self.info)
        if not reusable:
            return None
        memory = Memory(self.info.num_rows, reusable)
        memory.begin_call()
        self._predict(before.call, before.earlier_x, FULL, memory=memory)
        return memory

    def _method(
        self, call: Call, before: _Before, share: _Share, memory: Memory | None, forecasts: bool
    ) -> Callable[[], Prediction]:
        held = before.held if forecasts else replace(before.held, earlier=None)

        def predict() -> Prediction:
            own = None if memory is None else memory.fork()
            if own is not None:
                own.begin_call(share.store)
            return self._predict(call, before.x, share.plan, memory=own, held=held, keep_earlier=forecasts)

        return predict

    def _macs(self, prediction: Prediction) -> int:
        return sum(self.table.of(event).macs * len(event.rows) for event in prediction.trace)

    def _row(
        self,
        policy: Policy,
        key: str,
        shares: dict[str, list[list[_Share]]],
        times: dict[str, list[list[Timing]]],
        macs: dict[str, int],
    ) -> dict[str, Any]:
        total = reference = taken = 0.0
        for own, [full], weights in zip(times[key], times["full"], shares[key], strict=True):
            # Each plan's paired ratio, weighted by how often it is planned and by what the full call takes there.
            for timing, share in zip(own, weights, strict=True):
                total += share.count * timing.ratio_of(full) * full.median
                reference += share.count * full.median
                taken += share.count * timing.median
        ratio, macs_saved = total / reference, 1 - macs[key] / macs["full"]
        return {
            "policy": policy.name,
            "ms_per_call": 1000 * taken / len(self.every),
            "macs_saved": macs_saved,
            "time_saved": 1 - ratio,
            "speedup": 1 / ratio,
            "saving_realised": saving_realised(1 - ratio, macs_saved),
            "spread": max(timing.spread for part in times[key] for timing in part),
        }


def _named(key: str, number: int) -> str:
    """A policy's plans within one part, told apart."""
    return f"{key} {number}" if number else key
