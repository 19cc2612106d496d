"""DiT weights from elsewhere: official files, checkpoints of the official training script, diffusers, both ways."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor

from gearshift import api
from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.backbones.dit_weights import diffusers_config, from_diffusers, is_diffusers, to_diffusers
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.initial import load_into
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.backbones.weights import import_official, write_safetensors
from gearshift.runtime import config as configuration
from gearshift.runtime.errors import RunError, UsageError
from gearshift.verbs import export_weights, import_weights

CONFIG = DiTConfig(
    image_size=8, in_channels=4, patch_size=2, embed_dim=32, depth=3, num_heads=4, num_classes=10, null_class=True
)
CONF = Path(__file__).parents[2] / "conf" / "backbone"
State = dict[str, Tensor]


def network(seed: int, config: DiTConfig = CONFIG) -> DiT:
    torch.manual_seed(seed)
    made = DiT(config).eval()
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def equal(a: State, b: State) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# Official files ------------------------------------------------------------------------------------------------------


def bare(state: State, folder: Path) -> Path:
    torch.save(state, folder / "DiT-XL-2-256x256.pt")
    return folder / "DiT-XL-2-256x256.pt"


def trained(state: State, folder: Path) -> Path:
    """What the training script writes: raw weights, average, optimiser and command line."""
    source = DiT(CONFIG)
    optimizer = torch.optim.AdamW(source.parameters())
    stream = source.embed(torch.randn(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    stream.hidden.sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, num_classes=1000, global_seed=0, ckpt_every=50_000)
    raw = {name: torch.zeros_like(value) for name, value in state.items()}
    content = {"model": raw, "ema": state, "opt": optimizer.state_dict(), "args": args}
    torch.save(content, folder / "0400000.pt")
    return folder / "0400000.pt"


def trained_long_ago(state: State, folder: Path) -> Path:
    content = {"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


@pytest.mark.parametrize("save", [bare, trained, trained_long_ago])
def test_official_files_load_strictly(save: Callable[[State, Path], Path], tmp_path: Path) -> None:
    theirs, ours = network(1).state_dict(), network(2)
    path = save(theirs, tmp_path)
    assert not equal(theirs, ours.state_dict())
    assert import_official(path, ours) == {}
    assert equal(theirs, ours.state_dict())
    path.write_bytes(b"")  # nothing of the network still lies in the file
    assert equal(theirs, ours.state_dict())
    assert not ours.pos_embed.requires_grad


def test_missing_and_foreign_names_are_refused(tmp_path: Path) -> None:
    state = network(1).state_dict()
    del state["pos_embed"]
    with pytest.raises(RunError, match="1 missing: pos_embed"):
        import_official(bare(state, tmp_path), network(2))
    state = {**network(1).state_dict(), "blocks.3.attn.qkv.bias": torch.zeros(96)}
    with pytest.raises(RunError, match=r"1 unexpected: blocks\.3\.attn\.qkv\.bias"):
        import_official(bare(state, tmp_path), network(2))


class Trap:
    """What a hostile file would hold: unpickling it runs code."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.victim),)


def test_a_command_line_cannot_carry_code(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "bad.pt"
    torch.save({"ema": network(1).state_dict(), "args": argparse.Namespace(lr=Trap(victim))}, file)
    with pytest.raises(RunError, match="more than tensors"):
        import_official(file, network(2))
    assert not victim.exists()


def test_a_training_file_without_an_average_is_refused(tmp_path: Path) -> None:
    torch.save({"model": network(1).state_dict(), "args": argparse.Namespace()}, tmp_path / "x.pt")
    with pytest.raises(RunError, match=r"model \(OrderedDict\), args \(Namespace\)"):
        import_official(tmp_path / "x.pt", network(2))


def test_exits_around_an_official_file(tmp_path: Path) -> None:
    theirs = network(1)
    ours = EarlyExit(ExitsConfig(head="per_exit", uncertainty="none"), network(2))
    load_into(ours, bare(theirs.state_dict(), tmp_path), heads=True)
    assert equal(ours.backbone.state_dict(), theirs.state_dict())
    for head in ours.exit_heads.values():
        assert equal(head.state_dict(), theirs.final_layer.state_dict())


# The layout of diffusers ---------------------------------------------------------------------------------------------


def test_round_trip_is_bit_exact() -> None:
    state = network(1).state_dict()
    theirs = to_diffusers(state)
    assert is_diffusers(theirs) and not is_diffusers(state)
    assert equal(from_diffusers(theirs, 16), state)
    assert equal(to_diffusers(from_diffusers(theirs, 16)), theirs)


@pytest.mark.parametrize("name", ["dit_s_2", "dit_b_4", "dit_l_8", "dit_xl_2", "dit_xl_2_512"])
def test_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        ours = configuration.build(OmegaConf.load(CONF / f"{name}.yaml"))
        settings = {key: value for key, value in diffusers_config(ours).items() if key != "_class_name"}
        theirs = DiTTransformer2DModel(**settings).state_dict()
    state = {n: v for n, v in ours.state_dict().items() if n != "pos_embed"}
    converted = to_diffusers(state)
    assert {n: v.shape for n, v in converted.items()} == {n: v.shape for n, v in theirs.items()}


def patched_diffusers(ours: DiT) -> Any:
    """diffusers' own module with the weights of `ours`; the divisor of its frequencies set to 128."""
    from diffusers import DiTTransformer2DModel

    settings = {key: value for key, value in diffusers_config(ours).items() if key != "_class_name"}
    theirs = DiTTransformer2DModel(**settings).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict()), strict=True)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs


def test_patched_diffusers_gives_the_same_outputs() -> None:
    ours = network(1)
    theirs = patched_diffusers(ours)
    x = torch.randn(5, 4, 8, 8)
    time, labels = torch.tensor([0.0, 1.0, 123.0, 500.0, 999.0]), torch.tensor([0, 9, 10, 3, 4])
    with torch.no_grad():
        stream = ours.embed(x, time, labels)
        hidden = stream.hidden
        for block in ours.blocks:
            hidden = block(hidden, stream.cond)
        own = ours.readout(hidden, stream.cond, 3)
        out = theirs(x, timestep=time, class_labels=labels).sample
        torch.testing.assert_close(own, out, rtol=1e-5, atol=1e-5)
        # Without the patch, far from the data, they are not the same network: it is no oracle.
        theirs.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 1
        assert (theirs(x, timestep=time, class_labels=labels).sample - own)[1:].abs().max() > 1e-4
    assert own.std() > 0.1


def test_embedders_trained_apart_are_refused() -> None:
    theirs = to_diffusers(network(1).state_dict())
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    theirs[name] = theirs[name] + 1
    with pytest.raises(RunError, match=r"transformer_blocks\.2\.norm1.* differ: the embedders"):
        from_diffusers(theirs, 16)


def test_other_positions_have_no_place() -> None:
    state = network(1).state_dict()
    state["pos_embed"] = state["pos_embed"].flip(1)
    with pytest.raises(RunError, match="pos_embed is not the sin-cos table"):
        to_diffusers(state)
    with pytest.raises(RunError, match=r"lte_classifer\.0\.lte\.weight is no weight of a DiT"):
        to_diffusers({"lte_classifer.0.lte.weight": torch.zeros(1)})


def test_incomplete_files_of_diffusers(tmp_path: Path) -> None:
    theirs = to_diffusers(network(1).state_dict())
    del theirs["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(RunError, match=r"transformer_blocks\.1\.attn1\.to_k\.weight is missing"):
        from_diffusers(theirs, 16)
    theirs = to_diffusers(network(1).state_dict())
    theirs["transformer_blocks.0.attn2.to_q.weight"] = theirs.pop("proj_out_2.bias")
    path = tmp_path / "x.safetensors"
    write_safetensors(path, theirs, {})
    with pytest.raises(RunError) as caught:
        import_official(path, network(2))
    assert "1 missing: final_layer.linear.bias" in str(caught.value)
    assert "1 unexpected: transformer_blocks.0.attn2.to_q.weight" in str(caught.value)


@pytest.mark.parametrize("place", ["", "transformer"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_folders_of_diffusers(place: str, suffix: str, tmp_path: Path) -> None:
    theirs, folder = network(1).state_dict(), tmp_path / "model" / place
    folder.mkdir(parents=True)
    file = folder / f"diffusion_pytorch_model.{suffix}"
    if suffix == "bin":
        torch.save(to_diffusers(theirs), file)
    else:
        write_safetensors(file, to_diffusers(theirs), {"format": "pt"})
    for source in (tmp_path / "model", file):
        ours = network(2)
        load_into(ours, source, heads=True)
        assert equal(ours.state_dict(), theirs)
    with torch.device("meta"):
        empty = DiT(CONFIG)
    load_into(empty, file, heads=True)
    assert equal(empty.state_dict(), theirs)


def test_a_dit_of_diffusers_is_no_u_vit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, to_diffusers(network(1).state_dict()), {})
    other = UViT(UViTConfig(image_size=8, in_channels=4, patch_size=2, embed_dim=32, depth=2, num_heads=4))
    with pytest.raises(RunError, match="does not fit UViT"):
        import_official(path, other)


@pytest.mark.parametrize("change", [{"mlp_ratio": 2.0}, {"null_class": False}])
def test_what_diffusers_cannot_hold(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="the DiT of diffusers has classes, a null class and mlp_ratio=4"):
        diffusers_config(network(1, replace(CONFIG, **change)))


# Through the command line --------------------------------------------------------------------------------------------

BACKBONE = {
    "_target_": "gearshift.backbones.dit.DiT",
    **{name: getattr(CONFIG, name) for name in ("image_size", "in_channels", "patch_size", "embed_dim", "depth")},
    **{name: getattr(CONFIG, name) for name in ("num_heads", "num_classes", "null_class")},
}


def imported(weights: Path, folder: Path, name: str, exits: dict[str, Any] | None = None) -> str:
    process = {"_target_": "gearshift.diffusion.process.Discrete"}
    settings = {"weights": str(weights), "name": name, "runs_dir": str(folder / "runs"), "data": None}
    cfg = OmegaConf.create({**settings, "backbone": BACKBONE, "process": process, "exits": exits})
    return str(import_weights.run(cfg)["run"])


def exported(run: str, **settings: Any) -> Path:
    base = {"run": run, "out": None, "ema": True, "dtype": "fp32", "layout": "diffusers"}
    return Path(export_weights.run(OmegaConf.create({**base, **settings}))["file"])


def test_import_sample_export_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An official-shaped file of random weights: strict import, samples, the layout of diffusers, and back."""
    state = network(1).state_dict()
    run = imported(trained(state, tmp_path), tmp_path, "official")
    loaded = api.load(run, device="cpu")
    assert equal(loaded.denoiser.network.state_dict(), state)
    samples = loaded.sample(
        3, policy="full", solver="ddpm", guidance=1.5, guidance_channels=3, guidance_interval=(-3.0, 1.0), chunk=3
    )
    assert samples.images.shape == (3, 4, 8, 8) and samples.labels is not None
    assert 250 < samples.ledger.calls_per_image < 500

    file = exported(run)
    assert file == Path(run) / "diffusers" / "diffusion_pytorch_model.safetensors"
    assert "other frequencies" in capsys.readouterr().err
    assert equal(safetensors.torch.load_file(file), to_diffusers(state))
    assert json.loads((file.parent / "config.json").read_text())["num_embeds_ada_norm"] == 10
    again = imported(file.parent, tmp_path, "back")
    assert equal(api.load(again, device="cpu").denoiser.network.state_dict(), state)
    half = safetensors.torch.load_file(exported(run, out=str(tmp_path / "half"), dtype="bf16"))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


def test_diffusers_loads_what_was_exported(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    ours = network(1)
    file = exported(imported(bare(ours.state_dict(), tmp_path), tmp_path, "official"))
    theirs = DiTTransformer2DModel.from_pretrained(file.parent)
    assert equal(dict(theirs.state_dict()), to_diffusers(ours.state_dict()))
    assert theirs.config.attention_head_dim == 8 and theirs.config.out_channels == 8


def test_exports_that_cannot_be(tmp_path: Path) -> None:
    file = bare(network(1).state_dict(), tmp_path)
    exits = {"_target_": "gearshift.backbones.exits.EarlyExit", "uncertainty": "none"}
    run = imported(file, tmp_path, "exits", exits)
    assert equal(safetensors.torch.load_file(exported(run)), to_diffusers(network(1).state_dict()))
    with pytest.raises(UsageError, match="no place for exit and uncertainty heads"):
        exported(imported(file, tmp_path, "heads", {**exits, "head": "per_exit"}))
    with pytest.raises(UsageError, match="writes a folder"):
        exported(run, out=str(tmp_path / "x.safetensors"))
    with pytest.raises(UsageError, match="layout=onnx is not one of gearshift, diffusers"):
        exported(run, layout="onnx")


# Released files ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backbone"), [("256x256", "dit_xl_2"), ("512x512", "dit_xl_2_512")])
def test_released_weights(name: str, backbone: str) -> None:
    """At the last time an image is almost pure noise, so a trained network returns its input."""
    folder = os.environ.get("GEARSHIFT_DIT_WEIGHTS")
    path = Path(folder or "", f"DiT-XL-2-{name}.pt")
    if not folder or not path.is_file():
        pytest.skip("GEARSHIFT_DIT_WEIGHTS names no folder with the released .pt files")
    with torch.device("meta"):
        ours = configuration.build(OmegaConf.load(CONF / f"{backbone}.yaml"))
    assert import_official(path, ours) == {}
    side = math.isqrt(ours.pos_embed.shape[1])
    fresh = DiT(replace(CONFIG, image_size=2 * side, embed_dim=ours.config.embed_dim, num_heads=16, depth=1))
    assert torch.equal(ours.pos_embed, fresh.pos_embed)
    noise = torch.randn(1, 4, ours.image_size, ours.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stream = ours.embed(noise, torch.full((1,), 999.0), torch.tensor([207]))
        hidden = stream.hidden
        for block in ours.blocks:
            hidden = block(hidden, stream.cond)
        predicted = ours.readout(hidden, stream.cond, 28)[:, :4]
    assert (predicted - noise).square().mean() < 0.05
