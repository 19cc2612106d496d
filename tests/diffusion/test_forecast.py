"""Held and extrapolated predictions: the line through the last two, row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser, Prediction
from gearshift.diffusion.forecast import Held, forecast, renewed
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.diffusion.solvers import DDIM, Call, DDIMConfig, DPMpp2M, DPMpp2MConfig, Solver
from gearshift.execution.plan import FULL, StepPlan
from gearshift.execution.stream import Rows, Stream
from gearshift.policies import Full, Policy
from gearshift.sampling.loop import Sampler, sample_chunk

from ..contract import TOLERANCE, build, cost_table

R = 4
EVERY, NONE = torch.ones(R, dtype=torch.bool), torch.zeros(R, dtype=torch.bool)
PROCESS = VPSDE(VPSDEConfig())


def draw(seed: int, rows: int = R) -> Tensor:
    return torch.randn(rows, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def two(ratio: float = 5.0, last: float = 3.0) -> Held:
    """Every row evaluated at the two ratios."""
    first = renewed(None, draw(0), None, EVERY, ratio, keep_earlier=True)
    return renewed(first, draw(1), None, EVERY, last, keep_earlier=True)


# The line ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [2.0, 0.0, 4.0, 5.0])
def test_the_line_through_the_last_two(ratio: float) -> None:
    """Exact for what is a line over sigma / alpha, between and beyond the two as well."""
    eps, able = forecast(two(), EVERY, ratio)
    torch.testing.assert_close(eps, draw(1) + (ratio - 3) / (3 - 5) * (draw(1) - draw(0)), **TOLERANCE)
    assert able.all()


def test_at_its_own_level_it_is_the_last_prediction() -> None:
    assert torch.equal(forecast(two(), EVERY, 3.0)[0], draw(1))


def test_only_the_rows_asked_for() -> None:
    rows = torch.tensor([True, False, True, False])
    eps, able = forecast(two(), rows, 2.0)
    assert torch.equal(able, rows)
    assert torch.equal(eps[~rows], draw(1)[~rows])
    torch.testing.assert_close(eps[rows], forecast(two(), EVERY, 2.0)[0][rows], **TOLERANCE)
    eps, able = forecast(two(), NONE, 2.0)
    assert torch.equal(eps, draw(1)) and not able.any()


def test_every_row_has_a_line_of_its_own() -> None:
    """Random calls of random rows, against a list of (ratio, eps) per row."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        held: Held | None = None
        seen: list[list[tuple[float, Tensor]]] = [[] for _ in range(R)]
        ratio = 10.0
        for k in range(6):
            called = torch.rand(R, generator=generator) < 0.5
            if not called.any():
                continue
            ratio *= 0.7
            eps = draw(k)[called]
            held = renewed(held, eps, None, called, ratio, keep_earlier=True)
            for row, value in zip(called.nonzero().flatten().tolist(), eps, strict=True):
                seen[row].append((ratio, value))
            moved, able = forecast(held, EVERY, 0.5 * ratio)
            assert held.valid.tolist() == [len(past) > 0 for past in seen]
            assert able.tolist() == [len(past) > 1 for past in seen]
            for row, past in enumerate(seen):
                if not past:
                    continue
                last, eps_1 = past[-1]
                assert float(held.ratio[row]) == last and torch.equal(held.eps[row], eps_1)
                wanted = eps_1
                if len(past) > 1:
                    before, eps_0 = past[-2]
                    wanted = eps_1 + (0.5 * ratio - last) / (last - before) * (eps_1 - eps_0)
                torch.testing.assert_close(moved[row], wanted, **TOLERANCE)


def test_rows_without_two_predictions_hold() -> None:
    once = renewed(None, draw(0), None, EVERY, 5.0, keep_earlier=True)
    eps, able = forecast(once, EVERY, 2.0)
    assert torch.equal(eps, draw(0)) and not able.any()
    some = torch.tensor([True, False, False, True])
    mixed = renewed(once, draw(1)[some], None, some, 3.0, keep_earlier=True)
    eps, able = forecast(mixed, EVERY, 2.0)
    assert torch.equal(able, some) and torch.equal(eps[~some], draw(0)[~some])
    assert (eps[some] - mixed.eps[some]).flatten(1).norm(dim=1).min() > 0.1


def test_what_no_row_holds_does_not_leak() -> None:
    some = torch.tensor([True, False, True, True])
    held = two()
    assert held.earlier is not None
    poisoned = held.earlier.eps.clone()
    poisoned[1] = math.nan
    earlier = Held(poisoned, None, some, held.earlier.ratio)
    eps, able = forecast(Held(held.eps, None, held.valid, held.ratio, earlier), EVERY, 2.0)
    assert torch.isfinite(eps).all() and torch.equal(able, some) and torch.equal(eps[1], draw(1)[1])


def test_two_predictions_of_one_level_are_held() -> None:
    """Solvers that call twice visit levels twice; no line goes through two points above each other."""
    eps, able = forecast(two(3.0, 3.0), EVERY, 2.0)
    assert torch.equal(eps, draw(1)) and not able.any()


def test_nothing_earlier_is_kept_unless_asked() -> None:
    some = torch.tensor([True, False, True, False])
    held = renewed(None, draw(0), draw(5), EVERY, 5.0, keep_earlier=False)
    held = renewed(held, draw(1)[some], draw(6)[some], some, 3.0, keep_earlier=False)
    assert held.earlier is None and held.variance is not None
    assert torch.equal(held.variance, torch.where(some.view(-1, 1, 1, 1), draw(6), draw(5)))
    assert held.ratio.tolist() == [3.0, 5.0, 3.0, 5.0]
    third = renewed(two(), draw(2), None, EVERY, 1.0, keep_earlier=True)
    assert third.earlier is not None and third.earlier.earlier is None  # two, and never more
    assert torch.equal(third.earlier.eps, draw(1))


def test_renewing_leaves_the_older_alone() -> None:
    """A run may be forked: what is held is replaced, not written into."""
    held = two()
    kept = held.eps.clone()
    some = torch.tensor([True, False, True, False])
    renewed(held, draw(2)[some], None, some, 1.0, keep_earlier=True)
    forecast(held, EVERY, 2.0)
    assert torch.equal(held.eps, kept) and held.earlier is not None and torch.equal(held.earlier.eps, draw(0))


# In the denoiser -----------------------------------------------------------------------------------------------------

B = 3
TIMES = (0.8, 0.6, 0.5)


def predict(position: int, plan: StepPlan, held: Held | None, name: str = "dit-class", **options: Any) -> Prediction:
    x = torch.randn(B, 2, 8, 8, generator=torch.Generator().manual_seed(position))
    d, labels = Denoiser(build(name), PROCESS), torch.tensor([0, 2, 1])
    return d.predict(x, TIMES[position], labels, plan=plan, held=held, **{"keep_earlier": True, **options})


def ratio(position: int) -> float:
    return float(PROCESS.sigma(TIMES[position]) / PROCESS.alpha(TIMES[position]))


def weight() -> float:
    return (ratio(2) - ratio(1)) / (ratio(1) - ratio(0))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_skipped_call_continues_the_line_before_guidance(guidance: float) -> None:
    """With the scale of the call itself; the variance is held."""
    first = predict(0, FULL, None, guidance=guidance)
    second = predict(1, FULL, first.held, guidance=guidance)
    scale = guidance if guidance == 1.0 else 4.0
    third = predict(2, StepPlan(call=False, forecast=1), second.held, guidance=scale)
    line = second.held.eps + weight() * (second.held.eps - first.held.eps)
    wanted = line if guidance == 1.0 else line[B:] + scale * (line[:B] - line[B:])
    torch.testing.assert_close(third.eps, wanted, **TOLERANCE)
    assert third.forecast.all() and not third.called.any() and third.trace == []
    assert third.variance is not None and second.variance is not None
    assert torch.equal(third.variance, second.variance)
    # What was extrapolated is no prediction to extrapolate from.
    assert torch.equal(third.held.eps, second.held.eps) and third.held.ratio.tolist() == second.held.ratio.tolist()


def test_some_rows_are_called_and_the_others_continued() -> None:
    first = predict(0, FULL, None)
    second = predict(1, FULL, first.held)
    call = torch.tensor([True, False, True])
    mixed = predict(2, StepPlan(call=call, forecast=1), second.held)
    full = predict(2, FULL, second.held)
    continued = predict(2, StepPlan(call=False, forecast=1), second.held)
    torch.testing.assert_close(mixed.eps[call], full.eps[call], **TOLERANCE)
    torch.testing.assert_close(mixed.eps[~call], continued.eps[~call], **TOLERANCE)
    assert torch.equal(mixed.forecast, ~call) and torch.equal(mixed.called, call)
    assert not full.forecast.any()
    # The row that was not called keeps both of its predictions.
    assert mixed.held.earlier is not None and second.held.earlier is not None
    assert torch.equal(mixed.held.earlier.eps[~call], second.held.earlier.eps[~call])
    assert torch.equal(mixed.held.earlier.eps[call], second.held.eps[call])


def test_keeping_the_earlier_one_changes_nothing_else() -> None:
    for call in (True, torch.tensor([True, False, True]), False):
        runs = []
        for keep in (True, False):
            held: Held | None = None
            for position in range(2):
                held = predict(position, FULL, held, keep_earlier=keep).held
            runs.append(predict(2, StepPlan(call=call), held, keep_earlier=keep))
        assert torch.equal(runs[0].eps, runs[1].eps) and torch.equal(runs[0].held.eps, runs[1].held.eps)
        assert runs[0].held.earlier is not None and runs[1].held.earlier is None
        assert not runs[0].forecast.any()


def test_a_forecast_without_the_earlier_one_holds() -> None:
    held = predict(1, FULL, predict(0, FULL, None, keep_earlier=False).held, keep_earlier=False).held
    asked = predict(2, StepPlan(call=False, forecast=1), held, keep_earlier=False)
    assert torch.equal(asked.eps, predict(2, StepPlan(call=False), held).eps) and not asked.forecast.any()


# Over whole runs -----------------------------------------------------------------------------------------------------


class Line(Backbone):
    """eps is a line over sigma / alpha, for every image alike."""

    in_channels = out_channels = 1
    image_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.paths = ((0,),)
        self.blocks = nn.ModuleList([nn.Identity()])
        self.at = nn.Parameter(torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
        self.slope = nn.Parameter(torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1)) / 10)
        self.blocks[0].forward = lambda hidden, cond, skip, slot: hidden  # type: ignore[method-assign]

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return (1,)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        return Stream(x, time, Rows(len(x)), {"time": time})

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        ratio = torch.exp(-0.5 * PROCESS.log_snr(cond["time"].double() / 999)).to(self.at.dtype)
        return self.at + ratio.view(-1, 1, 1, 1) * self.slope


@dataclass(frozen=True)
class Some(Policy):
    """Two calls, then every third; between them the prediction is held, or extrapolated."""

    forecast: int

    @property
    def forecasts(self) -> bool:
        return bool(self.forecast)

    def plan(self, state: Any, call: Call) -> StepPlan:
        return StepPlan(call=call.position < 2 or call.position % 3 == 0, forecast=self.forecast)


@pytest.mark.parametrize("solver", [DDIM(DDIMConfig(12)), DPMpp2M(DPMpp2MConfig(12))], ids=lambda s: s.name)
def test_a_line_over_sigma_by_alpha_is_followed_exactly(solver: Solver) -> None:
    denoiser = Denoiser(Line().requires_grad_(False), PROCESS)
    images = {}
    for policy in (Full(), Some(1), Some(0)):
        s = Sampler(denoiser, solver, policy, chunk=2)
        images[policy] = sample_chunk(s, torch.arange(2), cost_table(denoiser.network)).images
    scale = images[Full()].abs().max()
    torch.testing.assert_close(images[Some(1)], images[Full()], rtol=1e-4, atol=1e-4 * float(scale))
    assert (images[Some(0)] - images[Full()]).abs().max() > 0.01 * scale
