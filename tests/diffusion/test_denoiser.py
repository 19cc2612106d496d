"""Denoiser: guidance, skipped calls, routing by noise level."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.execution.memory import Memory
from gearshift.execution.outputs import SIMULATE
from gearshift.execution.plan import FULL, StepPlan
from gearshift.runtime.errors import UsageError

from ..contract import EAGER, TOLERANCE, LeaveAt, build

B = 4


def denoiser(name: str = "isotropic") -> Denoiser:
    return Denoiser(build(name), VPSDE(VPSDEConfig()))


def inputs(d: Denoiser, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    size = d.network.image_size
    x = torch.randn(B, d.network.in_channels, size, size, generator=generator)
    return x, torch.tensor([0, 2, 1, 0]) if d.network.cond_kind == "class" else None


def by_hand(d: Denoiser, x: Tensor, time: float, labels: Tensor | None, depth: int | None = None) -> Tensor:
    fed = torch.full((len(x),), float(d.process.network_time(time)))
    stream = d.network.embed(x, fed, labels)
    hidden, skips = stream.hidden, []
    depth = d.network.num_blocks() if depth is None else depth
    for block in range(depth):
        hidden = d.network.blocks[block](hidden, stream.cond, skips.pop() if block in d.network.pops else None)
        if block in d.network.pushes:
            skips.append(hidden)
    return d.network.readout(hidden, stream.cond, depth)


def test_off_guidance_is_the_network() -> None:
    d = denoiser()
    x, labels = inputs(d)
    p = d.predict(x, 0.4, labels)
    assert torch.equal(p.eps, by_hand(d, x, 0.4, labels))
    alpha, sigma = float(d.process.alpha(0.4)), float(d.process.sigma(0.4))
    assert torch.equal(p.x0, (x - sigma * p.eps) / alpha)
    assert p.variance is None and p.called.tolist() == [True] * B and p.depth.tolist() == [4] * B


def test_variance_channels_are_split_off() -> None:
    d = denoiser("long-skips")
    x, _ = inputs(d)
    p = d.predict(x, 0.4, None)
    both = by_hand(d, x, 0.4, None)
    assert p.variance is not None
    assert torch.equal(p.eps, both[:, :1]) and torch.equal(p.variance, both[:, 1:])


@pytest.mark.parametrize("w", [0.0, 1.5, 4.0])
def test_guidance_mixes_the_branches(w: float) -> None:
    d = denoiser()
    x, labels = inputs(d)
    p = d.predict(x, 0.4, labels, guidance=w)
    conditional = by_hand(d, x, 0.4, labels)
    unconditional = by_hand(d, x, 0.4, torch.full((B,), 3))
    torch.testing.assert_close(p.eps, unconditional + w * (conditional - unconditional), **TOLERANCE)
    torch.testing.assert_close(p.held.eps, torch.cat([conditional, unconditional]), **TOLERANCE)
    assert p.depth.shape == p.called.shape == (2 * B,)


def test_branches_may_leave_at_different_depths() -> None:
    d = denoiser()
    x, labels = inputs(d)
    script = torch.tensor([1, 2, 3, 4, 4, 2, 1, 3])
    conditional = [by_hand(d, x, 0.4, labels, depth)[i] for i, depth in enumerate([1, 2, 3, 4])]
    unconditional = [by_hand(d, x, 0.4, torch.full((B,), 3), depth)[i] for i, depth in enumerate([4, 2, 1, 3])]
    c, u = torch.stack(conditional), torch.stack(unconditional)
    for plan in (StepPlan(depth=script), StepPlan(exit=LeaveAt(script))):
        for packing in (EAGER, SIMULATE):
            p = d.predict(x, 0.4, labels, plan=plan, guidance=3.0, packing=packing)
            assert torch.equal(p.depth, script)
            torch.testing.assert_close(p.eps, u + 3.0 * (c - u), **TOLERANCE)


def test_guidance_needs_a_null_condition() -> None:
    d = denoiser("long-skips")
    with pytest.raises(UsageError, match="LongSkips"):
        d.predict(inputs(d)[0], 0.4, None, guidance=2.0)
    d = denoiser()
    with pytest.raises(UsageError, match="guidance needs class conditioning for Isotropic, got none"):
        d.predict(inputs(d)[0], 0.4, None, guidance=2.0)


def test_a_skipped_call_holds_eps_and_derives_x0_again() -> None:
    d = denoiser("long-skips")
    x, _ = inputs(d)
    first = d.predict(x, 0.6, None)
    later, _ = inputs(d, seed=1)
    second = d.predict(later, 0.5, None, plan=StepPlan(call=False), held=first.held)
    assert torch.equal(second.eps, first.eps)
    assert second.variance is not None and first.variance is not None
    assert torch.equal(second.variance, first.variance)
    alpha, sigma = float(d.process.alpha(0.5)), float(d.process.sigma(0.5))
    assert torch.equal(second.x0, (later - sigma * first.eps) / alpha)
    assert second.trace == [] and not second.called.any() and second.depth.tolist() == [0] * B


def test_the_level_of_the_solver_wins_over_that_of_the_time() -> None:
    d = denoiser()
    x, labels = inputs(d)
    p = d.predict(x, 0.4, labels, level=(0.5, 0.25))
    assert torch.equal(p.x0, (x - 0.25 * p.eps) / 0.5)


def test_rows_skip_one_by_one_before_guidance() -> None:
    """Skipped rows keep their own branch's eps; evaluated rows are as in a batch of their own."""
    d = denoiser()
    x, labels = inputs(d)
    held = d.predict(x, 0.6, labels, guidance=2.0).held
    later, _ = inputs(d, seed=1)
    call = torch.tensor([True, False, True, False, False, False, True, True])
    p = d.predict(later, 0.5, labels, plan=StepPlan(call=call), held=held, guidance=2.0)
    full = d.predict(later, 0.5, labels, guidance=2.0)
    assert torch.equal(p.called, call)
    rows = torch.where(call[:, None, None, None], full.held.eps, held.eps)
    torch.testing.assert_close(p.held.eps, rows, **TOLERANCE)
    assert torch.equal(p.held.eps[~call], held.eps[~call])
    torch.testing.assert_close(p.eps, torch.lerp(rows[B:], rows[:B], 2.0), **TOLERANCE)
    assert p.depth.tolist() == [4, 0, 4, 0, 0, 0, 4, 4]
    assert {row for e in p.trace for row in e.rows.host().tolist()} == {0, 2, 6, 7}
    assert torch.equal(held.eps, d.predict(x, 0.6, labels, guidance=2.0).held.eps)  # the old one is not written to


def test_rows_without_a_prediction_are_evaluated_anyway() -> None:
    d = denoiser()
    x, labels = inputs(d)
    never = StepPlan(call=torch.tensor([False, True, False, True]))
    assert torch.equal(d.predict(x, 0.5, labels, plan=never).eps, d.predict(x, 0.5, labels).eps)
    assert d.predict(x, 0.5, labels, plan=never).called.all()


def test_a_row_may_be_skipped_many_times() -> None:
    """Each row holds its latest prediction through calls that evaluate only others."""
    d = denoiser()
    x, labels = inputs(d)
    held = d.predict(x, 0.6, labels).held
    wanted = held.eps.clone()
    for seed, called in enumerate(([True, False, False, True], [True, False, False, False], [False] * 4), 1):
        later, _ = inputs(d, seed)
        mask = torch.tensor(called)
        fresh = d.predict(later, 0.5, labels).eps
        p = d.predict(later, 0.5, labels, plan=StepPlan(call=mask), held=held)
        wanted[mask] = fresh[mask]
        assert p.called.tolist() == called
        torch.testing.assert_close(p.eps, wanted, **TOLERANCE)
        held = p.held


def test_per_row_plans_follow_the_rows_that_are_called() -> None:
    """Depths and rules speak of all R rows, whichever are skipped."""
    d = denoiser()
    x, labels = inputs(d)
    held = d.predict(x, 0.6, labels).held
    depths = torch.tensor([1, 2, 3, 4])
    plan = StepPlan(call=torch.tensor([False, True, False, True]), depth=depths)
    p = d.predict(x, 0.6, labels, plan=plan, held=held)
    assert p.depth.tolist() == [0, 2, 0, 4]
    torch.testing.assert_close(p.eps[1], by_hand(d, x, 0.6, labels, 2)[1], **TOLERANCE)
    assert torch.equal(p.eps[0], held.eps[0])


def test_skipped_rows_leave_their_memory_alone() -> None:
    d = denoiser()
    x, labels = inputs(d)
    memory = Memory(B, [(block, "output") for block in range(4)])
    memory.begin_call()
    held = d.predict(x, 0.6, labels, memory=memory).held
    memory.begin_call()
    call = torch.tensor([True, False, False, True])
    d.predict(x, 0.5, labels, plan=StepPlan(call=call), held=held, memory=memory)
    for block in range(4):
        assert memory.written((block, "output")).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    "process", [VPSDE(VPSDEConfig()), Discrete(DiscreteConfig(first_index=1))], ids=lambda p: p.name
)
def test_rows_may_have_their_own_times(process) -> None:  # type: ignore[no-untyped-def]
    d = Denoiser(build("isotropic"), process)
    x, labels = inputs(d)
    times = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64) * process.t_max
    together = d.rows(x, times, labels)
    for row, time in enumerate(times.tolist()):
        alone = d.rows(x[row : row + 1], time, labels[row : row + 1] if labels is not None else None)
        torch.testing.assert_close(together.prediction[row : row + 1], alone.prediction, **TOLERANCE)


def test_rows_are_routed_by_their_noise_level() -> None:
    """Mixed times in one batch; the level where the toy changes decoders is log-SNR 0."""
    d = denoiser("two-decoders")
    x, _ = inputs(d)
    border = float(d.process.time_of_log_snr(0.0))
    times = torch.tensor([border - 0.1, border + 0.1, border + 0.3, border - 0.2], dtype=torch.float64)
    ran: Counter[int] = Counter()
    hooks = [b.register_forward_hook(lambda *_, i=i: ran.update([i])) for i, b in enumerate(d.network.blocks)]
    outputs = d.rows(x, times, None)
    for hook in hooks:
        hook.remove()
    assert outputs.depth.tolist() == [6, 7, 7, 6]
    assert ran == dict.fromkeys(range(10), 1)
    for row, (time, expert) in enumerate(zip(times.tolist(), (0, 1, 1, 0), strict=True)):
        routed, forced = (d.rows(x[row : row + 1], time, None, plan) for plan in (FULL, StepPlan(expert=expert)))
        assert torch.equal(routed.prediction, forced.prediction)
        torch.testing.assert_close(outputs.prediction[row : row + 1], routed.prediction, **TOLERANCE)
    assert d.rows(x, times, None, StepPlan(expert=0)).depth.tolist() == [6] * 4


def test_prediction_is_fp32_whatever_the_network_computes_in() -> None:
    d = denoiser()
    x, labels = inputs(d)
    with torch.autocast("cpu", torch.bfloat16):
        p = d.predict(x, 0.4, labels, guidance=2.0)
    assert p.eps.dtype == p.x0.dtype == torch.float32
    assert torch.isfinite(p.eps).all()
