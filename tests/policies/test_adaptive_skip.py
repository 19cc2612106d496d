"""Adaptive skipping against references written from the definitions: criteria, and whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers import (
    DDIM,
    Call,
    DDIMConfig,
)
from gearshift.execution.plan import StepPlan
from gearshift.policies import AdaptiveSkip

from ..contract import TOLERANCE, build
from .skipping import (
    FREE,
    PROCESS,
    RULES,
    SOLVERS,
    STEPS,
    B,
    by_hand,
    called,
    embedded,
    magnitude,
    masks,
    middling,
    moving,
    run,
    sampler,
    text,
    trajectory,
    worst_sample,
)

# The criteria --------------------------------------------------------------------------------------------------------


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
