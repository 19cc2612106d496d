"""`gearshift export`: a run's weights in one safetensors file, or in the folder that diffusers loads a DiT from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from gearshift.assembly import build_denoiser, dtype_of
from gearshift.backbones import dit_weights
from gearshift.backbones.base import Backbone
from gearshift.backbones.dit import DiT
from gearshift.backbones.exits import EarlyExit
from gearshift.backbones.null_context import KEY, NullContext
from gearshift.backbones.weights import export_safetensors, load_strict, write_safetensors
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.progress import note
from gearshift.runtime.run import RunFolder

LAYOUTS = ("gearshift", "diffusers")


def run(cfg: DictConfig) -> dict[str, Any]:
    from gearshift.training.checkpoint import load_weights

    dtype = dtype_of(cfg.dtype)
    if cfg.layout not in LAYOUTS:
        raise UsageError(f"layout={cfg.layout} is not one of {', '.join(LAYOUTS)}")
    folder = RunFolder.open(cfg.run)
    network = build_denoiser(folder.config).network
    load_strict(network, load_weights(folder, ema=cfg.ema), folder.checkpoints)
    theirs = cfg.layout == "diffusers"
    transformer = _plain_dit(network) if theirs else None
    state = network.state_dict() if transformer is None else dit_weights.to_diffusers(transformer.state_dict())
    stored = {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}
    header = {"weights": "ema" if cfg.ema else "trained", "dtype": cfg.dtype}
    if transformer is None:
        out = Path(cfg.out) if cfg.out is not None else folder.path / "model.safetensors"
        null = NullContext.load(folder.path)
        if null is not None:
            stored, header = {**stored, KEY: null.features}, {**header, **null.header()}
        export_safetensors(out, stored, OmegaConf.to_yaml(folder.config), header)
    else:
        target = Path(cfg.out) if cfg.out is not None else folder.path / "diffusers"
        out = _write_folder(target, dit_weights.diffusers_config(transformer), stored, header)
    return {
        "run": str(folder.path),
        "file": str(out),
        "tensors": len(stored),
        "params": sum(v.numel() for v in stored.values()),
    }


def _plain_dit(network: Backbone) -> DiT:
    """The DiT itself. Raises UsageError where there is none, or heads that the layout has no place for."""
    if isinstance(network, EarlyExit):
        if network.exit_heads or network.uncertainty_heads:
            raise UsageError("layout=diffusers has no place for exit and uncertainty heads; use layout=gearshift")
        network = network.backbone
    if not isinstance(network, DiT):
        raise UsageError(f"layout=diffusers is there for DiT, and this run is a {network.name}; use layout=gearshift")
    return network


def _write_folder(target: Path, config: dict[str, Any], state: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Configuration and weights; returns the file of the weights."""
    if target.suffix == ".safetensors":
        raise UsageError(f"out={target}: layout=diffusers writes a folder with two files; name a folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"could not make the folder {target} ({error.strerror or error})") from error
    weights = target / dit_weights.WEIGHTS[0]
    write_safetensors(weights, state, {**header, "format": "pt"})
    atomic_write(target / dit_weights.CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    note(
        "diffusers embeds time with other frequencies (10000^(-k/127)), so its outputs are not quite those of this run"
    )
    return weights
