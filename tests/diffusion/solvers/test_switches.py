"""Switches of depth within a run: how visible they are, and starting the history again."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.solvers import (
    DDIM,
    Call,
    DDIMConfig,
    DiffusersConfig,
    DiffusersSolver,
    DPMpp2M,
    DPMpp2MConfig,
    Solver,
    State,
)
from gearshift.diffusion.solvers.scheduler_classes import SCHEDULERS
from gearshift.diffusion.solvers.switches import Switch, switches
from gearshift.runtime.errors import UsageError

N = 20
SPACING = {"EDMDPMSolverMultistepScheduler": "class"}
RESTARTABLE = [name for name, traits in SCHEDULERS.items() if traits.memory]


def adapted(name: str, restart: bool = True, **options: object) -> DiffusersSolver:
    return DiffusersSolver(DiffusersConfig(name, N, SPACING.get(name, "linspace"), options, restart))


def own(restart: bool = True, **options: object) -> DPMpp2M:
    return DPMpp2M(DPMpp2MConfig(N, restart_at_switch=restart, **options))  # type: ignore[arg-type]


SOLVERS = {"own": own, "own_all": lambda restart=True: own(restart, history="all")}
SOLVERS |= {name: lambda restart=True, name=name: adapted(name, restart) for name in RESTARTABLE}
SOLVERS |= {"order_3": lambda restart=True: adapted("DPMSolverMultistepScheduler", restart, solver_order=3)}


def drive(solver: Solver, process, toy, noise: Tensor, *, switched=None, state: State | None = None) -> list[State]:  # type: ignore[no-untyped-def]
    """States of a run; from `state` on where one is given. `switched(call)` None leaves the flag out."""
    states = [solver.begin(process, noise) if state is None else state]
    for call in solver.calls(process)[states[0].position :]:
        told = {} if switched is None else {"switched": switched(call)}
        eps = toy(solver.network_input(states[-1], call), call.training_index)[0]
        states.append(solver.advance(states[-1], call, eps, **told))
    return states


@pytest.mark.parametrize("name", SOLVERS)
def test_a_restarted_run_is_one_that_begins_at_the_switch(name, processes, toy, noise) -> None:
    """Bit for bit, at any call, whatever went before."""
    process = processes["linear"]
    for position in (1, 2, 7, N - 2, N - 1):
        states = drive(SOLVERS[name](), process, toy, noise, switched=lambda call, at=position: call.position == at)
        before = states[position]
        kept = {}
        if "scheduler" in before.history:
            kept = {"scheduler": {"_step_index": position, "is_scale_input_called": True}, "alpha": 0.0}
        fresh = State(before.x, position, kept)
        again = drive(SOLVERS[name](), process, toy, noise, state=fresh)
        assert torch.equal(again[-1].x, states[-1].x)
        untouched = drive(SOLVERS[name](), process, toy, noise)
        assert torch.equal(untouched[position].x, before.x)
        assert position != 7 or not torch.equal(untouched[-1].x, states[-1].x)


@pytest.mark.parametrize("name", SOLVERS)
def test_off_and_unswitched_are_as_before(name, processes, toy, noise) -> None:
    process = processes["linear"]
    plain = drive(SOLVERS[name](False), process, toy, noise)[-1].x
    assert torch.equal(drive(SOLVERS[name](False), process, toy, noise, switched=lambda call: True)[-1].x, plain)
    assert torch.equal(drive(SOLVERS[name](), process, toy, noise)[-1].x, plain)
    assert torch.equal(drive(SOLVERS[name](), process, toy, noise, switched=lambda call: False)[-1].x, plain)
    assert torch.equal(drive(SOLVERS[name](), process, toy, noise, switched=lambda c: c.position == 0)[-1].x, plain)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_step_of_a_switch_is_first_order(name, processes, toy, noise) -> None:
    """A step of DDIM, between the levels of the call."""
    process, solver = processes["linear"], SOLVERS[name]()
    states = drive(solver, process, toy, noise, switched=lambda call: call.position == 8)
    call = solver.calls(process)[8]
    x = solver.network_input(states[8], call)
    eps = toy(x, call.training_index)[0]
    expected = call.next_alpha * (x - call.sigma * eps) / call.alpha + call.next_sigma * eps
    after = solver.network_input(states[9], solver.calls(process)[9])
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_samples_switch_on_their_own(processes, toy, noise) -> None:
    process = processes["vp_sde"]
    everybody = drive(own(), process, toy, noise, switched=lambda call: call.position == 6)[-1].x
    nobody = drive(own(), process, toy, noise)[-1].x
    rows = torch.tensor([True, False, False, True])
    some = drive(own(), process, toy, noise, switched=lambda call: rows if call.position == 6 else False)[-1].x
    expected = torch.where(rows.view(-1, 1, 1, 1), everybody, nobody)
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-5)
    assert (everybody - nobody).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    with pytest.raises(UsageError, match=r"one history for all samples.*solver=dpmpp_2m"):
        drive(adapted("UniPCMultistepScheduler"), process, toy, noise, switched=lambda call: rows)


def test_a_prediction_used_again_switches_nothing(processes, noise) -> None:
    process, solver = processes["vp_sde"], own()
    calls = solver.calls(process)
    state = solver.begin(process, noise)
    for call in calls[:3]:
        state = solver.advance(state, call, noise)
    held = solver.advance(state, calls[3], noise, fresh=False)
    assert torch.equal(solver.advance(state, calls[3], noise, fresh=False, switched=True).x, held.x)
    rows = torch.tensor([True, False, True, True])
    mixed = solver.advance(state, calls[3], noise, fresh=rows)
    told = solver.advance(state, calls[3], noise, fresh=rows, switched=True)
    assert torch.equal(told.x[1], mixed.x[1]) and torch.isfinite(told.x).all()


def exact_eps(x: Tensor, call: Call) -> Tensor:
    """Gaussian data of mean 0.3 and deviation 0.5."""
    return call.sigma * (x - call.alpha * 0.3) / (call.alpha**2 * 0.25 + call.sigma**2)


def recorded(solver: Solver, process, noise: Tensor, error: float, at: int):  # type: ignore[no-untyped-def]
    """Data predictions of a run whose network is off by `error` of the data prediction before call `at`."""
    state, x0, depths = solver.begin(process, noise), [], []
    for call in solver.calls(process):
        x = solver.network_input(state, call)
        early = call.position < at
        eps = exact_eps(x, call) - (error * call.alpha / call.sigma if early else 0.0)
        x0.append((x - call.sigma * eps) / call.alpha)
        depths.append(2 if early else 4)
        state = solver.advance(state, call, eps, switched=call.position == at)
    return x0, depths


def test_a_switch_that_changes_nothing_is_invisible(processes) -> None:
    process, noise = processes["linear"], torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    solver = own(False)
    calls = solver.calls(process)
    for at in (6, 10, 14):
        [found] = switches(calls, *recorded(solver, process, noise, 0.0, at))
        assert (found.position, found.before, found.after) == (at, 2, 4)
        assert found.jump == pytest.approx(1, abs=0.25)
        jumps = [switches(calls, *recorded(solver, process, noise, error, at))[0].jump for error in (0.3, 1.0)]
        assert 1.4 < jumps[0] < jumps[1]


def test_jump_in_closed_form() -> None:
    """Predictions that grow by 1 per unit of log-SNR, and by 5 more at the switch."""
    template = DDIM(DDIMConfig(2))
    from gearshift.diffusion.process import Discrete, DiscreteConfig

    call = template.calls(Discrete(DiscreteConfig()))[0]
    levels = [0.0, 1.0, 2.0, 2.0, 4.0, 5.0, 6.0]
    calls = [replace(call, position=i, log_snr=level) for i, level in enumerate(levels)]
    x0 = [torch.full((2, 1, 2, 2), level + (5.0 if i >= 4 else 0.0)) for i, level in enumerate(levels)]
    depths = [3, 3, 3, 3, 7, 0, 7]  # the sixth was held
    assert switches(calls, x0, depths) == [Switch(4, 3, 7, pytest.approx(7 / 2))]
    assert switches(calls, x0, [3] * 7) == []
    [first] = switches(calls[:2], x0[:2], [3, 7])
    assert math.isnan(first.jump)  # nothing to compare with
    still = [torch.zeros(1, 1, 2, 2)] * 4 + x0[4:5] + [x0[4]] * 2
    assert switches(calls, still, depths)[0].jump == math.inf
    with pytest.raises(ValueError, match="7 calls, 7 predictions and 2 depths"):
        switches(calls, x0, [1, 2])


def test_a_restart_keeps_the_error_of_the_old_depth_out(processes) -> None:
    """The slope D - P over a switch is mostly the difference of the two networks; first order leaves it out."""
    process, noise = processes["linear"], torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    errors = {}
    for restart in (False, True):
        solver = own(restart)
        at = 12
        state, following = solver.begin(process, noise), None
        for call in solver.calls(process):
            x = solver.network_input(state, call)
            if call.position == at + 1:
                following = x
                break
            off = call.alpha / call.sigma if call.position < at else 0.0
            if call.position == at:
                # Where the exact network would take this very point.
                rank = (x - call.alpha * 0.3) / math.sqrt(call.alpha**2 * 0.25 + call.sigma**2)
                exact = call.next_alpha * 0.3 + rank * math.sqrt(call.next_alpha**2 * 0.25 + call.next_sigma**2)
            state = solver.advance(state, call, exact_eps(x, call) - off, switched=call.position == at)
        errors[restart] = (following - exact).abs().max().item()
    assert errors[True] < 0.5 * errors[False]
