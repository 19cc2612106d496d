"""Guidance in one batch and in turn: one loop of our own around one U-Net, called both ways."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.integrations.diffusers import attach
from gearshift.policies import AdaptiveSkip, AttentionReuse, Compose, DeepFeatureReuse, Policy, SkipEvery

from .tiny import CASES

STEPS, SCALE = 10, 4.0
POLICIES: dict[str, Policy] = {
    "skip": SkipEvery(3),
    "extrapolated": SkipEvery(2, extrapolate=True),
    "magnitude": AdaptiveSkip(0.3, warmup_steps=3),
    "third": AdaptiveSkip(0.6, criterion="third_difference", warmup_steps=3),
    "error": AdaptiveSkip(0.5, criterion="embedded_error", warmup_steps=2),
    "per sample": AdaptiveSkip(0.3, warmup_steps=3, decision="per_sample"),
    "output": AttentionReuse(operator="output", interval=2),
    "qk": AttentionReuse(operator="qk", last=4),
    "deep": DeepFeatureReuse(interval=2, branch=1),
    "all": Compose([SkipEvery(4), AttentionReuse(operator="output", interval=2), DeepFeatureReuse(interval=3)]),
}


@torch.no_grad()
def made(pipe: Any, together: bool) -> Tensor:
    """Latents of two samples."""
    pipe.scheduler.set_timesteps(STEPS)
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 16, 16, generator=draw)
    nothing = torch.zeros_like(text)
    for time in pipe.scheduler.timesteps:
        seen = pipe.scheduler.scale_model_input(x, time)
        if together:
            both = pipe.unet(torch.cat([seen, seen]), time, torch.cat([nothing, text]), return_dict=False)[0]
            without, given = both.chunk(2)
        else:
            without, given = (pipe.unet(seen, time, one, return_dict=False)[0] for one in (nothing, text))
        x = pipe.scheduler.step(without + SCALE * (given - without), time, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", POLICIES)
def test_both_ways_decide_and_compute_alike(name: str) -> None:
    built = CASES["sd"].build()
    pipe = SimpleNamespace(unet=built.unet, scheduler=built.scheduler)
    plain = made(pipe, together=True)
    with attach(pipe, POLICIES[name]) as handle:
        batched, first = made(pipe, together=True), handle.ledger
        in_turn, second = made(pipe, together=False), handle.ledger
    assert first.fired and not torch.equal(batched, plain)
    assert first.mask == second.mask and first.batch == second.batch == 2
    assert first.calls_per_sample == second.calls_per_sample
    assert first.data().macs.sum() == second.data().macs.sum()
    torch.testing.assert_close(batched, in_turn, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
