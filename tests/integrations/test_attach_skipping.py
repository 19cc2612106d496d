"""Skipped calls on pipelines: the same images as loops that keep predictions by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from gearshift.execution.plan import StepPlan
from gearshift.integrations.diffusers import attach
from gearshift.policies import AdaptiveSkip, Policy, SkipEvery

from .manual import Kept, Trace, by_hand, changed, held
from .tiny import CASES, texts, with_scheduler

KNOWN = [name for name in CASES if name != "wan2"]
STEPS = 6


@functools.cache
def built(name: str) -> Any:
    return CASES[name].build()


@functools.cache
def named(name: str) -> tuple[str, Any]:
    """The case "sd/euler" is "sd" with that scheduler."""
    case, _, scheduler = name.partition("/")
    return case, with_scheduler(CASES[case].build(), scheduler) if scheduler else built(case)


def every(k: int, total: int) -> Callable[[Trace], bool]:
    """Steps k-1, 2k-1, ... are not computed; the last one is."""
    return lambda trace: (trace.step + 1) % k != 0 or trace.step == total - 1


def steps_of(name: str, steps: int = STEPS) -> int:
    """Steps that a pipeline makes: with this strength image to image leaves out the first fifth."""
    return int(0.8 * steps) if name == "sd_img2img" else steps


def assert_skips_by_hand(name: str, k: int, **call: Any) -> None:
    case, pipe = named(name)
    total = steps_of(case)
    with by_hand(CASES[case], pipe, every(k, total)) as trace:
        expected = CASES[case].run(pipe, STEPS, **call)
    with attach(pipe, SkipEvery(k)) as handle:
        found = CASES[case].run(pipe, STEPS, **call)
    assert torch.equal(found, expected)
    assert handle.ledger.mask == trace.mask
    assert trace.mask.count(False) == (total - 1) // k
    assert handle.ledger.complete
    assert handle.ledger.fired
    assert handle.ledger.notes == []


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", KNOWN)
def test_skipping_every_kth_call_is_the_loop_by_hand(name: str, k: int) -> None:
    assert_skips_by_hand(name, k)


@pytest.mark.parametrize("name", KNOWN)
def test_without_guidance(name: str) -> None:
    assert_skips_by_hand(name, 2, guidance=1.0)


@pytest.mark.parametrize("call", [dict(prompts=2), dict(size=24), dict(guidance=1.0)], ids=str)
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
def test_under_other_schedulers(name: str, scheduler: str, call: dict[str, Any]) -> None:
    assert_skips_by_hand(f"{name}/{scheduler}", 2, **call)
    assert_skips_by_hand(f"{name}/{scheduler}", 3, **call)


def test_the_second_of_two_denoisers_begins_with_a_call() -> None:
    """The fourth step of six would be skipped, but what is held is of the other model."""
    case, pipe = CASES["wan2"], built("wan2")
    with by_hand(case, pipe, every(2, STEPS)) as trace:
        expected = case.run(pipe, STEPS)
    assert trace.mask == [True, False, True, True, True, True]
    with attach(pipe, SkipEvery(2)) as handle:
        assert torch.equal(case.run(pipe, STEPS), expected)
    assert handle.ledger.mask == trace.mask
    assert [step.forced for step in handle.ledger.steps].count("another denoiser took over") == 1


@pytest.mark.parametrize("kind", ["PNDM", "HeunDiscrete", "EulerAncestralDiscrete", "UniPCMultistep", "LCM", "DDPM"])
def test_schedulers_that_call_twice_or_draw_noise(kind: str) -> None:
    """A step is a step of the scheduler, however many of them it makes."""
    case, pipe = CASES["sd"], CASES["sd"].build()
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(pipe.scheduler.config)
    with by_hand(case, pipe) as trace:
        plain = case.run(pipe, STEPS)
    total = trace.step
    assert (total > STEPS) == (kind in ("PNDM", "HeunDiscrete"))
    with by_hand(case, pipe, every(2, total)) as trace:
        expected = case.run(pipe, STEPS)
    with attach(pipe, SkipEvery(2)) as handle:
        found = case.run(pipe, STEPS)
    assert torch.equal(found, expected)
    assert handle.ledger.mask == trace.mask
    assert not torch.equal(found, plain)


class Chosen(Policy):
    """Skips some steps, also several in a row."""

    skipped = (1, 2, 4)

    def plan(self, state: Any, call: Any) -> StepPlan:
        return StepPlan(call=call.position not in self.skipped)


@pytest.mark.parametrize("name", ["sd", "ddim", "dit", "wan", "flux"])
def test_whoever_called_may_write_into_what_is_returned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scheduler that does so what is kept stays as it was, also where it was given back before."""
    case, pipe = CASES[name], built(name)
    kind = type(pipe.scheduler)
    step = kind.step

    @functools.wraps(step)
    def spoiling(self: Any, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(self, model_output.clone(), *args, **kwargs)
        model_output.zero_()
        return result

    with by_hand(case, pipe, lambda trace: trace.step not in Chosen.skipped):
        expected = case.run(pipe, STEPS, guidance=1.0)
    monkeypatch.setattr(kind, "step", spoiling)
    with attach(pipe, Chosen()) as handle:
        assert torch.equal(case.run(pipe, STEPS, guidance=1.0), expected)
    assert handle.ledger.mask == [True, False, False, True, False, True]


# Written out -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("k", [2, 3])
def test_stable_diffusion_written_out(kind: type, k: int) -> None:
    """Without the pipeline: prompts, guidance and the loop over the timesteps."""
    pipe: Any = with_scheduler(CASES["sd"].build(), "ddim" if kind is DDIMScheduler else "euler")
    text, empty = pipe.encode_prompt(texts(2), torch.device("cpu"), 1, True)
    scheduler = kind.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for step, time in enumerate(scheduler.timesteps):
        if step % k != k - 1 or step == STEPS - 1:
            given = scheduler.scale_model_input(torch.cat([latents, latents]), time)
            plain, conditional = pipe.unet(given, time, torch.cat([empty, text])).sample.chunk(2)
        latents = scheduler.step(plain + 5.0 * (conditional - plain), time, latents).prev_sample
    with attach(pipe, SkipEvery(k)):
        assert torch.equal(CASES["sd"].run(pipe, STEPS, seed=7, prompts=2), latents)


# Adaptive ------------------------------------------------------------------------------------------------------------


def computes(policy: AdaptiveSkip, flags: list[bool], x: list[Tensor], eps: list[Tensor], s: list[float]) -> bool:
    """The formulas of `gearshift.policies.adaptive_skip`, for the step after those of `flags`."""
    n = len(flags)
    if sum(flags) < policy.warmup_steps or n == len(s) - 2 or not any(flags[-4:]):
        return True
    oldest, middle, newest = (x[j] - x[j - 1] for j in (n - 2, n - 1, n))
    i, k = [j for j, flag in enumerate(flags) if flag][-2:]
    if policy.criterion == "displacement_magnitude":
        sizes = [move.abs().mean() for move in (oldest, middle, newest)]
        statistic = ((sizes[2] + sizes[0]) / 2 - sizes[1]).abs() / sizes[1]
    elif policy.criterion == "third_difference":
        statistic = (newest - 2 * middle + oldest).norm() / middle.norm()
    else:
        slope = (eps[k] - eps[i]).square().mean().sqrt() / abs(s[k] - s[i])
        statistic = (s[n + 1] - s[k]) ** 2 / 2 * slope / x[n].square().mean().sqrt()
    assert abs(statistic / policy.threshold - 1) > 1e-3  # otherwise rounding decides
    return bool(statistic > policy.threshold)


def levels(scheduler: Any) -> list[float]:
    """At each step and after the last: sigma / alpha, of flow matching sigma, of v the angle."""
    if not hasattr(scheduler, "sigmas"):
        bars = [float(scheduler.alphas_cumprod[time]) for time in scheduler.timesteps]
        return [math.sqrt((1 - bar) / bar) for bar in (*bars, float(scheduler.final_alpha_cumprod))]
    angles = scheduler.config.get("prediction_type") == "v_prediction"
    return [math.atan(sigma) if angles else sigma for sigma in scheduler.sigmas.tolist()]


def framed(scheduler: Any, latents: list[Tensor], s: list[float]) -> list[Tensor]:
    """The latents in x_0 + s eps; of flow matching as they are; of v in alpha x_0 + sigma eps."""
    if scheduler.config.get("prediction_type") == "v_prediction":
        return [x * math.cos(angle) for x, angle in zip(latents, s, strict=False)]
    if isinstance(scheduler, DDIMScheduler | DPMSolverMultistepScheduler):
        return [x * math.hypot(1, ratio) for x, ratio in zip(latents, s, strict=False)]
    return latents


def by_formula(policy: AdaptiveSkip, pipe: Any, samples: int) -> Callable[[Trace], Any]:
    """`computes` as a rule for the loop by hand; what is stepped may have the frames of a sample in a row."""

    def by_sample(x: Tensor) -> Tensor:
        return x.reshape(samples, -1, *x.shape[1:])

    def rule(trace: Trace) -> Any:
        if not trace.mask:
            return True
        s, x = levels(pipe.scheduler), [by_sample(latents) for latents in trace.latents]
        outputs = [by_sample(output) for output in trace.outputs]
        x = framed(pipe.scheduler, x, s) if policy.criterion == "embedded_error" else x
        if policy.decision == "batch_mean":
            return computes(policy, trace.mask, x, outputs, s)
        asked = []
        for row in range(samples):
            flags = [flag if isinstance(flag, bool) else bool(flag[row]) for flag in trace.mask]
            asked.append(computes(policy, flags, [t[row] for t in x], [t[row] for t in outputs], s))
        return any(asked) if policy.decision == "batch_any" else torch.tensor(asked)

    return rule


def line(pipe: Any, first: int = 0, channels: int | None = None) -> Callable[[int, Kept], Any]:
    """Goes on along the line through the last two outputs; beyond `channels` lies a variance, which is held."""

    def instead(step: int, kept: Kept) -> Any:
        if len(kept) < 2:
            return held(step, kept)
        (i, before), (k, last) = kept[-2:]
        s = levels(pipe.scheduler)[first:]

        def moved(y: Tensor, x: Tensor) -> Tensor:
            on = y + (s[step] - s[k]) / (s[k] - s[i]) * (y - x)
            return on if channels is None else torch.cat([on[:, :channels], y[:, channels:]], 1)

        return changed(last, moved, before)

    return instead


# Thresholds at which some steps are skipped, and some computed for another reason than warm-up, tail and cap.
MAGNITUDE = {"sd/ddim": 0.02, "sd/euler": 0.3, "sdxl": 0.2, "pixart": 0.01, "wan": 0.02, "sd3": 0.05}
BEND = {"sd/ddim": 0.05, "sd/euler": 0.5, "sdxl": 0.5, "pixart": 0.1, "wan": 0.3, "sd3": 0.3}
ERROR = {"sd/ddim": 0.01, "sd/euler": 0.01, "sdxl": 0.02, "pixart": 0.01, "wan": 0.05, "sd3": 0.02, "svd": 0.05}
CRITERIA = {"displacement_magnitude": MAGNITUDE, "third_difference": BEND, "embedded_error": ERROR}


@pytest.mark.parametrize(
    ("criterion", "name", "threshold"),
    [(criterion, *item) for criterion, values in CRITERIA.items() for item in values.items()],
)
def test_adaptive_skipping_follows_its_formulas(criterion: str, name: str, threshold: float) -> None:
    """On the latents of the scheduler itself; the masks are equal, and so are the images."""
    case, pipe = named(name)
    policy = AdaptiveSkip(threshold, criterion=criterion, warmup_steps=3)
    with by_hand(CASES[case], pipe, by_formula(policy, pipe, 2)) as trace:
        expected = CASES[case].run(pipe, 12, prompts=2)
    assert not all(trace.mask)
    assert any(trace.mask[3:-1])
    with attach(pipe, policy) as handle:
        found = CASES[case].run(pipe, 12, prompts=2)
    assert handle.ledger.mask == trace.mask
    assert torch.equal(found, expected)
    assert handle.ledger.record["skip_statistic"].shape == (12,)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["sd", "text_to_video", "animatediff"])
def test_any_sample_of_a_batch_can_ask_for_a_call(name: str, criterion: str) -> None:
    """A sample may be a video, whichever way the pipeline lays its frames out for the scheduler."""
    case, pipe = CASES[name], built(name)
    threshold = {"displacement_magnitude": 0.02, "third_difference": 0.05, "embedded_error": 0.02}[criterion]
    policy = AdaptiveSkip(threshold, criterion=criterion, warmup_steps=3, decision="batch_any")
    with by_hand(case, pipe, by_formula(policy, pipe, 3)) as trace:
        expected = case.run(pipe, 12, prompts=3)
    with attach(pipe, policy) as handle:
        found = case.run(pipe, 12, prompts=3)
    assert handle.ledger.mask == trace.mask
    assert not all(trace.mask)
    assert any(trace.mask[3:-1])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("extrapolate", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["sd/ddim", "sdxl", "pixart"])
def test_every_sample_is_skipped_by_its_own_decision(name: str, criterion: str, extrapolate: bool) -> None:
    """Rows that are packed, against a loop that computes all rows and uses those that were asked for."""
    case, pipe = named(name)
    threshold = CRITERIA[criterion][name]
    policy = AdaptiveSkip(
        threshold, criterion=criterion, warmup_steps=3, decision="per_sample", extrapolate=extrapolate
    )
    with by_hand(CASES[case], pipe, by_formula(policy, pipe, 3), line(pipe) if extrapolate else held) as trace:
        expected = CASES[case].run(pipe, 12, prompts=3)
    with attach(pipe, policy) as handle:
        found = CASES[case].run(pipe, 12, prompts=3)
    mask = torch.stack([torch.as_tensor(flag).expand(3) for flag in trace.mask])
    called = torch.stack([step.branches[0].called.view(2, 3) for step in handle.ledger.steps])
    assert torch.equal(called[:, 0], mask)
    assert torch.equal(called[:, 1], mask)
    assert handle.ledger.calls_per_sample == pytest.approx(2 * mask.sum().item() / 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Extrapolated --------------------------------------------------------------------------------------------------------

LINES = ["sd/ddim", "sd/euler", "sd/dpmpp", "sd_img2img", "sdxl", "dit", "pixart", "svd", "wan", "sd3", "flux_cfg"]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", LINES)
def test_extrapolating_is_the_line_through_the_last_two_outputs(name: str, k: int) -> None:
    """Over sigma / alpha where the model predicts noise, over sigma in flow matching, over the angle for v."""
    case, pipe = named(name)
    total = steps_of(case, 8)
    rule = line(pipe, 8 - total, 4 if case == "dit" else None)
    with by_hand(CASES[case], pipe, every(k, total), rule) as trace:
        expected = CASES[case].run(pipe, 8)
    with attach(pipe, SkipEvery(k)):
        plain = CASES[case].run(pipe, 8)
    with attach(pipe, SkipEvery(k, extrapolate=True)) as handle:
        found = CASES[case].run(pipe, 8)
    assert handle.ledger.mask == trace.mask
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
    assert not torch.allclose(found, plain, rtol=0, atol=1e-3 * scale)


# Beside the denoiser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, dict(guess_mode=True), dict(control_guidance_end=0.5), dict(prompts=2)], ids=str)
@pytest.mark.parametrize("name", ["sd_controlnet", "sd_multicontrolnet"])
def test_controlnets_are_not_called_where_the_denoiser_is_not(name: str, more: dict[str, Any]) -> None:
    case, pipe = CASES[name], built(name)
    nets = list(getattr(pipe.controlnet, "nets", [pipe.controlnet]))
    calls = []
    handles = [net.conv_in.register_forward_pre_hook(lambda module, args: calls.append(module)) for net in nets]
    with by_hand(case, pipe, every(2, STEPS)) as trace:
        expected = case.run(pipe, STEPS, **more)
    usual = len(calls)
    calls.clear()
    with attach(pipe, SkipEvery(2)) as handle:
        found = case.run(pipe, STEPS, **more)
    assert torch.equal(found, expected)
    assert usual == STEPS * len(nets)
    assert [calls.count(net.conv_in) for net in nets] == [trace.mask.count(True)] * len(nets)
    assert handle.ledger.hits == {"controlnet": trace.mask.count(False)}
    for one in handles:
        one.remove()


def test_the_denoiser_is_called_where_the_ledger_says() -> None:
    """Counted in its first layer, which nothing of ours stands before."""
    case, pipe = CASES["sd"], built("sd")
    calls: list[nn.Module] = []
    watch = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: calls.append(module))
    for policy in (SkipEvery(3), AdaptiveSkip(1.0, warmup_steps=3)):
        calls.clear()
        with attach(pipe, policy) as handle:
            case.run(pipe, 12)
        assert len(calls) == handle.ledger.mask.count(True) < 12
    watch.remove()
