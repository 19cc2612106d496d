"""A plan found beforehand (`gearshift plan`): what every call of one run computes, as data.

A plan belongs to the calls it was made for: the same solver and number of steps on the same process, the same network
and the same number of guidance branches.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.parts import parts_of
from gearshift.execution.plan import PARTS, SCOPED, StepPlan
from gearshift.policies.base import Policy, RunInfo, check_depths
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError

AGAIN = "make a plan for this run (gearshift plan)"
SAME_LEVEL = 1e-4
"""Difference of log-SNR up to which two calls are at one noise level."""


@dataclass(frozen=True)
class Planned(Policy):
    """One decision per call.

    Attributes:
        file: that `gearshift plan` wrote, instead of the fields below.
        network, blocks: name and number of blocks of the network it was made for.
        solver: that it was made under; shown, the levels decide.
        log_snr: of every call.
        branches: guidance branches of the run.
        call: branches evaluated at each call: all of them, 1 (the conditional one alone) or 0 (none); the others take
            their last prediction.
        depth: blocks run at each call that is evaluated; 0 is all of them.
        reuse: at each call, block to the part that is taken from memory.
        forecast: at each call, whether branches that are not evaluated continue the line through their last two
            predictions (1) or take the last one as it is (0). Empty: they all take the last.
    """

    file: str | None = None
    network: str = ""
    blocks: int = 0
    solver: str = ""
    log_snr: list[float] = field(default_factory=list)
    branches: int = 1
    call: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    reuse: list[dict[int, str]] = field(default_factory=list)
    forecast: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.file is not None:
            self._read(self.file)
        if not self.call:
            raise UsageError("policy Planned has no plan; name a file of gearshift plan (policy.file=FILE)")
        if not self.forecast:
            object.__setattr__(self, "forecast", [0] * len(self.call))
        lengths = {name: len(getattr(self, name)) for name in ("log_snr", "call", "depth", "reuse", "forecast")}
        if len(set(lengths.values())) != 1:
            listed = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise UsageError(f"policy Planned needs one entry per call in each list, and has {listed}")
        wrong = sorted({value for value in self.call if not 0 <= value <= self.branches})
        if wrong:
            raise UsageError(f"policy Planned: call={wrong} branches, but it is a plan for {self.branches}")
        if self.call[0] != self.branches:
            raise UsageError("policy Planned: the first call must evaluate every branch; there is nothing to hold yet")
        parts = sorted({part for taken in self.reuse for part in taken.values()} - {*PARTS, *SCOPED})
        if parts:
            raise UsageError(f"policy Planned reuses {parts}; the parts are {', '.join(PARTS)}")
        if self.reuse[0]:
            raise UsageError("policy Planned: the first call has nothing to reuse")

    def _read(self, path: str) -> None:
        from omegaconf import DictConfig, OmegaConf

        beside = [one.name for one in fields(self) if one.name != "file" and getattr(self, one.name) != _default(one)]
        if beside:
            raise UsageError(
                f"policy Planned: file={path} and fields of a plan ({', '.join(beside)}) are given; keep one of them"
            )
        try:
            node = OmegaConf.load(Path(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"file={path} cannot be read ({error}); name a file of gearshift plan") from error
        except Exception as error:  # YAML's own errors have no common base with OmegaConf's
            raise UsageError(f"file={path} is no YAML ({str(error).splitlines()[0]})") from error
        wanted = f"{type(self).__module__}.{type(self).__qualname__}"
        tree = config.plain(node) if isinstance(node, DictConfig) else {}
        if tree.get(config.TARGET) not in (wanted, "gearshift.policies.Planned"):
            raise UsageError(f"file={path} is no plan: it does not say {config.TARGET}: gearshift.policies.Planned")
        if tree.get("file") is not None:
            raise UsageError(f"file={path} names another plan; name that one")
        read: Any = config.parse(
            {str(key): value for key, value in tree.items() if key != config.TARGET}, Planned, path=path, owner=Planned
        )
        for one in fields(self):
            object.__setattr__(self, one.name, getattr(read, one.name))

    @property
    def name(self) -> str:
        return f"plan ({sum(map(bool, self.call))} of {len(self.call)} calls)"

    @property
    def forecasts(self) -> bool:
        return any(self.forecast)

    def fits(self, network: Network) -> None:
        if (network.name, len(network.blocks)) != (self.network, self.blocks):
            raise UsageError(
                f"policy Planned was made for {self.network} with {self.blocks} blocks, and this run has "
                f"{network.name} with {len(network.blocks)}; {AGAIN}"
            )
        check_depths(network, sorted(set(self.depth) - {0}), "policy Planned")
        there = parts_of(network)
        for taken in self.reuse:
            for key in taken.items():
                if key not in there:
                    raise UsageError(
                        f"policy Planned takes {key[1]} of block {key[0]} from memory, which {network.name} lacks; "
                        f"{AGAIN}"
                    )

    def check(self, run: RunInfo) -> None:
        self.fits(run.network)
        if len(run.calls) != len(self.call):
            raise UsageError(
                f"policy Planned was made for {len(self.call)} calls of {self.solver}, and this run has "
                f"{len(run.calls)}; take the same solver and steps, or {AGAIN}"
            )
        for position, (call, level) in enumerate(zip(run.calls, self.log_snr, strict=True)):
            if abs(call.log_snr - level) > SAME_LEVEL * max(1.0, abs(level)):
                raise UsageError(
                    f"policy Planned was made for calls of {self.solver}, call {position} at log-SNR {level:.4g}, and "
                    f"this run has it at {call.log_snr:.4g}; take the same solver, spacing and process, or {AGAIN}"
                )
        if run.branches != self.branches:
            guided = {1: "without guidance", 2: "with guidance"}
            raise UsageError(
                f"policy Planned was made {guided.get(self.branches)} ({self.branches} branches), and this run is "
                f"{guided.get(run.branches)} ({run.branches}); {AGAIN}"
            )

    def plan_of(self, position: int, batch: int) -> StepPlan:
        """What call `position` computes, for a batch of so many samples."""
        evaluated = self.call[position]
        flag: bool | torch.Tensor = evaluated > 0
        if 0 < evaluated < self.branches:
            flag = torch.arange(self.branches * batch) < evaluated * batch
        return StepPlan(
            call=flag,
            depth=self.depth[position] or None,
            reuse=frozenset(self.reuse[position].items()) if evaluated else frozenset(),
            forecast=int(bool(self.forecast[position])),
        )

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        return self.plan_of(call.position, state.batch)


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()
