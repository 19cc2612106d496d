"""What is set against the best rows: which these are, what the baselines cost, and where there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.evaluation.baselines import EQUAL, Target, baselines_of, best
from gearshift.evaluation.rows import Row, plan_rows
from gearshift.evaluation.settings import BASELINES, EvaluationConfig
from gearshift.execution.cost import CostTable
from gearshift.policies import (
    AdaptiveSkip,
    AttentionReuse,
    Compose,
    DeepFeatureReuse,
    ExitSchedule,
    FixedDepth,
    Full,
    Planned,
    Policy,
    SkipEvery,
)
from gearshift.sampling.costs import macs_of
from gearshift.sampling.loop import Sampler, sample

SHAPE: dict[str, Any] = dict(image_size=8, in_channels=1, patch_size=4, embed_dim=8, num_heads=2)
DDIM = "gearshift.diffusion.solvers.ddim.DDIM"
Make = Callable[..., Sampler]


@cache
def denoiser_of(kind: str) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "dit":
            network: Any = DiT(DiTConfig(depth=4, num_classes=3, **SHAPE))
        else:
            network = UViT(UViTConfig(depth=6, num_classes=3, null_class=True, **SHAPE))
    return Denoiser(network.eval().requires_grad_(False), VPSDE(VPSDEConfig()))


@cache
def table_of(kind: str) -> CostTable:
    return CostTable.measure(denoiser_of(kind).network)


def maker(denoiser: Denoiser) -> Make:
    def make(policy: Policy, solver: Any, **options: Any) -> Sampler:
        made = Sampler(denoiser, solver, policy, **options)
        made.check()
        return made

    return make


class Bench:
    """Baselines of one solver at chosen MACs."""

    def __init__(self, solver: dict[str, Any] | str, kind: str = "uvit", **settings: Any) -> None:
        self.denoiser = denoiser_of(kind)
        self.table = table_of(kind)
        self.make = maker(self.denoiser)
        self.settings = EvaluationConfig(**{"solvers": {"s": solver}, "chunk": 4, "metrics": [], **settings})
        self.planned = plan_rows(self.settings, self.make)
        self.full = self.planned[0]
        self.full_macs = self.macs(Full())

    def at(self, *shares: float, taken: Sequence[Row] | None = None) -> list[Row]:
        targets = [Target(f"row {k}", share * self.full_macs) for k, share in enumerate(shares)]
        taken = self.planned if taken is None else taken
        return baselines_of(self.settings, self.make, self.table, self.full, targets, taken)

    def macs(self, policy: Policy, sampler: Sampler | None = None) -> int:
        macs = macs_of(self.full.sampler if sampler is None else sampler, policy, self.table)
        assert macs is not None
        return macs

    def share(self, row: Row) -> float:
        return self.macs(row.sampler.policy, row.sampler) / self.full_macs


def ddim(steps: int, **more: Any) -> dict[str, Any]:
    return {"_target_": DDIM, "steps": steps, **more}


# The rows that are matched -------------------------------------------------------------------------------------------


def test_best_is_the_cheapest_within_the_tolerance_else_the_closest() -> None:
    rows = {
        "full": {"macs_saved": 0.0, "label_agreement": 0.9, "psnr_to_full": None},
        "a": {"macs_saved": 0.2, "label_agreement": 0.9, "psnr_to_full": 30.0},
        "b": {"macs_saved": 0.5, "label_agreement": 0.88, "psnr_to_full": 20.0},
        "c": {"macs_saved": 0.9, "label_agreement": 0.2, "psnr_to_full": 10.0},
        "d": {"macs_saved": -0.1, "label_agreement": 1.0, "psnr_to_full": 40.0},
    }
    names = ["a", "b", "c", "d"]
    assert best(rows, names, "full", 3.0) == "b"
    assert best(rows, names, "full", 1.0) == "a"
    assert best(rows, ["c", "d"], "full", 3.0) == "c", "nothing is within the tolerance: the closest that saves"
    assert best(rows, ["d"], "full", 3.0) is None
    without = {name: {key: row[key] for key in ("macs_saved", "psnr_to_full")} for name, row in rows.items()}
    assert best(without, names, "full", 3.0) == "a"


# What they cost ------------------------------------------------------------------------------------------------------

POLICIES: list[Policy] = [
    Full(),
    FixedDepth(3),
    ExitSchedule(depths=[7, 5, 3]),
    SkipEvery(k=2),
    AttentionReuse(last=3, operator="map"),
    AttentionReuse(interval=2, operator="qk", layers=[1, 4]),
    DeepFeatureReuse(interval=3),
    DeepFeatureReuse(last=2, branch=1),
    Compose([FixedDepth(5), AttentionReuse(last=4, operator="output"), SkipEvery(k=3)]),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_counted_beforehand_is_what_the_ledger_counts(policy: Policy, guidance: float) -> None:
    bench = Bench(ddim(6), guidance=guidance)
    sampler = replace(bench.full.sampler, policy=policy)
    [chunk] = sample(sampler, 4, table=bench.table)
    assert bench.macs(policy, sampler) == chunk.ledger.macs_per_image


def test_guidance_within_an_interval_costs_what_it_calls() -> None:
    bench = Bench(ddim(8), guidance=2.0, guidance_interval=[-2.0, 3.0])
    [chunk] = sample(bench.full.sampler, 4)
    assert bench.full_macs == chunk.ledger.macs_per_image == chunk.ledger.full_macs_per_image
    assert set(chunk.ledger.branches.tolist()) == {1, 2}


@pytest.mark.parametrize("share", [0.04, 0.31, 0.55, 0.9])
@pytest.mark.parametrize("solver", [ddim(12), ddim(12, spacing="log_snr"), "dpmpp_2m", "edm_heun"], ids=str)
def test_no_baseline_costs_more_than_what_it_is_set_against(solver: Any, share: float) -> None:
    bench = Bench(solver)
    for row in bench.at(share):
        own = bench.share(row)
        assert own < 1 and row.equal_macs_to == "row 0"
        if row.baseline in ("fewer_steps", "other_grid"):
            one = len(row.sampler.calls()) == 1
            assert own <= share * (1 + EQUAL) or one
        elif row.note is None:
            assert own <= share
        else:
            assert own > share and row.note.startswith("saves less, though ")
    kinds = [row.baseline for row in bench.at(share)]
    assert len(set(kinds)) == len(kinds) and kinds == [kind for kind in BASELINES if kind in kinds]


@pytest.mark.parametrize(("share", "steps"), [(0.5, 10), (0.54, 10), (0.59, 11), (0.999, 19), (0.5499, 11), (0.01, 1)])
def test_steps_are_rounded_down_and_at_least_one(share: float, steps: int) -> None:
    """But for what nobody can see: 11 steps cost 0.02 % more than 0.5499 of 20."""
    bench = Bench(ddim(20), baselines=["fewer_steps"])
    [row] = bench.at(share)
    assert row.name == f"full, {steps} steps" and len(row.sampler.calls()) == steps


def test_steps_are_counted_by_their_calls() -> None:
    """Heun calls twice per step but for the last: 18 steps are 35 calls, and half of that is 17."""
    bench = Bench("edm_heun", baselines=["fewer_steps"])
    assert len(bench.full.sampler.calls()) == 35
    [row] = bench.at(0.5)
    assert (row.name, len(row.sampler.calls())) == ("full, 9 steps", 17)


@pytest.mark.parametrize(
    ("solver", "grid"),
    [
        (ddim(10), "log_snr"),
        (ddim(10, spacing="trailing"), "log_snr"),
        (ddim(10, spacing="log_snr"), "linspace"),
        ("dpmpp_2m", "linspace"),
        ("dpm_singlestep", "time"),
        ("edm_heun", None),
    ],
)
def test_the_other_grid_is_one_that_the_solver_has(solver: Any, grid: str | None) -> None:
    bench = Bench(solver, baselines=["fewer_steps", "other_grid"])
    own, *other = bench.at(0.5)
    assert own.grid is None and [row.grid for row in other] == ([] if grid is None else [grid])
    for row in other:
        assert row.name == f"{own.name}, {grid}"
        assert row.sampler.solver.config.spacing == grid
        assert len(row.sampler.calls()) == len(own.sampler.calls())
        assert [c.log_snr for c in row.sampler.calls()] != [c.log_snr for c in own.sampler.calls()]


def test_hurry_is_the_least_reuse_that_saves_enough() -> None:
    bench = Bench(ddim(8), baselines=["hurry"])
    late = {r: bench.macs(AttentionReuse(last=r, operator="map")) for r in range(8)}
    assert late[0] == bench.full_macs
    for r in (1, 3, 7):
        [row] = bench.at((late[r] + 0.4 * (late[r - 1] - late[r])) / bench.full_macs)
        assert row.sampler.policy == AttentionReuse(last=r, operator="map")
        assert (row.name, row.note) == (f"HURRY, last {r} (map)", None)
    [row] = bench.at(late[7] / bench.full_macs - 1e-6)
    assert row.name == "HURRY, last 7 (map)" and row.note == "saves less, though 7 of 8 calls reuse"


def test_deep_features_are_the_nearest_that_save_enough_by_the_smallest_interval() -> None:
    bench = Bench(ddim(8), baselines=["deep_features"])
    every = {
        (interval, branch): bench.macs(DeepFeatureReuse(interval=interval, branch=branch))
        for interval in range(2, 9)
        for branch in range(3)
    }
    for macs in sorted(set(every.values()))[::3]:
        [row] = bench.at((macs + 1) / bench.full_macs)
        policy = row.sampler.policy
        assert isinstance(policy, DeepFeatureReuse)
        assert (policy.interval, policy.branch) == min(key for key, own in every.items() if own == macs)
        assert row.note is None
    [row] = bench.at(0.01)
    assert bench.share(row) * bench.full_macs == min(every.values())
    assert row.note == "saves less, though 7 of 8 calls reuse"


# Where there are none ------------------------------------------------------------------------------------------------


def test_schedules_need_what_they_reuse() -> None:
    kinds = [row.baseline for row in Bench(ddim(8), kind="dit").at(0.5)]
    assert kinds == ["fewer_steps", "other_grid", "hurry"], "a DiT has no long skips"
    assert [row.baseline for row in Bench(ddim(1)).at(0.5)] == [], "one call has nothing before it"


def test_what_was_asked_for_is_not_added_again() -> None:
    node = {"_target_": "gearshift.policies.DeepFeatureReuse", "computed": [0, 2, 4, 6]}
    plain, asked = Bench(ddim(8)), Bench(ddim(8), policies={"every other": node})
    cost = plain.macs(DeepFeatureReuse(interval=2)) / plain.full_macs
    wanted = [row.name for row in plain.at(cost)]
    assert "deep features 1:2, branch 0" in wanted
    assert [row.name for row in asked.at(cost)] == [n for n in wanted if n != "deep features 1:2, branch 0"]


def test_two_rows_share_a_baseline_and_names_stay_apart() -> None:
    bench = Bench(ddim(8), baselines=["fewer_steps"])
    [row] = bench.at(0.5, 0.52)
    assert (row.equal_macs_to, row.note) == ("row 0", "also against row 1")
    two = bench.at(0.5, 0.26)
    assert [(row.name, row.equal_macs_to) for row in two] == [("full, 4 steps", "row 0"), ("full, 2 steps", "row 1")]
    taken = [replace(bench.full, name="full, 4 steps", sampler=replace(bench.full.sampler, policy=FixedDepth(2)))]
    [row] = bench.at(0.5, taken=taken)
    assert row.name == "full, 4 steps, baseline"


def test_every_solver_names_its_own() -> None:
    bench = Bench(ddim(8))
    settings = replace(bench.settings, solvers={"s": ddim(8), "t": ddim(6)})
    found = baselines_of(settings, bench.make, bench.table, bench.full, [Target("x", 0.5 * bench.full_macs)], [])
    assert found and all(row.name.endswith(" @ s") and row.full == bench.full.name for row in found)


# Plans ---------------------------------------------------------------------------------------------------------------


def test_policies_that_decide_by_data_are_like_no_other() -> None:
    bench = Bench(ddim(8))
    skipping = replace(bench.full, name="skip", sampler=replace(bench.full.sampler, policy=AdaptiveSkip()))
    assert [row.name for row in bench.at(0.5, taken=[bench.full, skipping])] == [row.name for row in bench.at(0.5)]


def test_a_plan_that_drops_a_branch_is_no_baseline_of_its_own() -> None:
    """`gearshift plan` may evaluate the conditional branch alone; what is compared with it is plain."""
    bench = Bench(ddim(4), guidance=2.0)
    calls = bench.full.sampler.calls()
    network = bench.denoiser.network
    planned = Planned(
        network=network.name,
        blocks=len(network.blocks),
        solver="ddim",
        log_snr=[call.log_snr for call in calls],
        branches=2,
        call=[2, 1, 0, 2],
        depth=[0] * 4,
        reuse=[{}] * 4,
    )
    row = replace(bench.full, name="plan", sampler=replace(bench.full.sampler, policy=planned))
    assert len(bench.at(0.5, taken=[bench.full, row])) == len(bench.at(0.5))
