"""Weights from elsewhere into plain networks and networks with exits: what goes where, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.initial import load_into
from gearshift.backbones.unet import UNet
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.backbones.weights import export_safetensors
from gearshift.runtime.errors import RunError, UsageError, UserError

from .unets import STANDARD

SHAPE = dict(image_size=8, in_channels=3, patch_size=2, embed_dim=16, depth=2, num_heads=2)
State = dict[str, Tensor]


def plain(seed: int, **shape: int) -> UViT:
    torch.manual_seed(seed)
    network = UViT(UViTConfig(**{**SHAPE, **shape}))  # type: ignore[arg-type]
    for parameter in network.parameters():  # norms and biases too, so that every copy can be told
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def exits(seed: int, **config: Any) -> EarlyExit:
    return EarlyExit(ExitsConfig(**config), plain(seed))


def state(network: torch.nn.Module) -> State:
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def part(of: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in of.items() if name.startswith(prefix)}


def official(folder: Path, network: UViT, heads: bool = False) -> Path:
    """The file that the official code writes; AdaDiff's adds a certainty head after each of the three blocks."""
    content = state(network)
    if heads:
        for block in range(3):
            content[f"lte_classifer.{block}.lte.weight"] = torch.randn(12, 16)
            content[f"lte_classifer.{block}.lte.bias"] = torch.randn(12)
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def exported(folder: Path, network: Backbone) -> Path:
    path = folder / "model.safetensors"
    export_safetensors(path, network.state_dict(), "backbone: {}\n")
    return path


def refused(kind: type[UserError], network: Backbone, source: Path | str, *, heads: bool) -> str:
    """The one line a file is refused with."""
    with pytest.raises(kind) as caught:
        load_into(network, source, heads=heads)
    line = str(caught.value)
    assert "\n" not in line
    assert str(source) in line
    return line


# Official files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [True, False])
def test_official_file_into_the_plain_network(tmp_path: Path, heads: bool) -> None:
    theirs, ours = plain(1), plain(2)
    load_into(ours, official(tmp_path, theirs), heads=heads)
    assert equal(state(ours), state(theirs))


def test_official_folder_into_exits(tmp_path: Path) -> None:
    theirs, ours = plain(1), exits(2)
    official(tmp_path, theirs).rename(tmp_path / "nnet_ema.pth")
    load_into(ours, tmp_path, heads=False)
    assert equal(state(ours.backbone), state(theirs))


@pytest.mark.parametrize("uncertainty", ["pixel_map", "token_mean"])
def test_fine_tuning_keeps_the_heads_that_were_drawn(tmp_path: Path, uncertainty: str) -> None:
    theirs, ours = plain(1), exits(2, uncertainty=uncertainty)
    drawn = part(state(ours), "uncertainty_heads.")
    assert len(drawn) == 6
    load_into(ours, official(tmp_path, theirs), heads=False)
    assert equal(part(state(ours), "uncertainty_heads."), drawn)
    assert equal(state(ours.backbone), state(theirs))


@pytest.mark.parametrize("kind", ["official", "exported"])
def test_heads_of_their_own_start_as_the_loaded_readout(tmp_path: Path, kind: str) -> None:
    """Not as copies of the readout that was drawn before the file was read."""
    theirs, ours = plain(1), exits(2, head="per_exit")
    drawn = state(ours)
    load_into(ours, official(tmp_path, theirs) if kind == "official" else exported(tmp_path, theirs), heads=False)
    readout = state(theirs.readout_modules(3))
    for depth in (1, 2):
        head = part(state(ours), f"exit_heads.0_{depth}.")
        assert equal(head, readout)
        assert not any(torch.equal(drawn[f"exit_heads.0_{depth}.{name}"], value) for name, value in head.items())
    hidden = torch.randn(2, 17, 16)
    for depth in (1, 2, 3):
        assert torch.equal(ours.readout(hidden, {}, depth), theirs.readout(hidden, {}, depth))
    with torch.no_grad():  # copies, not the same tensors
        ours.exit_heads["0_1"].get_submodule("decoder_pred").weight.zero_()  # type: ignore[operator]
    assert equal(state(ours.backbone), state(theirs))


@pytest.mark.parametrize("heads", [True, False])
def test_adadiff_file_with_heads(tmp_path: Path, heads: bool) -> None:
    """u = 1 - sigmoid(Wx + b) = sigmoid(-Wx - b); the head after block i stands at depth i + 1."""
    theirs, ours = plain(1), exits(2)
    file = official(tmp_path, theirs, heads=True)
    load_into(ours, file, heads=heads)
    content = torch.load(file, weights_only=True)
    assert equal(state(ours.backbone), state(theirs))
    for block in range(3):
        linear = ours.uncertainty_heads[f"0_{block + 1}"].linear
        assert torch.equal(linear.weight, -content[f"lte_classifer.{block}.lte.weight"])
        assert torch.equal(linear.bias, -content[f"lte_classifer.{block}.lte.bias"])


def test_fine_tuning_the_plain_network_of_an_adadiff_file(tmp_path: Path) -> None:
    theirs, ours = plain(1), plain(2)
    load_into(ours, official(tmp_path, theirs, heads=True), heads=False)
    assert equal(state(ours), state(theirs))


def test_adadiff_heads_have_no_place_in_the_plain_network(tmp_path: Path) -> None:
    ours = plain(2)
    line = refused(UsageError, ours, official(tmp_path, plain(1), heads=True), heads=True)
    assert "holds 6 tensors of AdaDiff's uncertainty heads" in line
    assert "exits=none has no place for them; use exits=adadiff" in line


@pytest.mark.parametrize("config", [{"uncertainty": "token_mean"}, {"time_embed": "concat"}, {"depths": [2]}])
def test_adadiff_heads_of_another_kind(tmp_path: Path, config: dict[str, Any]) -> None:
    ours = exits(2, **config)
    drawn = part(state(ours), "uncertainty_heads.")
    line = refused(RunError, ours, official(tmp_path, plain(1), heads=True), heads=True)
    assert "does not fit EarlyExit" in line
    assert "uncertainty_heads.0_1.linear.weight" in line
    assert equal(part(state(ours), "uncertainty_heads."), drawn)


def test_a_finished_model_needs_its_heads(tmp_path: Path) -> None:
    for source in (official(tmp_path, plain(1)), exported(tmp_path, plain(1))):
        line = refused(UsageError, exits(2), source, heads=True)
        assert line == f"{source} holds no uncertainty heads; use exits=none"
        ours = exits(2, uncertainty="none")  # without heads there is nothing to miss
        load_into(ours, source, heads=True)
        assert equal(state(ours.backbone), state(plain(1)))


def test_heads_that_nothing_can_begin_are_no_finished_model(tmp_path: Path) -> None:
    """The levels of a U-Net have no readout that could be copied; training begins with new heads."""
    theirs = UNet(STANDARD)
    source = exported(tmp_path, theirs)
    ours = EarlyExit(ExitsConfig(head="per_exit", uncertainty="none"), UNet(STANDARD))
    assert len(ours.exits()) > 1
    before = part(state(ours), "exit_heads.")
    line = refused(UsageError, ours, source, heads=True)
    assert line.startswith(
        f"{source} holds no exit heads, and at the depths {list(ours.exits()[:-1])} UNet has no readout"
    )
    load_into(ours, source, heads=False)
    assert equal(state(ours.backbone), state(theirs)) and equal(part(state(ours), "exit_heads."), before)


# Exported files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("config", [{}, {"head": "per_exit", "uncertainty": "token_mean", "time_embed": "concat"}])
def test_export_of_exits_into_the_same(tmp_path: Path, config: dict[str, str], heads: bool) -> None:
    theirs, ours = exits(1, **config), exits(2, **config)
    with torch.no_grad():  # heads that have gone their own way stay apart
        for parameter in (*theirs.exit_heads.parameters(), *theirs.uncertainty_heads.parameters()):
            parameter.normal_()
    assert not equal(state(ours), state(theirs))
    load_into(ours, exported(tmp_path, theirs), heads=heads)
    assert equal(state(ours), state(theirs))


def test_export_of_the_plain_network(tmp_path: Path) -> None:
    theirs = plain(1)
    file = exported(tmp_path, theirs)
    for heads in (True, False):
        ours = plain(2)
        load_into(ours, file, heads=heads)
        assert equal(state(ours), state(theirs))
    headed = exits(2)
    drawn = part(state(headed), "uncertainty_heads.")
    load_into(headed, file, heads=False)
    assert equal(state(headed.backbone), state(theirs))
    assert equal(part(state(headed), "uncertainty_heads."), drawn)


def test_export_of_exits_into_the_plain_network(tmp_path: Path) -> None:
    theirs, ours = exits(1, head="per_exit"), plain(2)
    file = exported(tmp_path, theirs)
    line = refused(UsageError, ours, file, heads=True)
    assert line == f"{file} holds exits, and exits=none has no place for them; use the exits it was made with"
    assert equal(state(ours), state(plain(2)))
    load_into(ours, file, heads=False)
    assert equal(state(ours), state(theirs.backbone))


@pytest.mark.parametrize(
    ("made", "used", "fault"),
    [
        ({}, {"head": "per_exit"}, r"12 missing: exit_heads\.0_1\."),
        ({"head": "per_exit"}, {}, r"12 unexpected: exit_heads\.0_1\."),
        ({}, {"uncertainty": "token_mean"}, r"0_1\.linear\.weight \(file \[12, 16\], network \[1, 16\]\)"),
        ({}, {"depths": [2]}, r"2 unexpected: uncertainty_heads\.0_1\."),
    ],
)
def test_export_of_other_exits(tmp_path: Path, made: dict[str, Any], used: dict[str, Any], fault: str) -> None:
    ours = exits(2, **used)
    before = state(ours)
    line = refused(RunError, ours, exported(tmp_path, exits(1, **made)), heads=False)
    assert re.search(fault, line), line
    assert equal(state(ours), before)


@pytest.mark.parametrize("headed", [False, True])
@pytest.mark.parametrize("kind", ["official", "exported"])
def test_weights_of_another_shape(tmp_path: Path, kind: str, headed: bool) -> None:
    theirs, ours = plain(1, embed_dim=32), exits(2) if headed else plain(2)
    before = state(ours)
    file = official(tmp_path, theirs) if kind == "official" else exported(tmp_path, theirs)
    line = refused(RunError, ours, file, heads=False)
    assert "pos_embed (file [1, 17, 32], network [1, 17, 16])" in line
    assert "does not fit UViT" in line
    assert equal(state(ours), before)


@pytest.mark.parametrize("network", [plain(2), exits(2)], ids=["plain", "exits"])
def test_files_that_are_not_there_or_broken(tmp_path: Path, network: Backbone) -> None:
    before = state(network)
    line = refused(UsageError, network, str(tmp_path / "nothing.pth"), heads=False)
    assert "there is no such file or folder; name a weights file" in line
    (tmp_path / "empty").mkdir()
    assert "it has no nnet_ema.pth, but nothing" in refused(UsageError, network, tmp_path / "empty", heads=False)
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        assert "corrupt" in refused(RunError, network, tmp_path / name, heads=False)
    assert equal(state(network), before)
