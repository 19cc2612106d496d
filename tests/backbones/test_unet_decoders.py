"""U-Net with a decoder per stage: one stage is the plain network; rows are routed, run and trained apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_config import UNetConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.execution.plan import StepPlan

from .unets import PYRAMID, STAGED, STANDARD, drawn, inputs, run

SHARED = replace(PYRAMID, decoders=(12, 8, 4), boundaries=(1.0, 5.0), middle="shared")
KINDS = pytest.mark.parametrize("config", [STAGED, SHARED], ids=["middle-in-decoder", "middle-shared"])


@pytest.mark.parametrize("middle", ["decoder", "shared"])
@pytest.mark.parametrize("base", [STANDARD, PYRAMID], ids=["standard", "pyramid"])
def test_one_stage_is_the_plain_network(base: UNetConfig, middle: str) -> None:
    """Same draws, same names but for the decoder's, same bits."""
    base = replace(base, middle=middle)
    plain, staged = drawn(base), drawn(replace(base, decoders=(base.model_channels,)), seed=1)
    renamed = {name.replace("dec.", "decs.0.", 1): tensor for name, tensor in plain.state_dict().items()}
    assert any(not torch.equal(tensor, renamed[name]) for name, tensor in staged.state_dict().items())
    staged.load_state_dict(renamed)
    x, time = inputs(base)
    assert torch.equal(run(staged, x, time).prediction, run(plain, x, time).prediction)
    assert staged.paths == plain.paths
    with torch.random.fork_rng():
        torch.manual_seed(3)
        fresh = UNet(base).state_dict()
        torch.manual_seed(3)
        other = UNet(replace(base, decoders=(base.model_channels,))).state_dict()
    assert all(torch.equal(tensor, other[name.replace("dec.", "decs.0.", 1)]) for name, tensor in fresh.items())


@KINDS
def test_paths_share_the_encoder_only(config: UNetConfig) -> None:
    network = UNet(config)
    names = {id(module): name for name, module in network.named_modules()}
    for stage, path in enumerate(network.paths):
        own = [names[id(network.blocks[block])] for block in path]
        shared = [name for name in own if name.startswith("enc.")]
        assert own[: len(shared)] == shared
        assert all(name.startswith(f"decs.{stage}.") for name in own[len(shared) :])
        middle = [name for name in own if "_in" in name]
        assert [name.split(".")[0] for name in middle] == (["enc"] if config.middle == "shared" else ["decs"]) * 2
    assert network.boundaries == config.boundaries
    assert network.route(-2 * torch.tensor([0.5, 1.0, 1.1, 5.0, 6.0], dtype=torch.float64).log()).tolist() == [
        *(0, 0, 1, 1, 2)
    ]


@KINDS
def test_mixed_batches(config: UNetConfig) -> None:
    """Rows are what they are alone, wherever they stand: nothing looks at the first one."""
    network = drawn(config)
    x, time = inputs(config, rows=7)
    expert = torch.tensor([2, 0, 1, 0, 2, 1, 0])
    with torch.no_grad():
        mixed = run(network, x, time, plan=StepPlan(expert=expert)).prediction
        for row, stage in enumerate(expert.tolist()):
            alone = run(network, x[row : row + 1], time[row : row + 1], plan=StepPlan(expert=stage)).prediction
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-12)
            other = run(network, x[row : row + 1], time[row : row + 1], plan=StepPlan(expert=(stage + 1) % 3))
            assert (other.prediction - alone).abs().max() > 1e-2
        order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
        moved = run(network, x[order], time[order], plan=StepPlan(expert=expert[order])).prediction
        torch.testing.assert_close(moved, mixed[order], rtol=0, atol=1e-12)
        changed = x.clone()
        changed[0] += 1
        after = run(network, changed, time, plan=StepPlan(expert=expert.index_fill(0, torch.tensor([0]), 1))).prediction
        torch.testing.assert_close(after[1:], mixed[1:], rtol=0, atol=1e-12)
        assert (after[0] - mixed[0]).abs().max() > 1e-2


def test_the_callers_time_decides() -> None:
    """Through the denoiser: each row's own log-SNR, in float64."""
    config = replace(STAGED, boundaries=(2.51027, 7.40458))
    network = drawn(config, torch.float32)
    denoiser = Denoiser(network, VPSDE(VPSDEConfig()))
    x, _ = inputs(config, rows=6, dtype=torch.float32)
    time = torch.tensor([0.6309, 0.4420, 0.4421, 0.9, 0.001, 0.6308], dtype=torch.float64)
    with torch.no_grad():
        outputs = denoiser.rows(x, time, None)
        stages = torch.tensor([2, 0, 1, 2, 0, 1])
        wanted = denoiser.rows(x, time, None, StepPlan(expert=stages)).prediction
    assert torch.equal(outputs.prediction, wanted)
    readouts = {event.path: event.rows.host().tolist() for event in outputs.trace if event.kind == "readout"}
    assert readouts == {0: [1, 4], 1: [2, 5], 2: [0, 3]}


@KINDS
def test_a_stage_trains_its_own_decoder(config: UNetConfig) -> None:
    """A batch of one stage leaves no gradient in the other decoders, and every parameter of its own path has one."""
    network = drawn(config)
    x, time = inputs(config)
    for stage in range(3):
        network.zero_grad(set_to_none=True)
        run(network, x, time, plan=StepPlan(expert=stage)).prediction.square().mean().backward()
        others = [p for k in range(3) if k != stage for p in network.decoder(k).parameters()]
        assert all(p.grad is None for p in others)
        foreign = {id(p) for p in others}
        mine = [p for p in network.parameters() if id(p) not in foreign]
        assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in mine)
