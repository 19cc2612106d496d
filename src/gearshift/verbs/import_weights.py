"""`gearshift import`: official weights to a run folder that every other verb accepts.

A checkpoint of EDM says itself what it is, so backbone and process are its own whatever the configuration names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gearshift.assembly import build_data, build_denoiser, give_null_context, irrelevant_to_weights
from gearshift.backbones.edm_pickle import EDMNetwork, is_edm, read_edm, write_converted
from gearshift.backbones.initial import load_edm, load_into
from gearshift.backbones.null_context import NullContext
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.progress import note
from gearshift.runtime.run import RunFolder, weights_hash


def run(cfg: DictConfig) -> dict[str, Any]:
    weights, pipeline = cfg.get("weights"), cfg.get("pipeline")
    if (weights is None) == (pipeline is None):
        both = "neither" if weights is None else f"weights={weights} and pipeline={pipeline}"
        raise UsageError(f"import takes weights=FILE or pipeline=FOLDER (or an id on the hub), and got {both}")
    if pipeline is not None:
        return _pipeline(cfg)
    source = Path(cfg.weights)
    official = read_edm(source) if is_edm(source) else None
    if official is not None:
        cfg = _described(cfg, official, source)
    config.validate(cfg)
    denoiser = build_denoiser(cfg)
    network = denoiser.network
    if official is None:
        load_into(network, source, heads=True)
    else:
        load_edm(network, official.state, source, heads=True)
    null = NullContext.inside(source)
    if cfg.get("data"):
        null = give_null_context(network, build_data(cfg, network)) or null
    if cfg.get("out") is not None:
        _write(cfg.out, official, source)
    stored = OmegaConf.create({**config.plain(cfg), "weights": str(source.resolve()), "out": None})
    path = Path(cfg.runs_dir) / str(cfg.name) / weights_hash(stored, irrelevant_to_weights(cfg))
    from gearshift.training.checkpoint import FORMAT, KEY, LAST, PREFIX, CheckpointFiles

    folder = RunFolder.create(path, stored)
    if null is not None and network.cond_kind == "text":
        null.save(folder.path)
    with folder.lock():
        if folder.result is None:
            weights = {PREFIX + name: value for name, value in network.state_dict().items()}
            own = {"format": FORMAT, "step": 0, "config": OmegaConf.to_yaml(stored), "ema": None}
            CheckpointFiles().save_checkpoint({"state_dict": weights, KEY: own}, folder.checkpoints / LAST)
            folder.finish({"run": str(path), "imported": source.name})
    params = sum(p.numel() for p in network.parameters())
    return {"run": str(path), "params": params, "checkpoint": str(folder.checkpoints)}


def _pipeline(cfg: DictConfig) -> dict[str, Any]:
    """A run folder that names a pipeline of diffusers; its weights stay where they are."""
    from gearshift.integrations.diffusers.model import PipelineModel, load_pipeline, pipeline_config

    if cfg.out is not None:
        raise UsageError(f"out={cfg.out} is for weights of EDM; a pipeline stays where it is")
    plain = config.plain(cfg)
    folder = Path(cfg.pipeline).expanduser()
    stored = {
        "name": cfg.name,
        # A folder of this machine by its whole path, which holds from every working directory.
        "pipeline": str(folder.resolve()) if folder.is_dir() else cfg.pipeline,
        **{name: plain[name] for name in ("revision", "variant", "dtype", "call") if plain.get(name)},
        **({"data": plain["data"]} if plain.get("data") else {}),
    }
    about = pipeline_config(stored)
    model = PipelineModel(about, load_pipeline(about))
    path = Path(cfg.runs_dir) / str(cfg.name) / weights_hash(stored, ())
    run_folder = RunFolder.create(path, OmegaConf.create(stored))
    with run_folder.lock():
        if run_folder.result is None:
            run_folder.finish({"run": str(path), "imported": cfg.pipeline})
    network = model.network
    return {
        "run": str(path),
        "pipeline": type(model.pipe).__name__,
        "network": network.name,
        "params": sum(p.numel() for p in network.parameters()),
        "takes": model.takes,
        "blocks": [block.name for block in network.blocks],
    }


def _described(cfg: DictConfig, official: EDMNetwork, source: Path) -> DictConfig:
    """The configuration with backbone and process of the file."""
    own = cfg.copy()
    OmegaConf.set_struct(own, False)
    own.backbone, own.process = official.backbone, official.process
    kinds = [str(node[config.TARGET]).rpartition(".")[2] for node in (official.backbone, official.process)]
    note(f"{source} says what it is: backbone {kinds[0]} and process {kinds[1]}")
    return own


def _write(out: str, official: EDMNetwork | None, source: Path) -> None:
    """The converted file. Raises UsageError where there is nothing to convert."""
    if official is None:
        raise UsageError(f"out={out} is for EDM checkpoints (.pkl), and weights={source} is none; leave it out")
    write_converted(out, official)
