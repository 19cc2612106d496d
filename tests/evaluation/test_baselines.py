"""What is set against the best rows: which these are, what the baselines cost, and where there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from gearshift.api import side_by_side
from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_config import UNetConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.evaluation.baselines import EQUAL, Target, baselines_of, best
from gearshift.evaluation.report import baseline_lines
from gearshift.evaluation.rows import Row, plan_rows
from gearshift.evaluation.savings import contests
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
    NetworkSwitch,
    Planned,
    Policy,
    SkipEvery,
)
from gearshift.runtime.errors import UsageError
from gearshift.sampling.costs import macs_of
from gearshift.sampling.loop import Sampler, sample

from ..toys import TwoDecoders

SHAPE: dict[str, Any] = dict(image_size=8, in_channels=1, patch_size=4, embed_dim=8, num_heads=2)
DDIM = "gearshift.diffusion.solvers.ddim.DDIM"
Make = Callable[..., Sampler]


@cache
def denoiser_of(kind: str) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "dit":
            network: Any = DiT(DiTConfig(depth=4, num_classes=3, **SHAPE))
        elif kind == "two":
            network = TwoDecoders()
        elif kind == "unet":
            sizes: Any = dict(image_size=8, in_channels=2, model_channels=8, channel_mult=(1, 2), num_blocks=1)
            network = UNet(UNetConfig(**sizes, attention_resolutions=(4,)))
        else:
            depth = {"uvit": 6, "shallow": 2, "deeper": 8}[kind]
            network = UViT(UViTConfig(depth=depth, num_classes=3, null_class=True, **SHAPE))
    return Denoiser(network.eval().requires_grad_(False), VPSDE(VPSDEConfig()))


@cache
def table_of(kind: str) -> CostTable:
    return CostTable.measure(denoiser_of(kind).network)


@cache
def beside(denoiser: Denoiser, other: str) -> Denoiser:
    return side_by_side(denoiser, "run=own", {other: denoiser_of(other)})


def maker(denoiser: Denoiser) -> Make:
    """Runs that policies name are kinds of `denoiser_of`."""

    def make(policy: Policy, solver: Any, **options: Any) -> Sampler:
        own = beside(denoiser, *policy.others()) if policy.others() else denoiser
        made = Sampler(own, solver, policy, **options)
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


@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_one_exit_is_the_deepest_that_is_cheap_enough(kind: str) -> None:
    bench = Bench(ddim(4), kind=kind, baselines=["fixed_depth"])
    costs = {depth: bench.macs(FixedDepth(depth)) for depth in bench.denoiser.network.exits()}
    for depth in (1, 2, len(costs) - 1):
        for macs in (costs[depth], costs[depth] + 0.9 * (costs[depth + 1] - costs[depth])):
            [row] = bench.at((macs + 0.5) / bench.full_macs)
            assert (row.name, row.baseline, row.note) == (f"depth {depth}", "fixed_depth", None)
            assert row.sampler.policy == FixedDepth(depth)
    [row] = bench.at(0.5 * costs[1] / bench.full_macs)
    assert (row.name, row.note) == ("depth 1", "saves less, though it is the first exit")
    [chunk] = sample(row.sampler, 4, table=bench.table)
    assert chunk.ledger.macs_per_image == costs[1], "no uncertainty head is asked"


def test_one_exit_needs_an_exit_on_every_path() -> None:
    """Depth 5 is one of the longer decoder alone, and the shorter would run past it; 6 is where the shorter ends."""
    bench = Bench(ddim(4), kind="two", labels="uniform", baselines=["fixed_depth"])
    assert [bench.denoiser.network.exits(path) for path in (0, 1)] == [(3, 4, 6), (2, 3, 5, 7)]
    [row] = bench.at(0.999)
    assert row.sampler.policy == FixedDepth(3)
    sample(row.sampler, 4, table=bench.table)


def test_a_network_without_exits_has_no_fixed_depth() -> None:
    assert Bench(ddim(4), kind="unet", labels="uniform", baselines=["fixed_depth"]).at(0.5) == []


# A smaller network ---------------------------------------------------------------------------------------------------


def shallow(solver: Any = None, **settings: Any) -> Bench:
    baselines = ["duodiff", "small_network"]
    return Bench(ddim(8) if solver is None else solver, **{"shallow": "shallow", "baselines": baselines, **settings})


@cache
def table_beside(denoiser: Denoiser) -> CostTable:
    return CostTable.measure(denoiser.network)


def spent(row: Row) -> float:
    [chunk] = sample(row.sampler, 4, table=table_beside(row.sampler.denoiser))
    return chunk.ledger.macs_per_image


@pytest.mark.parametrize("guidance", [{}, {"guidance": 2.0}, {"guidance": 2.0, "guidance_interval": [-2.0, 3.0]}])
@pytest.mark.parametrize("solver", [ddim(8), "edm_heun"], ids=str)
def test_the_fewest_calls_of_the_smaller_network_that_are_cheap_enough(solver: Any, guidance: dict[str, Any]) -> None:
    bench = shallow(solver, **guidance)
    for share in (0.6, 0.85):
        duo, small = bench.at(share)
        policy = duo.sampler.policy
        assert isinstance(policy, NetworkSwitch) and policy.calls is not None
        assert (duo.name, duo.baseline) == (f"DuoDiff, first {policy.calls} calls", "duodiff")
        fewer = replace(duo, sampler=replace(duo.sampler, policy=replace(policy, calls=policy.calls - 1)))
        assert spent(duo) <= share * bench.full_macs < spent(fewer)
        assert (small.name, small.baseline, small.note) == ("small network", "small_network", None)
        assert small.sampler.policy == NetworkSwitch("shallow")
        assert duo.equal_macs_to == small.equal_macs_to == "row 0"
    alone = Sampler(denoiser_of("shallow"), bench.full.sampler.solver, Full(), chunk=4, labels="balanced")
    alone = replace(alone, guidance=bench.settings.guidance, guidance_interval=bench.full.sampler.guidance_interval)
    [images] = sample(alone, 4)
    [found] = sample(small.sampler, 4, table=table_beside(small.sampler.denoiser))
    assert torch.equal(found.images, images.images) and spent(small) == images.ledger.macs_per_image


def test_what_costs_more_than_it_is_set_against_says_so() -> None:
    bench = shallow()
    own = spent(bench.at(0.6)[1]) / bench.full_macs
    [row] = bench.at(0.9 * own)
    assert (row.baseline, row.note) == ("small_network", "costs more than row 0"), "and is DuoDiff at all calls"
    duo, small = bench.at(0.6, 0.9 * own)
    assert duo.baseline == "duodiff" and small.note == "also against row 1; costs more than row 1"
    assert (small.equal_macs_to, small.also_against) == ("row 0", ("row 1",))
    [row] = shallow(baselines=["duodiff"]).at(0.9 * own)
    assert row.sampler.policy == NetworkSwitch("shallow", 8)
    assert row.note == "saves less, though 8 of 8 calls are the smaller network's"


def test_a_network_that_is_no_smaller_is_no_baseline() -> None:
    assert shallow(shallow="deeper").at(0.5) == shallow(shallow="uvit").at(0.5) == []


def test_no_smaller_network_no_such_baseline() -> None:
    assert shallow(shallow=None).at(0.5) == []
    assert shallow(baselines=["small_network"]).at(0.5)[0].baseline == "small_network"
    with pytest.raises(UsageError, match=r"shallow=x would not be read: .*has neither duodiff nor small_network"):
        shallow(shallow="x", baselines=["hurry"])
    assert shallow(shallow="x", equal_macs=False).settings.shallow == "x", "nothing is looked for that nobody asks for"


def test_a_smaller_network_that_does_not_fit_is_refused_before_anything_is_sampled() -> None:
    with pytest.raises(UsageError, match="run=own and the other network's run dit do not go together"):
        shallow(shallow="dit")


def test_the_same_calls_by_another_network_are_another_row() -> None:
    """And by the same one they are not added again."""
    calls = shallow().at(0.6)[0].sampler.policy.calls
    node = {"_target_": "gearshift.policies.NetworkSwitch", "calls": calls}
    for other, kinds in (("shallow", ["small_network"]), ("deeper", ["duodiff", "small_network"])):
        bench = shallow(policies={"asked": {**node, "other": other}})
        assert [row.baseline for row in bench.at(0.6)] == kinds


# Who wins ------------------------------------------------------------------------------------------------------------


def result(name: str, macs: float, fd: float | None, psnr: float | None, **more: Any) -> dict[str, Any]:
    identical = float(psnr is None)
    return {
        "name": name,
        "macs_per_image": macs,
        "fd_x": fd,
        "psnr_to_full": psnr,
        "identical_to_full": identical,
        **more,
    }


def against(name: str, *values: Any, **more: Any) -> dict[str, Any]:
    return result(name, *values, equal_macs_to="exit", **more)


@pytest.mark.parametrize(
    ("base", "head", "tail"),
    [
        ((0.9, 2.0, 20.0), "exit beats base at 90 %", ": fd_x 1.00 against 2.00, PSNR to full 30.0 against 20.0 dB"),
        ((1.0, 1.0, 30.0), "exit does not beat", ": fd_x 1.00 against 1.00, PSNR to full 30.0 against 30.0 dB"),
        ((1.0, 0.5, 40.0), "exit does not beat", ": fd_x 1.00 against 0.500, PSNR to full 30.0 against 40.0 dB"),
        ((1.2, 2.0, 40.0), "exit beats", " in fd_x 1.00 against 2.00; not in PSNR to full 30.0 against 40.0 dB"),
        ((1.0, None, 20.0), "exit beats", "100 % of the MACs: PSNR to full 30.0 against 20.0 dB"),
        ((1.0, 1.001, None), "exit does not beat", ": fd_x 1.00 against 1.00, PSNR to full 30.0 against identical dB"),
    ],
)
def test_who_wins_is_read_off_the_numbers(base: tuple[Any, ...], head: str, tail: str) -> None:
    """What prints alike is no difference."""
    [line] = contests([result("exit", 1.0, 1.0, 30.0), against("base", *base)])
    assert line.startswith(head) and line.endswith(tail)


def test_within_the_spread_over_repeats_nobody_wins() -> None:
    row = result("exit", 1.0, 1.0, 30.0, sd={"fd_x": 0.1, "psnr_to_full": 0.1})
    [line] = contests([row, against("base", 1.0, 1.2, 29.0, sd={"fd_x": 0.3})])
    assert line.startswith("exit beats base at 100 % of the MACs in PSNR to full") and "; not in fd_x" in line


def test_every_baseline_is_held_against_all_that_it_was_made_for() -> None:
    rows = [
        result("skip", 1.0, 2.0, 20.0),
        result("exit", 2.0, 1.0, 30.0),
        against("shared", 1.0, 1.5, 25.0, also_against=["skip"]),
        against("own", 2.0, 1.5, 25.0),
        against("unmeasured", 2.0, None, None, identical_to_full=0.0),
        result("of nobody", 1.0, 0.1, 50.0),
    ]
    assert [line.partition(" at ")[0] for line in contests(rows)] == [
        "skip does not beat shared",
        "exit beats shared",
        "exit beats own",
    ]
    assert contests(rows[:2]) == []


def test_the_report_says_what_they_are() -> None:
    kinds = {"fixed_depth": "depth 2", "duodiff": "DuoDiff, first 3 calls", "small_network": "small network"}
    lines = baseline_lines([against(name, 1.0, 1.0, 1.0, baseline=kind, note="n") for kind, name in kinds.items()])
    assert lines == [
        "depth 2: one exit at every call, nothing asked, against exit (n)",
        "DuoDiff, first 3 calls: a smaller network trained from scratch at the first calls, against exit (n)",
        "small network: a smaller network trained from scratch at every call, at its own MACs, against exit (n)",
    ]


# Where there are none ------------------------------------------------------------------------------------------------


def test_schedules_need_what_they_reuse() -> None:
    kinds = [row.baseline for row in Bench(ddim(8), kind="dit").at(0.5)]
    assert kinds == ["fewer_steps", "other_grid", "hurry", "fixed_depth"], "a DiT has no long skips"
    assert [row.baseline for row in Bench(ddim(1)).at(0.5)] == ["fixed_depth"], "one call has nothing before it"


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
