"""Guidance on the first channels and on an interval of log-SNR: what is mixed, what is run, what is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.diffusion.denoiser import Denoiser, Prediction
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.execution.memory import Memory
from gearshift.execution.outputs import SIMULATE
from gearshift.execution.plan import StepPlan

from ..contract import EAGER, TOLERANCE, LeaveAt, build

B, W = 4, 2.5
EVERYWHERE, NOWHERE = (-math.inf, math.inf), (50.0, 60.0)


def denoiser() -> Denoiser:
    """Class-conditional, two channels and two variance channels."""
    return Denoiser(build("dit-class"), VPSDE(VPSDEConfig()))


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(B, 2, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.tensor([0, 2, 1, 0])


def call(d: Denoiser, seed: int = 0, time: float = 0.4, **options: Any) -> Prediction:
    x, labels = inputs(seed)
    return d.predict(x, time, labels, **{"guidance": W, **options})


def rows_of(prediction: Prediction) -> set[int]:
    return {row for event in prediction.trace for row in event.rows.host().tolist()}


# Channels ------------------------------------------------------------------------------------------------------------


def test_the_other_channels_are_the_conditional_ones() -> None:
    d = denoiser()
    every, some, off = call(d), call(d, guidance_channels=1), call(d, guidance=1.0)
    assert torch.equal(some.eps[:, :1], every.eps[:, :1])
    assert torch.equal(some.eps[:, 1:], every.held.eps[:B, 1:])
    torch.testing.assert_close(some.eps[:, 1:], off.eps[:, 1:], **TOLERANCE)
    assert (every.eps[:, 1:] - some.eps[:, 1:]).abs().max() > 1e-2
    x = inputs()[0]
    alpha, sigma = float(d.process.alpha(0.4)), float(d.process.sigma(0.4))
    assert torch.equal(some.x0, (x - sigma * some.eps) / alpha)
    assert some.variance is not None and every.variance is not None
    assert torch.equal(some.variance, every.variance)  # of the conditional branch, whatever is guided
    assert torch.equal(some.held.eps, every.held.eps)  # before guidance


def test_all_channels_by_number() -> None:
    d = denoiser()
    assert torch.equal(call(d, guidance_channels=2).eps, call(d).eps)


def test_three_of_four_channels_as_the_official_sampler_has_it() -> None:
    """One batch of both branches: guide the first three output channels, keep the rest of the conditional half."""
    torch.manual_seed(0)
    shape = dict(image_size=4, in_channels=4, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    network = DiT(DiTConfig(**shape, null_class=True)).eval()  # type: ignore[arg-type]
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    d = Denoiser(network, VPSDE(VPSDEConfig()))
    x, labels = torch.randn(2, 4, 4, 4), torch.tensor([0, 2])
    with torch.no_grad():
        p = d.predict(x, 0.4, labels, guidance=4.0, guidance_channels=3)
        fed = d.process.network_time(0.4).expand(4)
        stream = network.embed(torch.cat([x, x]), fed, torch.tensor([0, 2, 3, 3]))
        hidden = stream.hidden
        for block in network.blocks:
            hidden = block(hidden, stream.cond)
        eps, rest = network.readout(hidden, stream.cond, 2).split([3, 5], dim=1)
    guided = eps[2:] + 4.0 * (eps[:2] - eps[2:])
    torch.testing.assert_close(p.eps, torch.cat([guided, rest[:2, :1]], 1), **TOLERANCE)
    assert p.variance is not None
    torch.testing.assert_close(p.variance, rest[:2, 1:], **TOLERANCE)


def test_off_guidance_has_one_branch_whatever_else_is_set() -> None:
    d = denoiser()
    plain = call(d, guidance=1.0)
    other = call(d, guidance=1.0, guidance_channels=1, guidance_interval=NOWHERE)
    assert torch.equal(plain.eps, other.eps) and other.called.shape == (B,) and other.branches == 1


# Interval ------------------------------------------------------------------------------------------------------------


def test_within_the_interval_nothing_changes() -> None:
    d = denoiser()
    level = float(d.process.log_snr(0.4))
    for interval in (EVERYWHERE, (level - 1e-6, 9.0), (-9.0, level + 1e-6)):
        p = call(d, guidance_interval=interval)
        assert torch.equal(p.eps, call(d).eps) and p.branches == 2 and p.called.all()


def test_outside_only_the_conditional_branch_is_run() -> None:
    d = denoiser()
    level = float(d.process.log_snr(0.4))
    alone = call(d, guidance=1.0)
    for interval in (NOWHERE, (level + 1e-6, 9.0), (-9.0, level - 1e-6)):
        p = call(d, guidance_interval=interval)
        assert torch.equal(p.eps, alone.eps) and torch.equal(p.x0, alone.x0)
        assert p.variance is not None and alone.variance is not None and torch.equal(p.variance, alone.variance)
        assert p.called.tolist() == [True] * B + [False] * B and p.depth.tolist() == [4] * B + [0] * B
        assert p.branches == 1 and p.held.valid.tolist() == [True] * B + [False] * B
        assert rows_of(p) == set(range(B)), "the trace charges the unconditional rows nothing"


@pytest.mark.parametrize("level", [(0.5, 0.25), (0.25, 0.5)])
def test_the_level_of_the_solver_decides(level: tuple[float, float]) -> None:
    d = denoiser()
    log_snr = 2 * math.log(level[0] / level[1])
    assert call(d, level=level, guidance_interval=(log_snr - 1e-9, log_snr + 1e-9)).branches == 2
    assert call(d, level=level, guidance_interval=(-log_snr - 1e-9, -log_snr + 1e-9)).branches == 1


def test_plans_of_all_rows_outside_the_interval() -> None:
    """Depths, rules and skips still speak of R rows; only the conditional half is used."""
    d = denoiser()
    script = torch.tensor([1, 2, 3, 4, 4, 4, 4, 4])
    for plan in (StepPlan(depth=script), StepPlan(exit=LeaveAt(script))):
        alone = StepPlan(depth=script[:B])
        for packing in (EAGER, SIMULATE):
            p = call(d, plan=plan, packing=packing, guidance_interval=NOWHERE)
            assert p.depth.tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
            torch.testing.assert_close(p.eps, call(d, plan=alone, guidance=1.0).eps, **TOLERANCE)
    held = call(d, guidance_interval=NOWHERE).held
    some = torch.tensor([True, False, False, True] + [True] * B)
    p = call(d, seed=1, plan=StepPlan(call=some), held=held, guidance_interval=NOWHERE)
    assert p.called.tolist() == [True, False, False, True] + [False] * B
    fresh = call(d, seed=1, guidance=1.0).eps
    torch.testing.assert_close(p.eps, torch.where(some[:B, None, None, None], fresh, held.eps[:B]), **TOLERANCE)
    p = call(d, seed=1, plan=StepPlan(call=False), held=held, guidance_interval=NOWHERE)
    assert torch.equal(p.eps, held.eps[:B]) and not p.called.any() and p.trace == []


# Held predictions and memory over the edge of the interval -----------------------------------------------------------


def test_guidance_starts_with_both_branches_of_one_call() -> None:
    """A plan that skips the first guided call cannot: the unconditional rows hold nothing."""
    d = denoiser()
    held = call(d, guidance_interval=NOWHERE).held
    p = call(d, seed=1, plan=StepPlan(call=False), held=held, guidance_interval=EVERYWHERE)
    assert p.called.all() and torch.equal(p.eps, call(d, seed=1).eps)
    # From there on skipping goes on as ever.
    later = call(d, seed=2, plan=StepPlan(call=False), held=p.held, guidance_interval=EVERYWHERE)
    assert torch.equal(later.eps, p.eps) and not later.called.any()


def test_a_sample_that_is_skipped_holds_its_own_pair() -> None:
    """Only samples whose other branch is missing are evaluated against the plan."""
    d = denoiser()
    guided = call(d).held
    valid = torch.tensor([True] * B + [True, False, True, True])
    guided = replace(guided, valid=valid)
    p = call(d, seed=1, plan=StepPlan(call=False), held=guided)
    assert p.called.tolist() == [False, True, False, False] * 2


def test_what_was_held_before_an_unguided_call_is_not_mixed_after_it() -> None:
    d = denoiser()
    first = call(d).held
    outside = call(d, seed=1, held=first, guidance_interval=NOWHERE).held
    assert outside.valid.tolist() == [True] * B + [False] * B
    assert first.valid.all(), "the older record is not written to"
    back = call(d, seed=2, plan=StepPlan(call=False), held=outside)
    assert torch.equal(back.eps, call(d, seed=2).eps)
    # A skipped unguided call makes nothing older.
    skipped = call(d, seed=1, plan=StepPlan(call=False), held=first, guidance_interval=NOWHERE).held
    assert skipped.valid.all()


def test_memory_of_the_other_branch_ends_with_guidance() -> None:
    d = denoiser()
    keys = [(block, "output") for block in range(4)]
    memory = Memory(2 * B, keys)
    reuse = StepPlan(reuse=frozenset(keys))
    memory.begin_call()
    call(d, memory=memory)
    memory.begin_call()
    call(d, seed=1, memory=memory, guidance_interval=NOWHERE)
    for key in keys:
        assert memory.written(key).tolist() == [1] * B + [-1] * B
    memory.begin_call()
    p = call(d, seed=2, plan=reuse, memory=memory)
    blocks = [event for event in p.trace if event.kind == "block"]
    assert {(e.mode, tuple(e.rows.host().tolist())) for e in blocks} == {
        ("output", tuple(range(B))),
        ("full", tuple(range(B, 2 * B))),
    }
    # The unconditional rows are those of a plain call; the conditional ones took the outputs of the call before.
    torch.testing.assert_close(p.held.eps[B:], call(d, seed=2).held.eps[B:], **TOLERANCE)
    alone = Memory(B, keys)
    for seed, plan in ((1, StepPlan()), (2, reuse)):
        alone.begin_call()
        conditional = call(d, seed=seed, plan=plan, memory=alone, guidance=1.0)
    torch.testing.assert_close(p.held.eps[:B], conditional.eps, **TOLERANCE)


def test_branches_are_extrapolated_together_or_not_at_all() -> None:
    """Where guidance has just begun, the other branch holds one prediction: neither is continued beyond its level."""
    d = denoiser()
    first = call(d, keep_earlier=True, guidance_interval=NOWHERE).held
    second = call(d, seed=1, held=first, keep_earlier=True, guidance_interval=EVERYWHERE, level=(0.8, 0.6)).held
    assert second.two().tolist() == [True] * B + [False] * B
    skip = StepPlan(call=False, forecast=1)
    p = call(d, seed=2, plan=skip, held=second, guidance_interval=EVERYWHERE, level=(0.9, 0.4))
    held = call(d, seed=2, plan=StepPlan(call=False), held=second, guidance_interval=EVERYWHERE, level=(0.9, 0.4))
    assert not p.forecast.any() and torch.equal(p.eps, held.eps)
    alone = call(d, seed=2, plan=skip, held=second, guidance_interval=NOWHERE, level=(0.9, 0.4))
    assert alone.forecast[:B].all() and not torch.equal(alone.eps, second.eps[:B])
