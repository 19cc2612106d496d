"""Runs that are taken call by call: forks of a run, and what of it is worth storing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser, Prediction
from gearshift.diffusion.edm import EDM, EDMConfig
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers import DDIM, DDIMConfig, DPMpp2M, DPMpp2MConfig, EDMHeun, EDMHeunConfig, Solver
from gearshift.diffusion.solvers.base import Call
from gearshift.execution.plan import PARTS, StepPlan
from gearshift.policies import Full, Policy
from gearshift.sampling.loop import Sampler, sample_chunk
from gearshift.sampling.stepping import Point, Stepper, worth_storing

from ..contract import build, cost_table

INDEX = torch.arange(3)
FUSED = ("qk", "output", "block")
SOLVERS: list[Solver] = [
    DDIM(DDIMConfig(steps=6)),
    DDIM(DDIMConfig(steps=6, eta=0.5)),
    DPMpp2M(DPMpp2MConfig(steps=6)),
    DPMpp2M(DPMpp2MConfig(steps=6, restart_at_switch=True)),
    EDMHeun(EDMHeunConfig(steps=4)),
]
NAMES = ["ddim", "ddim-noise", "dpmpp", "dpmpp-restart", "heun"]


def sampler(name: str, solver: Solver, policy: Policy | None = None, **fields: Any) -> Sampler:
    process = EDM(EDMConfig()) if isinstance(solver, EDMHeun) else Discrete(DiscreteConfig())
    return Sampler(Denoiser(build(name), process), solver, policy or Full(), chunk=3, **fields)


@dataclass(frozen=True)
class Script(Policy):
    """Any plans, by position."""

    plans: tuple[StepPlan, ...] = ()

    def plan(self, state: Any, call: Call) -> StepPlan:
        return self.plans[call.position]


def stepper_of(s: Sampler, plans: list[StepPlan]) -> Stepper:
    reusable = frozenset().union(*(plan.reuse for plan in plans))
    return Stepper(s, INDEX, s.cond(INDEX), reusable, any(plan.forecast for plan in plans))


def finish(stepper: Stepper, point: Point, plans: list[StepPlan], start: int) -> tuple[list[Tensor], Tensor]:
    """The rest of a run: eps of every call, and the images."""
    found = []
    for call in stepper.calls[start:]:
        point, _, prediction = stepper.step(point, call, plans[call.position])
        found.append(prediction.eps)
    return found, stepper.sampler.solver.result(point.solved)


def every_kind(total: int) -> list[StepPlan]:
    """Reuse, a call that is held, one that is extrapolated, one branch alone, another depth, and so on."""
    maps = frozenset((block, "output") for block in range(3))
    kinds = [
        StepPlan(),
        StepPlan(reuse=maps),
        StepPlan(),
        StepPlan(call=False, forecast=1),
        StepPlan(call=torch.arange(6) < 3),
        StepPlan(depth=3, reuse=frozenset({(1, "block")}), call=torch.arange(6) % 2 == 0),
    ]
    return [kinds[position % len(kinds)] for position in range(total)]


def snapshot(point: Point) -> list[Any]:
    """Everything a later call could read of a point, copied."""
    held = point.held
    tensors = [point.solved.x, *(v for v in point.solved.history.values() if isinstance(v, Tensor))]
    while held is not None:
        tensors += [held.eps, held.valid, held.ratio]
        held = held.earlier
    if point.memory is not None:
        for key in sorted(point.memory.keys):
            tensors.append(point.memory.written(key))
            tensors += [t for entry in point.memory._entries.get(key, {}).values() for t in entry]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_going_on_from_any_call_is_the_rest_of_the_run(solver: Solver) -> None:
    """Bit for bit, under guidance, with memory and predictions that are held; each fork after others went on."""
    s = sampler("isotropic", solver, guidance=2.0)
    plans = every_kind(len(s.calls()))
    stepper = stepper_of(s, plans)
    forks, seen, point = [], [], stepper.begin()
    for call in stepper.calls:
        forks.append(point.fork())
        point, _, prediction = stepper.step(point, call, plans[call.position])
        seen.append(prediction.eps)
    images = solver.result(point.solved)
    for start, fork in enumerate(forks):
        rest, again = finish(stepper, fork, plans, start)
        assert torch.equal(again, images)
        assert all(torch.equal(a, b) for a, b in zip(rest, seen[start:], strict=True))


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_a_fork_on_another_plan_leaves_the_first_alone(solver: Solver) -> None:
    """The fork reuses, skips and writes what it likes; the run it left goes on as if nothing had been."""
    s = sampler("isotropic", solver, guidance=2.0)
    plans = every_kind(len(s.calls()))
    stepper = stepper_of(s, plans)
    _, images = finish(stepper, stepper.begin(), plans, 0)
    others = [StepPlan(), StepPlan(call=False), StepPlan(depth=2), StepPlan(reuse=plans[1].reuse)]
    point = stepper.begin()
    for call in stepper.calls:
        before = snapshot(point)
        for other in others:
            detour, fork = [other, *reversed(plans)], point.fork()
            for later in stepper.calls[call.position : call.position + 3]:
                fork, _, _ = stepper.step(fork, later, detour[later.position - call.position])
        assert all(torch.equal(a, b) for a, b in zip(snapshot(point), before, strict=True))
        point, _, _ = stepper.step(point, call, plans[call.position])
    assert torch.equal(solver.result(point.solved), images)


def test_a_fork_copies_nothing() -> None:
    s = sampler("isotropic", SOLVERS[0])
    plans = every_kind(6)[:2] + [StepPlan()] * 4
    stepper = stepper_of(s, plans)
    point, _, _ = stepper.step(stepper.begin(), stepper.calls[0], plans[0])
    fork = point.fork()
    assert fork.solved is point.solved and fork.held is point.held
    assert fork.memory is not None and point.memory is not None and fork.memory is not point.memory
    for key in point.memory.keys:
        ours, theirs = point.memory._entries[key], fork.memory._entries[key]
        assert all(a is b for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    bare = Stepper(s, INDEX, s.cond(INDEX)).begin().fork()
    assert bare.memory is None and bare.watch is None and bare.held is None


@pytest.mark.parametrize("name", ["isotropic", "long-skips", "two-decoders", "uvit-class"])
def test_stepping_is_sampling(name: str) -> None:
    s = sampler(name, SOLVERS[0], seed=4)
    stepper = Stepper(s, INDEX, s.cond(INDEX))
    _, images = finish(stepper, stepper.begin(), [StepPlan()] * 6, 0)
    assert torch.equal(images, sample_chunk(s, INDEX, cost_table(s.denoiser.network)).images)


# What is worth storing -----------------------------------------------------------------------------------------------


def taking(*keys: tuple[int, str], **fields: Any) -> StepPlan:
    return StepPlan(reuse=frozenset(keys), **fields)


A, B = (1, "map"), (2, "block")


@pytest.mark.parametrize(
    ("plans", "wanted"),
    [
        ([StepPlan(), StepPlan()], [set(), set()]),
        ([StepPlan(), StepPlan(), taking(A), taking(A)], [set(), {A}, {A}, set()]),
        ([StepPlan(), taking(A), StepPlan(), taking(A)], [{A}, set(), {A}, set()]),
        # A call that is held reads and writes nothing.
        ([StepPlan(), StepPlan(call=False), taking(A)], [{A}, {A}, set()]),
        ([StepPlan(), taking(A, call=False), StepPlan()], [set(), set(), set()]),
        # Nor does a block that is not reached, or dropped.
        ([StepPlan(), StepPlan(depth=1), taking(A)], [{A}, {A}, set()]),
        ([StepPlan(), StepPlan(bypass=frozenset({1})), taking(A)], [{A}, {A}, set()]),
        ([StepPlan(), taking(A, depth=1), StepPlan()], [set(), set(), set()]),
        ([StepPlan(), taking(A, bypass=frozenset({1}))], [set(), set()]),
        # Block 1 does not run while 2 is taken whole, so it does not write its map again either.
        ([StepPlan(), taking(B), taking(A)], [{A, B}, {A}, set()]),
        ([StepPlan(), taking(B), taking(B), taking(A)], [{A, B}, {A, B}, {A}, set()]),
        # What lies behind the part that is taken is computed again, what lies before it is not.
        ([StepPlan(), taking(A), taking((1, "output"))], [{A}, {(1, "output")}, set()]),
        ([StepPlan(), taking(A), taking((1, "qk"))], [{A, (1, "qk")}, {(1, "qk")}, set()]),
        ([StepPlan(), taking((1, "qk")), taking(A)], [{A, (1, "qk")}, {A}, set()]),
        ([StepPlan(), taking((1, "block")), taking(A)], [{A, (1, "block")}, {A}, set()]),
        ([StepPlan(), taking((1, "output")), taking((1, "block"))], [{(1, "output")}, {(1, "block")}, set()]),
    ],
)
def test_in_closed_form(plans: list[StepPlan], wanted: list[set[tuple[int, str]]]) -> None:
    s = sampler("isotropic", DDIM(DDIMConfig(steps=len(plans))))
    assert worth_storing(s.info(s.calls()), plans) == wanted


def test_paths_write_their_own_blocks() -> None:
    """Block 6 is of the decoder of the first calls, 3 of that of the last; 2 is shared, and both write it."""
    s = sampler("two-decoders", DDIM(DDIMConfig(steps=6)))
    levels = torch.tensor([call.log_snr for call in s.calls()], dtype=torch.float64)
    assert s.denoiser.network.route(levels).tolist() == [1, 1, 1, 1, 0, 0]
    six, two, three = (6, "map"), (2, "map"), (3, "block")
    plans = [StepPlan(), taking(six), StepPlan(), taking(two), StepPlan(), taking(two, three, six)]
    assert worth_storing(s.info(s.calls()), plans) == [{six}, set(), {two}, set(), {two, three}, set()]


@pytest.mark.parametrize(
    "plan",
    [
        StepPlan(call=torch.tensor([True, False, True])),
        StepPlan(depth=torch.tensor([1, 2, 3])),
        StepPlan(bypass={1: torch.tensor([True, False, True])}),
        StepPlan(expert=0),
    ],
)
def test_rows_that_go_apart_may_want_anything(plan: StepPlan) -> None:
    s = sampler("isotropic", DDIM(DDIMConfig(steps=3)))
    assert worth_storing(s.info(s.calls()), [StepPlan(), plan, taking(A)]) is None


def random_plans(name: str, total: int, parts: tuple[str, ...], generator: torch.Generator) -> list[StepPlan]:
    """Static plans: skips, depths that all paths have, dropped blocks, and parts taken from anywhere."""
    network = build(name)
    exits = sorted(set.intersection(*(set(network.exits(path)) for path in range(len(network.paths)))))

    def chance(share: float) -> bool:
        return float(torch.rand((), generator=generator)) < share

    def one_of(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    blocks = range(len(network.blocks))
    plans = [StepPlan()]
    for _ in range(total - 1):
        share = one_of([0.0, 0.2, 0.5])
        reuse = frozenset((block, one_of(parts)) for block in blocks if chance(share))
        bypass = frozenset(block for block in blocks if chance(0.1))
        depth = one_of(exits) if exits and chance(0.3) else None
        plans.append(StepPlan(call=not chance(0.2), depth=depth, bypass=bypass, reuse=reuse))
    return plans


def events(prediction: Prediction) -> list[Any]:
    return [(e.kind, e.path, e.index, e.mode, e.rows.host().tolist()) for e in prediction.trace]


@pytest.mark.parametrize("parts", [FUSED, PARTS], ids=["fused", "maps"])
@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("isotropic", 2.0),
        ("uvit-class", 2.0),
        ("long-skips", 1.0),
        ("two-decoders", 1.0),
        ("ldm-decoders", 1.0),
        ("unet-class", 2.0),
        ("unet-shared-middle", 1.0),
        ("separate", 2.0),
        ("exits-two-decoders", 1.0),
    ],
)
def test_storing_less_computes_the_same(name: str, guidance: float, parts: tuple[str, ...]) -> None:
    """Against a run that stores all it may: the same blocks in the same modes at every call, and the same images.

    Maps that are not stored are not formed either, which rounds differently: there the modes must do.
    """
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        solver = DDIM(DDIMConfig(steps=7))
        plans = random_plans(name, 7, parts, generator)
        s = sampler(name, solver, Script(tuple(plans)), guidance=guidance)
        seen: list[Prediction] = []
        chunk = sample_chunk(s, INDEX, cost_table(build(name)), on_prediction=lambda _, p, seen=seen: seen.append(p))
        stepper = stepper_of(s, plans)
        point, most = stepper.begin(), 0
        for call in stepper.calls:
            point, _, prediction = stepper.step(point, call, plans[call.position])
            assert events(prediction) == events(seen[call.position])
            most = max(most, 0 if point.memory is None else point.memory.num_bytes)
        if parts == FUSED:
            assert torch.equal(chunk.images, solver.result(point.solved))
        assert chunk.ledger.kept[-1] == 0 and chunk.ledger.kept_bytes <= most / 3
