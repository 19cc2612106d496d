"""Adaptive skipping: warm-up, caps and tail, the official control flow, runs that stay apart, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gearshift.diffusion.solvers import (
    DDIM,
    Call,
    DDIMConfig,
)
from gearshift.policies import AdaptiveSkip, Full, RunInfo
from gearshift.runtime.errors import UsageError

from ..contract import build
from .skipping import (
    FREE,
    PROCESS,
    RULES,
    SOLVERS,
    STEPS,
    Seen,
    called,
    masks,
    middling,
    moving,
    run,
    sampler,
    text,
    trajectory,
)

# Control flow --------------------------------------------------------------------------------------------------------

STILL = moving([1.0] * 22)
"""Straight, for every criterion (eps, when asked for, does not change)."""


def always(policy: AdaptiveSkip) -> str:
    """The calls made where the criterion would always skip."""
    constant = [torch.ones(1, 1, 2, 2)] * 22
    return text(masks(policy, STILL, constant))


@pytest.mark.parametrize("criterion", RULES)
def test_the_cap(criterion: str) -> None:
    clean = AdaptiveSkip(criterion=criterion, tail_steps=0)
    assert always(clean) == "1111000010000100001000"
    assert always(replace(clean, max_skip_steps=1)) == "1111" + "01" * 9
    assert always(replace(clean, max_skip_steps=0)) == "1" * 22
    assert always(replace(clean, max_skip_steps=None)) == "1111" + "0" * 18


def test_the_cap_of_the_official_code() -> None:
    """It acts from the sixth flag on, so five calls are skipped first whatever it is; 0 looks at all flags."""
    quirks = AdaptiveSkip(upstream_quirks=True, tail_steps=0)
    assert always(quirks) == "1111000001000010000100"
    assert always(replace(quirks, max_skip_steps=2)) == "1111000001" + "001" * 4
    assert always(replace(quirks, max_skip_steps=1)) == "1111000001" + "01" * 6
    assert always(replace(quirks, max_skip_steps=0)) == "1111000001" + "0" * 12
    assert always(replace(quirks, tail_steps=5)) == always(quirks)  # it has none


def test_official_and_clean_flow_are_the_same_where_the_cap_is_silent() -> None:
    """On a trajectory that bends again and again."""
    path = moving([1 + 0.3 * math.cos(1.3 * n) for n in range(60)])
    clean = masks(AdaptiveSkip(0.15, max_skip_steps=4, tail_steps=0), path)
    assert torch.equal(clean, masks(AdaptiveSkip(0.15, max_skip_steps=4, tail_steps=0, upstream_quirks=True), path))
    assert "00" not in text(clean)[:9] and 10 < clean.sum() < 55


@pytest.mark.parametrize("criterion", RULES)
@pytest.mark.parametrize("warmup", [4, 7])
def test_warm_up_is_computed(criterion: str, warmup: int) -> None:
    policy = AdaptiveSkip(1e9, criterion=criterion, warmup_steps=warmup, **FREE)
    assert called(run(sampler(policy))) == [True] * warmup + [False] * (STEPS - warmup)


def test_the_tail_is_computed() -> None:
    for tail in (0, 1, 3, 40):
        policy = AdaptiveSkip(max_skip_steps=None, tail_steps=tail)
        assert always(policy) == ("1111" + "0" * 18)[: 22 - tail].ljust(22, "1")


@pytest.mark.parametrize("span", [0.0, 0.6, 1.0, 3.0])
def test_the_cap_on_the_span(span: float) -> None:
    """In half log-SNR, from the last computed call to the end of the step that uses its prediction."""
    calls = DDIM(DDIMConfig(22)).calls(PROCESS)
    wanted, level = [], math.nan
    for call in calls:
        reach = abs(0.5 * call.next_log_snr - level)
        wanted.append(call.position < 4 or not reach <= span)
        level = 0.5 * call.log_snr if wanted[-1] else level
    found = always(AdaptiveSkip(max_skip_steps=None, tail_steps=0, max_skip_span_lambda=span))
    assert found == text(wanted) and found[-1] == "1"
    assert ("0" in found) == (span > 0)
    both = always(AdaptiveSkip(max_skip_steps=1, tail_steps=0, max_skip_span_lambda=span))
    assert "00" not in both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_threshold_zero_is_the_plain_sampler_bit_for_bit(solver: str, dtype: torch.dtype) -> None:
    plain = run(sampler(Full(), solver, dtype=dtype)).images
    for criterion in RULES:
        for options in ({}, {"decision": "per_sample", "extrapolate": True}):
            zero = AdaptiveSkip(0.0, criterion=criterion, **FREE, **options)
            assert torch.equal(run(sampler(zero, solver, dtype=dtype)).images, plain)
    quirks = AdaptiveSkip(0.0, upstream_quirks=True, tail_steps=0)
    assert torch.equal(run(sampler(quirks, solver, dtype=dtype)).images, plain)
    assert all(always(AdaptiveSkip(0.0, criterion=criterion)) == "1" * 22 for criterion in RULES)


# Runs stay apart -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_nothing_for_the_next() -> None:
    for criterion, (_, warmup) in RULES.items():
        threshold = middling(criterion, "dpmpp_2m")
        s = sampler(AdaptiveSkip(threshold, criterion=criterion, warmup_steps=warmup, extrapolate=True), "dpmpp_2m")
        alone = run(sampler(s.policy, "dpmpp_2m"), [3, 4, 5])

        def interrupted(call: Call) -> None:
            if call.position == 9:
                raise KeyboardInterrupt

        run(s)
        after_another = run(s, [3, 4, 5])
        with pytest.raises(KeyboardInterrupt):
            run(s, on_call=interrupted)
        after_a_failure = run(s, [3, 4, 5])
        for chunk in (after_another, after_a_failure):
            assert torch.equal(chunk.images, alone.images)
            assert torch.equal(chunk.record["skip_statistic"].nan_to_num(), alone.record["skip_statistic"].nan_to_num())


def test_states_are_not_changed_but_replaced() -> None:
    """A search goes on from one state in several ways."""
    path, eps = trajectory()
    calls = DDIM(DDIMConfig(50)).calls(PROCESS)
    for criterion in RULES:
        policy = AdaptiveSkip(0.05, criterion=criterion, decision="per_sample", **FREE)
        state = policy.begin(RunInfo(calls, build("isotropic"), 2, 1))
        for call in calls[:20]:
            before = state
            kept = {name: repr(getattr(before, name)) for name in ("reuse", "computed", "streak", "level", "moves")}
            flags = torch.as_tensor(policy.plan(state, call).call).expand(2)
            state = policy.observe(
                state, call, path[call.position], path[call.position + 1], Seen(eps[call.position], flags)
            )
            assert {name: repr(getattr(before, name)) for name in kept} == kept


@pytest.mark.parametrize(
    ("evaluated", "asked"),
    [
        ("1" * 12, "1111" + "0" * 8),  # never four in a row without
        ("10" * 6, "1111111" + "0" * 5),  # warm-up ends with the fourth that was evaluated
        ("1111" + "0" * 8, "1111" + "0000" + "1" * 4),  # a cap that is not obeyed goes on asking
    ],
)
def test_what_counts_is_what_was_evaluated(evaluated: str, asked: str) -> None:
    """Another policy, or guidance that starts, may decide otherwise."""
    calls = DDIM(DDIMConfig(12)).calls(PROCESS)
    policy, found = AdaptiveSkip(tail_steps=0), ""
    state = policy.begin(RunInfo(calls, build("isotropic"), 1, 1))
    for call, flag in zip(calls, evaluated, strict=True):
        found += text([bool(policy.plan(state, call).call)])
        shown = Seen(STILL[0], torch.tensor([flag == "1"]))
        state = policy.observe(state, call, STILL[call.position], STILL[call.position + 1], shown)
    assert found == asked


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "chi2"}, "criterion 'chi2' is not one of displacement_magnitude, third_difference"),
        ({"decision": "vote"}, "decision 'vote' is not one of batch_mean, batch_any, per_sample"),
        ({"threshold": -0.1}, "threshold=-0.1 must be at least 0"),
        ({"threshold": math.nan}, "threshold=nan must be at least 0"),
        ({"max_skip_steps": -1}, "max_skip_steps=-1 must be at least 0"),
        ({"max_skip_span_lambda": -1.0}, "max_skip_span_lambda=-1.0 must be at least 0"),
        ({"tail_steps": -2}, "tail_steps=-2 must be at least 0"),
        ({"atol": -1e-3}, "atol=-0.001 must be at least 0"),
        ({"warmup_steps": 2}, "warmup_steps=2, but displacement_magnitude needs 3"),
        ({"warmup_steps": 2, "criterion": "third_difference"}, "warmup_steps=2, but third_difference needs 3"),
        ({"warmup_steps": 1, "criterion": "embedded_error"}, "warmup_steps=1, but embedded_error needs 2"),
        (
            {"upstream_quirks": True, "criterion": "third_difference"},
            "official displacement_magnitude, batch_mean with warmup_steps=4, not third_difference, batch_mean with 4",
        ),
        ({"upstream_quirks": True, "decision": "per_sample"}, "not displacement_magnitude, per_sample with 4"),
        ({"upstream_quirks": True, "warmup_steps": 5}, "not displacement_magnitude, batch_mean with 5"),
        ({"upstream_quirks": True, "max_skip_steps": None}, "needs a max_skip_steps; the official value is 4"),
        (
            {"upstream_quirks": True, "max_skip_span_lambda": 0.5},
            "max_skip_span_lambda=0.5 would do nothing under upstream_quirks",
        ),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdaptiveSkip(**fields)
