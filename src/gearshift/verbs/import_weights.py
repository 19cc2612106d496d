"""`gearshift import`: official weights to a run folder that every other verb accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gearshift.assembly import build_data, build_denoiser
from gearshift.backbones.exits import EarlyExit
from gearshift.backbones.weights import import_official, load_strict, uncertainty_heads
from gearshift.runtime import config
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.run import RunFolder, weights_hash


def run(cfg: DictConfig) -> dict[str, Any]:
    source = Path(cfg.weights)
    if not source.exists():
        raise UsageError(f"weights={cfg.weights}: there is no such file or folder")
    config.validate(cfg)
    denoiser = build_denoiser(cfg)
    network = denoiser.network
    backbone = network.backbone if isinstance(network, EarlyExit) else network
    heads = import_official(source, backbone)
    if heads and not isinstance(network, EarlyExit):
        raise UsageError(
            f"{source} also holds {len(heads)} tensors of AdaDiff's uncertainty heads, and exits=none has no place for "
            "them; import with exits=adadiff"
        )
    if isinstance(network, EarlyExit):
        if not heads and network.has_uncertainty:
            raise UsageError(f"{source} holds no uncertainty heads; import with exits=none")
        if heads:
            load_strict(network.uncertainty_heads, _without_prefix(uncertainty_heads(heads)), source)
    if cfg.get("data"):
        build_data(cfg, network)
    stored = OmegaConf.create({**config.plain(cfg), "weights": str(source.resolve())})
    path = Path(cfg.runs_dir) / str(cfg.name) / weights_hash(stored, ("name", "runs_dir", "data.path"))
    from gearshift.training.checkpoint import FORMAT, KEY, LAST, PREFIX, CheckpointFiles

    folder = RunFolder.create(path, stored)
    with folder.lock():
        if folder.result is None:
            weights = {PREFIX + name: value for name, value in network.state_dict().items()}
            own = {"format": FORMAT, "step": 0, "config": OmegaConf.to_yaml(stored), "ema": None}
            CheckpointFiles().save_checkpoint({"state_dict": weights, KEY: own}, folder.checkpoints / LAST)
            folder.finish({"run": str(path), "imported": source.name})
    params = sum(p.numel() for p in network.parameters())
    return {"run": str(path), "params": params, "checkpoint": str(folder.checkpoints)}


def _without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    prefix = "uncertainty_heads."
    foreign = [name for name in state if not name.startswith(prefix)]
    if foreign:
        raise RunError(f"uncertainty heads are named {prefix}*, found {foreign[0]}")
    return {name.removeprefix(prefix): value for name, value in state.items()}
