"""Others at the components of a pipeline with a policy: broken-off generations, copies, exchanged parts, wrappers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gearshift.integrations.diffusers import attach
from gearshift.policies import SkipEvery
from gearshift.runtime.errors import RunError, UsageError

from .tiny import CASES

STEPS = 6


class Stop(Exception):
    """Breaks a generation off."""


def broken_off(case: Any, pipe: Any) -> None:
    """A generation that ends after its first step."""

    def stop(*_: Any) -> Any:
        raise Stop

    with pytest.raises(Stop):
        case.run(pipe, STEPS, callback_on_step_end=stop)


def test_calls_after_a_generation_that_was_broken_off_are_not_of_it() -> None:
    """Another scheduler, a call by hand, and a pipeline that shares the model."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

    case, late = CASES["sd"], CASES["sd_img2img"]
    pipe = case.build()
    own, other = pipe.scheduler, EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    sharing = StableDiffusionImg2ImgPipeline(**{**pipe.components, "scheduler": other}, requires_safety_checker=False)
    sharing.set_progress_bar_config(disable=True)
    given = (torch.ones(2, 4, 8, 8), 5, torch.ones(2, 16, 16))
    pipe.scheduler = other
    plain, shared = case.run(pipe, STEPS), late.run(sharing, STEPS)
    pipe.scheduler = own
    with torch.no_grad():
        by_hand = pipe.unet(*given, return_dict=False)[0]
        with attach(pipe, SkipEvery(2)):
            broken_off(case, pipe)
            assert torch.equal(pipe.unet(*given, return_dict=False)[0], by_hand)
            broken_off(case, pipe)
            assert torch.equal(late.run(sharing, STEPS), shared)
            broken_off(case, pipe)
            pipe.scheduler = other
            assert torch.equal(case.run(pipe, STEPS), plain)
    pipe.scheduler = own


def test_a_copied_scheduler_steps_by_itself() -> None:
    """Some pipelines copy their scheduler; the copy drives neither the original nor the policy, and has none."""
    pipe = CASES["sd"].build()
    with attach(pipe, SkipEvery(2)) as handle:
        copied = copy.deepcopy(pipe.scheduler)
        copied.set_timesteps(4)
        x = torch.ones(1, 4, 8, 8)
        copied.step(x, copied.timesteps[0], x)
        assert len(pipe.scheduler.timesteps) != 4 and copied.step.__self__ is copied
        with pytest.raises(RunError, match="nothing was generated yet"):
            handle.ledger  # noqa: B018
    pipe.scheduler, own = copied, pipe.scheduler
    attach(pipe, SkipEvery(2)).detach()
    pipe.scheduler = own


def test_a_model_that_was_exchanged_is_not_taken_for_the_old_one(caplog: pytest.LogCaptureFixture) -> None:
    case, pipe = CASES["sd"], CASES["sd"].build()
    with attach(pipe, SkipEvery(2)) as handle:
        case.run(pipe, STEPS)
        mine, pipe.unet = pipe.unet, CASES["sd"].build().unet
        caplog.clear()
        case.run(pipe, STEPS)
        (message,) = [record.getMessage() for record in caplog.records]
        assert "unet of the pipeline was exchanged" in message
        with pytest.raises(RunError, match="nothing was generated yet"):
            handle.ledger  # noqa: B018
        pipe.unet = mine
        case.run(pipe, STEPS)
        assert handle.ledger.fired


def test_wrappers_of_others_stay() -> None:
    """One that was there before comes back; one that came after has to go first."""
    pipe = CASES["sd"].build()
    own = pipe.scheduler
    mine = lambda *args, **kwargs: type(own).step(own, *args, **kwargs)  # noqa: E731
    own.step = mine
    attach(pipe, SkipEvery(2)).detach()
    assert vars(own).pop("step") is mine
    handle = attach(pipe, SkipEvery(2))
    ours, own.step = own.step, mine
    with pytest.raises(UsageError, match="got another wrapper"):
        handle.detach()
    own.step = ours
    handle.detach()
    assert "step" not in vars(own)


def test_samples_are_counted_where_both_branches_are_stepped() -> None:
    case, pipe = CASES["dit"], CASES["dit"].build()
    with attach(pipe, SkipEvery(2)) as handle:
        case.run(pipe, STEPS, prompts=2)
        assert handle.ledger.batch == 2 and handle.ledger.full_calls_per_sample == 2 * STEPS
        case.run(pipe, STEPS, prompts=2, guidance=1.0)
        assert handle.ledger.batch == 2 and handle.ledger.full_calls_per_sample == STEPS


@pytest.mark.parametrize(("steps", "strength", "skips"), [(7, 0.8, False), (20, 0.9, True), (20, 0.95, True)])
def test_a_generation_that_begins_at_a_repeated_timestep(steps: int, strength: float, skips: bool) -> None:
    """PNDM lists some of its timesteps twice, and image to image may begin at the second."""
    from diffusers import PNDMScheduler

    case, pipe = CASES["sd_img2img"], CASES["sd_img2img"].build()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=skips)
    with attach(pipe, SkipEvery(2)) as handle:
        case.run(pipe, steps, strength=strength)
        assert handle.ledger.complete and not handle.ledger.notes
        assert handle.ledger.mask == [
            k % 2 == 0 or k == len(handle.ledger.mask) - 1 for k in range(handle.ledger.expected)
        ]
