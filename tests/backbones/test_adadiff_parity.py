"""AdaDiff's official model, by what is published of it: parameters, inner outputs, costs of every exit, guidance."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from gearshift.assembly import build_network, named
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.execution.cost import CostTable
from gearshift.execution.plan import StepPlan
from gearshift.policies import RunInfo, UncertaintyExit

HEADS = {
    "uvit_cifar10": 80_028,
    "uvit_celeba64": 320_112,
    "uvit_mscoco": 106_704,
    "uvit_imagenet256_l": 344_400,
}
# GFLOPs (2 * MACs, attention products included): block of encoder or middle, block of the decoder, readout, uncertainty
# head, and the exits after the encoder, after the middle block, and at full depth.
COSTS = {
    "uvit_cifar10": (1.752, 2.022, 0.0033, 0.0031, 10.52, 12.27, 24.40),
    "uvit_celeba64": (1.752, 2.022, 0.0133, 0.0126, 10.54, 12.29, 24.42),
    "uvit_imagenet64_m": (3.857, 4.465, 0.020, 0.019, 30.9, 34.8, 70.5),
    "uvit_imagenet256_l": (6.765, 7.848, 0.0087, 0.0084, 67.7, 74.4, 152.9),
    "uvit_mscoco": (2.330, 2.680, 0.006, 0.004, 14.05, 16.38, 32.46),
}


def official(backbone: str) -> EarlyExit:
    """A published size with AdaDiff's heads, without weights."""
    with torch.device("meta"):
        nodes = {"backbone": named("backbone", backbone), "exits": named("exits", "adadiff")}
        network = build_network(OmegaConf.create(nodes))
    assert isinstance(network, EarlyExit)
    return network


def small(**config: object) -> EarlyExit:
    torch.manual_seed(0)
    shape = dict(image_size=4, in_channels=1, patch_size=2, embed_dim=8, depth=4, num_heads=2)
    network = EarlyExit(
        ExitsConfig(**config),  # type: ignore[arg-type]
        UViT(UViTConfig(num_classes=3, null_class=True, **shape)),  # type: ignore[arg-type]
    )
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("backbone", HEADS)
def test_parameters_of_the_heads(backbone: str) -> None:
    network = official(backbone)
    assert sum(p.numel() for p in network.uncertainty_heads.parameters()) == HEADS[backbone]
    assert len(network.uncertainty_heads) == len(network.blocks)


@pytest.mark.parametrize("backbone", COSTS)
def test_costs_of_every_exit(backbone: str) -> None:
    """To 1 % of what the figures say, which are rounded."""
    network = official(backbone)
    table, half = CostTable.measure(network), len(network.blocks) // 2
    encoder, decoder, head, uncertainty, after_encoder, after_middle, full = COSTS[backbone]
    for name, wanted, cost in (
        ("encoder", encoder, table.entries["block", 0, 0, "full"]),
        ("middle", encoder, table.entries["block", 0, half, "full"]),
        ("decoder", decoder, table.entries["block", 0, half + 1, "full"]),
        ("head", head, table.entries["readout", 0, 1, "full"]),
        ("uncertainty", uncertainty, table.entries["uncertainty", 0, 1, "full"]),
        ("after the encoder", after_encoder, table.path_cost(0, half, blocks=network.paths[0])),
        ("after the middle", after_middle, table.path_cost(0, half + 1, blocks=network.paths[0])),
        ("full", full, table.full(network)),
    ):
        digits = len(str(wanted).partition(".")[2])
        assert abs(cost.flops / 1e9 - wanted) <= 0.01 * wanted + 0.5 * 10**-digits, name


def test_flops_of_the_published_model_with_and_without_attention_products() -> None:
    network = official("uvit_cifar10")
    full = CostTable.measure(network).full(network)
    assert 2 * full.linear / 1e9 == pytest.approx(22.64, abs=0.01)
    assert full.flops / 1e9 == pytest.approx(24.40, abs=0.01)


def test_a_plain_file_lacks_the_heads_and_nothing_else() -> None:
    network = official("uvit_cifar10")
    plain = {f"backbone.{name}" for name in network.backbone.state_dict()}
    missing = set(network.state_dict()) - plain
    assert not plain - set(network.state_dict())
    assert len(missing) == 2 * 13
    assert missing == {f"uncertainty_heads.0_{d}.linear.{kind}" for d in range(1, 14) for kind in ("weight", "bias")}


def test_inner_outputs() -> None:
    """depth + 1 predictions and maps of the image's shape; the last prediction is the model's."""
    network = small()
    denoiser = Denoiser(network, Discrete(DiscreteConfig("linear")))
    x, cond = torch.randn(3, 1, 4, 4), torch.tensor([0, 2, 1])
    outputs = denoiser.rows(x, 300.0, cond, StepPlan(taps=network.exits()))
    assert sorted(outputs.taps) == sorted(outputs.uncertainty) == [1, 2, 3, 4, 5]
    assert {tuple(t.shape) for t in (*outputs.taps.values(), *outputs.uncertainty.values())} == {(3, 1, 4, 4)}
    plain = Denoiser(network.backbone, denoiser.process).rows(x, 300.0, cond)
    assert torch.equal(outputs.taps[5], plain.prediction) and torch.equal(outputs.prediction, plain.prediction)


def test_a_hard_sample_holds_the_batch_back_only_in_official_mode() -> None:
    network = small(uncertainty="token_mean")
    for depth in range(1, 6):
        torch.nn.init.zeros_(network.uncertainty_heads[f"0_{depth}"].linear.weight)
        torch.nn.init.constant_(network.uncertainty_heads[f"0_{depth}"].linear.bias, 0.0)
    # Only the head of depth 2 tells rows apart.
    torch.nn.init.normal_(network.uncertainty_heads["0_2"].linear.weight, std=3.0)
    denoiser = Denoiser(network, Discrete(DiscreteConfig("linear")))
    x, cond = torch.randn(16, 1, 4, 4), torch.arange(16) % 3
    u = denoiser.rows(x, 300.0, cond, StepPlan(taps=network.exits())).uncertainty[2]
    easy, hard = int(u.argmin()), int(u.argmax())
    threshold = float(u[easy]) * 0.75 + float(u[hard]) * 0.25
    for statistic in ("batch", "sample"):
        policy = UncertaintyExit(threshold, statistic=statistic, depths=[2])

        def leaves(rows: list[int], policy: UncertaintyExit = policy) -> int:
            run = RunInfo((), network, len(rows), 1)
            plan = policy.plan(policy.begin(run), None)  # type: ignore[arg-type]
            return int(denoiser.rows(x[rows], 300.0, cond[rows], plan).depth[0])

        assert leaves([easy]) == 2
        assert leaves([easy, hard]) == (5 if statistic == "batch" else 2)


def test_guidance_exits_are_apart_and_none_is_called_without_guidance() -> None:
    network = small(uncertainty="token_mean")
    for head in network.uncertainty_heads.values():
        torch.nn.init.normal_(head.linear.weight, std=2.0)
    denoiser = Denoiser(network, Discrete(DiscreteConfig("linear")))
    x, cond = torch.randn(12, 1, 4, 4), torch.arange(12) % 3

    def predicted(guidance: float, threshold: float) -> torch.Tensor:
        policy = UncertaintyExit(threshold)
        run = RunInfo((), network, 12, denoiser.num_branches(guidance))
        plan = policy.plan(policy.begin(run), None)  # type: ignore[arg-type]
        return denoiser.predict(x, 300.0, cond, plan=plan, guidance=guidance).depth

    apart = 0
    for threshold in torch.linspace(0.2, 0.8, 13).tolist():
        depth = predicted(2.0, threshold)
        assert depth.shape == (24,)
        apart += int((depth[:12] != depth[12:]).sum())
        assert torch.equal(predicted(1.0, threshold), depth[:12])  # w = 1, the papers' s = 0: one pass
    assert apart > 0


def test_the_shallow_network_of_duodiff() -> None:
    """For CIFAR-10: three blocks, 10,122,848 parameters."""
    with torch.device("meta"):
        node = named("backbone", "uvit_cifar10")
        node.depth = 2
        network = build_network(OmegaConf.create({"backbone": node}))
    assert sum(p.numel() for p in network.parameters()) == 10_122_848 and len(network.blocks) == 3
