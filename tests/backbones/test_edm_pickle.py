"""Official EDM checkpoints, written here as the official code writes them, to networks and run folders."""

from __future__ import annotations

import json
import pickle
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from gearshift import api
from gearshift.assembly import build_network
from gearshift.backbones import edm_pickle
from gearshift.backbones.edm_pickle import backbone_of, is_edm, read_edm, write_converted
from gearshift.backbones.initial import load_into
from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_config import UNetConfig
from gearshift.backbones.unet_weights import to_official
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.runtime import config
from gearshift.runtime.errors import RunError, UsageError
from gearshift.verbs import import_weights

CONFIG = UNetConfig(
    image_size=8,
    in_channels=1,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    dropout=0.13,
    augment_dim=9,
)
KWARGS: dict[str, Any] = dict(
    img_resolution=8,
    in_channels=1,
    out_channels=1,
    label_dim=0,
    embedding_type="positional",
    encoder_type="standard",
    decoder_type="standard",
    channel_mult_noise=1,
    resample_filter=[1, 1],
    model_channels=8,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    dropout=0.13,
    augment_dim=9,
)
FOURIER = dict(encoder_type="residual", embedding_type="fourier", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])


# Writing as `torch_utils.persistence` does: a class, its source, and the state of the object -------------------------


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    raise AssertionError("the code of a pickle was run")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@pytest.fixture
def persistence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that such pickles name, for as long as they are written."""
    module = types.ModuleType("torch_utils.persistence")
    vars(module)["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


class Persistent:
    """An object of a class that travels with the pickle."""

    def __init__(self, kind: str, state: dict[str, Any]) -> None:
        self.kind, self.held = kind, state

    def __reduce__(self) -> tuple[Any, ...]:
        meta = dict(type="class", version=6, module_src="raise SystemExit", class_name=self.kind, state=self.held)
        return _reconstruct_persistent_obj, (meta,), None


class Part(nn.Module):
    """A persistent module."""

    kind = "Conv2d"

    def __reduce__(self) -> Any:
        state = {name: value for name, value in vars(self).items() if name != "kind"}
        return Persistent(self.kind, state).__reduce__()


def module_of(state: dict[str, Tensor], kind: str = "Conv2d") -> nn.Module:
    """Modules inside each other, with the parameters and buffers of a flat state dict."""
    part: nn.Module = Part()
    part.kind = kind  # type: ignore[assignment]
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if rest:
            groups.setdefault(first, {})[rest] = value
        elif first in ("resample_filter", "freqs"):
            part.register_buffer(first, value)
        else:
            part.register_parameter(first, nn.Parameter(value))
    for name, inner in groups.items():
        if name in ("enc", "dec"):
            part.add_module(name, nn.ModuleDict({key: module_of(*group) for key, group in _split(inner).items()}))
        else:
            part.add_module(name, module_of(inner))
    part.register_buffer("scratch", torch.ones(1), persistent=False)
    part.register_parameter("none", None)
    return part.requires_grad_(False)


def _split(state: dict[str, Tensor]) -> dict[str, tuple[dict[str, Tensor], str]]:
    groups: dict[str, tuple[dict[str, Tensor], str]] = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, ({}, "UNetBlock"))[0][rest] = value
    return groups


def checkpoint(
    network: UNet,
    wrapper: str = "EDMPrecond",
    inner: str = "SongUNet",
    loss: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """What `training_loop` pickles. `changes`: of the arguments of the inner network, or attributes of the wrapper."""
    arguments = {**KWARGS, **{key: value for key, value in changes.items() if key in {*KWARGS, *edm_pickle._DEFAULTS}}}
    model = module_of(to_official(network.state_dict(), network), inner)
    vars(model).update(_init_args=changes.get("_init_args", ()), _init_kwargs=arguments)
    outer = module_of({}, wrapper)
    outer.add_module("model", model)
    settings = {key: value for key, value in changes.items() if key not in arguments and key != "_init_args"}
    vars(outer).update(img_resolution=8, use_fp16=False, sigma_min=0, sigma_max=float("inf"), sigma_data=0.5)
    vars(outer).update(_init_args=(), _init_kwargs=dict(model_type=inner), **settings)
    return dict(
        ema=outer,
        loss_fn=Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5, **(loss or {})}),
        augment_pipe=Persistent("AugmentPipe", {"p": 0.12, "xflip": 1e8}),
        dataset_kwargs=dict(class_name="training.dataset.ImageFolderDataset", path="x.zip", resolution=8),
    )


def network(seed: int = 0, **changes: Any) -> UNet:
    """Random weights everywhere, with the last convolution as large as the others."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = UNet(replace(CONFIG, **changes))
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


@pytest.fixture
def written(tmp_path: Path, persistence: None) -> Any:
    def write(content: Any, name: str = "network-snapshot-200000.pkl", protocol: int = 4) -> Path:
        file = tmp_path / name
        file.write_bytes(pickle.dumps(content, protocol))
        return file

    return write


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ({}, {}),
        ({"num_classes": 10}, {"label_dim": 10}),
        ({"encoder": "residual", "embedding": "fourier", "resample_filter": (1, 3, 3, 1)}, FOURIER),
    ],
    ids=["ddpmpp", "conditional", "ncsnpp"],
)
def test_state_and_configuration_come_out(written: Any, shape: dict[str, Any], arguments: dict[str, Any]) -> None:
    own = network(**shape)
    found = read_edm(written(checkpoint(own, **arguments)))
    assert equal(found.state, to_official(own.state_dict(), own))
    rebuilt = build_network(OmegaConf.create({"backbone": found.backbone}))
    assert isinstance(rebuilt, UNet) and rebuilt.config == replace(CONFIG, **shape)
    process = config.build(found.process)
    assert type(process).__name__ == "EDM" and process.config.P_mean == -1.2


def test_a_network_begins_from_a_file(written: Any) -> None:
    own, file = network(), written(checkpoint(network()))
    begun = network(seed=1)
    assert not equal(begun.state_dict(), own.state_dict())
    load_into(begun, file, heads=False)
    assert equal(begun.state_dict(), own.state_dict())
    other = UViT(UViTConfig(image_size=8, in_channels=1, patch_size=2, embed_dim=8, depth=2, num_heads=2))
    with pytest.raises(UsageError, match="holds an EDM U-Net and the backbone is UViT"):
        load_into(other, file, heads=False)
    with pytest.raises(RunError, match="does not fit UNet"):
        load_into(network(num_blocks=2), file, heads=False)


@pytest.mark.parametrize(
    ("wrapper", "settings", "expected"),
    [
        (
            "EDMPrecond",
            {"sigma_data": 0.25},
            {"_target_": "gearshift.diffusion.edm.EDM", "sigma_data": 0.25, "P_mean": -1.0, "P_std": 1.2},
        ),
        (
            "VEPrecond",
            {"sigma_min": 0.02, "sigma_max": 100},
            {"_target_": "gearshift.diffusion.edm.VE", "sigma_min": 0.02, "sigma_max": 100.0},
        ),
        (
            "VPPrecond",
            {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "sigma_min": 0.003, "sigma_max": 152.0},
            {"_target_": "gearshift.diffusion.process.VPSDE", "beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5},
        ),
    ],
)
def test_the_process_is_that_of_the_preconditioning(
    written: Any, wrapper: str, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    file = written(checkpoint(network(), wrapper, loss={"P_mean": -1.0}, **settings))
    found = read_edm(file).process
    assert found == expected
    config.build(found)
    if wrapper == "VPPrecond":
        with pytest.raises(RunError, match="feeds 500 - 1 times"):
            read_edm(written(checkpoint(network(), wrapper, **{**settings, "M": 500})))


def test_defaults_of_the_official_constructor() -> None:
    """Arguments that were left out mean what they mean there."""
    node = backbone_of(dict(img_resolution=32, in_channels=3, out_channels=3), "x.pkl")
    built = config.parse({key: value for key, value in node.items() if key != "_target_"}, UNetConfig)
    assert built == UNetConfig(image_size=32, in_channels=3, channel_mult=(1, 2, 2, 2), dropout=0.1)
    with_labels = dict(img_resolution=32, in_channels=3, out_channels=3, label_dim=10, label_dropout=0.1)
    assert backbone_of(with_labels, "x.pkl")["null_class"] is True


def test_converted_files(written: Any, tmp_path: Path) -> None:
    found = read_edm(written(checkpoint(network())))
    file = tmp_path / "edm.safetensors"
    write_converted(file, found)
    again = read_edm(file)
    assert equal(again.state, found.state) and (again.backbone, again.process) == (found.backbone, found.process)
    assert is_edm(file) and is_edm(tmp_path / "network-snapshot-200000.pkl")
    file.write_bytes(b"damaged")
    assert not is_edm(file) and not is_edm(tmp_path / "nowhere.pkl")
    with pytest.raises(RunError, match="no converted EDM network"):
        read_edm(file)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"inner": "DhariwalUNet"}, "holds a 'DhariwalUNet' under EDMPrecond, and only SongUNet"),
        ({"wrapper": "iDDPMPrecond"}, "holds a 'iDDPMPrecond', and of the preconditionings EDMPrecond, VEPrecond"),
        ({"channel_mult_emb": 2}, "channel_mult_emb=2, and the backbone here knows 4"),
        ({"decoder_type": "skip"}, "decoder_type='skip'"),
        ({"encoder_type": "skip"}, "encoder_type='skip'.*knows 'standard' and 'residual'"),
        ({"out_channels": 2}, "out_channels=2"),
        ({"embedding_type": "fourier"}, "channel_mult_noise=1, and the backbone here knows 2"),
        ({"_init_args": (8, 1, 1)}, "does not say by name what it was made with"),
        ({"model_channels": "eight"}, "something else than numbers"),
        ({"channel_mult": [[1], 2]}, "'channel_mult' that is no number, text or list"),
    ],
)
def test_other_networks_are_refused_by_name(written: Any, parts: dict[str, Any], said: str) -> None:
    with pytest.raises(RunError, match=said):
        read_edm(written(checkpoint(network(), **parts)))


def test_other_contents_are_refused(written: Any) -> None:
    with pytest.raises(RunError, match="holds state, step and no network under 'ema'"):
        read_edm(written({"state": 1, "step": 2}))
    with pytest.raises(RunError, match="holds list and no network"):
        read_edm(written([1]))
    with pytest.raises(RunError, match="the unknown argument 'heads'"):
        backbone_of({**KWARGS, "heads": 4}, "x.pkl")
    with pytest.raises(RunError, match="no argument img_resolution"):
        backbone_of({}, "x.pkl")


def test_hostile_pieces_in_an_honest_file_are_refused(written: Any, tmp_path: Path) -> None:
    trap = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.mkdir, (trap,)

    content = checkpoint(network())
    content["ema"].extra = Trap()
    with pytest.raises(RunError, match=r"asks for 'pathlib\.\S*Path\.mkdir'|asks for 'builtins.getattr'"):
        read_edm(written(content))
    assert not trap.exists()


def test_modules_that_are_no_tree_are_refused(written: Any) -> None:
    content = checkpoint(network())
    content["ema"].model.enc["8x8_conv"] = content["ema"].model.map_layer0
    with pytest.raises(RunError, match="stands at two places"):
        read_edm(written(content))
    content = checkpoint(network())
    vars(content["ema"].model)["_parameters"] = {"weight": 3}
    with pytest.raises(RunError, match="weight is a int and no tensor"):
        read_edm(written(content))
    vars(content["ema"].model)["_parameters"] = [1]
    with pytest.raises(RunError, match="_parameters of a 'SongUNet' is not a dictionary"):
        read_edm(written(content))


# Through the command line --------------------------------------------------------------------------------------------


def imported(weights: Path, **settings: Any) -> dict[str, Any]:
    base = {"weights": str(weights), "name": "edm", "runs_dir": str(weights.parent / "runs"), "data": None}
    backbone = {"_target_": "gearshift.backbones.uvit.UViT", "image_size": 32, "in_channels": 3}
    process = {"_target_": "gearshift.diffusion.process.VPSDE"}
    return import_weights.run(
        OmegaConf.create({**base, "backbone": backbone, "process": process, "exits": None, "out": None, **settings})
    )


def test_import_gives_a_run_that_samples(written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = network()
    out = tmp_path / "converted.safetensors"
    answer = imported(written(checkpoint(own)), out=str(out))
    assert "backbone UNet and process EDM" in capsys.readouterr().err
    loaded = api.load(answer["run"], device="cpu")
    assert equal(loaded.denoiser.network.state_dict(), own.state_dict())
    assert answer["params"] == sum(p.numel() for p in own.parameters())
    solver = {"_target_": "gearshift.diffusion.solvers.ddim.DDIM", "steps": 3}
    images = loaded.sample(2, policy="full", solver=solver, chunk=2).images
    assert images.shape == (2, 1, 8, 8) and bool(images.isfinite().all())
    # The converted file says the same, and where it is written does not make another run.
    again = imported(out)
    assert equal(api.load(again["run"], device="cpu").denoiser.network.state_dict(), own.state_dict())
    assert imported(tmp_path / "network-snapshot-200000.pkl")["run"] == answer["run"]
    stored = json.loads(json.dumps(OmegaConf.to_container(OmegaConf.load(Path(answer["run"]) / "config.yaml"))))
    assert stored["backbone"]["augment_dim"] == 9 and stored["process"]["sigma_data"] == 0.5


def test_only_these_files_are_converted(tmp_path: Path) -> None:
    from gearshift.backbones.weights import write_safetensors

    settings = UViTConfig(image_size=8, in_channels=1, patch_size=2, embed_dim=8, depth=2, num_heads=2)
    write_safetensors(tmp_path / "x.safetensors", UViT(settings).state_dict(), {})
    node = {"image_size": 8, "in_channels": 1, "patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2}
    with pytest.raises(UsageError, match=r"out=y\.safetensors is for EDM checkpoints"):
        imported(
            tmp_path / "x.safetensors",
            out="y.safetensors",
            backbone={"_target_": "gearshift.backbones.uvit.UViT", **node},
        )
