"""How often a policy waits for the device: within a call only where an exit rule is asked, and at most once between two
calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from gearshift.diffusion.denoiser import Denoiser, Prediction
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers.base import Call
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.execution import asking
from gearshift.execution.exits import ExitView
from gearshift.execution.outputs import PACK, Packing
from gearshift.execution.plan import StepPlan
from gearshift.policies import AdaptiveSkip, AttentionReuse, Compose, DeepFeatureReuse, Full, Policy, RunInfo, SkipEvery
from gearshift.policies.adaptive_skip import CRITERIA, DECISIONS
from gearshift.sampling.loop import Sampler, sample_chunk

from ..contract import build, cost_table
from .test_loop import Script

STEPS, B = 8, 12
OVERLAP = Packing(overlap=True)
LOOKING: list[Policy] = [
    AdaptiveSkip(0.2, criterion=criterion, decision=decision, max_skip_steps=2, warmup_steps=3, tail_steps=0)
    for criterion in CRITERIA
    for decision in DECISIONS
]
STATIC: list[Policy] = [
    SkipEvery(2, extrapolate=True),
    AttentionReuse(interval=2, operator="qk"),
    AttentionReuse(last=4, operator="output"),
    DeepFeatureReuse(interval=2),
]


def sampler(policy: Policy) -> Sampler:
    return Sampler(Denoiser(build("uvit-class"), Discrete(DiscreteConfig())), DDIM(DDIMConfig(STEPS)), policy, chunk=3)


@pytest.mark.parametrize("policy", LOOKING, ids=lambda policy: f"{policy.criterion}-{policy.decision}")
def test_a_decision_asks_the_device_once(policy: AdaptiveSkip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where the only way from the device to the host lies: item() and cpu() of a device tensor."""
    asked: list[str] = []
    plain = {name: getattr(torch.Tensor, name) for name in ("cpu", "item")}
    observe = AdaptiveSkip.observe

    def watched(self: AdaptiveSkip, *arguments: Any) -> Any:
        before = len(asked)
        with monkeypatch.context() as patch:
            for name, method in plain.items():
                patch.setattr(torch.Tensor, name, lambda t, n=name, m=method: (asked.append(n), m(t))[1])
            state = observe(self, *arguments)
        assert len(asked) - before <= 1
        return state

    monkeypatch.setattr(AdaptiveSkip, "observe", watched)
    s = sampler(policy)
    chunk = sample_chunk(s, torch.arange(3), cost_table(s.denoiser.network))
    assert not chunk.ledger.called.all(), "a policy that never fires decides nothing"
    assert 0 < len(asked) <= STEPS


# Exit rules ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Below:
    """Rows leave below a threshold of the head's mean; `ended` are the depths of the last call's rows."""

    threshold: float
    ended: frozenset[int]

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return exits[:-1]

    def quiet(self, exits: tuple[int, ...]) -> Collection[int]:
        """Depths that rows passed, and none left at."""
        return [d for d in self.depths(exits) if d not in self.ended and d < max(self.ended, default=0)]

    def begin(self, num_rows: int) -> None:
        return None

    def leaves(self, view: ExitView, state: Any) -> torch.Tensor:
        return view.uncertainty() < self.threshold


@dataclass(frozen=True)
class Learning(Policy):
    """Expects of every depth what it saw at the last call that ran anybody."""

    threshold: float
    static: ClassVar[bool] = False

    def begin(self, run: RunInfo) -> frozenset[int]:
        return frozenset()

    def plan(self, state: frozenset[int], call: Call) -> StepPlan:
        return StepPlan(exit=Below(self.threshold, state))

    def observe(
        self, state: frozenset[int], call: Call, before: torch.Tensor, after: torch.Tensor, prediction: Any
    ) -> frozenset[int]:
        return frozenset(prediction.depth[prediction.called].tolist()) or state


def exiting(policy: Policy, packing: Packing = PACK, device: str = "cpu") -> Sampler:
    denoiser = Denoiser(build("exits-isotropic"), Discrete(DiscreteConfig(beta_end=0.004))).to(device)
    return Sampler(denoiser, DDIM(DDIMConfig(STEPS)), policy, chunk=B, guidance=2.0, packing=packing)


def threshold() -> float:
    """One that some rows fall below, at some depths and calls."""
    seen: list[torch.Tensor] = []
    exits = build("exits-isotropic").exits()
    s = exiting(Script((StepPlan(taps=exits),) * STEPS))
    table = cost_table(s.denoiser.network)
    sample_chunk(
        s, torch.arange(B), table, on_prediction=lambda _, p: seen.extend(u.flatten() for u in p.uncertainty.values())
    )
    # The mean over a map spreads less than the map.
    means = torch.stack([u.reshape(2 * B, -1).mean(1) for u in seen])
    return float(means.quantile(0.2))


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every wait of an exit rule: "at once", or "late" where the next block had been launched."""
    found: list[str] = []
    send, wait = asking.send, asking.wait
    late: list[Any] = []

    def sent(mask: torch.Tensor) -> Any:
        late.append(mask)
        return send(mask)

    def waited(mask: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append("late" if rest and (rest[0] is not None or any(mask is one for one in late)) else "at once")
        return wait(mask, *rest)

    monkeypatch.setattr(asking, "send", sent)
    monkeypatch.setattr(asking, "wait", waited)
    return found


@pytest.mark.parametrize("skipping", [False, True])
def test_what_is_expected_is_looked_at_late(looked: list[str], skipping: bool) -> None:
    at = threshold()
    policy: Policy = Compose([SkipEvery(2), Learning(at)]) if skipping else Learning(at)
    chunks = []
    for packing in (OVERLAP, PACK):
        looked.clear()
        s = exiting(policy, packing)
        table = cost_table(s.denoiser.network)
        predictions: list[Prediction] = []
        chunk = sample_chunk(s, torch.arange(B), table, on_prediction=lambda _, p, to=predictions: to.append(p))
        asked = [{e.index for e in p.trace if e.kind == "uncertainty"} for p in predictions]
        assert len(looked) == sum(len(depths) for depths in asked)  # one per asked depth
        chunks.append((chunk, list(looked), predictions))
    late, plain = chunks
    assert set(plain[1]) == {"at once"} and "late" in late[1]
    first = {e.index for e in late[2][0].trace if e.kind == "uncertainty"}
    assert late[1][: len(first)] == ["at once"] * len(first), "nothing is known at the first call"
    assert (late[0].ledger.depth == plain[0].ledger.depth).all() and (
        late[0].ledger.called == plain[0].ledger.called
    ).all()
    assert len(set(plain[0].ledger.depth[plain[0].ledger.called].tolist())) > 1
    torch.testing.assert_close(late[0].images, plain[0].images, rtol=1e-4, atol=1e-4)
    assert (late[0].ledger.macs >= plain[0].ledger.macs).all()


def test_where_nobody_leaves_only_the_first_call_waits(looked: list[str]) -> None:
    s = exiting(Learning(0.0), OVERLAP)
    table = cost_table(s.denoiser.network)
    chunk = sample_chunk(s, torch.arange(B), table)
    exits = len(s.denoiser.network.exits()) - 1
    assert looked == ["at once"] * exits + ["late"] * exits * (STEPS - 1)
    full = sample_chunk(exiting(Full()), torch.arange(B), table)
    assert torch.equal(chunk.images, full.images)
    assert (chunk.ledger.depth == full.ledger.depth).all()


# On a device ---------------------------------------------------------------------------------------------------------


def told(run: Callable[[], Any]) -> int:
    """How often torch says that the host waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len(seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_waits_of_an_exit_rule_on_a_gpu(looked: list[str]) -> None:
    """torch tells of the waits at once; those for an event, which the device reaches while it runs the next block, it
    does not count."""
    try:
        at = threshold()
        index, table = torch.arange(B, device="cuda"), cost_table(build("exits-isotropic"))

        def extra(policy: Policy, packing: Packing) -> int:
            runs = [exiting(one, packing, "cuda") for one in (policy, Full())]
            for s in runs:
                sample_chunk(s, index, table)  # the first uploads, and finds its kernels
            counts = []
            for s in runs[::-1]:
                looked.clear()
                counts.append(told(lambda s=s: sample_chunk(s, index, table)))
            return counts[1] - counts[0]

        for below in (0.0, at):
            assert extra(Learning(below), PACK) == looked.count("at once")
            assert "late" in looked
            assert extra(Learning(below), Packing(overlap=False)) == len(looked) == looked.count("at once")
        late, plain = (
            sample_chunk(exiting(Learning(at), packing, "cuda"), index, table)
            for packing in (PACK, Packing(overlap=False))
        )
        assert (late.ledger.depth == plain.ledger.depth).mean() > 0.9  # kernels round by the number of rows
    finally:
        build("exits-isotropic").to("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [Full(), *LOOKING, *STATIC], ids=lambda policy: policy.name)
def test_waits_on_a_gpu(policy: Policy) -> None:
    """torch tells of every wait. What full compute waits for (its first upload) all others wait for too."""

    def waits(one: Policy) -> int:
        s = sampler(one)
        s = replace(s, denoiser=s.denoiser.to("cuda"))
        index = torch.arange(3, device="cuda")
        table = cost_table(build("uvit-class"))
        sample_chunk(s, index, table)
        return told(lambda: sample_chunk(s, index, table))

    try:
        extra = waits(policy) - waits(Full())
    finally:
        build("uvit-class").to("cpu")
    assert extra <= (STEPS if not policy.static else 0)
