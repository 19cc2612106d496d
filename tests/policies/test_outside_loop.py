"""Policies driven from outside: a scheduler and a U-Net of `diffusers`, and a loop that has nothing of our sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DModel
from torch import Tensor

from gearshift.diffusion.solvers import Call
from gearshift.policies import AdaptiveSkip, Compose, Policy, RunInfo, SkipEvery

STEPS, B = 14, 2
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"),
    "euler": EulerDiscreteScheduler,
}


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8)
        blocks = dict(
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
        )
        return UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **sizes, **blocks).eval()


class Shown(NamedTuple):
    """All that a policy looks at of a prediction."""

    eps: Tensor
    called: Tensor
    branches: int = 1


def ready(name: str) -> tuple[Any, list[float]]:
    """A scheduler at its start, and sigma / alpha of every call and of the end."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    if name == "euler":
        return scheduler, scheduler.sigmas.tolist()
    stride = scheduler.config.num_train_timesteps // STEPS
    visited = [*scheduler.timesteps.tolist(), int(scheduler.timesteps[-1]) - stride]
    bars = [float(scheduler.alphas_cumprod[t]) if t >= 0 else float(scheduler.final_alpha_cumprod) for t in visited]
    return scheduler, [math.sqrt(1 / bar - 1) for bar in bars]


def calls_of(scheduler: Any, ratios: list[float]) -> tuple[Call, ...]:
    """What a policy is told beforehand."""
    alpha = [1 / math.hypot(1.0, ratio) for ratio in ratios]
    log_snr = [-2 * math.log(ratio) if ratio else math.inf for ratio in ratios]
    times = scheduler.timesteps.tolist()
    return tuple(
        Call(
            position=k,
            step=k,
            time=times[k],
            next_time=times[k + 1] if k + 1 < STEPS else None,
            alpha=alpha[k],
            sigma=ratios[k] * alpha[k],
            log_snr=log_snr[k],
            next_alpha=alpha[k + 1],
            next_sigma=ratios[k + 1] * alpha[k + 1],
            next_log_snr=log_snr[k + 1],
            training_index=times[k],
            needs_noise=False,
        )
        for k in range(STEPS)
    )


def noise(scheduler: Any) -> Tensor:
    return torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * float(scheduler.init_noise_sigma)


@torch.no_grad()
def driven(name: str, unet: UNet2DModel, policy: Policy) -> tuple[Tensor, list[bool]]:
    """The loop with a policy in it."""
    scheduler, ratios = ready(name)
    calls, euler = calls_of(scheduler, ratios), name == "euler"
    run = RunInfo(calls, None, B, 1, sigma_frame=euler)  # type: ignore[arg-type]  # skipping asks nothing of a network
    policy.check(run)
    state, x, eps, mask = policy.begin(run), noise(scheduler), torch.zeros(B, 3, 8, 8), []
    for call, timestep in zip(calls, scheduler.timesteps, strict=True):
        plan = policy.plan(state, call)
        seen = scheduler.scale_model_input(x, timestep)  # alpha x_0 + sigma eps
        assert isinstance(plan.call, bool)
        if plan.call:
            eps = unet(seen, timestep).sample
        mask.append(plan.call)
        x = scheduler.step(eps, timestep, x).prev_sample
        after = x * call.next_alpha if euler else x
        state = policy.observe(state, call, seen, after, Shown(eps, torch.full((B,), plan.call)))
    return x, mask


@torch.no_grad()
def masked(name: str, unet: UNet2DModel, asks: Callable[[list[Tensor]], bool]) -> tuple[Tensor, list[bool]]:
    """The loop by hand; `asks` tells from the scheduler's latents L_0 .. L_n whether step n + 1 calls."""
    scheduler, _ = ready(name)
    x, mask = noise(scheduler), []
    path, eps = [x], x
    for timestep in scheduler.timesteps:
        mask.append(asks(path))
        if mask[-1]:
            eps = unet(scheduler.scale_model_input(x, timestep), timestep).sample
        x = scheduler.step(eps, timestep, x).prev_sample
        path.append(x)
    return x, mask


THRESHOLD, CAP = {"ddim": 0.05, "euler": 0.15}, 2


def adaptive(name: str) -> AdaptiveSkip:
    return AdaptiveSkip(THRESHOLD[name], max_skip_steps=CAP, tail_steps=1)


def magnitude(name: str, regular: int | None = None) -> Callable[[list[Tensor]], bool]:
    """Section 2.1 of the notes, four calls before and one call after, with a cap; and every k-th call is not made."""
    made: list[bool] = []

    def asks(path: list[Tensor]) -> bool:
        n = len(path) - 1
        call = made.count(True) < 4 or n == STEPS - 1 or made[-CAP:] == [False] * CAP
        if not call:
            d = [float((b - a).abs().mean()) for a, b in pairwise(path[-4:])]
            call = abs(0.5 * (d[2] + d[0]) - d[1]) > THRESHOLD[name] * d[1]
        if regular is not None and n % regular == regular - 1 and n < STEPS - 1:
            call = False
        made.append(call)
        return call

    return asks


@pytest.mark.parametrize("name", SCHEDULERS)
def test_full_compute_is_the_library_alone(name: str, unet: UNet2DModel) -> None:
    x, mask = driven(name, unet, Policy())
    assert torch.equal(x, masked(name, unet, lambda path: True)[0]) and all(mask)
    assert torch.equal(x, driven(name, unet, AdaptiveSkip(0.0))[0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_adaptive_skipping(name: str, unet: UNet2DModel) -> None:
    x, mask = driven(name, unet, adaptive(name))
    wanted, by_hand = masked(name, unet, magnitude(name))
    assert mask == by_hand and 4 < sum(mask) < STEPS
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_kth_call_is_not_made(name: str, unet: UNet2DModel) -> None:
    x, mask = driven(name, unet, SkipEvery(3))
    wanted, by_hand = masked(name, unet, lambda path: len(path) % 3 != 0 or len(path) == STEPS)
    assert mask == by_hand and sum(mask) == STEPS - 4
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_both(name: str, unet: UNet2DModel) -> None:
    """What the regular policy leaves out counts for the cap of the adaptive one, and not for its warm-up."""
    for parts in ([adaptive(name), SkipEvery(5)], [SkipEvery(5), adaptive(name)]):
        x, mask = driven(name, unet, Compose(parts))
        wanted, by_hand = masked(name, unet, magnitude(name, regular=5))
        assert mask == by_hand
        assert torch.equal(x, wanted)
    assert sum(mask) < min(sum(driven(name, unet, part)[1]) for part in parts)
