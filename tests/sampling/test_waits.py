"""How often a policy waits for the device: never within a call, and at most once between two."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.policies import AdaptiveSkip, AttentionReuse, DeepFeatureReuse, Full, Policy, SkipEvery
from gearshift.policies.adaptive_skip import CRITERIA, DECISIONS
from gearshift.sampling.loop import Sampler, sample_chunk

from ..contract import build, cost_table

STEPS = 8
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
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                sample_chunk(s, index, table)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len(seen)

    try:
        extra = waits(policy) - waits(Full())
    finally:
        build("uvit-class").to("cpu")
    assert extra <= (STEPS if not policy.static else 0)
