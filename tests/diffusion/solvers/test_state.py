"""What holds for every solver: runs do not leak, states can be saved, steps leave the host alone, misuse is told."""

import io
from collections.abc import Callable

import pytest
import torch

from gearshift.diffusion.solvers import (
    DDIM,
    DDPM,
    DDIMConfig,
    DDPMConfig,
    DiffusersConfig,
    DiffusersSolver,
    DPMpp2M,
    DPMpp2MConfig,
    DPMSinglestep,
    DPMSinglestepConfig,
    EDMHeun,
    EDMHeunConfig,
    EulerMaruyama,
    EulerMaruyamaConfig,
    Solver,
    State,
)

N = 9
OWN: dict[str, Callable[[], Solver]] = {
    "ddim": lambda: DDIM(DDIMConfig(N)),
    "ddim_eta": lambda: DDIM(DDIMConfig(N, eta=0.7, clip_x0=True)),
    "ddpm": lambda: DDPM(DDPMConfig(N)),
    "ddpm_clip": lambda: DDPM(DDPMConfig(N, variance="fixed_large", clip_x0=True)),
    "euler_maruyama": lambda: EulerMaruyama(EulerMaruyamaConfig(N)),
    "dpmpp_2m": lambda: DPMpp2M(DPMpp2MConfig(N)),
    "dpmpp_2m_all": lambda: DPMpp2M(DPMpp2MConfig(N, history="all", to_data=False)),
    "dpm_singlestep": lambda: DPMSinglestep(DPMSinglestepConfig(N)),
    "dpm_singlestep_denoise": lambda: DPMSinglestep(DPMSinglestepConfig(N, order=2, denoise=True)),
    "edm_heun": lambda: EDMHeun(EDMHeunConfig(N)),
    "edm_heun_churn": lambda: EDMHeun(EDMHeunConfig(N, S_churn=4.0, S_noise=1.003)),
}
ADAPTED: dict[str, Callable[[], Solver]] = {
    "diffusers_dpmpp": lambda: DiffusersSolver(DiffusersConfig(steps=N)),
    "diffusers_dpmpp_3": lambda: DiffusersSolver(DiffusersConfig(steps=N, options={"solver_order": 3})),
    "diffusers_sde": lambda: DiffusersSolver(DiffusersConfig(steps=N, options={"algorithm_type": "sde-dpmsolver++"})),
    "diffusers_euler": lambda: DiffusersSolver(DiffusersConfig("EulerDiscreteScheduler", N)),
    "diffusers_unipc": lambda: DiffusersSolver(DiffusersConfig("UniPCMultistepScheduler", N)),
    "pndm": lambda: DiffusersSolver(DiffusersConfig("PNDMScheduler", 10, "leading")),
    "pndm_plms": lambda: DiffusersSolver(DiffusersConfig("PNDMScheduler", N, "leading", {"skip_prk_steps": True})),
    "deis": lambda: DiffusersSolver(DiffusersConfig("DEISMultistepScheduler", N, options={"solver_order": 3})),
    "heun": lambda: DiffusersSolver(DiffusersConfig("HeunDiscreteScheduler", N)),
    "kdpm2": lambda: DiffusersSolver(DiffusersConfig("KDPM2DiscreteScheduler", N)),
    "lms": lambda: DiffusersSolver(DiffusersConfig("LMSDiscreteScheduler", N)),
    "single": lambda: DiffusersSolver(DiffusersConfig("DPMSolverSinglestepScheduler", N)),
    "single_3": lambda: DiffusersSolver(
        DiffusersConfig("DPMSolverSinglestepScheduler", N, options={"solver_order": 3})
    ),
    "edm_euler": lambda: DiffusersSolver(DiffusersConfig("EDMEulerScheduler", N, "class")),
    "edm_dpmpp": lambda: DiffusersSolver(DiffusersConfig("EDMDPMSolverMultistepScheduler", N, "class")),
    "ipndm": lambda: DiffusersSolver(DiffusersConfig("IPNDMScheduler", N)),
}
ASKS_THE_DEVICE = "diffusers_unipc"
"""Copies a few scalars to the device at every step."""
ALL = OWN | ADAPTED


def kept_in(name: str) -> torch.dtype:
    """The type x is kept in: one solver keeps more than the network sees."""
    return torch.float64 if name.startswith("edm_heun") else torch.float32


FLAGS = torch.tensor([True, False, True, False])


def predict(toy):  # type: ignore[no-untyped-def]
    return lambda x, call: toy(x, call.training_index)


def every_third(call):  # type: ignore[no-untyped-def]
    return FLAGS | (call.position % 3 == 0)


@pytest.mark.parametrize("name", ALL)
def test_two_batches_with_one_object_equal_two_fresh_objects(name, processes, toy, noise, run) -> None:
    process, used = processes["vp_sde"], ALL[name]()
    run(used, process, noise.flip(0), predict(toy), fresh=every_third)
    # A run that is dropped half way leaves nothing behind either.
    call, state = used.calls(process)[0], used.begin(process, noise)
    used.advance(state, call, noise, noise=noise)
    again = run(used, process, noise, predict(toy))
    assert torch.equal(again, run(ALL[name](), process, noise, predict(toy)))
    assert not torch.equal(again, run(ALL[name](), process, noise.flip(0), predict(toy)))


@pytest.mark.parametrize("name", ALL)
def test_saved_at_any_call_it_goes_on_to_the_same_bits(name, processes, toy, noise, step_noise, run) -> None:
    process = processes["vp_sde"]
    states: list[State] = []
    result = run(ALL[name](), process, noise, lambda x, call: toy(x, call.training_index)[0], states=states)
    for position in (1, 2, 4, N - 1):
        file = io.BytesIO()
        torch.save(states[position - 1].state_dict(), file)
        file.seek(0)
        state = State.from_state_dict(torch.load(file, weights_only=True))
        solver = ALL[name]()  # as after a restart
        for call in solver.calls(process)[position:]:
            eps = toy(solver.network_input(state, call), call.training_index)[0]
            draw = step_noise(noise.shape, call.position) if call.needs_noise else None
            state = solver.advance(state, call, eps, noise=draw)
        assert torch.equal(solver.result(state), result), position


@pytest.mark.parametrize("name", ALL)
def test_a_step_changes_nothing_it_was_given(name, processes, noise, step_noise) -> None:
    process, solver = processes["vp_sde"], ALL[name]()
    state = solver.begin(process, noise)
    given = noise.clone()
    for call in solver.calls(process):
        eps, draw = step_noise(noise.shape, 100 + call.position), step_noise(noise.shape, call.position)
        copies = eps.clone(), draw.clone(), _cloned(state.state_dict())
        following = solver.advance(state, call, eps, noise=draw, fresh=FLAGS)
        assert torch.equal(eps, copies[0]) and torch.equal(draw, copies[1]) and torch.equal(noise, given)
        _assert_same(state.state_dict(), copies[2])
        assert torch.equal(following.x, solver.advance(state, call, eps, noise=draw, fresh=FLAGS).x)
        assert following.position == state.position + 1 and following.x.dtype == kept_in(name)
        state = following


@pytest.mark.parametrize("name", ALL)
def test_half_precision_predictions_leave_x_as_precise_as_it_was(name, processes, noise) -> None:
    process, solver = processes["vp_sde"], ALL[name]()
    state = solver.begin(process, noise.bfloat16())
    for call in solver.calls(process):
        eps = solver.network_input(state, call).bfloat16()
        state = solver.advance(state, call, eps, noise=noise.half())
        assert state.x.dtype == kept_in(name)
    assert solver.result(state).dtype == torch.float32


@pytest.mark.parametrize("name", ALL)
def test_misuse_is_told(name, processes, noise) -> None:
    process, solver = processes["vp_sde"], ALL[name]()
    state, calls = solver.begin(process, noise), solver.calls(process)
    with pytest.raises(ValueError, match=f"{solver.name}.*at call 0.*call 1"):
        solver.advance(state, calls[1], noise, noise=noise)
    with pytest.raises(ValueError, match=r"shape \(4, 8, 4, 4\).*\(4, 4, 4, 4\).*split"):
        solver.advance(state, calls[0], noise.repeat(1, 2, 1, 1), noise=noise)
    if solver.stochastic:
        drawing = next(call for call in calls if call.needs_noise)
        for call in calls[: drawing.position]:
            state = solver.advance(state, call, noise)
        with pytest.raises(ValueError, match=f"{solver.name}.*draws noise"):
            solver.advance(state, drawing, noise)


@pytest.mark.parametrize("name", ALL)
def test_an_eight_channel_network_runs_when_split(name, processes, toy, noise, run) -> None:
    # Only ancestral sampling has a use for the variance channels; the others must not be moved by them.
    process = processes["vp_sde"]
    both = run(ALL[name](), process, noise, predict(toy))
    alone = run(ALL[name](), process, noise, lambda x, call: toy(x, call.training_index)[0])
    assert torch.equal(both, alone) != name.startswith("ddpm")


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("name", [name for name in ALL if name != ASKS_THE_DEVICE])
def test_steps_never_look_at_data(name, per_sample, processes) -> None:
    """Tensors without data: anything that asked one for its value would raise."""
    process, solver = processes["vp_sde"], ALL[name]()
    empty = torch.empty(3, 1, 2, 2, device="meta")
    fresh = torch.empty(3, dtype=torch.bool, device="meta") if per_sample else True
    state = solver.begin(process, empty)
    for call in solver.calls(process):
        x = solver.network_input(state, call)
        state = solver.advance(state, call, x, variance=x, noise=empty, fresh=fresh)
    assert solver.result(state).device.type == "meta" and solver.result(state).shape == empty.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in ALL if name != ASKS_THE_DEVICE])
def test_no_host_device_sync_in_the_loop(name, processes, noise) -> None:
    process, solver = processes["vp_sde"], ALL[name]()
    calls = solver.calls(process)
    device = torch.device("cuda")
    start, flags = noise.to(device), FLAGS.to(device)
    runs = []
    for mode in ("default", "error"):  # once to load kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            state = solver.begin(process, start)
            for call in calls:
                fresh = flags if call.position % 2 else True
                state = solver.advance(state, call, solver.network_input(state, call), noise=start, fresh=fresh)
            runs.append(solver.result(state))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*runs)


def _cloned(value):  # type: ignore[no-untyped-def]
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(inner) for key, inner in value.items()}
    return [_cloned(inner) for inner in value] if isinstance(value, list) else value


def _assert_same(a, b) -> None:  # type: ignore[no-untyped-def]
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
    else:
        assert a == b
