"""References of adaptive skipping, written from the definitions, and short ways to run it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

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
from gearshift.policies import Full, Policy, RunInfo
from gearshift.runtime import keys
from gearshift.sampling.loop import Chunk, Sampler, sample_chunk

from ..contract import build, cost_table

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


def trajectory() -> tuple[list[Tensor], list[Tensor]]:
    """51 smooth latents [2, 2, 4, 4] whose speed and direction change, and 50 predictions."""
    draws = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2, 2, 4, 4, generator=draws, dtype=torch.float64) for _ in range(3))
    at = [n / 50 for n in range(51)]
    path = [a * math.cos(2 * t) + b * t**2 + c * 0.05 * math.sin(20 * t) for t in at]
    eps = [a * t**3 + b * math.sin(3 * t) for t in at[:-1]]
    return [x.float() for x in path], [e.float() for e in eps]
