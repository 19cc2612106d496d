"""`gearshift train`: compose, check, train; the same command again resumes."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from gearshift.assembly import build_data, build_denoiser, build_objective, irrelevant_to_weights, run_path
from gearshift.backbones.initial import load_into
from gearshift.execution.cost import CostTable
from gearshift.runtime import config, launch
from gearshift.runtime.errors import UsageError
from gearshift.runtime.run import RunFolder, weights_settings
from gearshift.verbs import SweepError


def run(cfg: DictConfig) -> dict[str, Any] | None:
    config.validate(cfg)
    settings = config.build(cfg.trainer)
    path = run_path(cfg)
    if cfg.dry_run:
        return _dry_run(cfg, str(path))
    if (path / "config.yaml").is_file() and (finished := RunFolder.open(path).result) is not None:
        return finished
    try:
        launch.ensure_processes(settings.devices, ["train", *sys.argv[1:]], multirun=_in_sweep())
    except UsageError as error:
        if _in_sweep():
            raise SweepError(str(error)) from error
        raise
    # Weights are drawn on the CPU, so they are the same on every device and in every process.
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        denoiser = build_denoiser(cfg)
    if cfg.init is not None:
        load_into(denoiser.network, cfg.init, heads=False)
    objective = build_objective(cfg, denoiser.network)
    data = build_data(cfg, denoiser.network)
    train_split = data.load("train")
    from gearshift.training.train import train

    # A folder that exists keeps the configuration it was started with; its hash says they agree in what matters.
    folder = RunFolder.create(path, cfg) if launch.is_main() else RunFolder(path)
    answer = train(
        settings,
        denoiser=denoiser,
        objective=objective,
        dataset=train_split,
        run=folder,
        config_text=json.dumps(
            {**weights_settings(cfg, irrelevant_to_weights(cfg)), "data_digest": train_split.digest}, sort_keys=True
        ),
        flip=data.flip,
        logger=config.build(cfg.logger) if cfg.logger else None,
    )
    return answer if launch.is_main() else None


def _in_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.initialized() and "MULTIRUN" in str(HydraConfig.get().mode)


def _dry_run(cfg: DictConfig, path: str) -> dict[str, Any]:
    """Configuration, parameters, MACs and run folder; builds on the meta device, loads no data."""
    with torch.device("meta"):
        denoiser = build_denoiser(cfg)
    build_objective(cfg, denoiser.network)
    build_data(cfg, denoiser.network)
    network = denoiser.network
    full = CostTable.measure(network).full(network)
    print(OmegaConf.to_yaml(cfg, resolve=True), file=sys.stderr)
    return {
        "run": path,
        "dry_run": True,
        "params": sum(p.numel() for p in network.parameters()),
        "gmacs": full.macs / 1e9,
        "gmacs_conv_linear": full.linear / 1e9,
        "exits": [list(network.exits(p)) for p in range(len(network.paths))],
    }
