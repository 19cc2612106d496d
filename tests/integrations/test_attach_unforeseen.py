"""What was not foreseen is computed in full, and said; policies that never fire say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gearshift.execution.plan import FULL, StepPlan
from gearshift.integrations.diffusers import attach
from gearshift.policies import AdaptiveSkip, AttentionReuse, Full, Policy, SkipEvery

from .manual import by_hand
from .test_attach_generations import FIRING, STEPS, Stop, assert_as_fresh, at, attached, built, stop, warnings
from .tiny import CASES, with_scheduler

# Warnings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [AdaptiveSkip(0.0), SkipEvery(STEPS), AttentionReuse(operator="output", last=0)])
def test_a_policy_that_never_fired_says_so_once_a_generation(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    case, pipe = CASES["sd"], built("sd")
    with attach(pipe, policy) as handle:
        for _ in range(2):
            case.run(pipe, STEPS)
            assert warnings(caplog) == [f"{policy.name} never fired: all {STEPS} steps were computed in full"]
            assert "never fired" in handle.ledger.summary()
        # It might have, had it not been broken off.
        with pytest.raises(Stop):
            case.run(pipe, STEPS, callback_on_step_end=at(2, stop))
    assert warnings(caplog) == []


@pytest.mark.parametrize("policy", [Full(), *FIRING.values()], ids=["full", *FIRING])
def test_policies_that_do_what_they_should_say_nothing(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    with attach(built("sd"), policy):
        CASES["sd"].run(built("sd"), STEPS)
    assert warnings(caplog) == []


# What was not foreseen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", FIRING)
def test_a_scheduler_that_was_exchanged(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing tells the policy where a generation is, so all is computed, and one warning says why."""
    case, pipe = CASES["sd"], CASES["sd"].build()
    own = pipe.scheduler
    other = with_scheduler(pipe, "euler").scheduler
    plain = case.run(pipe, STEPS)
    pipe.scheduler = own
    with attach(pipe, FIRING[policy]) as handle:
        first = case.run(pipe, STEPS)
        warnings(caplog)
        pipe.scheduler = other
        assert torch.equal(case.run(pipe, STEPS), plain)
        (message,) = warnings(caplog)
        assert "scheduler of the pipeline was exchanged" in message
        assert "detach, and attach again" in message
        pipe.scheduler = own
        assert torch.equal(case.run(pipe, STEPS), first)
        assert handle.ledger.fired
    assert warnings(caplog) == []
    assert "step" not in vars(own)


def test_a_model_that_is_called_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """Before and after a generation: computed in full, with one warning."""
    pipe = built("sd")
    given = (torch.ones(2, 4, 8, 8), 5, torch.ones(2, 16, 16))
    with torch.no_grad():
        expected = pipe.unet(*given).sample
        with attach(pipe, SkipEvery(2)):
            assert torch.equal(pipe.unet(*given).sample, expected)
            (message,) = warnings(caplog)
            assert "outside of a generation" in message
            CASES["sd"].run(pipe, STEPS)
            assert torch.equal(pipe.unet(*given).sample, expected)
            assert torch.equal(pipe.unet(*given).sample, expected)
    assert warnings(caplog) == []


@pytest.mark.parametrize("policy", FIRING)
def test_latents_that_change_their_size_on_the_way(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    case, pipe = CASES["sd"], built("sd")

    def grow(pipe: Any, tensors: dict[str, Any]) -> None:
        tensors["latents"] = interpolate(tensors["latents"], scale_factor=1.5)

    with attached("sd", policy) as handle:
        found = case.run(pipe, 8, callback_on_step_end=at(2, grow))
        messages = warnings(caplog)
        assert "called with 2x4x8x8 float32 on cpu" in messages[0] and "now with 2x4x12x12 float32 on" in messages[0]
        assert messages[1:] == ([] if handle.ledger.fired else [m for m in messages if "never fired" in m])
        assert len(handle.ledger.notes) == 1
        assert handle.ledger.notes[0].startswith("full compute from step 3 on")
        assert handle.ledger.mask[3:] == [True] * 5
        assert handle.ledger.complete
        assert found.shape == (1, 4, 12, 12)
        assert_as_fresh(handle, "sd", policy)
    if policy == "skip":
        with by_hand(case, pipe, lambda trace: trace.step != 1):
            assert torch.equal(case.run(pipe, 8, callback_on_step_end=at(2, grow)), found)


class Surprised(Policy):
    """Skips every second step, and fails to look at the third."""

    static = False
    fails = 2

    def plan(self, state: Any, call: Any) -> StepPlan:
        return StepPlan(call=False) if call.position % 2 == 1 else FULL

    def observe(self, state: Any, call: Any, before: Tensor, after: Tensor, prediction: Any) -> Any:
        if call.position == self.fails:
            raise ValueError("not\nexpected")
        return state


class Planless(Surprised):
    """Fails to decide on the fourth step."""

    fails = -1

    def plan(self, state: Any, call: Any) -> StepPlan:
        if call.position == 3:
            raise ValueError("not\nexpected")
        return super().plan(state, call)


@pytest.mark.parametrize("policy", [Surprised, Planless])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd_controlnet", "wan", "dit", "flux"])
def test_a_policy_that_fails(name: str, policy: type[Policy], caplog: pytest.LogCaptureFixture) -> None:
    """From there on everything is computed; the next generation begins anew."""
    case, pipe = CASES[name], built(name)
    with by_hand(case, pipe, lambda trace: trace.step != 1) as trace:
        expected = case.run(pipe, STEPS)
    with attach(pipe, policy()) as handle:
        for _ in range(2):
            assert torch.equal(case.run(pipe, STEPS), expected)
            (message,) = warnings(caplog)
            assert message.startswith(f"{policy.__name__}: unexpected ValueError: not expected; the rest")
            assert handle.ledger.mask == trace.mask == [True, False, True, True, True, True]
            assert len(handle.ledger.notes) == 1
            assert handle.ledger.complete


def test_a_policy_that_fails_fails_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEARSHIFT_DEBUG", "1")
    with attach(built("sd"), Surprised()), pytest.raises(ValueError, match="expected"):
        CASES["sd"].run(built("sd"), STEPS)
