"""One generation of a pipeline under a policy: decides once per step of the scheduler, and counts what happened.

The scheduler is the clock. A step begins with the first model that is called after the last `step`, and all models and
branches of a step share its decision. What was not foreseen is computed in full.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gearshift.execution.memory import Key, Memory
from gearshift.execution.plan import FULL, StepPlan
from gearshift.execution.stream import Rows
from gearshift.integrations.diffusers import trees
from gearshift.integrations.diffusers.beside import Beside
from gearshift.integrations.diffusers.clock import Clock, number
from gearshift.integrations.diffusers.compat import Forward
from gearshift.integrations.diffusers.costs import Seen
from gearshift.integrations.diffusers.held import Remembered, Work
from gearshift.integrations.diffusers.inner import Inner, awaited, check_plan, host
from gearshift.integrations.diffusers.levels import timeline
from gearshift.integrations.diffusers.observed import first_that_fits, shown_of
from gearshift.integrations.diffusers.record import Branch, Generation, Step, rows_of
from gearshift.integrations.diffusers.replay import zeros
from gearshift.integrations.diffusers.rows import Signature, first_tensor, picked, same_but_rows, shown, signature_of
from gearshift.policies.adaptive_skip import place
from gearshift.policies.base import RunInfo
from gearshift.runtime.errors import UserError

if TYPE_CHECKING:
    from gearshift.integrations.diffusers.attach import Attached

log = logging.getLogger("gearshift")


class Session:
    """One generation.

    Args:
        attached: what it belongs to.
        inner: ports and processors; None where the policy needs none.
    """

    def __init__(self, attached: Attached) -> None:
        self.attached, self.network = attached, attached.network
        self.scheduler = attached.scheduler
        self.clock = Clock(self.scheduler)
        self.inner: Inner | None = None
        self.record = Generation(self.network, attached.policy.name, table=attached.table)
        self.plan: StepPlan | None = None
        self.replay = attached.replay
        self.step: Step | None = None
        self.skips = True
        self.remembered: dict[str | int, Remembered] = {}
        self.kept: dict[str | int, tuple[Signature, Memory]] = {}
        self._signatures: dict[str | int, Signature] = {}
        self.beside = Beside(self)
        self._guided: Any = None
        self._row: tuple[int, ...] = ()
        self.path: int | None = None
        self._warned = False
        self.broken = False
        self._store: list[frozenset[Key]] | None = None
        self._keys: frozenset[Key] = frozenset()
        self._started = False

    # The run ---------------------------------------------------------------------------------------------------------

    def _open(self, batch: int, branches: int | None) -> None:
        """Tell the policy about the run; before a step was made nothing says how many branches guidance has (None)."""
        found = timeline(self.scheduler, self.clock.first)
        device = next(iter(self.network.parameters())).device.type
        network: Any = self.network  # it is run by its own library
        frame = found.sigma_frame, device, found.held
        self.run = RunInfo(found.calls, network, batch, branches or 1, *frame)
        policy = self.attached.policy.resolved(self.run)
        possible = (1, 2, 3) if branches is None else (branches,)
        self.run = first_that_fits(policy, [replace(self.run, branches=count) for count in possible])
        self.policy = policy
        self.state = policy.begin(self.run)
        self.plans = [policy.plan(self.state, call) for call in found.calls] if policy.static else None
        for plan in self.plans or ():
            check_plan(plan, self.network)
        self.skips = self.plans is None or any(plan.call is not True for plan in self.plans)
        self.record.policy, self.record.expected, self.record.calls = policy.name, len(found.calls), found.calls
        reuse = policy.memory_keys(self.run)
        deep = any(p.depth is not None or p.bypass for p in self.plans or ())
        self.inner = self.attached.inner_for(reuse, deep)
        if self.inner is not None:
            self._keys = self.inner.memory_keys(reuse)
            if self.plans is not None and self._keys:
                self._store = awaited(self.inner, self.plans, self._path_at)

    def _path_at(self, position: int) -> int:
        level = torch.tensor([self.run.calls[position].log_snr], dtype=torch.float64)
        return int(self.network.route(level)[0])

    @property
    def over(self) -> bool:
        """Whether every step was made."""
        return self._started and self.clock.made >= len(self.run.calls)

    def expects(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call can be of this generation."""
        return not self._started or self.clock.is_ours(args, kwargs)

    # Decisions -------------------------------------------------------------------------------------------------------

    def decide(self, path: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepPlan:
        """What this step computes; `path` is the denoiser that is called, None for a helper."""
        if not self._started:
            self.clock.guess_first(args, kwargs)
            self._open(first_tensor(args, kwargs).shape[0], None)
            self._started = True
        if self.plan is None:
            self._begin_step()
        assert self.plan is not None
        if path is not None and self.path is not None and path != self.path:
            self.compute_all("another denoiser took over", forget=True)
        self.path = self.path if path is None else path
        return self.plan

    def _begin_step(self) -> None:
        call = self.run.calls[self.clock.made]
        self.step = Step(call)
        self.beside.begin_step()
        if self.broken:
            self.plan = FULL
            return
        self.plan = self.policy.plan(self.state, call) if self.plans is None else self.plans[self.clock.made]
        if self.plans is None:
            check_plan(self.plan, self.network)
            if self.plan.depth is not None or self.plan.bypass:
                self.inner = self.attached.inner_for((), True)
        guided = self.attached.guided()
        if self._guided is not None and guided != self._guided:
            self.compute_all("guidance was switched", forget=True)
        self._guided = guided

    def compute_all(self, reason: str, *, forget: bool = False) -> None:
        """Make this step full compute, and say why in the ledger; `forget` what is held of the steps before."""
        assert self.step is not None
        self.plan, self.step.forced = FULL, reason
        if forget:
            self.forget()

    def fall_back(self, reason: str) -> None:
        """Something is not as it should be: compute everything from here on, and say so once."""
        self.broken = True
        self.plan = FULL
        self.forget()
        if self.inner is not None:
            self.inner.calm()
        if not self._warned:
            self._warned = True
            self.record.notes.append(f"full compute from step {self.clock.made} on: {reason}")
            log.warning("%s: %s; the rest of this generation is computed in full", self.record.policy, reason)

    def forget(self) -> None:
        """Drop predictions and memory."""
        self.remembered, self.kept = {}, {}

    # Models ----------------------------------------------------------------------------------------------------------

    def denoise(
        self, path: int, module: nn.Module, branch: str | None, inner: Forward, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """A denoiser: call it, call it for some rows, or leave it out."""
        if self.replays:
            return self._replayed(path, args, kwargs)
        work = self.safely(lambda: self._prepared(path, module, branch, args, kwargs))
        if work is None:
            output = inner(*args, **kwargs)
            self._computed_after_all(path, output)
            return output
        if work.output is not None:
            return work.output
        try:
            output = inner(*work.args, **work.kwargs)
            finished = self.safely(lambda: self._finished(work, output))
        finally:
            if self.inner is not None:
                self.inner.calm()
        if finished is not None:
            return finished
        # Something went wrong afterwards; of some rows alone there is no output to return.
        output = output if work.rows.index is None else inner(*args, **kwargs)
        self._computed_after_all(path, output)
        return output

    @property
    def replays(self) -> bool:
        """Whether this call was made before."""
        return self.replay is not None and self.replay.replays(self.clock.made)

    def _replayed(self, path: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        self.decide(path, args, kwargs)
        assert self.step is not None and self.replay is not None
        self._row = tuple(x.shape[1:])
        self.step.branches.append(Branch(path, host(False, len(x)), FULL))
        return zeros(self.replay.outputs[path], x.device)

    def _computed_after_all(self, path: int, output: Any) -> None:
        """A call that was made without us."""
        first = next(trees.tensors(output), None)
        if self.step is not None and first is not None:
            self.step.branches.append(Branch(path, host(True, len(first)), FULL))

    def _prepared(
        self, path: int, module: nn.Module, branch: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Work:
        """All that is decided before a denoiser is called."""
        x = first_tensor(args, kwargs)
        plan, self._row, rows = self.decide(path, args, kwargs), tuple(x.shape[1:]), x.shape[0]
        assert self.step is not None
        key: str | int = len(self.step.branches) if branch is None else branch
        signature = signature_of(args, kwargs)
        before = self.remembered.get(key)
        last = self._signatures.get(key, signature)
        self._signatures[key] = signature
        if last != signature:
            if same_but_rows(last, signature):
                self.compute_all("the number of rows changed", forget=True)
            else:
                self.fall_back(f"the denoiser was called with {shown(last)}, and now with {shown(signature)}")
            before, plan = None, FULL
        called = self._called(plan, rows, before, path)
        work = Work(path, key, signature, plan, before, called, args, kwargs, Rows(rows))
        if not bool(called.any()):
            assert before is not None  # only such rows are not called
            self.step.branches.append(Branch(path, called, plan))
            output = before.reproduced(~called, self._at(), bool(plan.forecast))
            return replace(work, output=output)
        if plan.call is False:
            self.step.forced = "nothing is held yet"
        return self._to_be_computed(work, module)

    def _to_be_computed(self, work: Work, module: nn.Module) -> Work:
        """With the ports told what to do, and the inputs of the rows that are evaluated."""
        name = self.attached.denoiser_names[work.path]
        if name not in self.record.seen:
            self.record.seen[name] = Seen.of(module, work.args, work.kwargs, work.rows.total)
        if not bool(work.called.all()):
            rows = Rows(work.rows.total, work.called.nonzero().flatten())
            args, kwargs = picked(module, work.args, work.kwargs, rows.host(), rows.total)
            work = replace(work, args=args, kwargs=kwargs, rows=rows)
        own = frozenset(key for key in work.plan.reuse if key[0] in self.network.paths[work.path])
        possible = replace(work.plan, call=True, reuse=frozenset() if self.inner is None else own)
        if self.inner is not None:
            memory = self._memory(work.key, work.signature, work.rows.total)
            if memory is not None:
                memory.begin_call(None if self._store is None else self._store[self.clock.made])
            possible = self.inner.possible(possible, memory, work.rows)
            assert self.step is not None
            if len(possible.reuse) < len(own) and self.step.forced is None:
                missing = len(own) - len(possible.reuse)
                self.step.forced = f"{missing} layers had nothing to take from memory"
            hits = self.inner.set(possible, work.path, memory, work.rows)
            work = replace(work, memory=memory, hits=tuple(hits))
        self.beside.check(possible)
        return replace(work, plan=possible)

    def _called(self, plan: StepPlan, rows: int, before: Remembered | None, path: int) -> Tensor:
        """Rows of a call that are evaluated, host bool [rows]."""
        if plan.call is True or before is None or before.path != path:
            return host(True, rows)
        asked: bool | Tensor = plan.call
        if isinstance(asked, Tensor):
            assert self.step is not None
            done = sum(len(branch.called) for branch in self.step.branches)
            asked = asked[done : done + rows]
            if len(asked) != rows:
                return host(True, rows)
        return host(asked, rows) | ~before.held[0].valid

    def _finished(self, work: Work, output: Any) -> Any:
        """Keep what later calls take from this one, and give all rows back."""
        assert self.step is not None
        if self.inner is not None:
            self.inner.harvest(work.path, work.memory, work.rows)
            self.record.hits.update(work.hits)
            if work.memory is not None and self._store is not None:
                work.memory.drop(self._keys - self._store[self.clock.made])
        everything = work.rows.index is None
        if self.skips and not self.broken:
            channels = work.signature[0][1] if len(work.signature[0]) > 1 else 0
            remembered = Remembered.of(
                work.path, output, work.before, work.called, self._at(), channels, self.policy.forecasts
            )
            self.remembered[work.key] = remembered
            if not everything:
                extrapolated = self.plan is not None and bool(self.plan.forecast)
                output = remembered.reproduced(~work.called, self._at(), extrapolated)
        self.step.branches.append(Branch(work.path, work.called, work.plan))
        self.attached.outputs[work.path] = trees.describing(output)
        return output

    def _memory(self, key: str | int, signature: Signature, rows: int) -> Memory | None:
        if not self._keys or self.broken:
            return None
        known = self.kept.get(key)
        if known is None or known[0] != signature:
            known = signature, Memory(rows, self._keys)
            self.kept[key] = known
        return known[1]

    def safely(self, action: Callable[[], Any]) -> Any:
        """What an action returns; None, and full compute from here on, where it fails for no reason that we foresaw."""
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            if os.environ.get("GEARSHIFT_DEBUG") == "1":
                raise
            self.fall_back(f"unexpected {type(error).__name__}: {' '.join(str(error).split())}")
            return None

    def memories(self) -> list[Memory]:
        """Of every branch."""
        return [memory for _, memory in self.kept.values()]

    def _at(self) -> float:
        assert self.step is not None
        return place(self.run, self.step.call.alpha, self.step.call.sigma)

    # The scheduler ---------------------------------------------------------------------------------------------------

    def stepped(self, sample: Tensor, output: Tensor, timestep: Any, after: Tensor) -> None:
        """The scheduler has made a step."""
        if self.step is None or not self._started:
            return
        replayed = self.replays
        self.safely(lambda: self._looked(sample, output, timestep, after))
        self.clock.made += 1
        if self.replay is not None and not replayed:
            self.replay.note(self, after)
        self.plan, self.step = None, None
        if self.over:
            self.close()

    def _looked(self, sample: Tensor, output: Tensor, timestep: Any, after: Tensor) -> None:
        assert self.step is not None
        if not self.record.steps:
            self._settle_first(sample, timestep)
        elif self.clock.made == 1 and self.clock.began_later(timestep):
            self._open(self.run.batch, self.run.branches)
            self.record.steps[0].call, self.step.call = self.run.calls[:2]
        elif not self.broken and not self.clock.is_now(timestep):
            self.fall_back(f"the scheduler stepped at {number(timestep):g} where {self.clock.now:g} was next")
        step = self.step
        held: list[Any] = [*self.remembered.values(), *self.memories()]
        step.kept_bytes = sum(one.num_bytes for one in held)
        self.record.steps.append(step)
        if not self.policy.static and not self.broken and not self.replays:
            self._observe(step, sample, output, after)

    def _settle_first(self, sample: Tensor, timestep: Any) -> None:
        """Now that a step was made it is known how many samples and branches there are, and where it began."""
        assert self.step is not None
        wrong = self.clock.settle_first(timestep)
        rows = sum(len(branch.called) for branch in self.step.branches)
        # Pipelines of video may step with the frames of all samples in a row.
        framed = len(self._row) == sample.ndim
        batch = sample.numel() // math.prod(self._row) if framed else len(sample)
        if batch % 2 == 0 and self.attached.steps_with_branches and torch.equal(*sample.chunk(2)):
            batch //= 2
        self.record.batch = max(batch, 1)
        if wrong is None and (rows == 0 or batch == 0 or rows % batch or len(sample) % batch):
            wrong = f"the denoiser was called for {rows} rows, and there are {len(sample)} latents"
        if wrong is not None:
            self.fall_back(wrong)
        else:
            self._open(batch, rows // batch)
            self.step.call = self.run.calls[0]

    def _observe(self, step: Step, sample: Tensor, output: Tensor, after: Tensor) -> None:
        called, batch = rows_of(step.branches), self.run.batch
        if len(called) % batch or len(called) > self.run.num_rows:
            self.fall_back(f"the denoiser was called for {len(called)} rows, and there are {batch} samples")
            return
        before, following, seen = shown_of(self.run, step.call, called, sample, output, after)
        self.state = self.policy.observe(self.state, step.call, before, following, seen)

    def close(self) -> None:
        """The generation is over, or was broken off: free what was held."""
        if self._started and not self.record.record:
            self.record.record = self.policy.record(self.state)
        self.forget()
        if self.inner is not None:
            self.inner.calm()
