"""`gearshift import`: official weights to a run folder that every other verb accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gearshift.assembly import build_data, build_denoiser, irrelevant_to_weights
from gearshift.backbones.initial import load_into
from gearshift.runtime import config
from gearshift.runtime.run import RunFolder, weights_hash


def run(cfg: DictConfig) -> dict[str, Any]:
    source = Path(cfg.weights)
    config.validate(cfg)
    denoiser = build_denoiser(cfg)
    network = denoiser.network
    load_into(network, source, heads=True)
    if cfg.get("data"):
        build_data(cfg, network)
    stored = OmegaConf.create({**config.plain(cfg), "weights": str(source.resolve())})
    path = Path(cfg.runs_dir) / str(cfg.name) / weights_hash(stored, irrelevant_to_weights(cfg))
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
