"""Weights in and out: official files, AdaDiff's heads, safetensors with the configuration inside, and broken files."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor

from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.backbones.weights import (
    export_safetensors,
    import_official,
    load_strict,
    read_safetensors,
    uncertainty_heads,
)
from gearshift.execution.executor import execute
from gearshift.execution.plan import FULL
from gearshift.runtime import config as configuration
from gearshift.runtime.errors import RunError, UsageError

CONFIG = UViTConfig(image_size=8, in_channels=3, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=4)


def network(seed: int, config: UViTConfig = CONFIG) -> UViT:
    torch.manual_seed(seed)
    return UViT(config)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def save_pth(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def save_old_pth(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "weights.pth", _use_new_zipfile_serialization=False)
    return folder / "weights.pth"


def save_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_training_folder(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({name: torch.zeros_like(tensor) for name, tensor in state.items()}, folder / "nnet.pth")
    torch.save(state, folder / "nnet_ema.pth")
    torch.save(75000, folder / "step.pth")
    return folder


@pytest.mark.parametrize("save", [save_pth, save_old_pth, save_safetensors, save_training_folder])
def test_official_files_load(save: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path) -> None:
    theirs, ours = network(1).state_dict(), network(2)
    assert not equal(theirs, ours.state_dict())
    assert import_official(save(theirs, tmp_path), ours) == {}
    assert equal(theirs, ours.state_dict())


def test_loading_onto_the_meta_device_fills_it(tmp_path: Path) -> None:
    theirs = network(1).state_dict()
    with torch.device("meta"):
        ours = UViT(CONFIG)
    import_official(save_pth(theirs, tmp_path), ours)
    assert equal(theirs, ours.state_dict())
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_loading_keeps_the_precision_of_the_network(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in network(1).state_dict().items()}
    ours = network(2)
    import_official(save_pth(half, tmp_path), ours)
    assert ours.pos_embed.dtype == torch.float32
    assert torch.equal(ours.pos_embed, half["pos_embed"].float())


def test_adadiff_heads_become_uncertainty_heads(tmp_path: Path) -> None:
    """c = sigmoid(Wx + b) after block i in the file is u = 1 - c at depth i + 1 here."""
    theirs = network(1).state_dict()
    for block in range(3):
        theirs[f"lte_classifer.{block}.lte.weight"] = torch.randn(12, 16)
        theirs[f"lte_classifer.{block}.lte.bias"] = torch.randn(12)
    ours = EarlyExit(ExitsConfig(), network(2))
    heads = import_official(save_pth(theirs, tmp_path), ours.backbone)
    assert len(heads) == 6
    translated = uncertainty_heads(heads)
    load_strict(ours, {**ours.state_dict(), **translated}, "heads")
    assert set(translated) == {name for name in ours.state_dict() if name.startswith("uncertainty_heads.")}
    hidden = torch.randn(2, 18, 16)
    for block in range(3):
        weight, bias = (theirs[f"lte_classifer.{block}.lte.{kind}"] for kind in ("weight", "bias"))
        certainty = torch.sigmoid(hidden[:, 2:] @ weight.T + bias)
        got = ours.uncertainty(hidden, torch.zeros(2), block + 1)
        assert torch.allclose(got, 1 - ours.assemble(certainty, 3, block + 1), atol=1e-6)


def test_unknown_and_lone_heads_are_refused() -> None:
    with pytest.raises(RunError, match=r"lte_classifer\.0\.fc\.weight is no AdaDiff head"):
        uncertainty_heads({"lte_classifer.0.fc.weight": torch.zeros(1)})
    with pytest.raises(RunError, match=r"weight and bias; 1 alone: lte_classifer\.1\.lte\.weight"):
        uncertainty_heads({"lte_classifer.1.lte.weight": torch.zeros(1, 1)})


def test_misfits_name_both_sides_and_change_nothing(tmp_path: Path) -> None:
    theirs = network(1).state_dict()
    del theirs["mid_block.norm1.weight"], theirs["norm.bias"]
    theirs["label_emb.weight"] = torch.zeros(5, 16)
    theirs.update({f"foreign.{i}": torch.zeros(1) for i in range(5)})
    ours = network(2)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(RunError) as caught:
        import_official(save_pth(theirs, tmp_path), ours)
    message = str(caught.value)
    assert "\n" not in message
    assert "2 missing: mid_block.norm1.weight, norm.bias;" in message
    assert "5 unexpected: foreign.0, foreign.1, foreign.2 and 2 more;" in message
    assert "1 of another shape: label_emb.weight (file [5, 16], network [4, 16])" in message
    assert equal(before, ours.state_dict())


def truncated(folder: Path, suffix: str) -> Path:
    path = (save_pth if suffix == "pth" else save_safetensors)(network(1).state_dict(), folder)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def noise(folder: Path, suffix: str) -> Path:
    path = folder / f"weights.{suffix}"
    path.write_bytes(b"this is not a checkpoint")
    return path


def empty(folder: Path, suffix: str) -> Path:
    path = folder / f"weights.{suffix}"
    path.touch()
    return path


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("make", [truncated, noise, empty])
def test_broken_files(make: Callable[[Path, str], Path], suffix: str, tmp_path: Path) -> None:
    path = make(tmp_path, suffix)
    with pytest.raises(RunError, match=r"weights\.\w+ is corrupt") as caught:
        import_official(path, network(2))
    assert "\n" not in str(caught.value)


class Trap:
    """What a hostile file would hold: unpickling it runs code."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.victim),)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"pos_embed": Trap(victim)}, tmp_path / "weights.pth")
    with pytest.raises(RunError, match="more than tensors"):
        import_official(tmp_path / "weights.pth", network(2))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(victim)))
    with pytest.raises(RunError, match="more than tensors"):
        import_official(tmp_path / "plain.pth", network(2))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"pos_embed": torch.zeros(1)}, "step": 3}, r"model \(dict\), step \(int\)"),
        ({}, "it is empty"),
        (torch.zeros(2), "holds a Tensor, not a state dict"),
    ],
)
def test_files_of_another_kind(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(RunError, match=message):
        import_official(tmp_path / "weights.pth", network(2))


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*nothing\.pth"):
        import_official(tmp_path / "nothing.pth", network(2))
    (tmp_path / "step.pth").touch()
    with pytest.raises(UsageError, match=r"no nnet_ema\.pth, but step\.pth"):
        import_official(tmp_path, network(2))
    with pytest.raises(UsageError, match="there is no file"):
        read_safetensors(tmp_path / "nothing.safetensors")


# Safetensors ---------------------------------------------------------------------------------------------------------


def test_export_round_trip(tmp_path: Path) -> None:
    source = network(1)
    text = "backbone:\n  name: übung  # any text\n"
    path = tmp_path / "model.safetensors"
    export_safetensors(path, source.state_dict(), text, {"step": "75000"})
    state, config, metadata = read_safetensors(path)
    assert equal(dict(sorted(source.state_dict().items())), dict(sorted(state.items())))
    assert (config, metadata) == (text, {"step": "75000"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    other = network(2)
    import_official(path, other)  # an exported file is an official one too
    assert equal(source.state_dict(), other.state_dict())


def test_export_of_views_aliases_and_half_precision(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "alias": base, "transposed": base.T, "row": base[1], "half": base.bfloat16(), "none": base[:0]}
    export_safetensors(tmp_path / "x.safetensors", state, "")
    read, config, _ = read_safetensors(tmp_path / "x.safetensors")
    assert config == ""
    assert set(read) == set(state)
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_export_over_a_file_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(path, {"a": torch.ones(2)}, "first")
    with pytest.raises(RunError, match="could not write"):
        export_safetensors(tmp_path / "no" / "folder" / "x.safetensors", {"a": torch.ones(2)}, "x")
    with pytest.raises(ValueError, match="gearshift_config"):
        export_safetensors(path, {"a": torch.zeros(2)}, "second", {"gearshift_config": "x"})
    state, config, _ = read_safetensors(path)
    assert config == "first"
    assert torch.equal(state["a"], torch.ones(2))


def test_safetensors_without_configuration(tmp_path: Path) -> None:
    path = save_safetensors(network(1).state_dict(), tmp_path)
    with pytest.raises(RunError, match="no configuration") as caught:
        read_safetensors(path)
    assert "import it as official weights" in str(caught.value)


# Released files ------------------------------------------------------------------------------------------------------

RELEASED = {
    "cifar10_uvit_small": "uvit_cifar10",
    "celeba64_uvit_small": "uvit_celeba64",
    "imagenet64_uvit_mid": "uvit_imagenet64_m",
    "imagenet64_uvit_large": "uvit_imagenet64_l",
    "imagenet256_uvit_large": "uvit_imagenet256_l",
    "imagenet256_uvit_huge": "uvit_imagenet256_h",
    "imagenet512_uvit_large": "uvit_imagenet512_l",
    "imagenet512_uvit_huge": "uvit_imagenet512_h",
    "mscoco_uvit_small": "uvit_mscoco",
    "mscoco_uvit_small_deep": "uvit_mscoco_deep",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_released_weights(name: str) -> None:
    """At the last time an image is almost pure noise, so a trained network returns its input: ε-MSE well below 0.05."""
    folder = os.environ.get("GEARSHIFT_UVIT_WEIGHTS")
    if not folder:
        pytest.skip("GEARSHIFT_UVIT_WEIGHTS names no folder with the released .pth files")
    path = Path(folder) / f"{name}.pth"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    conf = Path(__file__).parents[2] / "conf" / "backbone"
    with torch.device("meta"):
        ours = configuration.build(OmegaConf.load(conf / f"{RELEASED[name]}.yaml"))
    assert import_official(path, ours) == {}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, ours.in_channels, ours.image_size, ours.image_size, generator=generator)
    with torch.no_grad():
        stream = ours.embed(noise, torch.full((2,), 999.0), ours.example_cond(2, "cpu"))
        predicted = execute(ours, stream, FULL).prediction
    assert (predicted - noise).square().mean() < 0.05
