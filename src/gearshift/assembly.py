"""From a composed configuration to objects that fit together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from gearshift.backbones.base import Backbone
from gearshift.data.dataset import DataSource
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Solver
from gearshift.objectives.base import Objective
from gearshift.policies.base import Policy
from gearshift.runtime import config, launch
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir

# What changes nothing in the weights: how and where a run is executed, watched and named.
IRRELEVANT_TO_WEIGHTS = (
    "name",
    "runs_dir",
    "dry_run",
    "logger",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.checkpoint_every_steps",
    "trainer.checkpoint_every_minutes",
    "trainer.log_every",
    "trainer.deterministic",
)


def build_network(cfg: DictConfig) -> Backbone:
    """The backbone of `cfg.backbone`, with the exits of `cfg.exits` where there are any.

    `cfg.shrink` narrows it (debug=tiny): same blocks and exits, small widths.
    """
    node = config.plain(cfg.backbone)
    target = config.locate(node[config.TARGET], "backbone")
    fields = {key: value for key, value in node.items() if key != config.TARGET}
    settings: Any = config.parse(fields, config.schema_of(target), path="backbone", owner=target)
    if cfg.get("shrink"):
        if not hasattr(settings, "shrunk"):
            raise UsageError(f"debug=tiny cannot shrink {target.__name__}: its configuration has no shrunk()")
        settings = settings.shrunk()
    backbone: Backbone = target(settings)
    exits = cfg.get("exits")
    if exits:
        backbone = config.build(exits, backbone=backbone)
    return backbone


def build_denoiser(cfg: DictConfig) -> Denoiser:
    """Network and process of `cfg`."""
    return Denoiser(build_network(cfg), config.build(cfg.process))


def build_data(cfg: DictConfig, network: Backbone) -> DataSource:
    """The data of `cfg.data`. Raises UsageError where its images or classes do not fit the network."""
    data: DataSource = config.build(cfg.data)
    if (data.image_size, data.channels) != (network.image_size, network.in_channels):
        raise UsageError(
            f"the data has images of {data.channels} x {data.image_size} x {data.image_size}, but {network.name} takes "
            f"{network.in_channels} x {network.image_size} x {network.image_size}; choose a backbone for this data"
        )
    if network.cond_kind == "class" and data.num_classes != network.num_classes:
        raise UsageError(
            f"the data has {data.num_classes or 'no'} classes, but {network.name} is conditioned on "
            f"{network.num_classes}; set backbone.num_classes"
        )
    return data


def build_objective(cfg: DictConfig, network: Backbone) -> Objective:
    """The objective of `cfg.objective`, checked against the network."""
    objective: Objective = config.build(cfg.objective)
    objective.check(network)
    return objective


def build_policy(node: Policy | DictConfig | Mapping[str, Any] | str) -> Policy:
    """A policy from a node, or by the name of a file under conf/policy."""
    policy = (
        node if isinstance(node, Policy) else config.build(named("policy", node) if isinstance(node, str) else node)
    )
    if not isinstance(policy, Policy):
        raise UsageError(f"policy names {type(policy).__name__}, which is not a policy")
    return policy


def build_solver(node: Solver | DictConfig | Mapping[str, Any] | str) -> Solver:
    """A solver from a node, or by the name of a file under conf/solver."""
    solver = (
        node if isinstance(node, Solver) else config.build(named("solver", node) if isinstance(node, str) else node)
    )
    if not isinstance(solver, Solver):
        raise UsageError(f"solver names {type(solver).__name__}, which is not a solver")
    return solver


def named(group: str, name: str) -> DictConfig:
    """The file of a configuration group. Raises UsageError with the names there are."""
    folder = conf_dir() / group
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
        raise UsageError(f"there is no {group} {name!r}; there are {', '.join(known)}")
    loaded = OmegaConf.load(file)
    assert isinstance(loaded, DictConfig)
    return loaded


def device_of(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises UsageError where it is not there."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", launch.local_rank())
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device={name} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={name}, but this machine has no CUDA device; use device=cpu")
    return device


def dtype_of(precision: str) -> torch.dtype:
    """fp32, bf16 or fp16 to a torch dtype."""
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in known:
        raise UsageError(f"precision={precision} is not one of {', '.join(known)}")
    return known[precision]


def run_path(cfg: DictConfig) -> Path:
    """runs_dir / name / hash of what changes the weights."""
    from gearshift.runtime.run import weights_hash

    plain = config.plain(cfg)
    return Path(cfg.runs_dir) / str(cfg.name) / weights_hash(plain, irrelevant_to_weights(cfg))


def irrelevant_to_weights(cfg: DictConfig) -> tuple[str, ...]:
    """Settings that leave the weights as they are. A path does where the data set is the same wherever it lies; a
    folder of images is what its path says."""
    node = config.plain(cfg.data) if cfg.get("data") else {}
    decides = getattr(config.locate(node[config.TARGET], "data"), "path_is_identity", False) if node else False
    return IRRELEVANT_TO_WEIGHTS if decides else (*IRRELEVANT_TO_WEIGHTS, "data.path")
