"""Heun of EDM: its grid and calls, a scalar reference of algorithm 2, its order, its churn, skipped calls."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gearshift.diffusion.edm import EDM, VE, EDMConfig, VEConfig
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.diffusion.solvers import EDMHeun, EDMHeunConfig
from gearshift.runtime.errors import UsageError

GRID_18 = [80, 57.59, 40.79, 28.37, 19.35, 12.91, 8.401, 5.315, 3.257, 1.923, 1.088, 0.5853, 0.2964, 0.1395, 0.0599]
GRID_18 += [0.0229, 0.0075, 0.002]
CHURN = EDMHeunConfig(8, S_churn=3.0, S_min=0.05, S_max=50.0, S_noise=1.003)
PROCESSES = {
    "edm": EDM(EDMConfig()),
    "ve": VE(VEConfig()),
    "vp": VPSDE(VPSDEConfig(t_min=1e-5)),
    "cosine": Discrete(DiscreteConfig("cosine")),
}
EDM_ = PROCESSES["edm"]
MEAN, STD = 0.3, 0.5


def ratio(call) -> float:  # type: ignore[no-untyped-def]
    return call.sigma / call.alpha


def gaussian(x, call):  # type: ignore[no-untyped-def]
    """The best noise prediction where the data are normal, from x in the VP frame."""
    variance = (call.alpha * STD) ** 2 + call.sigma**2
    return call.sigma * (x - call.alpha * MEAN) / variance


def test_grid_is_the_published_one() -> None:
    calls = EDMHeun(EDMHeunConfig()).calls(EDM_)
    firsts = [call for call in calls if call.substep == 0]
    assert [ratio(call) for call in firsts] == pytest.approx(GRID_18, rel=5e-3)
    assert firsts[0].time == pytest.approx(80, rel=1e-12) and firsts[-1].time == pytest.approx(0.002, rel=1e-12)
    assert calls[-1].next_time is None and calls[-1].next_sigma == 0 and calls[-1].next_log_snr == math.inf


@pytest.mark.parametrize(("steps", "nfe"), [(1, 1), (2, 3), (18, 35), (40, 79), (256, 511)])
def test_calls_are_2n_minus_1_and_chain(steps: int, nfe: int) -> None:
    churn = EDMHeunConfig(steps, S_churn=40.0, S_min=0.05, S_max=50.0, S_noise=1.003)
    for process in PROCESSES.values():
        for config in (EDMHeunConfig(steps), churn):
            calls = EDMHeun(config).calls(process)
            assert [call.position for call in calls] == list(range(nfe))
            assert [(call.step, call.substep) for call in calls] == [(k // 2, k % 2) for k in range(nfe)]
            assert [call.order for call in calls] == [2] * (nfe - 1) + [1]
            for call, following in pairwise(calls):
                assert call.next_time == following.time
                assert (call.next_alpha, call.next_sigma) == (following.alpha, following.sigma)
                assert call.next_log_snr == following.log_snr
            for call in calls:
                assert call.alpha**2 + call.sigma**2 == pytest.approx(1, abs=1e-12)
                assert call.log_snr == pytest.approx(process.log_snr(call.time).item(), abs=1e-9)
                assert call.training_index == pytest.approx(process.training_index(call.time).item())
            assert EDMHeun(config).calls(process) == calls


def test_every_level_but_the_first_is_called_twice() -> None:
    seen = Counter(call.time for call in EDMHeun(EDMHeunConfig()).calls(EDM_))
    assert len(seen) == 18 and sorted(seen.values()) == [1] + [2] * 17
    assert seen[max(seen)] == 1


def test_calls_per_published_stage() -> None:
    levels = [ratio(call) for call in EDMHeun(EDMHeunConfig()).calls(EDM_)]
    stages = [0 if s <= 2.5103 else 1 if s <= 7.6577 else 2 for s in levels]
    assert [stages.count(k) for k in range(3)] == [18, 4, 13]


def test_levels_beyond_the_process_are_held() -> None:
    ends = {
        name: [ratio(call) for call in EDMHeun(EDMHeunConfig(5, sigma_min=1e-4, sigma_max=400.0)).calls(process)]
        for name, process in PROCESSES.items()
    }
    assert (ends["edm"][0], ends["edm"][-1]) == pytest.approx((80, 0.002))
    assert (ends["ve"][0], ends["ve"][-1]) == pytest.approx((100, 0.02))
    assert (ends["vp"][0], ends["vp"][-1]) == pytest.approx((152.2, math.sqrt(math.expm1(1e-6))), rel=1e-3)
    # Churn may go where training went: beyond 80 for EDM, not beyond the end of the others.
    churned = {
        name: ratio(EDMHeun(EDMHeunConfig(5, sigma_max=400.0, S_churn=9.0)).calls(process)[0])
        for name, process in PROCESSES.items()
    }
    assert churned["edm"] == pytest.approx(80 * math.sqrt(2))
    assert churned["vp"] == pytest.approx(152.2, rel=1e-3) and churned["ve"] == pytest.approx(100)


def test_a_table_is_visited_at_its_entries() -> None:
    process = PROCESSES["cosine"]
    table = torch.exp(-0.5 * process.log_snr(torch.arange(1000))).tolist()
    high, low = 80 ** (1 / 7), max(0.002, table[0]) ** (1 / 7)
    for config in (EDMHeunConfig(), replace(CHURN, steps=18)):
        for i, call in enumerate(call for call in EDMHeun(config).calls(process) if call.substep == 0):
            assert call.time == pytest.approx(round(call.time), abs=1e-9)
            wanted = min(table, key=lambda s, i=i: abs(s - (high + i / 17 * (low - high)) ** 7))
            if config.S_churn and 0.05 <= wanted <= 50:
                wanted = min(table, key=lambda s, w=wanted: abs(s - (1 + 3 / 18) * w))
            assert ratio(call) == pytest.approx(wanted, rel=1e-9)


def reference(process: Process, config: EDMHeunConfig, latent: float, denoise, draws: list[float]) -> float:  # type: ignore[no-untyped-def]
    """Algorithm 2 on one number in float64, from its text, in terms of D; ``draws`` is the noise of each step."""
    n, rho = config.steps, config.rho
    a, b = config.sigma_max ** (1 / rho), config.sigma_min ** (1 / rho)
    grid = [(a + i / (n - 1) * (b - a)) ** rho for i in range(n)] + [0.0]
    x = latent * grid[0]
    for i in range(n):
        now, following = grid[i], grid[i + 1]
        limit = math.inf if config.S_max is None else config.S_max
        gamma = min(config.S_churn / n, math.sqrt(2) - 1) if config.S_min <= now <= limit else 0.0
        raised = now + gamma * now
        raised_x = x + math.sqrt(raised**2 - now**2) * config.S_noise * draws[i]
        slope = (raised_x - denoise(raised_x, raised)) / raised
        x = raised_x + (following - raised) * slope
        if following > 0:
            second = (x - denoise(x, following)) / following
            x = raised_x + (following - raised) * (0.5 * slope + 0.5 * second)
    return x


def smooth(x: float, s: float) -> float:
    """A denoiser that is not linear and depends on the level."""
    return math.tanh(x / math.sqrt(1 + s * s)) * 0.7 / (1 + 0.1 * s)


@pytest.mark.parametrize("churn", [False, True])
def test_equals_a_scalar_reference(churn: bool, step_noise) -> None:  # type: ignore[no-untyped-def]
    config = CHURN if churn else EDMHeunConfig()
    solver = EDMHeun(config)
    assert solver.stochastic == churn
    calls = solver.calls(EDM_)
    noise = torch.tensor([-1.3, 0.2, 0.9]).view(3, 1, 1, 1)
    state = solver.begin(EDM_, noise)
    drawn = {}
    for call in calls:
        x_e = state.x.flatten().tolist()
        fed = solver.network_input(state, call)
        assert fed.dtype == torch.float32
        torch.testing.assert_close(fed.double(), state.x * call.alpha, rtol=1e-7, atol=0)
        s = ratio(call)
        eps = torch.tensor([(x - smooth(x, s)) / s for x in x_e], dtype=torch.float64).view_as(noise)
        draw = step_noise(noise.shape, call.position) if call.needs_noise else None
        if draw is not None:
            drawn[call.step + 1] = draw.flatten().tolist()
        state = solver.advance(state, call, eps, noise=draw)
    assert state.x.dtype == torch.float64
    for j, latent in enumerate(noise.flatten().tolist()):
        # The first step's churn is not drawn here: 80 lies beyond S_max.
        draws = [drawn.get(i, [0.0] * 3)[j] for i in range(config.steps)]
        expected = reference(EDM_, config, latent, smooth, draws)
        assert state.x.flatten()[j].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)  # eps passes through fp32
    expected_draws = sum(0.05 <= s <= 50 for s in _grid(config)) if churn else 0
    assert len(drawn) == sum(call.needs_noise for call in calls) == expected_draws


def _grid(config: EDMHeunConfig) -> list[float]:
    return [ratio(call) for call in EDMHeun(replace(config, S_churn=0.0)).calls(EDM_) if call.substep == 0]


def test_churn_of_the_first_step_is_part_of_the_initial_noise() -> None:
    config = EDMHeunConfig(8, S_churn=2.0, S_noise=1.5)
    noise = torch.ones(1, 1, 1, 1)
    state = EDMHeun(config).begin(EDM_, noise)
    first = EDMHeun(config).calls(EDM_)[0]
    assert ratio(first) == pytest.approx(80 * 1.25)
    assert state.x.item() ** 2 == pytest.approx(80**2 + 1.5**2 * (100**2 - 80**2))
    # And the noise that follows a step raises its level to the next one's.
    call = EDMHeun(config).calls(EDM_)[1]
    assert call.spread**2 == pytest.approx(1.5**2 * (1.25**2 - 1) * call.stop**2)


def test_without_churn_it_is_deterministic(toy, noise, run) -> None:  # type: ignore[no-untyped-def]
    solver = EDMHeun(EDMHeunConfig(6))
    assert not solver.stochastic and not any(call.needs_noise for call in solver.calls(EDM_))
    runs = [run(EDMHeun(EDMHeunConfig(6)), EDM_, noise, lambda x, c: toy(x, c.training_index)) for _ in range(2)]
    assert torch.equal(*runs) and runs[0].dtype == torch.float32
    idle = EDMHeun(EDMHeunConfig(6, S_churn=0.0, S_min=0.1, S_max=1.0, S_noise=1.007))
    assert torch.equal(run(idle, EDM_, noise, lambda x, c: toy(x, c.training_index)), runs[0])


@pytest.mark.parametrize("name", ["edm", "ve", "vp"])
def test_error_is_of_second_order(name: str, run) -> None:  # type: ignore[no-untyped-def]
    process = PROCESSES[name]
    noise = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    errors = []
    for steps in (32, 64, 128):
        solver = EDMHeun(EDMHeunConfig(steps))
        last = ratio(solver.calls(process)[-1])
        first = ratio(solver.calls(process)[0])
        # The ODE keeps the rank within the marginal; the last step is the data prediction.
        rank = (noise * first - MEAN) / math.hypot(first, STD)
        x = MEAN + rank * math.hypot(last, STD)
        exact = x - last * last * (x - MEAN) / (last**2 + STD**2)
        errors.append((run(solver, process, noise, gaussian) - exact).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert 1.9 < orders[-1] < 2.2, (errors, orders)


@pytest.mark.parametrize("name", PROCESSES)
def test_churned_samples_have_the_data_distribution(name: str, run) -> None:  # type: ignore[no-untyped-def]
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    solver = EDMHeun(EDMHeunConfig(100, S_churn=40.0, S_min=0.05, S_max=50.0))
    samples = run(solver, PROCESSES[name], noise, gaussian)
    assert samples.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(4000) + 0.005)
    assert samples.std().item() == pytest.approx(STD, rel=4 / math.sqrt(8000) + 0.015)


def test_a_point_mass_is_reached_exactly(noise, run) -> None:  # type: ignore[no-untyped-def]
    """Where D is one image, the ODE is a straight line, and every step is exact."""
    image = noise[:1].tanh()
    for process in PROCESSES.values():
        ended = run(EDMHeun(EDMHeunConfig(4)), process, noise, lambda x, c: (x - c.alpha * image) / c.sigma)
        torch.testing.assert_close(ended, image.expand_as(ended), rtol=1e-4, atol=1e-4)


def test_held_predictions_in_either_place_of_a_step(toy, noise, run) -> None:  # type: ignore[no-untyped-def]
    def predict(x, call):  # type: ignore[no-untyped-def]
        return toy(x, call.training_index)[0]

    solver = EDMHeun(EDMHeunConfig(6))
    # Second call of every step held: Euler, that is DDIM, on the same grid.
    euler = run(solver, EDM_, noise, predict, fresh=lambda call: call.substep == 0)
    x = noise.double() * 80
    for call in (call for call in solver.calls(EDM_) if call.substep == 0):
        stop = call.stop  # type: ignore[attr-defined]
        x = x + (stop - ratio(call)) * predict((x * call.alpha).float(), call)
    torch.testing.assert_close(euler.double(), x, rtol=1e-5, atol=1e-5)
    # First call of every step but the first held: it begins with the slope of the level it stands at.
    thrifty = run(solver, EDM_, noise, predict, fresh=lambda call: call.substep == 1 or call.step == 0)
    x, slope = noise.double() * 80, None
    for call in solver.calls(EDM_):
        if call.substep == 0:
            base = x
            slope = predict((x * call.alpha).float(), call) if slope is None else slope
            x = base + (call.stop - call.start) * slope  # type: ignore[attr-defined]
        else:
            second = predict((x * call.alpha).float(), call)
            x, slope = base + (call.stop - call.start) * (slope + second) / 2, second  # type: ignore[attr-defined]
    torch.testing.assert_close(thrifty.double(), x, rtol=1e-5, atol=1e-5)


def test_result_on_the_way_is_in_the_frame_of_the_others(noise) -> None:  # type: ignore[no-untyped-def]
    solver = EDMHeun(EDMHeunConfig(6))
    state, calls = solver.begin(EDM_, noise), solver.calls(EDM_)
    for call, following in pairwise(calls):
        assert torch.equal(solver.result(state), solver.network_input(state, call))
        state = solver.advance(state, call, 0.1 * noise)
        torch.testing.assert_close(solver.result(state), solver.network_input(state, following))


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (lambda: EDMHeunConfig(sigma_min=0.0), "sigma_min=0.0"),
        (lambda: EDMHeunConfig(sigma_min=2.0, sigma_max=1.0), "sigma_min=2.0 sigma_max=1.0"),
        (lambda: EDMHeunConfig(rho=0.0), "rho=0.0"),
        (lambda: EDMHeunConfig(S_churn=-1.0), "S_churn=-1.0"),
        (lambda: EDMHeunConfig(S_min=2.0, S_max=1.0), "S_min=2.0 S_max=1.0"),
    ],
)
def test_impossible_options_are_refused(make, quoted) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=quoted):
        make()


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(UsageError, match=r"edm_heun.*edm.*steps=0"):
        EDMHeun(EDMHeunConfig(0)).calls(EDM_)


def test_a_range_beside_that_of_the_process_is_refused() -> None:
    for low, high in ((200.0, 300.0), (1e-4, 1e-3)):
        with pytest.raises(UsageError, match=rf"sigma_max={high:g} to sigma_min={low:g}.*'ve'.*100 to 0\.02"):
            EDMHeun(EDMHeunConfig(5, sigma_min=low, sigma_max=high)).check(PROCESSES["ve"])
