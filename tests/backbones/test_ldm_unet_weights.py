"""LDM weights both ways: the order of attention's rows, whole checkpoints, files that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gearshift.backbones.ldm_unet import LdmUNet, LdmUNetConfig
from gearshift.backbones.ldm_unet_weights import from_official, to_official
from gearshift.backbones.weights import import_official
from gearshift.runtime import keys
from gearshift.runtime.errors import RunError

SMALL = LdmUNetConfig(
    image_size=8,
    in_channels=1,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsamplings=(2,),
    head_dim=8,
    num_groups=8,
)


def random_state(network: LdmUNet, seed: int = 1) -> dict[str, Tensor]:
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    return {
        name: keys.normal(seed, "weights", torch.tensor([place]), 0, shape)[0]
        for place, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, decoders=(16, 8), boundaries=(1.0,))], ids=["one", "two"])
def test_round_trip_is_bit_exact(config: LdmUNetConfig) -> None:
    network = LdmUNet(config)
    state = random_state(network)
    official = to_official(state, 8)
    assert {name for name in state if not torch.equal(state[name], official[name])} == {
        name for name in state if ".qkv." in name
    }
    for there_and_back in (from_official(official, 8), to_official(from_official(state, 8), 8)):
        assert list(there_and_back) == list(state)
        assert all(torch.equal(there_and_back[name], state[name]) for name in state)
    network.load_state_dict(network.from_official(official))
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(torch.equal(tensor, official[name]) for name, tensor in network.to_official().items())


def test_rows_by_hand() -> None:
    """Two heads of two channels: q, k, v of head 0, then of head 1, become q of both, k of both, v of both."""
    rows = torch.arange(12.0)
    state = {"a.qkv.bias": rows, "a.qkv.weight": rows[:, None, None].expand(12, 4, 1), "a.norm.bias": rows[:4]}
    converted = from_official(state, 2)
    order = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert converted["a.qkv.bias"].tolist() == order
    assert converted["a.qkv.weight"][:, 3, 0].tolist() == order
    assert torch.equal(converted["a.norm.bias"], rows[:4])


def checkpoint(state: dict[str, Tensor], averaged: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    whole["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
    whole["betas"] = torch.zeros(1000)
    if averaged is not None:
        whole |= {f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in averaged.items()}
        whole |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return whole


def test_whole_checkpoint() -> None:
    network = LdmUNet(SMALL)
    live, averaged = random_state(network, 1), random_state(network, 2)
    for whole, wanted in ((checkpoint(live), live), (checkpoint(live, averaged), averaged)):
        network.load_state_dict(network.from_official(whole))
        official = network.to_official()
        assert all(torch.equal(official[name], tensor) for name, tensor in wanted.items())


def test_bad_files() -> None:
    network = LdmUNet(SMALL)
    whole = checkpoint(random_state(network), random_state(network))
    del whole["model_ema.diffusion_modelout2bias"]
    with pytest.raises(RunError, match=r"averaged weights, but not of model\.diffusion_model\.out\.2\.bias"):
        network.from_official(whole)
    with pytest.raises(RunError, match=r"qkv.weight has 96 rows, which is no multiple of 3 x 5"):
        from_official({"middle_block.1.qkv.weight": torch.zeros(96, 32, 1)}, 5)


@pytest.mark.parametrize("whole", [False, True])
def test_an_official_file_is_put_in_our_order(tmp_path: Path, whole: bool) -> None:
    """The shapes are the same either way, so rows left in their order would load, and be wrong."""
    state = random_state(LdmUNet(SMALL))
    official = to_official(state, 8)
    if whole:
        official = {f"model.diffusion_model.{name}": tensor for name, tensor in official.items()}
    torch.save({"state_dict": official} if whole else official, tmp_path / "model.ckpt")
    network = LdmUNet(SMALL)
    assert import_official(tmp_path / "model.ckpt", network) == {}
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
