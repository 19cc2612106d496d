"""A shallow network for the first calls, the deep one after (DuoDiff, arXiv 2410.09633): alone, and with others."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gearshift.api import side_by_side
from gearshift.assembly import named
from gearshift.backbones.base import Backbone
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.evaluation.reduce import cost_numbers
from gearshift.execution.cost import CostTable
from gearshift.execution.plan import StepPlan
from gearshift.policies import (
    AdaptiveSkip,
    AttentionReuse,
    Compose,
    DeepFeatureReuse,
    ExitSchedule,
    FixedDepth,
    Full,
    NetworkSwitch,
    Policy,
    SaturationExit,
    SkipEvery,
    UncertaintyExit,
)
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Chunk, Sampler, sample

from ..toys import Isotropic, LongSkips, TwoDecoders

DEEP, SHALLOW = 5, 3
SHAPE: dict[str, Any] = dict(image_size=8, in_channels=1, patch_size=4, embed_dim=8, num_heads=2)
SOLVERS = ("ddim", "ddpm", "euler_maruyama", "edm_heun", "dpmpp_2m")


def network(depth: int, seed: int, heads: bool) -> Backbone:
    """`depth` blocks; its weights are large enough that networks differ."""
    torch.manual_seed(seed)
    made: Backbone = UViT(UViTConfig(depth=depth - 1, num_classes=3, null_class=True, **SHAPE))
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 * parameter[0].numel() ** -0.5)
    return EarlyExit(ExitsConfig(uncertainty="token_mean"), made) if heads else made


@cache
def denoisers(heads: bool = False) -> tuple[Denoiser, Denoiser, Denoiser]:
    """Deep (with heads, if asked for), shallow, and both side by side."""
    with torch.random.fork_rng():
        process = VPSDE(VPSDEConfig())
        deep, shallow = (
            Denoiser(network(blocks, seed, heads and blocks == DEEP), process).eval().requires_grad_(False)
            for blocks, seed in ((DEEP, 0), (SHALLOW, 1))
        )
    return deep, shallow, side_by_side(deep, "run=deep", {"shallow": shallow})


@cache
def table_of(denoiser: Denoiser) -> CostTable:
    return CostTable.measure(denoiser.network)


def sampler(denoiser: Denoiser, policy: Policy, solver: str = "ddim", **options: Any) -> Sampler:
    node: Any = named("solver", solver)
    node.steps = 6
    made = Sampler(denoiser, config.build(node), policy, chunk=4, **options)
    made.check()
    return made


def run(denoiser: Denoiser, policy: Policy, solver: str = "ddim", **options: Any) -> Chunk:
    [chunk] = sample(sampler(denoiser, policy, solver, **options), 4, table=table_of(denoiser))
    return chunk


def switched(calls: int | None, policy: Policy | None = None) -> Policy:
    switch = NetworkSwitch("shallow", calls)
    return switch if policy is None else Compose([policy, switch])


def same_costs(one: LedgerData, other: LedgerData) -> bool:
    """What was called, how deep and what it took; not what full compute would have."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("called", "depth", "macs", "time"))


# The decision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "first"), [({"calls": 0}, 0), ({"calls": 2}, 2), ({}, 6), ({"share": 0.25}, 2)])
def test_the_first_calls_go_to_the_other_network(fields: dict[str, Any], first: int) -> None:
    """A share is rounded to whole calls, halves up."""
    *_, both = denoisers()
    policy = NetworkSwitch("shallow", **fields)
    made = sampler(both, policy)
    info = made.info(made.calls())
    assert [policy.plan(policy.begin(info), call).expert for call in info.calls] == [1] * first + [0] * (6 - first)
    settled = policy.resolved(info)
    assert settled.calls_of(6) == first and settled.share is None
    assert policy.static and policy.others() == ("shallow",)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"calls": 3, "share": 0.5}, "calls=3 and share=0.5 both say"),
        ({"calls": -1}, "calls=-1 must be at least 0"),
        ({"share": 1.5}, r"share=1.5 is outside \[0, 1\]"),
        ({"calls": 7}, r"the first 7 calls, and this run has 6; set calls to 0..6"),
    ],
)
def test_calls_that_there_are_not(fields: dict[str, Any], line: str) -> None:
    *_, both = denoisers()
    with pytest.raises(UsageError, match=line):
        sampler(both, NetworkSwitch("shallow", **fields))


@pytest.mark.parametrize("alone", [Isotropic, TwoDecoders])
def test_it_needs_two_networks_side_by_side(alone: Any) -> None:
    """Two decoders are paths too, but of one network, and by noise level."""
    with pytest.raises(UsageError, match=f"the network of shallow to another one, and there is {alone.__name__} alone"):
        NetworkSwitch("shallow", 1).fits(alone())


def test_two_switches_of_one_composition_name_one_network() -> None:
    one, again, other = NetworkSwitch("a", 1), NetworkSwitch("a", 1), NetworkSwitch("b", 1)
    assert Compose([Full(), one, again]).others() == ("a",)
    assert Compose([Full(), SkipEvery(2)]).others() == Full().others() == ()
    with pytest.raises(UsageError, match=r"different networks \(a and b\); keep one"):
        Compose([one, other]).others()


@pytest.mark.parametrize(("name", "calls"), [("duodiff", 300), ("small_network", None)])
def test_its_files_leave_open_what_nobody_can_know(name: str, calls: int | None) -> None:
    node = named("policy", name)
    with pytest.raises(UsageError, match="other has no value"):
        config.build(node)
    node.other = "runs/x"
    assert config.build(node) == NetworkSwitch("runs/x", calls)


# Alone ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_a_switch_it_is_one_network_bit_for_bit(solver: str, guidance: float) -> None:
    deep, shallow, both = denoisers()
    total = len(sampler(deep, Full(), solver).calls())
    for alone, policies in ((deep, [switched(0), Full()]), (shallow, [switched(total), switched(None)])):
        plain = run(alone, Full(), solver, guidance=guidance)
        for policy in policies:
            found = run(both, policy, solver, guidance=guidance)
            assert torch.equal(found.images, plain.images)
            assert same_costs(found.ledger, plain.ledger)
            assert found.ledger.full_macs.tolist() == [table_of(deep).full(deep.network).macs] * total
    assert not torch.equal(run(deep, Full(), solver).images, run(shallow, Full(), solver).images)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_exactly_so_many_calls_are_the_other_network_s(solver: str, guidance: float) -> None:
    deep, shallow, both = denoisers()
    total = len(sampler(deep, Full(), solver).calls())
    dear, cheap = (table_of(one).full(one.network).macs for one in (deep, shallow))
    branches = 2 if guidance > 1 else 1
    full = run(deep, Full(), solver, guidance=guidance).ledger
    for calls in (1, total // 2, total):
        ledger = run(both, switched(calls), solver, guidance=guidance).ledger
        assert (ledger.depth == SHALLOW).all(axis=(1, 2)).sum() == calls
        assert (ledger.depth[calls:] == DEEP).all() and ledger.called.all()
        assert ledger.macs_per_image == branches * (calls * cheap + (total - calls) * dear)
        # 1 - t_s / T (1 - r), of full compute by the deep network.
        assert 1 - ledger.macs_saved == pytest.approx(1 - calls / total * (1 - cheap / dear))
        numbers = cost_numbers(ledger, full, total)
        assert numbers["macs_saved"] == pytest.approx(ledger.macs_saved)
        assert numbers["full_equivalents"] == pytest.approx(branches * (total - calls * (1 - cheap / dear)))


def test_up_to_the_switch_it_is_the_shallow_run() -> None:
    """x before call t_s is what the shallow network alone has there; what follows is not."""
    deep, shallow, both = denoisers()

    def seen(denoiser: Denoiser, policy: Policy) -> list[Tensor]:
        found: list[Tensor] = []
        made = sampler(denoiser, policy)
        index = torch.arange(4)
        made.generate(index, table_of(denoiser), on_prediction=lambda call, prediction: found.append(prediction.eps))
        return found

    mixed, small, large = seen(both, switched(3)), seen(shallow, Full()), seen(deep, Full())
    assert all(torch.equal(a, b) for a, b in zip(mixed[:3], small[:3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(mixed[3:], small[3:], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(mixed, large, strict=True))


def test_its_cost_is_known_beforehand() -> None:
    deep, shallow, both = denoisers()
    table, network = table_of(both), both.network
    assert table.of_plan(network, StepPlan(expert=1), 0) == table_of(shallow).full(shallow.network)
    assert table.of_plan(network, StepPlan(expert=0), 1) == table_of(deep).full(deep.network)
    assert table.of_plan(network, StepPlan(), 0) == table_of(deep).full(deep.network)
    with pytest.raises(ValueError, match="tells rows apart"):
        table.of_plan(network, StepPlan(expert=torch.zeros(4, dtype=torch.int64)))


def test_the_published_shallow_network() -> None:
    """U-ViT-S/2 of CIFAR-10 with one encoder block, the middle and one decoder block: 22.7 % of the MACs of 13."""
    with torch.device("meta"):
        shallow, deep = (config.build({**named("backbone", "uvit_cifar10"), "depth": depth}) for depth in (2, 12))
    assert (shallow.num_blocks(), deep.num_blocks()) == (3, 13)
    assert sum(parameter.numel() for parameter in shallow.parameters()) == 10_122_848
    costs = [CostTable.measure(one).full(one).macs for one in (shallow, deep)]
    assert costs[0] / costs[1] == pytest.approx(0.227, abs=5e-4)


# With other policies -------------------------------------------------------------------------------------------------

OTHERS: list[Policy] = [
    FixedDepth(2),
    ExitSchedule(depths=[3, 2, 1]),
    SkipEvery(k=2),
    AdaptiveSkip(threshold=1e9, max_skip_steps=1),
    AttentionReuse(last=3, operator="output"),
    DeepFeatureReuse(interval=2),
    UncertaintyExit(threshold=0.6),
]


@pytest.mark.parametrize("policy", OTHERS, ids=lambda policy: policy.name)
def test_without_a_switch_others_do_what_they_did(policy: Policy) -> None:
    """The deep network with heads and the shallow one without: an exit rule finds nothing to ask in the latter."""
    deep, shallow, both = denoisers(heads=True)
    plain, found = run(deep, policy), run(both, switched(0, policy))
    assert torch.equal(found.images, plain.images) and same_costs(found.ledger, plain.ledger)
    alone = Full() if isinstance(policy, UncertaintyExit) else policy
    plain, found = run(shallow, alone), run(both, switched(6, policy))
    assert torch.equal(found.images, plain.images) and same_costs(found.ledger, plain.ledger)


def test_exits_are_asked_in_the_deep_part_alone() -> None:
    _, _, both = denoisers(heads=True)
    ledger = run(both, switched(3, UncertaintyExit(threshold=1.0))).ledger
    nested = Compose([UncertaintyExit(threshold=1.0), Compose([switched(3), Full()])])
    assert same_costs(run(both, nested).ledger, ledger)
    assert ledger.depth[:, 0, 0].tolist() == [SHALLOW] * 3 + [1] * 3
    table, network = table_of(both), both.network
    cheap = table.full(network, 1).macs
    first = table.path_cost(0, 1, blocks=network.paths[0]).macs
    asked = table.entries["uncertainty", 0, 1, "full"].macs
    assert asked > 0 and ("uncertainty", 1, 1, "full") not in table.entries
    assert ledger.macs[:, 0, 0].tolist() == [cheap] * 3 + [first + asked] * 3


def test_skipped_calls_are_nobody_s() -> None:
    """Of the calls that are made, those before t_s are shallow; a held prediction outlives the switch."""
    _, _, both = denoisers()
    ledger = run(both, switched(3, SkipEvery(k=2))).ledger
    assert ledger.depth[:, 0, 0].tolist() == [SHALLOW, 0, SHALLOW, 0, DEEP, DEEP]
    held = run(both, switched(3, SkipEvery(k=4))).ledger
    assert held.depth[:, 0, 0].tolist() == [SHALLOW, SHALLOW, SHALLOW, 0, DEEP, DEEP]


def test_one_depth_is_the_least_of_both() -> None:
    _, _, both = denoisers()
    for depth, seen in ((2, [2] * 6), (4, [SHALLOW] * 3 + [4] * 3)):
        ledger = run(both, switched(3, FixedDepth(depth))).ledger
        assert ledger.depth[:, 0, 0].tolist() == seen


@pytest.mark.parametrize("heads", [(True, False), (False, True), (False, False), (True, True)])
def test_rules_act_on_networks_that_have_heads_where_some_have(heads: tuple[bool, bool]) -> None:
    networks = [network(blocks, 0, own) for blocks, own in zip((DEEP, SHALLOW), heads, strict=True)]
    deep, shallow = (Denoiser(one, VPSDE(VPSDEConfig())) for one in networks)
    info = sampler(side_by_side(deep, "run=deep", {"shallow": shallow}), NetworkSwitch("shallow", 2)).info(())
    for asks in (True, False):
        rule: Any = SimpleNamespace(asks_heads=asks)
        for path, own in enumerate(heads):
            plan = NetworkSwitch("shallow", 2).amend(info, StepPlan(expert=path, exit=rule))
            assert (plan.exit is rule) == (own or not any(heads) or not asks) and plan.expert == path
    assert UncertaintyExit(0.1).rule(info, 0.1).asks_heads and not SaturationExit(0.1).rule(info, 0.1).asks_heads


# What does not go together -------------------------------------------------------------------------------------------


def refused(network: Backbone, other: Backbone, process: Any = None) -> str:
    deep, shallow = Denoiser(network, VPSDE(VPSDEConfig())), Denoiser(other, process or VPSDE(VPSDEConfig()))
    with pytest.raises(UsageError) as caught:
        side_by_side(deep, "run=a", {"b": shallow})
    line = str(caught.value)
    assert line.startswith("run=a and the other network's run b do not go together") and "\n" not in line
    return line


def test_both_sides_are_quoted() -> None:
    one = network(DEEP, 0, False)
    line = refused(one, network(SHALLOW, 0, False), Discrete(DiscreteConfig()))
    assert "VPSDEConfig(" in line and "DiscreteConfig(" in line and line.endswith("train both on one")
    line = refused(one, network(SHALLOW, 0, False), VPSDE(VPSDEConfig(beta_max=19.0)))
    assert "beta_max=20.0" in line and "beta_max=19.0" in line
    plain = UViT(UViTConfig(depth=2, **SHAPE))
    assert "networks.0 has cond_kind=class and networks.1 has none" in refused(one, plain)
    larger = UViT(UViTConfig(depth=2, **{**SHAPE, "image_size": 16}))
    assert "networks.0 has image_size=8 and networks.1 has 16" in refused(plain, larger)
    assert "networks.0 (TwoDecoders) has 2 paths of its own" in refused(TwoDecoders(), TwoDecoders())


def test_a_learned_variance_is_said_by_name() -> None:
    """One that is learned on one side alone would be lost, or taken for noise."""
    learned, plain = LongSkips(), LongSkips()
    plain.out_channels = 1
    assert "they predict a variance and none (2 and 1 channels of 1)" in refused(learned, plain)
    assert "they predict none and a variance (1 and 2 channels of 1)" in refused(plain, learned)


def test_one_run_twice_is_that_run() -> None:
    deep, *_ = denoisers()
    both = side_by_side(deep, "run=a", {"a": deep})
    plain = run(deep, Full())
    found = run(both, NetworkSwitch("a", 3))
    assert torch.equal(found.images, plain.images) and same_costs(found.ledger, plain.ledger)
    assert len(list(both.parameters())) == len(list(deep.parameters())), "nothing is copied"


def test_names_say_when_it_switches() -> None:
    names = [NetworkSwitch("x", 300).name, NetworkSwitch("x", share=0.3).name, NetworkSwitch("x").name]
    assert names == ["DuoDiff, first 300 calls", "DuoDiff, first 30 % of calls", "other network"]
