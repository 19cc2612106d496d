"""Sampling with guidance on some channels and in an interval of log-SNR: images, ledger, policies, refusals."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers.base import Call, Solver
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.diffusion.solvers.ddpm import DDPM, DDPMConfig
from gearshift.diffusion.solvers.dpmpp_2m import DPMpp2M, DPMpp2MConfig
from gearshift.execution.plan import StepPlan
from gearshift.policies import Full, Policy, SkipEvery
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Chunk, Sampler, sample_chunk

from ..contract import build, cost_table

B, W, STEPS = 4, 2.5, 6
INTERVAL = (-4.0, 1.0)


def sampler(policy: Policy | None = None, solver: Solver | None = None, **fields: Any) -> Sampler:
    solver = DDIM(DDIMConfig(steps=STEPS)) if solver is None else solver
    denoiser = Denoiser(build("dit-class"), Discrete(DiscreteConfig()))
    made = Sampler(denoiser, solver, policy or Full(), chunk=B, **{"guidance": W, **fields})
    made.check()
    return made


def chunk(s: Sampler) -> Chunk:
    return sample_chunk(s, torch.arange(B), cost_table(s.denoiser.network))


def inside(s: Sampler) -> list[bool]:
    return [INTERVAL[0] <= c.log_snr <= INTERVAL[1] for c in s.calls()]


def by_hand(s: Sampler, channels: int) -> Tensor:
    """The network on both branches at every call, mixed where the call is guided."""
    network, process, solver = s.denoiser.network, s.denoiser.process, s.solver
    labels = keys.integers(0, "sample_label", torch.arange(B), 0, 3)
    state = solver.begin(process, keys.normal(0, "init_noise", torch.arange(B), 0, (2, 8, 8)))
    for call, guided in zip(solver.calls(process), inside(s), strict=True):
        outputs = []
        for cond in (labels, torch.full((B,), 3)):
            x = solver.network_input(state, call)
            stream = network.embed(x, torch.full((B,), float(process.network_time(call.time))), cond)
            hidden = stream.hidden
            for block in network.blocks:
                hidden = block(hidden, stream.cond)
            outputs.append(network.readout(hidden, stream.cond, 4))
        eps = outputs[0][:, :2].clone()
        if guided:
            eps[:, :channels] = torch.lerp(outputs[1][:, :channels], outputs[0][:, :channels], W)
        noise = keys.normal(0, "step_noise", torch.arange(B), call.position, (2, 8, 8)) if call.needs_noise else None
        state = solver.advance(state, call, eps, variance=outputs[0][:, 2:], noise=noise)
    return solver.result(state)


@pytest.mark.parametrize(
    "solver",
    [DDIM(DDIMConfig(steps=STEPS)), DDPM(DDPMConfig(steps=STEPS)), DPMpp2M(DPMpp2MConfig(steps=STEPS))],
    ids=lambda s: s.name,
)
@pytest.mark.parametrize("channels", [1, 2])
def test_images_are_those_of_the_loop_by_hand(solver: Solver, channels: int) -> None:
    """Multistep history included: a call outside the interval is as fresh as one inside."""
    s = sampler(solver=solver, guidance_channels=channels, guidance_interval=INTERVAL)
    assert any(inside(s)) and not all(inside(s)) and not inside(s)[0]
    with torch.no_grad():
        torch.testing.assert_close(chunk(s).images, by_hand(s, channels), rtol=1e-4, atol=1e-4)


def test_ledger_of_an_interval() -> None:
    s = sampler(guidance_interval=INTERVAL)
    table, network = cost_table(s.denoiser.network), s.denoiser.network
    full = table.full(network).macs
    ledger = chunk(s).ledger
    guided = np.array(inside(s))
    assert ledger.branches.tolist() == [2 if g else 1 for g in guided]
    assert ledger.called[:, 0].all() and ledger.called[:, 1].tolist() == [[g] * B for g in guided.tolist()]
    assert ledger.macs[:, 0].tolist() == [[full] * B] * STEPS
    assert ledger.macs[:, 1].tolist() == [[full * g] * B for g in guided.tolist()]
    assert ledger.depth[~guided, 1].max() == 0
    calls = STEPS + int(guided.sum())
    assert ledger.calls_per_image == calls and ledger.macs_per_image == calls * full
    assert ledger.full_macs_per_image == calls * full
    assert ledger.macs_saved == 0, "the interval is a setting of guidance, not a saving of the policy"


def test_every_call_inside_is_plain_guidance_and_none_is_no_guidance() -> None:
    plain, off = chunk(sampler()), chunk(sampler(guidance=1.0))
    inner = chunk(sampler(guidance_interval=(-100.0, 100.0)))
    outer = chunk(sampler(guidance_interval=(90.0, 100.0)))
    assert torch.equal(inner.images, plain.images)
    assert torch.equal(outer.images, off.images)
    assert outer.ledger.macs_per_image == off.ledger.macs_per_image
    assert outer.ledger.called.shape == (STEPS, 2, B)


def test_skipped_calls_around_the_edge() -> None:
    s = sampler(SkipEvery(2), guidance_interval=INTERVAL)
    made = chunk(s)
    guided = inside(s)
    first = guided.index(True)
    wanted = []
    for k, g in enumerate(guided):
        skipped = k % 2 == 1 and k != STEPS - 1
        both = g and (not skipped or k == first)
        wanted.append([both if g else not skipped, both])
    assert made.ledger.called[:, :, 0].tolist() == wanted
    assert torch.isfinite(made.images).all()
    assert 0 < made.ledger.macs_saved < 0.5


@dataclass(frozen=True)
class ReuseOutputs(Policy):
    """Attention outputs of the call before, at every second call."""

    def plan(self, state: Any, call: Call) -> StepPlan:
        keep = frozenset((block, "output") for block in range(4))
        return StepPlan(reuse=keep) if call.position % 2 else StepPlan()


def test_reuse_around_the_edge() -> None:
    """Rows that were not run before the interval compute in its first call; nothing else does."""
    s = sampler(ReuseOutputs(), guidance_interval=INTERVAL)
    ledger = chunk(s).ledger
    guided = inside(s)
    for k, g in enumerate(guided):
        reuses = k % 2 == 1
        assert (ledger.reused[k, 0] == 4 * reuses).all()
        assert (ledger.reused[k, 1] == 4 * (reuses and g and guided[k - 1])).all()


def test_ledger_files_of_before(tmp_path: Path) -> None:
    """A ledger without `branches` was guided at every call."""
    data = chunk(sampler()).ledger
    arrays = {f.name: getattr(data, f.name) for f in fields(LedgerData) if f.name != "branches"}
    np.savez(tmp_path / "old.npz", **arrays)
    old = LedgerData.load(tmp_path / "old.npz")
    assert old.branches.tolist() == [2] * STEPS and old.full_macs_per_image == data.full_macs_per_image
    data = chunk(sampler(guidance_interval=INTERVAL)).ledger
    data.save(tmp_path / "new.npz")
    for ledger in (LedgerData.load(tmp_path / "new.npz"), LedgerData.merge([data, data]), data.take(slice(0, 1))):
        assert ledger.branches.dtype == np.int16 and ledger.branches.tolist() == data.branches.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_channels": 3}, r"guidance_channels=3 is outside 1\.\.2, the channels of DiT"),
        ({"guidance_channels": 0}, r"guidance_channels=0 is outside 1\.\.2"),
        ({"guidance_interval": (1.0, -4.0)}, r"guidance_interval=\[1\.0, -4\.0\] is empty"),
        ({"guidance_interval": (float("nan"), 1.0)}, "is empty"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler(**settings)
