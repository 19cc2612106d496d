"""Generations under one attached policy: none leaves anything to the next, and the unforeseen is computed in full."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.execution.memory import Memory
from gearshift.execution.plan import FULL
from gearshift.integrations.diffusers import Attached, attach
from gearshift.integrations.diffusers.held import Remembered
from gearshift.integrations.diffusers.session import Session
from gearshift.policies import AdaptiveSkip, AttentionReuse, DeepFeatureReuse, Policy, SkipEvery
from gearshift.runtime.errors import RunError, UsageError

from .manual import Trace, by_hand
from .tiny import CASES

STEPS = 6
FIRING: dict[str, Policy] = {
    "skip": SkipEvery(2),
    "adaptive": AdaptiveSkip(1.0, warmup_steps=3, max_skip_steps=2),
    "output": AttentionReuse(operator="output", interval=2),
    "deep": DeepFeatureReuse(interval=2),
}
PAIRS = [(n, p) for n in ("sd", "sdxl", "wan", "dit") for p in FIRING if p != "deep" or n in ("sd", "sdxl")]
Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


@functools.cache
def built(name: str) -> Any:
    return CASES[name].build()


@functools.cache
def fresh(name: str, policy: str) -> Tensor:
    """What the first generation after attaching gives."""
    with attach(built(name), FIRING[policy]) as handle:
        found = CASES[name].run(built(name), STEPS)
    assert handle.ledger.fired
    return found


@contextmanager
def attached(name: str, policy: str) -> Iterator[Attached]:
    """A policy on a pipeline, and known what its first generation gives."""
    fresh(name, policy)
    with attach(built(name), FIRING[policy]) as handle:
        yield handle


def assert_as_fresh(handle: Attached, name: str, policy: str) -> None:
    """Asserts that the next generation is as if it were the first."""
    assert torch.equal(CASES[name].run(built(name), STEPS), fresh(name, policy))
    assert handle.ledger.complete
    assert handle.ledger.fired
    assert handle.ledger.notes == []
    assert [step.forced for step in handle.ledger.steps] == [None] * STEPS


def at(wanted: int, action: Callable[[Any, dict[str, Any]], None]) -> Callback:
    """A callback that acts after one step."""

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == wanted:
            action(pipe, tensors)
        return tensors

    return callback


class Stop(Exception):
    pass


def stop(pipe: Any, tensors: dict[str, Any]) -> None:
    raise Stop


def interrupt(pipe: Any, tensors: dict[str, Any]) -> None:
    pipe._interrupt = True


@contextmanager
def failing(module: nn.Module, call: int) -> Iterator[None]:
    """The given call of a module fails."""
    calls = []

    def fail(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(module)
        if len(calls) == call:
            raise Stop

    watch = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        watch.remove()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Messages of ours since the last look."""
    found = [record.getMessage() for record in caplog.records if record.name == "gearshift"]
    assert all(record.levelno == logging.WARNING for record in caplog.records if record.name == "gearshift")
    caplog.clear()
    return found


# Nothing leaks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "policy"), PAIRS)
def test_a_generation_leaves_nothing_to_the_next(name: str, policy: str) -> None:
    """Other seeds, steps, sizes, numbers of prompts, and guidance on and off."""
    case, pipe = CASES[name], built(name)
    before: list[dict[str, Any]] = [
        dict(steps=STEPS, seed=1),
        dict(steps=5),
        dict(steps=STEPS, prompts=2),
        dict(steps=STEPS, size=case.sizes[1]),
        dict(steps=STEPS, guidance=1.0),
    ]
    with attached(name, policy) as handle:
        for call in before:
            case.run(pipe, **call)
            assert handle.ledger.complete
            assert handle.ledger.fired
            assert handle.ledger.notes == []
            assert_as_fresh(handle, name, policy)


@pytest.mark.parametrize("policy", FIRING)
def test_every_generation_of_a_row_is_as_if_it_were_the_first(policy: str) -> None:
    case, pipe = CASES["sd"], built("sd")
    calls: list[dict[str, Any]] = [
        dict(prompts=2, size=24),
        dict(guidance=1.0),
        dict(steps=9, seed=3),
        dict(guidance=1.0, prompts=3),
        dict(seed=2),
    ]
    alone = []
    for call in calls:
        with attach(pipe, FIRING[policy]):
            alone.append(case.run(pipe, **call))
    with attach(pipe, FIRING[policy]):
        together = [case.run(pipe, **call) for call in calls]
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("how", ["raised", "interrupted"])
@pytest.mark.parametrize(("name", "policy"), [pair for pair in PAIRS if pair[0] != "dit"])
def test_a_generation_that_was_broken_off_leaves_nothing_either(name: str, policy: str, how: str, step: int) -> None:
    """By an exception in a callback, and by the pipeline's own flag."""
    case, pipe = CASES[name], built(name)
    with attached(name, policy) as handle:
        if how == "raised":
            with pytest.raises(Stop):
                case.run(pipe, STEPS, seed=1, callback_on_step_end=at(step, stop))
        else:
            case.run(pipe, STEPS, seed=1, callback_on_step_end=at(step, interrupt))
        broken = handle.ledger
        assert not broken.complete
        assert len(broken.steps) == step + 1
        assert broken.expected == STEPS
        assert f"{step + 1} of {STEPS} steps" in broken.summary()
        assert_as_fresh(handle, name, policy)
        assert handle.ledger is not broken


@pytest.mark.parametrize(("name", "policy"), PAIRS)
def test_a_denoiser_that_failed_leaves_nothing_either(name: str, policy: str) -> None:
    """In its last layer, with everything armed for what this call keeps or takes."""
    case, pipe = CASES[name], built(name)
    layers = [module for module in getattr(pipe, case.denoisers[0]).modules() if not list(module.children())]
    with attached(name, policy) as handle:
        for call in (1, 2, 3):
            with failing(layers[-1], call), pytest.raises(Stop):
                case.run(pipe, STEPS, seed=1)
            assert_as_fresh(handle, name, policy)


# Guidance ------------------------------------------------------------------------------------------------------------


def unguided(pipe: Any, tensors: dict[str, Any]) -> None:
    """Switches guidance off as the documentation of the library shows it."""
    pipe._guidance_scale = 1.0
    if "prompt_embeds" in tensors:
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]


def switching(name: str, step: int) -> dict[str, Any]:
    more: dict[str, Any] = dict(callback_on_step_end=at(step, unguided))
    if name == "sd":
        more |= dict(callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    return more


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(("name", "why"), [("sd", "the number of rows changed"), ("wan", "guidance was switched")])
def test_guidance_that_is_switched_off_on_the_way(name: str, why: str, prompts: int, step: int) -> None:
    """The step after is computed in full, whether or not it would have been, and the ledger says why."""
    case, pipe, total = CASES[name], built(name), 8
    more = switching(name, step)

    def computes(trace: Trace) -> bool:
        return trace.step % 2 == 0 or trace.step in (step + 1, total - 1)

    with by_hand(case, pipe, computes) as trace:
        expected = case.run(pipe, total, prompts=prompts, **more)
    with attached(name, "skip") as handle:
        found = case.run(pipe, total, prompts=prompts, **more)
        ledger = handle.ledger
        assert torch.equal(found, expected)
        assert ledger.mask == trace.mask
        assert [made.forced for made in ledger.steps] == [why if k == step + 1 else None for k in range(total)]
        guided = sum(ledger.mask[: step + 1])
        assert ledger.calls_per_sample == 2 * guided + sum(ledger.mask[step + 1 :])
        assert ledger.full_calls_per_sample == 2 * (step + 1) + total - step - 1
        assert ledger.batch == prompts
        assert ledger.complete
        assert ledger.notes == []
        assert torch.equal(case.run(pipe, STEPS), fresh(name, "skip"))


@pytest.mark.parametrize("policy", ["adaptive", "output", "deep"])
def test_other_policies_also_compute_the_step_after_the_switch(policy: str) -> None:
    case, pipe = CASES["sd"], built("sd")
    with attach(pipe, FIRING[policy]) as handle:
        case.run(pipe, 8, **switching("sd", 2))
    step = handle.ledger.steps[3]
    assert step.forced == "the number of rows changed"
    (branch,) = step.branches
    assert branch.called.tolist() == [True]
    assert branch.plan.key() == FULL.key()
    assert handle.ledger.fired
    assert handle.ledger.notes == []


# The ledger ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dit", "wan2", "sd_img2img")])
def test_the_ledger_counts(name: str) -> None:
    case, pipe = CASES[name], built(name)
    with attach(pipe, SkipEvery(2)) as handle:
        case.run(pipe, STEPS, prompts=2)
    ledger = handle.ledger
    branches = 2 if case.guided or case.sequential else 1
    assert ledger.mask == [True, False, True, False, True, True]
    assert ledger.batch == 2
    assert ledger.expected == len(ledger.steps) == STEPS
    assert ledger.calls_per_sample == 4 * branches
    assert ledger.full_calls_per_sample == STEPS * branches
    assert ledger.extra_bytes == max(step.kept_bytes for step in ledger.steps) > 0
    assert [len(step.branches) for step in ledger.steps] == [2 if case.sequential else 1] * STEPS
    assert all(step.forced is None for step in ledger.steps)
    assert ledger.complete
    assert f"6 steps, 2 without the denoiser; {4 * branches} of {6 * branches}" in ledger.summary()


def test_there_is_no_ledger_before_the_first_generation() -> None:
    with attach(built("sd"), SkipEvery(2)) as handle, pytest.raises(RunError, match="nothing was generated yet"):
        _ = handle.ledger


def test_a_run_that_the_policy_does_not_fit_is_refused_before_anything_is_made() -> None:
    """With an error that says why; the next run that fits is as ever."""
    case, pipe = CASES["sd"], built("sd")
    plain = case.run(pipe, STEPS)
    with attach(pipe, AttentionReuse(operator="output", last=4)) as handle:
        with pytest.raises(UsageError, match="last 4 calls of a run of 4"):
            case.run(pipe, 4)
        assert not handle.ledger.complete
        assert handle.ledger.steps == []
        case.run(pipe, STEPS)
        assert handle.ledger.complete
        assert handle.ledger.fired
    assert torch.equal(case.run(pipe, STEPS), plain)


def test_the_ledger_of_image_to_image_begins_where_the_pipeline_does() -> None:
    case, pipe = CASES["sd_img2img"], built("sd_img2img")
    with attach(pipe, SkipEvery(2)) as handle:
        case.run(pipe, STEPS)
    assert handle.ledger.expected == 4
    assert handle.ledger.mask == [True, False, True, True]
    assert [step.call.position for step in handle.ledger.steps] == [0, 1, 2, 3]
    assert [step.call.time for step in handle.ledger.steps] == pipe.scheduler.timesteps[2:].tolist()
    assert handle.ledger.complete


@contextmanager
def watched() -> Iterator[Callable[..., list[Any]]]:
    """Gives a function that finds everything of some classes that was made since and is still referred to."""

    def alive(*kinds: type) -> list[Any]:
        gc.collect()
        # Some objects warn when they are asked for their class and not for their type.
        return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]

    gc.collect()
    gc.freeze()
    try:
        yield alive
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(("name", "policy"), [("sd", "skip"), ("sd", "adaptive"), ("sd", "deep"), ("wan", "output")])
def test_what_was_kept_is_let_go(name: str, policy: str) -> None:
    """After a generation, and after detaching from one that was broken off."""
    case, pipe = CASES[name], built(name)
    case.run(pipe, STEPS)
    with watched() as alive:

        def assert_let_go() -> None:
            assert handle._session is None
            assert handle.ledger.extra_bytes > 0
            found = alive(Tensor, Session, Remembered, Memory)
            assert all(isinstance(thing, Tensor) for thing in found)
            assert [tuple(thing.shape) for thing in found if thing.device.type != "meta" and thing.numel() > 100] == []

        handle = attach(pipe, FIRING[policy])
        case.run(pipe, STEPS)
        assert_let_go()
        with pytest.raises(Stop):
            case.run(pipe, STEPS, callback_on_step_end=at(2, stop))
        handle.detach()
        assert_let_go()
