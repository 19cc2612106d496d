"""`gearshift train`: compose, check, train; the same command again resumes.

With `pretrain=EXPERIMENT` the run of that experiment comes first, where it is not done yet, in the same processes. It
is an ordinary run with a folder of its own, so however the chain is interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from gearshift.assembly import (
    build_augment,
    build_data,
    build_denoiser,
    build_objective,
    give_null_context,
    identity,
    irrelevant_to_weights,
    pretraining,
    run_path,
)
from gearshift.backbones.initial import load_into, load_state
from gearshift.execution.cost import CostTable
from gearshift.runtime import config, launch
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.progress import note
from gearshift.runtime.run import FolderInUse, RunFolder, weights_settings
from gearshift.verbs import SweepError
from gearshift.verbs import settings as schemas

_POLL_SECONDS = 2.0


def run(cfg: DictConfig) -> dict[str, Any] | None:
    config.validate(cfg)
    settings = config.build(cfg.trainer)
    before = _checked(cfg)
    if cfg.dry_run:
        return _dry_run(cfg, before)
    answer = _finished(cfg)
    if answer is None:
        try:
            launch.ensure_processes(settings.devices, ["train", *sys.argv[1:]], multirun=_in_sweep())
        except UsageError as error:
            if _in_sweep():
                raise SweepError(str(error)) from error
            raise
        answer = _carry_out(cfg)
    if before is not None:
        answer = {**answer, "pretrained": str(run_path(before))}
    return answer if launch.is_main() else None


def _finished(cfg: DictConfig) -> dict[str, Any] | None:
    path = run_path(cfg)
    return RunFolder.open(path).result if (path / "config.yaml").is_file() else None


def _carry_out(cfg: DictConfig) -> dict[str, Any]:
    """Trains what comes before, where it is still needed, and then this."""
    from gearshift.training.checkpoint import latest
    from gearshift.training.train import train

    path, before = run_path(cfg), pretraining(cfg)
    # A training that has a checkpoint of its own does not begin any more.
    if before is not None and latest(RunFolder(path)) is None:
        _share(before)
    # Weights are drawn on the CPU, so they are the same on every device and in every process.
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        denoiser = build_denoiser(cfg)
    source = cfg.init if before is None else run_path(before)
    if source is not None and latest(RunFolder(path)) is None:
        _begin_from(denoiser.network, Path(source))
    data = build_data(cfg, denoiser.network)
    null = give_null_context(denoiser.network, data)
    objective = build_objective(cfg, denoiser.network)
    augment = build_augment(cfg, denoiser.network, data)
    train_split = data.load("train")
    if launch.is_main():
        stored = config.plain(cfg) if before is None else {**config.plain(cfg), "pretrained": str(run_path(before))}
        # A folder that exists keeps the configuration it was started with; its hash says they agree in what matters.
        folder = RunFolder.create(path, stored)
        if null is not None:
            null.save(folder.path)
    else:
        folder = RunFolder(path)
    decides = weights_settings(identity(cfg), irrelevant_to_weights(cfg))
    return train(
        config.build(cfg.trainer),
        denoiser=denoiser,
        objective=objective,
        dataset=train_split,
        run=folder,
        config_text=json.dumps({**decides, "data_digest": train_split.digest}, sort_keys=True),
        flip=data.flip,
        augment=augment,
        logger=config.build(cfg.logger) if cfg.logger else None,
    )


# What a training begins from ---------------------------------------------------------------------------------------


def _begin_from(network: Any, source: Path) -> None:
    """Loads weights from elsewhere: of a run folder the averaged ones, or those in a file or folder of another kind."""
    if not ((source / "config.yaml").is_file() and (source / "checkpoints").is_dir()):
        load_into(network, source, heads=False)
        return
    from gearshift.training.checkpoint import load_weights

    run = RunFolder.open(source)
    state = load_weights(run)
    if run.result is None:
        note(f"{source} is not finished; its newest checkpoint is taken")
    load_state(network, state, source, heads=False)


def _checked(cfg: DictConfig) -> DictConfig | None:
    """The pretraining of `cfg`, after it was seen that this training can follow it: mistakes in what comes later show
    before anything is trained. Raises UsageError."""
    before = pretraining(cfg)
    if before is None:
        return None
    try:
        before = schemas.check("train", before)
        config.validate(before)
    except UsageError as error:
        raise UsageError(f"pretrain={cfg.pretrain}: {error}") from error
    _checked(before)
    with torch.device("meta"):
        ours, theirs = build_denoiser(cfg).network, build_denoiser(before).network
    try:
        load_state(ours, theirs.state_dict(), f"pretrain={cfg.pretrain}", heads=False)
    except RunError as error:
        raise UsageError(str(error)) from error
    if ours.cond_kind == "text":
        give_null_context(ours, build_data(cfg, ours))
    build_objective(cfg, ours)
    return before


def _share(cfg: DictConfig) -> None:
    """A pretraining that other commands may want at the same time, such as the jobs of a sweep: one of them trains, the
    others wait for it, or take over from it. Several processes of one command do not wait; they say that it is in use.
    """
    while _finished(cfg) is None:
        note(f"pretraining first: {run_path(cfg)}")
        try:
            _carry_out(cfg)
            return
        except FolderInUse as error:
            if launch.world_size() > 1:
                raise
            note(f"{str(error).partition(';')[0]}; waiting for it")
            _wait(RunFolder(run_path(cfg)))


def _wait(folder: RunFolder) -> None:
    """Until nobody works in the folder."""
    while True:
        try:
            with folder.lock():
                return
        except FolderInUse:
            time.sleep(_POLL_SECONDS)


def _in_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.initialized() and "MULTIRUN" in str(HydraConfig.get().mode)


def _dry_run(cfg: DictConfig, before: DictConfig | None) -> dict[str, Any]:
    """Configuration, parameters, MACs and run folder; builds on the meta device, loads no data. What comes before is
    shown first and told under `pretraining`."""
    first = None if before is None else _dry_run(before, pretraining(before))
    with torch.device("meta"):
        denoiser = build_denoiser(cfg)
    data = build_data(cfg, denoiser.network)
    give_null_context(denoiser.network, data)
    build_objective(cfg, denoiser.network)
    build_augment(cfg, denoiser.network, data)
    network = denoiser.network
    full = CostTable.measure(network).full(network)
    print(OmegaConf.to_yaml(cfg, resolve=True), file=sys.stderr)
    answer = {
        "run": str(run_path(cfg)),
        "dry_run": True,
        "params": sum(p.numel() for p in network.parameters()),
        "gmacs": full.macs / 1e9,
        "gmacs_conv_linear": full.linear / 1e9,
        "exits": [list(network.exits(p)) for p in range(len(network.paths))],
    }
    return answer if first is None else {**answer, "pretrained": first["run"], "pretraining": first}
