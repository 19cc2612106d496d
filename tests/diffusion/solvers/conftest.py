"""What the solver tests share: processes, a smooth stand-in for a network, and the plain sampling loop."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.diffusion.solvers import Call, Solver, State

Predict = Callable[[Tensor, Call], Tensor | tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def processes() -> dict[str, Process]:
    return {
        "vp_sde": VPSDE(VPSDEConfig()),
        "linear": Discrete(DiscreteConfig("linear")),
        "scaled_linear": Discrete(DiscreteConfig("scaled_linear", 1000, 8.5e-4, 0.012, first_index=1)),
        "cosine": Discrete(DiscreteConfig("cosine")),
    }


@pytest.fixture(scope="session")
def noise() -> Tensor:
    """A batch of initial noise [4, 4, 4, 4]."""
    return torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(7))


def step_noise(shape: Sequence[int], position: int) -> Tensor:
    """Noise of one call: a function of its position, so that two loops can share it."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(1000 + position))


@pytest.fixture(scope="session", name="step_noise")
def step_noise_fixture() -> Callable[[Sequence[int], int], Tensor]:
    return step_noise


class Toy:
    """A smooth network of 4 channels that predicts noise and variance channels, and depends on x and on the index."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(3)
        self.mix = torch.randn(4, 4, generator=draws) * 0.5
        self.shift = torch.randn(4, 1, 1, generator=draws)

    def __call__(self, x: Tensor, index: float) -> tuple[Tensor, Tensor]:
        mixed = torch.einsum("oc,bchw->bohw", self.mix, x) + self.shift
        eps = (index / 1000) ** 0.5 * x * 0.9 + 0.3 * torch.sin(mixed + index / 150)
        return eps, torch.tanh(0.5 * mixed + index / 400 - 1)


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()


def run(
    solver: Solver,
    process: Process,
    noise: Tensor,
    predict: Predict,
    *,
    fresh: Callable[[Call], bool | Tensor] | None = None,
    states: list[State] | None = None,
) -> Tensor:
    """The plain loop. ``predict(x, call)`` gives eps, or (eps, variance).

    Where ``fresh`` says no, the prediction held is used; per sample if it gives a tensor. ``states`` collects states.
    """
    state, held = solver.begin(process, noise), None
    for call in solver.calls(process):
        flag: bool | Tensor = True if fresh is None else fresh(call)
        output = predict(solver.network_input(state, call), call)
        eps, variance = output if isinstance(output, tuple) else (output, None)
        if held is not None:
            eps = torch.where(torch.as_tensor(flag).view(-1, 1, 1, 1), eps, held)
        held = eps
        draw = step_noise(noise.shape, call.position) if call.needs_noise else None
        state = solver.advance(state, call, eps, variance=variance, noise=draw, fresh=flag)
        if states is not None:
            states.append(state)
    return solver.result(state)


@pytest.fixture(scope="session", name="run")
def run_fixture() -> Callable[..., Tensor]:
    return run
