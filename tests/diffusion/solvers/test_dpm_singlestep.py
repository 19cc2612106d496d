"""Singlestep DPM-Solver: orders and nodes, its order of convergence, where it is exact, an independent reference."""

import math
from itertools import pairwise

import pytest
import torch

from gearshift.diffusion.edm import EDM, VE, EDMConfig, VEConfig
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.diffusion.solvers import DPMSinglestep, DPMSinglestepConfig
from gearshift.diffusion.solvers.dpm_singlestep import step_orders
from gearshift.runtime.errors import UsageError

VP = VPSDE(VPSDEConfig(t_min=1e-5))
PROCESSES = {
    "vp": VP,
    "edm": EDM(EDMConfig()),
    "ve": VE(VEConfig()),
    "linear": Discrete(DiscreteConfig("linear")),
    "scaled_linear": Discrete(DiscreteConfig("scaled_linear", 1000, 8.5e-4, 0.012, first_index=1)),
}
MEAN, STD = 0.3, 0.5

PUBLISHED = {
    1: [1], 2: [2], 3: [2, 1], 4: [3, 1], 5: [3, 2], 6: [3, 2, 1], 7: [3, 3, 1], 8: [3, 3, 2], 9: [3, 3, 2, 1],
    10: [3, 3, 3, 1], 12: [3, 3, 3, 2, 1], 15: [3] * 4 + [2, 1], 20: [3] * 6 + [2], 25: [3] * 8 + [1],
    30: [3] * 9 + [2, 1],
}  # fmt: skip


def gaussian(x, call):  # type: ignore[no-untyped-def]
    return call.sigma * (x - call.alpha * MEAN) / ((call.alpha * STD) ** 2 + call.sigma**2)


@pytest.mark.parametrize("n", range(1, 31))
def test_order_list_of_every_number_of_calls(n: int) -> None:
    outer = n // 3 + 1
    orders = step_orders(n, 3)
    assert orders == {0: [3] * (outer - 2) + [2, 1], 1: [3] * (outer - 1) + [1], 2: [3] * (outer - 1) + [2]}[n % 3]
    assert orders == PUBLISHED.get(n, orders)
    assert step_orders(n, 2) == [2] * (n // 2) + [1] * (n % 2) and step_orders(n, 1) == [1] * n
    for order in (1, 2, 3):
        assert sum(step_orders(n, order)) == n
        for process in PROCESSES.values():
            calls = DPMSinglestep(DPMSinglestepConfig(n, order)).calls(process)
            assert len(calls) == n
            assert [call.order for call in calls if call.substep == 0] == step_orders(n, order)


@pytest.mark.parametrize("spacing", ["log_snr", "time", "time_quadratic"])
@pytest.mark.parametrize("name", PROCESSES)
def test_calls_chain_and_nodes_divide_their_step(name: str, spacing: str) -> None:
    process = PROCESSES[name]
    for n in (3, 20):
        calls = DPMSinglestep(DPMSinglestepConfig(n, spacing=spacing)).calls(process)
        assert [call.position for call in calls] == list(range(n))
        for call, following in pairwise(calls):
            assert call.next_time == following.time and call.next_alpha == following.alpha
            assert call.next_sigma == following.sigma and call.next_log_snr == following.log_snr
            assert call.log_snr < following.log_snr and not call.needs_noise
        for call in calls:
            assert call.alpha**2 + call.sigma**2 == pytest.approx(1, abs=1e-12)
            assert call.log_snr == pytest.approx(process.log_snr(call.time).item(), abs=1e-9)
            assert call.log_snr == pytest.approx(2 * math.log(call.alpha / call.sigma), abs=1e-9)
            nodes = {1: [0.0], 2: [0.0, 0.5], 3: [0.0, 1 / 3, 2 / 3]}[call.order]
            part = (0.5 * call.log_snr - call.start) / (call.stop - call.start)  # type: ignore[attr-defined]
            assert part == pytest.approx(nodes[call.substep], abs=1e-9)
        assert calls[0].time == pytest.approx(process.t_max)
        end = (1e-3 if n <= 15 else 1e-4) if name == "vp" else process.t_min
        assert calls[-1].next_log_snr == pytest.approx(process.log_snr(end).item(), abs=1e-9)
        assert calls[-1].next_time == pytest.approx(end, rel=1e-6, abs=1e-9)


def test_log_snr_steps_are_equal_and_other_steps_as_long_as_their_order() -> None:
    steps = [call for call in DPMSinglestep(DPMSinglestepConfig(20)).calls(VP) if call.substep == 0]
    lengths = [call.stop - call.start for call in steps]  # type: ignore[attr-defined]
    assert len(lengths) == 7 and lengths == pytest.approx([lengths[0]] * 7)
    for spacing, power in (("time", 1), ("time_quadratic", 2)):
        calls = DPMSinglestep(DPMSinglestepConfig(20, spacing=spacing)).calls(VP)
        ends = [call.time for call in calls if call.substep == 0] + [calls[-1].next_time]
        parts = [a ** (1 / power) - b ** (1 / power) for a, b in pairwise(ends)]
        whole = 1 - 1e-4 ** (1 / power)
        assert parts == pytest.approx([whole * order / 20 for order in (3, 3, 3, 3, 3, 3, 2)], rel=1e-6)
    # On a table the same of the index counted from 1; on EDM of its own axis.
    for name in ("linear", "edm"):
        process = PROCESSES[name]
        calls = DPMSinglestep(DPMSinglestepConfig(10, 1, "time_quadratic")).calls(process)
        roots = [math.sqrt(call.training_index + 1) for call in calls] + [1.0]
        assert [a - b for a, b in pairwise(roots)] == pytest.approx([(math.sqrt(1000) - 1) / 10] * 10, rel=1e-6)


def test_ends() -> None:
    def end(n: int, process: Process, t_end: float | None = None) -> float:
        return DPMSinglestep(DPMSinglestepConfig(n, t_end=t_end)).calls(process)[-1].next_log_snr

    assert end(15, VP) == pytest.approx(VP.log_snr(1e-3).item()) and end(16, VP) == pytest.approx(
        VP.log_snr(1e-4).item()
    )
    near = VPSDE(VPSDEConfig())  # t_min 1e-3
    assert end(20, near) == pytest.approx(near.log_snr(1e-3).item())
    assert end(20, near, 1e-4) == pytest.approx(near.log_snr(1e-4).item())
    assert end(20, PROCESSES["edm"]) == pytest.approx(-2 * math.log(0.002))
    assert end(20, PROCESSES["edm"], 0.01) == pytest.approx(-2 * math.log(0.01))


def test_calls_per_published_stage() -> None:
    """20 calls to t = 1e-4 with boundaries t = .4420 and .6308: 12 / 2 / 6; one node lies 7e-4 from the first."""
    calls = DPMSinglestep(DPMSinglestepConfig(20, t_end=1e-4)).calls(VP)
    stages = [0 if call.time <= 0.4420 else 1 if call.time <= 0.6308 else 2 for call in calls]
    assert [stages.count(k) for k in range(3)] == [12, 2, 6]
    near = min(abs(0.5 * (call.log_snr - VP.log_snr(0.4420).item())) for call in calls)
    assert near == pytest.approx(7e-4, rel=0.1)


@pytest.mark.parametrize("name", ["vp", "edm"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(order: int, name: str, run) -> None:  # type: ignore[no-untyped-def]
    process = PROCESSES[name]
    noise = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    errors = []
    for steps in (8, 16, 32):
        solver = DPMSinglestep(DPMSinglestepConfig(order * steps + (2 if order == 3 else 0), order, t_end=0.05))
        calls = solver.calls(process)
        a, b = calls[0], calls[-1]
        rank = (noise - a.alpha * MEAN) / math.hypot(a.alpha * STD, a.sigma)
        exact = b.next_alpha * MEAN + rank * math.hypot(b.next_alpha * STD, b.next_sigma)
        errors.append((run(solver, process, noise, gaussian) - exact).abs().max().item())
    found = [math.log2(a / b) for a, b in pairwise(errors)]
    assert order - 0.4 < found[-1] < order + 0.8, (errors, found)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_constant_prediction_is_integrated_exactly(name: str, order: int, noise, run) -> None:  # type: ignore[no-untyped-def]
    """The linear part is exact and so is the exponential integral of a constant, however few the calls."""
    process = PROCESSES[name]
    eps = 0.4 * noise.flip(0)
    solver = DPMSinglestep(DPMSinglestepConfig(4, order))
    first, last = solver.calls(process)[0], solver.calls(process)[-1]
    x0 = (noise.double() - first.sigma * eps) / first.alpha
    exact = last.next_alpha * x0 + last.next_sigma * eps
    got = run(solver, process, noise, lambda x, call: eps)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5 / first.alpha)


def test_order_2_and_3_are_exact_where_eps_is_linear_in_log_snr(noise, run) -> None:  # type: ignore[no-untyped-def]
    """eps = a + b l: order 3 is built on phi functions, so it integrates this exactly; order 2 is not."""
    a, b = noise, 0.2 * noise.flip(0)

    def exact(first: float, last: float) -> torch.Tensor:
        # x / alpha changes by the integral of eps d(ratio), ratio = exp(-l).
        def primitive(lam: float) -> torch.Tensor:
            return math.exp(-lam) * (a + b * (lam + 1)).double()

        return primitive(last) - primitive(first)

    errors = {}
    for order, n in ((2, 12), (3, 17)):
        solver = DPMSinglestep(DPMSinglestepConfig(n, order, t_end=0.05))
        if order == 3:
            assert step_orders(n, 3)[-1] == 2  # one step of order 2 at the end
        calls = solver.calls(VP)
        # The steps of full order alone.
        count = sum(1 for call in calls if call.order == order)
        state = solver.begin(VP, noise)
        for call in calls[:count]:
            state = solver.advance(state, call, a + b * (0.5 * call.log_snr))
        last = calls[count - 1]
        change = state.x.double() / last.next_alpha - noise.double() / calls[0].alpha
        wanted = exact(0.5 * calls[0].log_snr, 0.5 * last.next_log_snr)
        errors[order] = (change - wanted).abs().max().item() / wanted.abs().max().item()
    assert errors[3] < 3e-6 < 1e-3 < errors[2]


def scalar_reference(calls_per_step: list[int], lambdas: list[float], x: float, eps) -> float:  # type: ignore[no-untyped-def]
    """DPM-Solver-1, -2, -3 as algorithms of the paper state them, on one float; eps(x, lambda)."""

    def alpha(lam: float) -> float:
        return math.sqrt(1 / (1 + math.exp(-2 * lam)))

    def sigma(lam: float) -> float:
        return math.sqrt(1 / (1 + math.exp(2 * lam)))

    for order, s, t in zip(calls_per_step, lambdas, lambdas[1:], strict=False):
        h, e = t - s, eps(x, s)
        if order == 1:
            x = alpha(t) / alpha(s) * x - sigma(t) * (math.exp(h) - 1) * e
        elif order == 2:
            m = s + h / 2
            u = alpha(m) / alpha(s) * x - sigma(m) * (math.exp(h / 2) - 1) * e
            # With r1 = 1/2 the combination is the prediction at the middle alone.
            x = alpha(t) / alpha(s) * x - sigma(t) * (math.exp(h) - 1) * eps(u, m)
        else:
            r1, r2 = 1 / 3, 2 / 3
            p, q = s + r1 * h, s + r2 * h
            u1 = alpha(p) / alpha(s) * x - sigma(p) * (math.exp(r1 * h) - 1) * e
            d1 = eps(u1, p) - e
            u2 = alpha(q) / alpha(s) * x - sigma(q) * (math.exp(r2 * h) - 1) * e
            u2 -= sigma(q) * r2 / r1 * ((math.exp(r2 * h) - 1) / (r2 * h) - 1) * d1
            d2 = eps(u2, q) - e
            x = alpha(t) / alpha(s) * x - sigma(t) * (math.exp(h) - 1) * e
            x -= sigma(t) / r2 * ((math.exp(h) - 1) / h - 1) * d2
    return x


@pytest.mark.parametrize(("n", "order"), [(12, 1), (12, 2), (13, 2), (9, 3), (10, 3), (20, 3)])
def test_equals_a_scalar_reference(n: int, order: int, run) -> None:  # type: ignore[no-untyped-def]
    def eps(x: float, lam: float) -> float:
        return math.sin(1.3 * x + 0.4 * lam) + 0.2 * x

    noise = torch.tensor([-1.1, 0.3, 1.7]).view(3, 1, 1, 1)

    def predict(x, call):  # type: ignore[no-untyped-def]
        return torch.tensor([eps(v, 0.5 * call.log_snr) for v in x.flatten().tolist()]).view_as(x)

    got = run(DPMSinglestep(DPMSinglestepConfig(n, order)), VP, noise, predict)
    first, last = (0.5 * VP.log_snr(t).item() for t in (1.0, 1e-3 if n <= 15 else 1e-4))
    orders = step_orders(n, order)
    lambdas = [first + (last - first) * k / len(orders) for k in range(len(orders) + 1)]
    for value, start in zip(got.flatten().tolist(), noise.flatten().tolist(), strict=True):
        assert value == pytest.approx(scalar_reference(orders, lambdas, start, eps), rel=2e-4, abs=2e-4)


def test_denoising_is_one_call_more_and_its_data_prediction(run) -> None:  # type: ignore[no-untyped-def]
    noise = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    for process in PROCESSES.values():
        plain, clean = (DPMSinglestep(DPMSinglestepConfig(20, denoise=flag)) for flag in (False, True))
        last = clean.calls(process)[-1]
        assert len(clean.calls(process)) == 21 and last.next_time is None and last.next_sigma == 0
        assert (last.alpha, last.sigma) == (
            plain.calls(process)[-1].next_alpha,
            plain.calls(process)[-1].next_sigma,
        )
        x = run(plain, process, noise, gaussian)
        x0 = (x - last.sigma * gaussian(x, last)) / last.alpha
        torch.testing.assert_close(run(clean, process, noise, gaussian), x0)


def test_held_predictions_lower_the_order(toy, noise, run) -> None:  # type: ignore[no-untyped-def]
    """Intermediate calls all skipped: first order on the grid of the steps."""

    def predict(x, call):  # type: ignore[no-untyped-def]
        return toy(x, call.training_index)[0]

    solver = DPMSinglestep(DPMSinglestepConfig(20))
    skipped = run(solver, VP, noise, predict, fresh=lambda call: call.substep == 0)
    x = noise
    for call in (call for call in solver.calls(VP) if call.substep == 0):
        a, b = call.start, call.stop  # type: ignore[attr-defined]
        eps = predict(x, call)
        ratio = math.sqrt((1 + math.exp(-2 * a)) / (1 + math.exp(-2 * b)))
        x = ratio * x - math.sqrt(1 / (1 + math.exp(2 * b))) * math.expm1(b - a) * eps
    torch.testing.assert_close(skipped, x, rtol=1e-5, atol=1e-5)


def test_tables_are_visited_between_their_entries() -> None:
    process = PROCESSES["scaled_linear"]
    calls = DPMSinglestep(DPMSinglestepConfig(20)).calls(process)
    assert any(call.time != round(call.time) for call in calls)
    assert calls[0].time == 1000 and calls[-1].next_time == pytest.approx(1)
    for call in calls[1:]:
        low = math.floor(call.time)
        here, there = (process.log_snr(float(low + k)).item() for k in (0, 1))
        assert call.log_snr == pytest.approx(here + (there - here) * (call.time - low), abs=1e-9)


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (lambda: DPMSinglestepConfig(order=4), "order=4"),
        (lambda: DPMSinglestepConfig(spacing="uniform"), "'uniform'; known: log_snr, time"),
        (lambda: DPMSinglestep(DPMSinglestepConfig(0)).check(VP), "steps=0"),
        (lambda: DPMSinglestep(DPMSinglestepConfig(t_end=0.0)).check(VP), "t_end=0.*vp_sde"),
        (lambda: DPMSinglestep(DPMSinglestepConfig(t_end=1.0)).check(VP), "t_end=1.*vp_sde"),
        (lambda: DPMSinglestep(DPMSinglestepConfig(t_end=1e-4)).check(PROCESSES["scaled_linear"]), "t_end=0.0001"),
        (lambda: DPMSinglestep(DPMSinglestepConfig(1001)).check(PROCESSES["linear"]), "steps=1001.*linear"),
    ],
)
def test_impossible_options_are_refused(make, quoted) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=quoted):
        make()
