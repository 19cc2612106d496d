"""U-Net: official weights both ways, and through the import of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gearshift.backbones.initial import load_into
from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_weights import from_official, to_official
from gearshift.runtime.errors import RunError

from .reference_unet import unet
from .unets import PYRAMID, STAGED, STANDARD, drawn, inputs, run


def test_there_and_back() -> None:
    for config in (STANDARD, PYRAMID, replace(STANDARD, decoders=(64,))):
        network = drawn(config)
        state = network.state_dict()
        official = to_official(state, network)
        assert list(from_official(official, network)) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in from_official(official, network).items())
        assert {name.split(".")[0] for name in official} <= {"enc", "dec", "map_noise", "map_layer0", "map_layer1"}
        moved = [name for name, tensor in official.items() if name in state and not torch.equal(tensor, state[name])]
        assert all(".qkv." in name for name in moved)


def test_rows_of_qkv() -> None:
    """Officially q, k and v of a channel stand side by side."""
    network = UNet(replace(STANDARD, model_channels=8))
    name = "enc.4x4_block0.qkv.bias"
    ours = torch.arange(48.0)
    theirs = to_official({name: ours}, network)[name]
    assert theirs[:6].tolist() == [0, 16, 32, 1, 17, 33]
    assert torch.equal(from_official({name: theirs}, network)[name], ours)
    with pytest.raises(RunError, match="has 47 rows"):
        from_official({name: theirs[1:]}, network)


def test_wrapper_and_one_stage() -> None:
    network = drawn(STANDARD)
    wrapped = {f"model.{name}": tensor for name, tensor in to_official(network.state_dict(), network).items()}
    converted = from_official(wrapped, network)
    assert all(torch.equal(tensor, converted[name]) for name, tensor in network.state_dict().items())
    staged = UNet(replace(STANDARD, decoders=(64,))).double()
    staged.load_state_dict(from_official(wrapped, staged))
    x, time = inputs(STANDARD)
    assert torch.equal(run(staged, x, time).prediction, run(network, x, time).prediction)
    with pytest.raises(RunError, match="one decoder, and this network has 3"):
        to_official({}, UNet(STAGED))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_official_files_load(tmp_path: Path, suffix: str) -> None:
    """The loaded network gives what the definition gives with the file's own weights."""
    source = drawn(PYRAMID)
    official = {name: tensor.contiguous() for name, tensor in to_official(source.state_dict(), source).items()}
    file = tmp_path / f"official{suffix}"
    if suffix == ".pth":
        torch.save(official, file)
    else:
        safetensors.torch.save_file(official, file)
    network = UNet(PYRAMID).double()
    load_into(network, file, heads=False)
    x, time = inputs(PYRAMID)
    with torch.no_grad():
        torch.testing.assert_close(run(network, x, time).prediction, unet(official, x, time), rtol=0, atol=1e-10)
    assert network.enc["8x8_block0"].conv0.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RunError, match="does not fit UNet"):
        load_into(UNet(STANDARD), file, heads=False)
