"""From a composed configuration to objects that fit together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from gearshift.backbones.base import Backbone, check_text
from gearshift.backbones.null_context import NullContext
from gearshift.data.augment import AugmentPipe, check_augment
from gearshift.data.dataset import DataSource
from gearshift.data.latents import Latents, text_shape_of
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Solver
from gearshift.objectives.base import Objective
from gearshift.policies.base import Policy
from gearshift.policies.from_file import FromFile
from gearshift.runtime import config, launch
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir
from gearshift.runtime.run import refuse_pipeline

# What changes nothing in the weights: how and where a run is executed, watched and named. Of a pretraining the hash of
# its run counts, not its name.
IRRELEVANT_TO_WEIGHTS = (
    "name",
    "runs_dir",
    "dry_run",
    "pretrain",
    "pretrain_overrides",
    "logger",
    "data.autoencoder",
    "trainer.accelerator",
    "trainer.compile",
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
    refuse_pipeline(cfg)
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
    network = build_network(cfg)
    with torch.device("cpu"):  # its tables are read on the host, also where the network is only counted
        process = config.build(cfg.process)
    return Denoiser(network, process)


def build_data(cfg: DictConfig, network: Backbone) -> DataSource:
    """The data of `cfg.data`. Raises UsageError where its images or classes do not fit the network."""
    data: DataSource = config.build(cfg.data)
    if (data.image_size, data.channels) != (network.image_size, network.in_channels):
        raise UsageError(
            f"the data has images of {data.channels} x {data.image_size} x {data.image_size}, but {network.name} takes "
            f"{network.in_channels} x {network.image_size} x {network.image_size}; choose a backbone for this data"
        )
    if network.cond_kind == "text":
        check_text(network, text_shape_of(data), "the data")
    if network.cond_kind == "class" and data.num_classes != network.num_classes:
        raise UsageError(
            f"the data has {data.num_classes or 'no'} classes, but {network.name} is conditioned on "
            f"{network.num_classes}; set backbone.num_classes"
        )
    return data


def give_null_context(network: Backbone, data: DataSource | Latents) -> NullContext | None:
    """Tells a network that takes text what the features of the empty string are, from data that `build_data` checked;
    returns them for the run folder. Nothing for other networks. Raises RunError when the data's file was changed."""
    if network.cond_kind != "text":
        return None
    assert isinstance(data, Latents) and data.manifest.text is not None
    null = NullContext(data.null_text(), data.manifest.text["encoder"], data.manifest.text["fingerprint"])
    network.set_null_context(null.features)
    return null


def build_augment(cfg: DictConfig, network: Backbone, data: DataSource) -> AugmentPipe | None:
    """The augmentations of `cfg.augment`, checked against data and network; None where there are none."""
    if not cfg.get("augment"):
        return None
    pipe: AugmentPipe = config.build(cfg.augment)
    check_augment(pipe, data, flip=data.flip, augment_dim=network.augment_dim, network=network.name)
    return pipe


def build_objective(cfg: DictConfig, network: Backbone) -> Objective:
    """The objective of `cfg.objective`, checked against the network."""
    objective: Objective = config.build(cfg.objective)
    objective.check(network)
    return objective


def build_policy(node: Policy | DictConfig | Mapping[str, Any] | str) -> Policy:
    """A policy from a node, by the name of a file under conf/policy, or by the path of a file (.yaml)."""
    if isinstance(node, str) and node.endswith((".yaml", ".yml")):
        return FromFile(node)
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

    return Path(cfg.runs_dir) / str(cfg.name) / weights_hash(identity(cfg), irrelevant_to_weights(cfg))


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, with the hash of the pretraining's run as `pretrained` where there is one."""
    plain, before = config.plain(cfg), pretraining(cfg)
    return plain if before is None else {**plain, "pretrained": run_path(before).name}


def irrelevant_to_weights(cfg: DictConfig) -> tuple[str, ...]:
    """Settings that leave the weights as they are. A path does where the data set is the same wherever it lies; a
    folder of images is what its path says."""
    node = config.plain(cfg.data) if cfg.get("data") else {}
    decides = getattr(config.locate(node[config.TARGET], "data"), "path_is_identity", False) if node else False
    found = IRRELEVANT_TO_WEIGHTS if decides else (*IRRELEVANT_TO_WEIGHTS, "data.path")
    # augment=none is an empty node, and no node at all means the same.
    return found if cfg.get("augment") else (*found, "augment")


# Trainings that start from another ---------------------------------------------------------------------------------

# What the training before has in common with this one: where it is run, and the seed.
_CARRIED = (
    "seed",
    "runs_dir",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.deterministic",
)


def pretraining(cfg: DictConfig) -> DictConfig | None:
    """The configuration of the training whose averaged weights the one of `cfg` starts from; None where there is none.

    It is that of `experiment=PRETRAIN`, on the machine, with the seed and, if it is the same kind of data, from the
    `data.path` of `cfg`; under +debug=tiny where `cfg` is shrunk. `cfg.pretrain_overrides` have the last word.

    Raises UsageError where it cannot be composed, where it goes round in circles, and where `cfg.init` says otherwise.
    """
    steps: list[tuple[str, tuple[str, ...]]] = []
    before = _before(cfg)
    node: DictConfig | None = cfg
    while node is not None and node.get("pretrain") is not None:
        step = (str(node.pretrain), tuple(node.get("pretrain_overrides") or ()))
        if step in steps:
            raise UsageError(f"pretrain goes round in circles: {', then '.join(name for name, _ in [*steps, step])}")
        steps.append(step)
        node = before if node is cfg else _before(node)
    return before


def _before(cfg: DictConfig) -> DictConfig | None:
    name, overrides = cfg.get("pretrain"), tuple(cfg.get("pretrain_overrides") or ())
    if name is None:
        if overrides:
            raise UsageError(f"pretrain_overrides={list(overrides)}, but there is no pretrain; name an experiment")
        return None
    if cfg.get("init") is not None:
        raise UsageError(f"init={cfg.init} and pretrain={name} are two beginnings; set one of them to null")
    given = {override.partition("=")[0].lstrip("+~") for override in overrides}
    tiny = ("+debug=tiny",) if cfg.get("shrink") and "debug" not in given else ()
    composed = _composed((f"experiment={name}", *tiny, *overrides)).copy()
    OmegaConf.set_struct(composed, False)
    for key in _CARRIED:
        if key not in given:
            OmegaConf.update(composed, key, OmegaConf.select(cfg, key))
    ours, theirs = cfg.get("data"), composed.get("data")
    same_kind = ours and theirs and ours.get(config.TARGET) == theirs.get(config.TARGET)
    if same_kind and ours.get("path") is not None and not given & {"data", "data.path"}:
        theirs.path = ours.path
    return composed


@cache  # it is asked for its hash again and again
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        if GlobalHydra.instance().is_initialized():  # within a verb
            return compose("train", overrides=list(overrides))
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("train", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        said = str(error).splitlines()[0]
        raise UsageError(f"the pretraining {' '.join(overrides)} cannot be composed: {said}") from error
