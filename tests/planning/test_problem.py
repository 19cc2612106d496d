"""What a schedule costs and loses: against the sampling loop, whatever was measured before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gearshift.diffusion.solvers.dpmpp_2m import DPMpp2M, DPMpp2MConfig
from gearshift.diffusion.solvers.edm_heun import EDMHeun, EDMHeunConfig
from gearshift.planning import problem as module
from gearshift.planning.choices import SPACES, Choice, Menu, as_policy, describe
from gearshift.planning.problem import Problem, psnr
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import sample_chunk

from ..contract import build, cost_table
from .conftest import problem, sampler, shared

NETWORKS = ["exits-uvit", "exits-isotropic", "long-skips", "two-decoders", "unet-class", "dit-class"]


def random_schedules(p: Problem, menu: Menu, count: int, seed: int = 0) -> list[tuple[Choice, ...]]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        schedule = [menu.full]
        for position in range(1, len(p.calls)):
            some = p.menu_at(menu, position).all()
            schedule.append(some[int(draw.integers(len(some)))])
        found.append(tuple(schedule))
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_schedule_is_what_the_loop_makes_of_its_policy(name: str) -> None:
    """Images, and MACs to the last one, also where parts were never computed and where rows take other decoders."""
    guided = build(name).cond_kind == "class" and name != "exits-isotropic"
    p, menu = shared(name, guidance=2.0 if guided and name != "dit-class" else 1.0)
    table = cost_table(p.run.network)
    for schedule in random_schedules(p, menu, 6):
        policy = as_policy(schedule, p.run, "ddim")
        chunk = sample_chunk(replace(p.sampler, policy=policy), torch.arange(3), table)
        torch.testing.assert_close(p.images(schedule), chunk.images, rtol=1e-4, atol=1e-4)
        share = chunk.ledger.macs_per_image / chunk.ledger.full_macs_per_image
        if name == "two-decoders":  # what only some calls of a path have left behind is counted as absent
            assert p.cost(schedule) >= share - 1e-9
        else:
            assert p.cost(schedule) == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize(
    "solver", [DPMpp2M(DPMpp2MConfig(steps=6)), EDMHeun(EDMHeunConfig(steps=4))], ids=["dpmpp_2m", "heun"]
)
def test_what_was_measured_before_changes_nothing(solver) -> None:
    """The prefix cache: any order of schedules gives each the images it has alone, bit for bit."""
    p, menu = problem(solver=solver)
    schedules = random_schedules(p, menu, 5)
    alone = []
    for schedule in schedules:
        fresh, _ = problem(solver=solver)
        alone.append(fresh.images(schedule))
    for number in (0, 1, 2, 1, 4, 3, 0):
        assert torch.equal(p.images(schedules[number]), alone[number])
        if number in (1, 3):
            p.hold(schedules[number])
    assert torch.equal(p.images(p.full), p.reference)


def test_late_changes_cost_late_calls_only() -> None:
    p, _menu = problem()
    p.hold(p.full)
    before = p.steps_made
    p.measure((*p.full[:-1], Choice(0)))
    assert p.steps_made == before + 1
    p.measure((p.full[0], Choice(0), *p.full[2:]))
    assert p.steps_made == before + 1 + len(p.calls) - 1


def test_a_small_cache_keeps_every_other_point(monkeypatch: pytest.MonkeyPatch) -> None:
    p, menu = problem()
    monkeypatch.setattr(module, "CACHE_BYTES", 1)
    tight, _ = problem()
    assert len(tight.points) == 1 < len(p.points) == len(p.calls)
    for schedule in random_schedules(p, menu, 3):
        assert torch.equal(tight.images(schedule), p.images(schedule))


def test_full_compute_loses_nothing_and_costs_all() -> None:
    p, _menu = shared()
    measured = p.measure(p.full)
    assert (measured.loss, measured.cost) == (0.0, 1.0) and psnr(0.0) == float("inf")
    assert psnr(4.0) == 0.0 and psnr(0.04) == pytest.approx(20.0)


def test_a_menu_says_what_may_be_decided() -> None:
    network = build("exits-uvit")
    menu = Menu.of(network, 2, SPACES)
    assert menu.full == Choice(2) and menu.computing()[0] == menu.full
    assert Choice(0) in menu.all() and Choice(0, forecast=True) in menu.all()
    assert Choice(1, forecast=True) in menu.all() and Choice(2, forecast=True) not in menu.all()
    assert menu.depths == (0, 4, 2)
    # Nothing is taken whole from memory next to the readout: skipping the call does that for less.
    assert all(not (c.depth == 2 and (1, "block") in c.reuse) for c in menu.computing())
    assert Menu.of(network, 2, ["steps"]).all() == [Choice(2), Choice(0), Choice(0, forecast=True)]
    with pytest.raises(UsageError, match="name some of steps"):
        Menu.of(network, 2, ["step"])
    with pytest.raises(UsageError, match="leaves nothing to decide"):
        Menu.of(build("unet-class"), 1, ["depth"])


def test_choices_in_words() -> None:
    full = Choice(2)
    assert describe(full, full) == "full"
    assert describe(Choice(0), full) == "skip" and describe(Choice(0, forecast=True), full) == "extrapolate"
    some = Choice(1, 4, frozenset({(0, "qk"), (1, "qk"), (2, "block")}))
    assert describe(some, full) == "1 branch, depth 4, block of 2, qk of 2 blocks"


def test_wrong_length() -> None:
    p, _ = shared()
    with pytest.raises(ValueError, match="the schedule has 2 calls, the run 7"):
        p.images(p.full[:2])


def test_latents_are_compared_as_they_are() -> None:
    s = sampler()
    clipped = Problem(s, torch.arange(3), cost_table(s.denoiser.network), frozenset())
    plain = Problem(s, torch.arange(3), cost_table(s.denoiser.network), frozenset(), clip=False)
    schedule = (plain.full[0], *(Choice(0),) * 6)
    far = plain.images(schedule).abs().max()
    assert far > 1 and clipped.measure(schedule).loss < plain.measure(schedule).loss
