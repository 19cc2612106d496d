"""Dropped decoder blocks: which ones, what remains of them, and what that costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers import DDIM, DDIMConfig
from gearshift.execution.cost import CostTable
from gearshift.execution.executor import execute
from gearshift.execution.plan import FULL, StepPlan
from gearshift.policies import BypassSchedule, Compose, ExitSchedule, RunInfo
from gearshift.runtime.config import build as build_config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir

from ..contract import build

CALLS = DDIM(DDIMConfig(steps=10)).calls(Discrete(DiscreteConfig()))


def uvit(depth: int = 6) -> UViT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UViT(UViTConfig(image_size=8, in_channels=2, patch_size=2, embed_dim=16, depth=depth, num_heads=2))
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def run(network) -> RunInfo:  # type: ignore[no-untyped-def]
    return RunInfo(CALLS, network, batch=2, branches=1)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 8, 8, generator=generator), torch.tensor([5.0, 400.0, 999.0])


def predict(network: UViT, plan: StepPlan) -> Tensor:
    x, time = inputs()
    with torch.no_grad():
        return execute(network, network.embed(x, time, None), plan).prediction


def merge_only(network: UViT, dropped: int) -> Tensor:
    """The network written out, with the last `dropped` decoder blocks reduced to their first line."""
    x, time = inputs()
    with torch.no_grad():
        hidden, skips = network.embed(x, time, None).hidden, []
        for block in network.in_blocks:
            hidden = block(hidden, {})
            skips.append(hidden)
        hidden = network.mid_block(hidden, {})
        for position, block in enumerate(network.out_blocks):
            if position < len(network.out_blocks) - dropped:
                hidden = block(hidden, {}, skips.pop())
            else:
                assert block.skip_linear is not None
                hidden = block.skip_linear(torch.cat([hidden, skips.pop()], dim=-1))
        assert not skips
        return network.readout(hidden, {}, 2 * len(network.in_blocks) + 1)


@pytest.mark.parametrize("dropped", [0, 1, 2, 3])
def test_a_dropped_decoder_block_is_its_skip_merge(dropped: int) -> None:
    network = uvit()
    policy = BypassSchedule(dropped=[dropped])
    policy.check(run(network))
    plan = policy.plan(run(network), CALLS[0])
    assert sorted(plan.bypass) == list(range(7 - dropped, 7)) and plan.depth is None
    result = predict(network, plan)
    torch.testing.assert_close(result, merge_only(network, dropped), rtol=1e-6, atol=1e-6)
    assert torch.equal(result, predict(network, FULL)) == (dropped == 0)


def test_every_skip_is_consumed_once_when_all_are_dropped(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    network = uvit()
    seen: list[int] = []
    pushed = {}
    for index, block in enumerate(network.in_blocks):
        block.register_forward_hook(lambda module, args, out, index=index: pushed.setdefault(index, out))
    bypass = UViT.bypass

    def watched(self, block, hidden, cond, skip):  # type: ignore[no-untyped-def]
        seen.extend(index for index, out in pushed.items() if torch.equal(out, skip))
        return bypass(self, block, hidden, cond, skip)

    monkeypatch.setattr(UViT, "bypass", watched)
    for block in network.out_blocks:
        block.attn.register_forward_hook(lambda *_: pytest.fail("a dropped block ran its attention"))
    predict(network, BypassSchedule(dropped=[3]).plan(run(network), CALLS[0]))
    assert seen == [2, 1, 0]


def test_numbers_along_a_run_and_on_other_networks() -> None:
    policy = BypassSchedule(dropped=[0, 0, 1, 2, 2, 3, 4, 4, 5, 5], of=6)
    small, large = uvit(6), uvit(12)
    wanted = {large: [0, 0, 1, 2, 2, 3, 4, 4, 5, 5], small: [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]}
    for network, counts in wanted.items():
        policy.check(run(network))
        plans = [policy.plan(run(network), call) for call in reversed(CALLS)]
        assert [len(plan.bypass) for plan in plans] == counts
        decoder = sorted(network.pops)
        for plan, count in zip(plans, counts, strict=True):
            assert plan.bypass == set(decoder[len(decoder) - count :])
    assert policy.plan(run(large), replace(CALLS[0], training_index=200.0)).bypass == {12}
    assert policy.plan(run(large), replace(CALLS[0], training_index=199.9)).bypass == frozenset()


def test_shipped_schedule() -> None:
    policy = build_config(OmegaConf.load(Path(conf_dir()) / "policy" / "ase_uvit_bypass.yaml"))  # type: ignore[arg-type]
    assert sum(policy.dropped) / 10 == pytest.approx(2.6) and policy.of == 6
    assert policy.name == "bypass (mean 2.6 decoder blocks)"


def test_celeba_costs() -> None:
    """U-ViT-S on CelebA 64: 12.20 GMACs in the blocks, 7.2 % of the whole for each dropped decoder block."""
    with torch.device("meta"):
        network = UViT(UViTConfig(image_size=64, in_channels=3, patch_size=4, embed_dim=512, depth=12, num_heads=8))
    table = CostTable.measure(network)
    full = table.full(network).macs

    def cost(block: int, mode: str) -> float:
        return table.entries["block", 0, block, mode].macs

    blocks = sum(cost(block, "full") for block in range(13))
    assert blocks == pytest.approx(12.20e9, rel=1e-3)
    assert cost(12, "full") == pytest.approx(0.876e9 + 0.135e9, rel=1e-2)
    assert cost(12, "bypass") == pytest.approx(0.135e9, rel=1e-2)
    assert (cost(12, "full") - cost(12, "bypass")) / full == pytest.approx(0.072, abs=1e-3)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(UsageError, match="Isotropic has none that merge a long skip; take policy ExitSchedule"):
        BypassSchedule(dropped=[1]).check(run(build("isotropic")))
    with pytest.raises(UsageError, match="drops 4 decoder blocks, but UViT has 3"):
        BypassSchedule(dropped=[0, 4]).check(run(uvit()))
    for arguments, message in (
        (dict(), "drops nothing"),
        (dict(dropped=[-1]), "at least 0"),
        (dict(dropped=[7], of=6), "at most the 6 blocks"),
        (dict(dropped=[1, 2], edges=[]), "policy BypassSchedule: 2 bins need 1 edges"),
    ):
        with pytest.raises(UsageError, match=message):
            BypassSchedule(**arguments)


def test_composed_with_an_exit_schedule() -> None:
    network = uvit()
    both = Compose([ExitSchedule(depths=[7, 5]), BypassSchedule(dropped=[0, 3])])
    both.check(run(network))
    plan = both.plan(both.begin(run(network)), CALLS[0])
    assert plan.depth == 5 and plan.bypass == {4, 5, 6}
