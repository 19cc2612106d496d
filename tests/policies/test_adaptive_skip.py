"""Adaptive skipping against references written from the definitions: criteria, control flow, runs, isolation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers import (
    DDIM,
    Call,
    DDIMConfig,
    DiffusersConfig,
    DiffusersSolver,
    DPMpp2M,
    DPMpp2MConfig,
    EDMHeun,
    EDMHeunConfig,
    Solver,
)
from gearshift.execution.plan import StepPlan
from gearshift.policies import AdaptiveSkip, Full, Policy, RunInfo
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Chunk, Sampler, sample_chunk

from ..contract import TOLERANCE, build, cost_table

B, STEPS = 3, 16
PROCESS = Discrete(DiscreteConfig())
SOLVERS: dict[str, Solver] = {
    "ddim": DDIM(DDIMConfig(STEPS)),
    "euler": DiffusersSolver(DiffusersConfig("EulerDiscreteScheduler", STEPS)),  # conf/solver/diffusers_euler.yaml
    "dpmpp_2m": DPMpp2M(DPMpp2MConfig(STEPS)),
    "edm_heun": EDMHeun(EDMHeunConfig(8)),
}
FREE: dict[str, Any] = dict(max_skip_steps=None, tail_steps=0)
"""Nothing decides but the criterion."""


def sampler(policy: Policy, solver: str = "ddim", **fields: Any) -> Sampler:
    made = Sampler(Denoiser(build("isotropic"), PROCESS), SOLVERS[solver], policy, **{"chunk": B, "seed": 3, **fields})
    made.check()
    return made


def run(s: Sampler, index: Sequence[int] = range(B), **options: Any) -> Chunk:
    return sample_chunk(s, torch.tensor(index), cost_table(s.denoiser.network), **options)


def called(chunk: Chunk) -> list[bool]:
    """Which calls were made, where all samples agree."""
    assert (chunk.ledger.called == chunk.ledger.called[:, :1, :1]).all()
    return chunk.ledger.called[:, 0, 0].tolist()


# References ----------------------------------------------------------------------------------------------------------

Rule = Callable[[Sequence[Call], list[Tensor], list[tuple[Call, Tensor]]], Tensor]
"""Statistic of the step that follows, from the calls of the run, the latents L_0 .. L_n in the solver's frame, and the
calls that were computed with their predictions."""


def magnitude(calls: Sequence[Call], path: list[Tensor], seen: list[tuple[Call, Tensor]]) -> Tensor:
    """|(d_n + d_{n-2}) / 2 - d_{n-1}| / d_{n-1} with d_n = mean |L_n - L_{n-1}|."""
    d = [(new.double() - old.double()).abs().mean() for old, new in pairwise(path[-4:])]
    return (0.5 * (d[2] + d[0]) - d[1]).abs() / d[1]


def third(calls: Sequence[Call], path: list[Tensor], seen: list[tuple[Call, Tensor]]) -> Tensor:
    """||L_n - 3 L_{n-1} + 3 L_{n-2} - L_{n-3}|| / ||L_{n-1} - L_{n-2}||."""
    a, b, c, d = (x.double() for x in path[-4:])
    return (d - 3 * c + 3 * b - a).norm() / (c - b).norm()


def embedded(
    calls: Sequence[Call], path: list[Tensor], seen: list[tuple[Call, Tensor]], *, sigma_frame: bool = False
) -> Tensor:
    """|s' - s_k|^2 / 2 ||eps_k - eps_{k-1}|| / |s_k - s_{k-1}| / ||x||, x in the frame x_0 + s eps."""
    (before, older), (last, newer) = seen[-2:]
    call = calls[len(path) - 1]
    s0, s1, stop = before.sigma / before.alpha, last.sigma / last.alpha, call.next_sigma / call.next_alpha
    rms = [tensor.double().square().mean().sqrt() for tensor in (newer - older, path[-1])]
    rms[1] = rms[1] if sigma_frame else rms[1] / call.alpha
    return 0.5 * (stop - s1) ** 2 * rms[0] / abs(s1 - s0) / rms[1]


def worst_sample(rule: Rule) -> Rule:
    """The rule on every sample by itself; the greatest statistic decides."""

    def of(calls: Sequence[Call], path: list[Tensor], seen: list[tuple[Call, Tensor]]) -> Tensor:
        alone = [
            rule(calls, [x[b : b + 1] for x in path], [(call, eps[b : b + 1]) for call, eps in seen])
            for b in range(len(path[0]))
        ]
        return torch.stack(alone).max()

    return of


RULES: dict[str, tuple[Rule, int]] = {
    "displacement_magnitude": (magnitude, 4),
    "third_difference": (third, 4),
    "embedded_error": (embedded, 2),
}
"""Rule, and calls before the first decision."""


def by_hand(
    s: Sampler, rule: Rule, warmup: int, threshold: float, extrapolate: bool = False
) -> tuple[list[bool], list[float], Tensor]:
    """The loop written out: which calls were made, the statistics behind it, the images."""
    solver, calls, index = s.solver, s.calls(), torch.arange(B)
    rule = partial(embedded, sigma_frame=solver.sigma_frame) if rule is embedded else rule
    labels = keys.integers(s.seed, "sample_label", index, 0, 3)
    state = solver.begin(PROCESS, keys.normal(s.seed, "init_noise", index, 0, (2, 8, 8)))
    path, seen, mask, statistics = [state.x], [], [], []
    for position, call in enumerate(calls):
        statistic = float(rule(calls, path, seen)) if position >= warmup else math.inf
        compute = statistic > threshold
        x = solver.network_input(state, call)
        if compute:
            eps = s.denoiser.predict(x, call.time, labels, level=(call.alpha, call.sigma)).eps
            seen.append((call, eps))
        else:
            eps = seen[-1][1]
            if extrapolate:
                (before, older), (last, newer) = seen[-2:]
                s0, s1 = before.sigma / before.alpha, last.sigma / last.alpha
                eps = newer + (call.sigma / call.alpha - s1) / (s1 - s0) * (newer - older)
        state = solver.advance(state, call, eps, fresh=compute or extrapolate)
        path.append(state.x)
        mask.append(compute)
        statistics.append(statistic)
    return mask, statistics, solver.result(state)


@cache
def middling(criterion: str, solver: str) -> float:
    """A threshold between the statistics of the plain run: some calls are skipped, some are not."""
    rule, warmup = RULES[criterion]
    _, statistics, _ = by_hand(sampler(Full(), solver), rule, warmup, -1.0)
    known = sorted(value for value in statistics[warmup:] if math.isfinite(value))  # Heun visits levels twice
    return 0.5 * (known[len(known) // 2] + known[len(known) // 2 + 1])


@dataclass(frozen=True)
class Seen:
    """What a policy is shown of a call."""

    eps: Tensor
    called: Tensor
    branches: int = 1


def masks(
    policy: Policy,
    path: Sequence[Tensor],
    eps: Sequence[Tensor] | None = None,
    *,
    sigma_frame: bool = False,
    solver: Solver | None = None,
) -> Tensor:
    """Calls that the policy makes while it is shown the latents `path` [K + 1] of the solver: bool [K, B]."""
    calls = (DDIM(DDIMConfig(len(path) - 1)) if solver is None else solver).calls(PROCESS)
    batch = len(path[0])
    info = RunInfo(calls, build("isotropic"), batch, 1, sigma_frame)
    state, made = policy.begin(info), []
    for call, before, after in zip(calls, path, path[1:], strict=False):
        made.append(torch.as_tensor(policy.plan(state, call).call).expand(batch))
        # What is shown is in the frame alpha x_0 + sigma eps, whatever the solver's is.
        scales = (call.alpha, call.next_alpha) if sigma_frame else (1.0, 1.0)
        shown = Seen(after if eps is None else eps[call.position], made[-1])
        state = policy.observe(state, call, before * scales[0], after * scales[1], shown)
    return torch.stack(made)


def moving(displacements: Sequence[float]) -> list[Tensor]:
    """Latents that move by so much at each step, exactly."""
    total = torch.tensor([0.0, *displacements]).cumsum(0)
    return [value.expand(1, 1, 2, 2).contiguous() for value in total]


def text(mask: Tensor | list[bool]) -> str:
    flat = mask[:, 0].tolist() if isinstance(mask, Tensor) else mask
    return "".join("01"[flag] for flag in flat)


# The criteria --------------------------------------------------------------------------------------------------------


def trajectory() -> tuple[list[Tensor], list[Tensor]]:
    """51 smooth latents [2, 2, 4, 4] whose speed and direction change, and 50 predictions."""
    draws = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2, 2, 4, 4, generator=draws, dtype=torch.float64) for _ in range(3))
    at = [n / 50 for n in range(51)]
    path = [a * math.cos(2 * t) + b * t**2 + c * 0.05 * math.sin(20 * t) for t in at]
    eps = [a * t**3 + b * math.sin(3 * t) for t in at[:-1]]
    return [x.float() for x in path], [e.float() for e in eps]


@pytest.mark.parametrize("sigma_frame", [False, True])
@pytest.mark.parametrize(("criterion", "threshold"), [("displacement_magnitude", 0.02), ("third_difference", 0.05)])
def test_criterion_on_a_recorded_trajectory(criterion: str, threshold: float, sigma_frame: bool) -> None:
    path, _ = trajectory()
    rule = RULES[criterion][0]
    wanted = [n < 4 or bool(rule((), path[: n + 1], []) > threshold) for n in range(50)]
    policy = AdaptiveSkip(threshold, criterion=criterion, **FREE)
    found = masks(policy, path, sigma_frame=sigma_frame)[:, 0].tolist()
    assert found == wanted and 10 < sum(found) < 40


@pytest.mark.parametrize("atol", [0.0, 0.05])
def test_embedded_error_on_a_recorded_trajectory(atol: float) -> None:
    """What was skipped is not looked at, so the reference needs its own decisions."""
    path, eps = trajectory()
    calls = DDIM(DDIMConfig(50)).calls(PROCESS)
    threshold, seen, wanted = 0.02, [], []
    for n, call in enumerate(calls):
        compute = n < 2
        if not compute:
            size = (path[n] / call.alpha).double().square().mean().sqrt()
            error = embedded(calls, path[: n + 1], seen) * size
            compute = bool(error > atol + threshold * size)
        wanted.append(compute)
        if compute:
            seen.append((call, eps[n]))
    policy = AdaptiveSkip(threshold, criterion="embedded_error", atol=atol, warmup_steps=2, **FREE)
    found = masks(policy, path, eps)[:, 0].tolist()
    assert found == wanted and 5 < sum(found) < 40
    if atol:
        assert sum(found) < masks(replace(policy, atol=0.0), path, eps).sum()


@pytest.mark.parametrize(
    ("displacements", "threshold", "reuse"),
    [
        ((1, 1, 1), 0.01, True),
        ((1, 1.2, 1), 0.01, False),
        ((1, 1, 1.5), 0.25, True),  # equal: |.| = threshold * d
        ((1, 1, 1.5), 0.2499, False),
        ((1, 0, 1), 0.99, False),  # nothing moved in between
        ((0, 0, 0), 0.99, False),
    ],
)
def test_edges_of_the_criterion_on_magnitudes(displacements: Sequence[float], threshold: float, reuse: bool) -> None:
    for decision in ("batch_mean", "batch_any", "per_sample"):
        policy = AdaptiveSkip(threshold, warmup_steps=3, decision=decision, **FREE)
        assert text(masks(policy, moving([*displacements, 1]))) == ("1110" if reuse else "1111")


def test_equality_computes_under_the_third_difference() -> None:
    """The paper computes where ||.|| >= threshold ||.||."""
    path = moving([1, 1, 1.5, 1])
    for threshold, wanted in ((0.5, "1111"), (0.5001, "1110")):
        assert (
            text(masks(AdaptiveSkip(threshold, warmup_steps=3, criterion="third_difference", **FREE), path)) == wanted
        )


def test_magnitudes_are_not_tensors() -> None:
    """Displacements that reverse: the tensors may be straight where their sizes are not, and the other way round."""
    there_and_back = moving([1, 0.25, -0.5, 1])
    straight = moving([1, -1, 1, 1])
    for path, by_magnitude, by_tensor in ((there_and_back, "1111", "1110"), (straight, "1110", "1111")):
        assert text(masks(AdaptiveSkip(0.9, warmup_steps=3, **FREE), path)) == by_magnitude
        policy = AdaptiveSkip(0.9, warmup_steps=3, criterion="third_difference", **FREE)
        assert text(masks(policy, path)) == by_tensor


# Runs against the loop by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("criterion", RULES)
def test_a_run_is_the_loop_by_hand(criterion: str, solver: str) -> None:
    """Displacements are measured in the solver's own frame: Euler's and EDM's is x_0 + s eps."""
    (rule, warmup), threshold = RULES[criterion], middling(criterion, solver)
    policy = AdaptiveSkip(threshold, criterion=criterion, warmup_steps=warmup, **FREE)
    s = sampler(policy, solver)
    assert s.solver.sigma_frame == (solver in ("euler", "edm_heun"))
    chunk = run(s)
    mask, statistics, images = by_hand(s, rule, warmup, threshold)
    assert called(chunk) == mask and warmup < sum(mask) < len(mask)
    torch.testing.assert_close(chunk.images, images, rtol=1e-5, atol=1e-3)
    found = chunk.record["skip_statistic"]
    assert found.shape == (len(mask),)
    torch.testing.assert_close(found[warmup:], torch.tensor(statistics[warmup:]), rtol=1e-3, atol=1e-4)


def test_the_frame_matters() -> None:
    """Were Euler's displacements measured as x is shown, other calls would be made."""
    s = sampler(AdaptiveSkip(0.03, **FREE), "euler")

    def measured_as_shown(calls: Sequence[Call], path: list[Tensor], seen: list[tuple[Call, Tensor]]) -> Tensor:
        return magnitude(calls, [x * c.alpha for c, x in zip(calls, path, strict=False)], seen)

    assert called(run(s)) == by_hand(s, magnitude, 4, 0.03)[0] != by_hand(s, measured_as_shown, 4, 0.03)[0]


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("criterion", RULES)
def test_extrapolated_skips_are_the_loop_by_hand(criterion: str, solver: str) -> None:
    """For a solver with history a prediction that was extrapolated is one of its own level."""
    (rule, warmup), threshold = RULES[criterion], middling(criterion, solver)
    policy = AdaptiveSkip(threshold, criterion=criterion, warmup_steps=warmup, extrapolate=True, **FREE)
    s = sampler(policy, solver)
    chunk = run(s)
    mask, _, images = by_hand(s, rule, warmup, threshold, extrapolate=True)
    assert called(chunk) == mask and warmup < sum(mask) < len(mask)
    torch.testing.assert_close(chunk.images, images, rtol=1e-4, atol=1e-2)
    held = run(replace(s, policy=replace(policy, extrapolate=False)))
    assert (held.images - chunk.images).abs().max() > 1


@pytest.mark.parametrize("criterion", RULES)
def test_batch_any_computes_where_some_sample_asks(criterion: str) -> None:
    (rule, warmup), threshold = RULES[criterion], 1.2 * middling(criterion, "ddim")
    policy = AdaptiveSkip(threshold, criterion=criterion, warmup_steps=warmup, decision="batch_any", **FREE)
    s = sampler(policy)
    chunk = run(s)
    mask, _, images = by_hand(s, worst_sample(rule), warmup, threshold)
    assert called(chunk) == mask and warmup < sum(mask) < len(mask)
    torch.testing.assert_close(chunk.images, images, rtol=1e-5, atol=1e-3)
    assert chunk.record["skip_statistic"].shape == (STEPS, B)
    assert mask != called(run(replace(s, policy=replace(policy, decision="batch_mean"))))


@pytest.mark.parametrize("criterion", RULES)
@pytest.mark.parametrize(
    ("solver", "extrapolate"),
    [("ddim", False), ("euler", False), ("dpmpp_2m", False), ("ddim", True), ("dpmpp_2m", True)],
)
def test_per_sample_is_every_sample_alone(extrapolate: bool, criterion: str, solver: str) -> None:
    """Rows that compute are packed, so kernels round differently; decisions are the same."""
    warmup, threshold = RULES[criterion][1], middling(criterion, solver)
    fields: dict[str, Any] = dict(criterion=criterion, warmup_steps=warmup, tail_steps=1, extrapolate=extrapolate)
    s = sampler(AdaptiveSkip(threshold, decision="per_sample", **fields), solver)
    together = run(s)
    made = []
    for b in range(B):
        alone = run(replace(s, policy=AdaptiveSkip(threshold, **fields), chunk=1), [b])
        made.append(called(alone))
        assert together.ledger.called[:, 0, b].tolist() == made[-1]
        torch.testing.assert_close(together.images[b], alone.images[0], rtol=1e-4, atol=1e-2)
        assert together.ledger.macs[:, :, b].tolist() == alone.ledger.macs[:, :, 0].tolist()
    assert extrapolate or len({text(mask) for mask in made}) > 1


def test_guided_samples_skip_both_branches_together() -> None:
    s = sampler(AdaptiveSkip(0.04, decision="per_sample"), guidance=2.0)
    ledger = run(s).ledger
    assert (ledger.called[:, 0] == ledger.called[:, 1]).all()
    assert 0 < ledger.called[4:].sum() < ledger.called[4:].size
    for b in range(B):
        alone = run(replace(s, policy=AdaptiveSkip(0.04), chunk=1), [b]).ledger
        assert (alone.called[:, :, 0] == ledger.called[:, :, b]).all()


def test_reused_guidance_takes_the_new_scale_on_the_cached_pair() -> None:
    d = Denoiser(build("isotropic"), PROCESS)
    x, labels = torch.randn(B, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1])
    first = d.predict(x, 700.0, labels, guidance=1.5)
    conditional, unconditional = first.held.eps[:B], first.held.eps[B:]
    later = d.predict(x + 1, 600.0, labels, guidance=4.0, held=first.held, plan=StepPlan(call=False))
    torch.testing.assert_close(later.eps, unconditional + 4.0 * (conditional - unconditional), **TOLERANCE)
    assert not later.called.any() and later.branches == 2
    assert (later.eps - first.eps).abs().max() > 0.1


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
