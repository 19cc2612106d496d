"""Several whole networks as one backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.separate import SeparateConfig, SeparateNetworks
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.execution.cost import CostTable
from gearshift.execution.executor import execute
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import Rows, Stream
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError

from ..contract import TOLERANCE, Subject, build, plain_loop
from ..toys import Isotropic, LongSkips, TwoDecoders

NODE = {
    "_target_": "gearshift.backbones.uvit.UViT",
    "image_size": 8,
    "in_channels": 1,
    "patch_size": 2,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}


def node(networks: list[Any], boundaries: list[float]) -> dict[str, Any]:
    target = "gearshift.backbones.separate.SeparateNetworks"
    return {"_target_": target, "networks": networks, "boundaries": boundaries}


def test_mixed_batch_is_each_network_alone() -> None:
    expert = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    subjects = [Subject.of("separate", path, rows=8) for path in (0, 1)]
    outputs = subjects[0].run(StepPlan(expert=expert))
    alone = [plain_loop(subjects[path], index=torch.tensor([row]))[0] for row, path in enumerate(expert.tolist())]
    torch.testing.assert_close(outputs.prediction, torch.stack(alone), **TOLERANCE)


def test_one_network_is_that_network_bit_for_bit() -> None:
    network, alone = build("separate"), Subject.of("separate", 1)
    assert isinstance(network, SeparateNetworks)
    own = network.network(1)
    direct = execute(own, own.embed(alone.x, alone.time, alone.cond), StepPlan()).prediction
    assert torch.equal(alone.run(StepPlan(expert=1)).prediction, direct)


def test_levels_decide_and_not_the_first_of_the_batch() -> None:
    network, process = build("separate"), VPSDE(VPSDEConfig())
    denoiser = Denoiser(network, process)
    subject = Subject.of("separate", rows=6)
    times = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.95])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert subject.cond is not None
    one = denoiser.rows(subject.x, times, subject.cond).prediction
    other = denoiser.rows(subject.x[order], times[order], subject.cond[order]).prediction
    torch.testing.assert_close(other, one[order], **TOLERANCE)
    assert network.route(process.log_snr(times)).tolist() == [0, 1, 0, 1, 1, 1]


def test_gradients_stay_in_the_network_that_ran() -> None:
    network = SeparateNetworks(SeparateConfig([Isotropic(), Isotropic(depth=2)], (1.0,)))
    x, cond = torch.randn(3, 2, 8, 8), torch.arange(3)
    execute(network, network.embed(x, torch.rand(3), cond), StepPlan(expert=1)).prediction.square().mean().backward()
    assert all(p.grad is None for p in network.networks[0].parameters())
    assert all(p.grad is not None for p in network.networks[1].parameters())


class Augmented(Isotropic):
    """Adds the mean of the augmentation labels to the time features."""

    augment_dim = 2

    def embed_augmented(self, x: Tensor, time: Tensor, cond: Tensor | None, augment: Tensor) -> Stream:
        stream = self.embed(x, time, cond)
        stream.cond["vector"] = stream.cond["vector"] + augment.mean(1, keepdim=True)
        return stream


class SkipsAtOnce(LongSkips):
    """Embeds straight to a pushed skip, as U-Nets do with their input convolution."""

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        stream = super().embed(x, time, cond)
        stream.push()
        stream.hidden = stream.hidden * 2
        return stream


def test_augmentation_labels_reach_each_network() -> None:
    torch.manual_seed(0)
    networks: list[Any] = [Augmented(), Augmented(depth=3)]
    both = SeparateNetworks(SeparateConfig(networks, (1.0,)))
    assert both.augment_dim == 2
    x, time, cond, augment = torch.randn(4, 2, 8, 8), torch.rand(4), torch.arange(4) % 3, torch.randn(4, 2)
    expert = torch.tensor([1, 0, 0, 1])
    found = execute(both, both.embed_augmented(x, time, cond, augment), StepPlan(expert=expert)).prediction
    for row, path in enumerate(expert.tolist()):
        own, k = networks[path], slice(row, row + 1)
        alone = execute(own, own.embed_augmented(x[k], time[k], cond[k], augment[k]), StepPlan()).prediction
        torch.testing.assert_close(found[k], alone, **TOLERANCE)
    plain = SeparateNetworks(SeparateConfig([Isotropic()]))
    with pytest.raises(UsageError, match="cannot be told of augmentations"):
        plain.embed_augmented(x, time, cond, augment)


def test_skips_of_an_embedding_keep_their_rows() -> None:
    torch.manual_seed(0)
    networks: list[Any] = [SkipsAtOnce(), SkipsAtOnce(half=1)]
    both = SeparateNetworks(SeparateConfig(networks, (1.0,)))
    x, time = torch.randn(4, 1, 6, 6), torch.rand(4)
    stream = both.embed(x, time, None)
    entered = both.enter(stream.take(torch.tensor([1, 3])), 1)
    assert [skip.rows.host().tolist() for skip in entered.skips] == [[1, 3]]
    assert isinstance(entered.rows, Rows) and entered.rows.total == 4


def test_exits_around_all_of_it() -> None:
    inner = SeparateNetworks(SeparateConfig([Isotropic(), Isotropic(3)], (1.0,)))
    network = EarlyExit(ExitsConfig(uncertainty="token_mean"), inner)
    x, cond = torch.randn(4, 2, 8, 8), torch.arange(4) % 3
    plan = StepPlan(expert=torch.tensor([0, 1, 1, 0]), depth=2)
    outputs = execute(network, network.embed(x, torch.rand(4), cond), plan)
    assert outputs.depth.tolist() == [2] * 4
    assert network.exits(0) == (1, 2, 3, 4) and network.exits(1) == (1, 2, 3)


def test_from_a_configuration() -> None:
    network = config.build(node([NODE, {**NODE, "depth": 4}, NODE], [1.0, 3.0]))
    assert [len(path) for path in network.paths] == [3, 5, 3]
    assert network.boundaries == (1.0, 3.0)
    assert network.name == "3 separate UViT"
    assert {name.split(".")[1] for name in network.state_dict()} == {"0", "1", "2"}
    alone = config.build(NODE)
    assert {name.removeprefix("networks.0.") for name in network.state_dict() if name.startswith("networks.0.")} == set(
        alone.state_dict()
    )
    small = SeparateNetworks(network.config.shrunk())
    assert small.paths == network.paths
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("networks", "boundaries", "line"),
    [
        ([], [], "names no network"),
        ([NODE, NODE], [], r"make 1 stages and networks names 2"),
        ([NODE, NODE], [2.0, 1.0], "give them strictly ascending"),
        ([NODE, {**NODE, "image_size": 16}], [1.0], "networks.0 has image_size=8 and networks.1 has 16"),
        ([NODE, {**NODE, "num_classes": 3}], [1.0], "networks.0 has cond_kind=none and networks.1 has class"),
        ([NODE, {**NODE, "widht": 3}], [1.0], r"networks.1: widht: unknown key"),
        ([NODE, "uvit"], [1.0], "networks.1='uvit' is no backbone"),
        ([NODE, {"_target_": "gearshift.policies.FixedDepth", "depth": 1}], [1.0], "FixedDepth, which is no backbone"),
    ],
)
def test_what_does_not_go_together(networks: list[Any], boundaries: list[float], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        config.build(node(networks, boundaries))


# Networks that plans choose between ----------------------------------------------------------------------------------


def test_without_levels_the_plan_says_and_else_it_is_the_first() -> None:
    torch.manual_seed(0)
    networks: list[Any] = [Isotropic(), Isotropic(depth=2)]
    both = SeparateNetworks(SeparateConfig(networks, None))
    assert both.by_plan and both.boundaries == () and not build("separate").by_plan
    assert both.route(torch.tensor([-1e9, 0.0, 1e9], dtype=torch.float64)).tolist() == [0, 0, 0]
    x, cond = torch.randn(3, 2, 8, 8), torch.arange(3)
    times = torch.tensor([0.1, 0.5, 0.9])
    process = VPSDE(VPSDEConfig())
    for plan, own in ((StepPlan(), networks[0]), (StepPlan(expert=0), networks[0]), (StepPlan(expert=1), networks[1])):
        found = Denoiser(both, process).rows(x, times, cond, plan).prediction
        assert torch.equal(found, Denoiser(own, process).rows(x, times, cond).prediction)


def test_heads_and_exits_are_each_network_s_own() -> None:
    torch.manual_seed(0)
    deep = EarlyExit(ExitsConfig(uncertainty="token_mean", depths=[2]), Isotropic())
    shallow = Isotropic(depth=2)
    both = SeparateNetworks(SeparateConfig([shallow, deep], None))
    assert both.exits(0) == both.readable(0) == (1, 2) and both.exits(1) == (2, 4)
    assert both.has_uncertainty and not SeparateNetworks(SeparateConfig([shallow], None)).has_uncertainty
    assert [both.predicts_error(2, path) for path in (0, 1)] == [False, True]
    hidden, time = torch.randn(3, 16, 16), torch.rand(3)
    assert torch.equal(both.uncertainty(hidden, time, 2, 1), deep.uncertainty(hidden, time, 2))
    assert torch.equal(both.mean_uncertainty(hidden, time, 4, 1), deep.mean_uncertainty(hidden, time, 4))
    [found] = both.uncertainties([hidden], time, [2], 1)
    assert torch.equal(found, deep.uncertainty(hidden, time, 2))
    table, alone = CostTable.measure(both), CostTable.measure(deep)
    heads = {key: cost for key, cost in table.entries.items() if key[0] == "uncertainty"}
    assert heads == {
        ("uncertainty", 1, depth, "full"): alone.entries["uncertainty", 0, depth, "full"] for depth in (2, 4)
    }


def test_one_network_within_another_is_entered_too() -> None:
    torch.manual_seed(0)
    inner = SeparateNetworks(SeparateConfig([Isotropic()]))
    both = SeparateNetworks(SeparateConfig([Isotropic(depth=2), inner], None))
    x, time, cond = torch.randn(3, 2, 8, 8), torch.rand(3), torch.arange(3)
    found = execute(both, both.embed(x, time, cond), StepPlan(expert=1)).prediction
    assert torch.equal(found, execute(inner, inner.embed(x, time, cond), StepPlan()).prediction)


def test_texts_of_two_shapes_do_not_go_together() -> None:
    shape: Any = dict(image_size=8, in_channels=1, patch_size=4, embed_dim=8, depth=2, num_heads=2, context_dim=5)
    networks: list[Any] = [UViT(UViTConfig(context_tokens=tokens, **shape)) for tokens in (3, 4)]
    with pytest.raises(UsageError, match=r"networks.0 takes text of \(3, 5\) and networks.1 of \(4, 5\)"):
        SeparateNetworks(SeparateConfig(networks, None))
    assert SeparateNetworks(SeparateConfig([networks[0]] * 2, None)).cond_kind == "text"


def test_levels_can_be_left_out_of_a_configuration() -> None:
    network = config.build({**node([NODE, {**NODE, "depth": 4}], []), "boundaries": None})
    assert network.by_plan and [len(path) for path in network.paths] == [3, 5]
    assert network.config.shrunk().boundaries is None


def test_a_network_of_several_paths_is_not_one_of_several() -> None:
    two: list[Backbone] = [TwoDecoders(), TwoDecoders()]
    with pytest.raises(UsageError, match="has 2 paths of its own"):
        SeparateNetworks(SeparateConfig(list(two), (1.0,)))
