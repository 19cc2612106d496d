"""DPM-Solver++ 2M: against the library's, and its history where samples skip calls."""

import math
from dataclasses import replace

import pytest
import torch

from gearshift.diffusion.solvers import DDIM, DDIMConfig, DiffusersConfig, DiffusersSolver, DPMpp2M, DPMpp2MConfig

COMPUTED = {0, 1, 2, 5, 6, 9, 13, 14, 17}
STEPS = 18


def predict(toy):  # type: ignore[no-untyped-def]
    return lambda x, call: toy(x, call.training_index)[0]


@pytest.mark.parametrize("process_name", ["linear", "scaled_linear", "vp_sde"])
@pytest.mark.parametrize("steps", [8, 20, 50])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_equals_the_library_on_the_same_grid(process_name, steps, spacing, processes, toy, noise, run) -> None:
    process = processes[process_name]
    if process.continuous and spacing == "linspace":
        return  # the library can only visit table entries
    ours = DPMpp2M(DPMpp2MConfig(steps, spacing=spacing))
    theirs = DiffusersSolver(DiffusersConfig(steps=steps, spacing="inclusive" if spacing == "linspace" else spacing))
    assert [c.time for c in ours.calls(process)] == pytest.approx([c.time for c in theirs.calls(process)])
    samples = [run(solver, process, noise, predict(toy)) for solver in (ours, theirs)]
    assert (samples[0] - samples[1]).abs().max().item() < 2e-5 * max(1.0, samples[0].abs().max().item() / 3)


@pytest.mark.parametrize("to_data", [True, False])
def test_both_histories_are_the_same_bits_without_skipping(to_data, processes, toy, noise, run) -> None:
    samples = [
        run(DPMpp2M(DPMpp2MConfig(12, history=history, to_data=to_data)), processes["linear"], noise, predict(toy))
        for history in ("computed", "all")
    ]
    assert torch.equal(*samples)


def test_one_flag_and_one_per_sample_agree(processes, toy, noise, run) -> None:
    solver = DPMpp2M(DPMpp2MConfig(STEPS))
    for kept in (COMPUTED, set(range(STEPS))):
        flags = [
            lambda call, kept=kept: call.position in kept,
            lambda call, kept=kept: torch.full((len(noise),), call.position in kept),
        ]
        samples = [run(solver, processes["linear"], noise, predict(toy), fresh=flag) for flag in flags]
        torch.testing.assert_close(*samples, rtol=1e-6, atol=2e-6)


def test_first_call_counts_as_computed(processes, toy, noise, run) -> None:
    solver = DPMpp2M(DPMpp2MConfig(STEPS))
    never = run(solver, processes["linear"], noise, predict(toy), fresh=lambda call: False)
    # Held from the first call to the data: one data prediction.
    first = solver.calls(processes["linear"])[0]
    x0 = (noise - first.sigma * predict(toy)(noise, first)) / first.alpha
    torch.testing.assert_close(never, x0, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("to_data", [True, False])
def test_skipping_is_2m_on_the_thinned_grid(to_data, processes, toy, noise, run) -> None:
    """The written-out multistep formula over the computed points alone."""
    process = processes["vp_sde"]
    solver = DPMpp2M(DPMpp2MConfig(STEPS, to_data=to_data))
    sample = run(solver, process, noise, predict(toy), fresh=lambda call: call.position in COMPUTED)

    calls = solver.calls(process)
    points = [call for call in calls if call.position in COMPUTED]
    x, before = noise.double(), None
    for k, call in enumerate(points):
        end = points[k + 1].position - 1 if k + 1 < len(points) else STEPS - 1
        alpha, sigma = calls[end].next_alpha, calls[end].next_sigma
        x0 = (x - call.sigma * predict(toy)(x.float(), call).double()) / call.alpha
        ratio = (sigma / call.sigma) * (call.alpha / alpha)
        slope = 0.0
        if before is not None and sigma > 0:
            h = -math.log(ratio)
            slope = h / (2 * 0.5 * (call.log_snr - points[k - 1].log_snr))
        direction = x0 if before is None else x0 + slope * (x0 - before)
        x, before = sigma / call.sigma * x + alpha * (1 - ratio) * direction, x0
    torch.testing.assert_close(sample, x.float(), rtol=1e-5, atol=1e-4)


def test_samples_that_skip_do_not_touch_the_others(processes, toy, noise, run) -> None:
    solver = DPMpp2M(DPMpp2MConfig(STEPS))
    half = torch.tensor([True, False, True, False])

    def mixed(call):  # type: ignore[no-untyped-def]
        return half | (call.position in COMPUTED)

    together = run(solver, processes["linear"], noise, predict(toy), fresh=mixed)
    full = run(solver, processes["linear"], noise[half], predict(toy))
    skipping = run(solver, processes["linear"], noise[~half], predict(toy), fresh=lambda c: c.position in COMPUTED)
    torch.testing.assert_close(together[half], full, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(together[~half], skipping, rtol=1e-6, atol=2e-6)
    assert (full - run(solver, processes["linear"], noise[~half], predict(toy))).abs().max() > 0.01


def test_official_history_after_a_reuse(processes, toy, noise) -> None:
    """x0 pushed by a reuse = x0 + (1 - e^-h) / (2 r) (x0 - x0 before), from the step before (h, r)."""
    process = processes["linear"]
    solver = DPMpp2M(DPMpp2MConfig(20, history="all"))
    calls = solver.calls(process)
    state = solver.begin(process, noise)
    for call in calls[:6]:
        eps = predict(toy)(state.x, call)
        before, state = state, solver.advance(state, call, eps)
    reused = solver.advance(state, calls[6], eps, fresh=False)
    old, new = before.history["x0"], state.history["x0"]
    h = 0.5 * (calls[5].next_log_snr - calls[5].log_snr)
    r = 0.5 * (calls[5].log_snr - calls[4].log_snr) / h
    expected = new + (1 - math.exp(-h)) / (2 * r) * (new - old)
    torch.testing.assert_close(reused.history["x0"], expected, rtol=1e-5, atol=1e-4)


def test_first_order_is_ddim(processes, toy, noise, run) -> None:
    class FirstOrder(DPMpp2M):
        def calls(self, process):  # type: ignore[no-untyped-def]
            return tuple(replace(call, order=1) for call in super().calls(process))

    samples = [
        run(solver, processes["cosine"], noise, predict(toy))
        for solver in (FirstOrder(DPMpp2MConfig(20)), DDIM(DDIMConfig(20, spacing="log_snr")))
    ]
    torch.testing.assert_close(*samples, rtol=1e-5, atol=3e-5)


def test_orders_of_the_calls(processes) -> None:
    def orders(**options: object) -> list[int]:
        return [call.order for call in DPMpp2M(DPMpp2MConfig(**options)).calls(processes["linear"])]  # type: ignore[arg-type]

    assert orders(steps=4) == [1, 2, 2, 1]
    assert orders(steps=4, to_data=False) == [1, 2, 2, 1]
    assert orders(steps=4, to_data=False, lower_order_final=False) == [1, 2, 2, 2]
    assert orders(steps=20, to_data=False)[-1] == 2 and orders(steps=20)[-1] == 1


def test_clipping(processes, noise, run) -> None:
    def towards_three(x, call):  # type: ignore[no-untyped-def]
        return (x - call.alpha * 3.0) / call.sigma

    clipped = run(DPMpp2M(DPMpp2MConfig(10, clip_x0=True)), processes["linear"], noise, towards_three)
    torch.testing.assert_close(clipped, torch.ones_like(noise))
