"""The top level of every verb's configuration: one dataclass each, so that a typo or a wrong type is refused at once.

Groups (backbone, policy, ...) are checked by the classes they name; these are the plain settings beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gearshift.runtime import config
from gearshift.runtime.boundaries import load_boundaries
from gearshift.runtime.paths import conf_dir

MISSING: Any = "???"


@dataclass
class Train:
    name: str = "custom"
    seed: int = 0
    init: str | None = None
    pretrain: str | None = None
    pretrain_overrides: list[str] = field(default_factory=list)
    runs_dir: str = "runs"
    shrink: bool = False
    dry_run: bool = False


@dataclass
class Sample:
    run: str = MISSING
    num_images: int = 64
    start: int = 0
    seed: int = 0
    guidance: float | None = None
    s: float | None = None
    guidance_channels: int | None = None
    guidance_interval: list[float] | None = None
    labels: str = "uniform"
    prompts: str | None = None
    chunk: int = 256
    ema: bool = True
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    format: str = "npz"
    switches: bool = False
    devices: int | None = None
    out: str | None = None


@dataclass
class Evaluate:
    run: str = MISSING
    data_path: str | None = None
    prompts: str | None = None
    ema: bool = True
    devices: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    out: str | None = None


@dataclass
class Profile:
    run: str | None = None
    guidance: float = 1.0
    shrink: bool = False
    baseline: str | None = None
    images: int | None = None
    baseline_images: int | None = None


@dataclass
class Bench:
    run: str | None = None
    batch: int = 256
    guidance: float = 1.0
    strata: int = 8
    repeats: int = 15
    warmup: int = 3
    training: bool = False
    stages: bool = False
    steps: bool = False
    sampling: bool = False
    batches: list[int] = field(default_factory=lambda: [1, 8, 32, 128])
    latency_repeats: int = 20
    rounds: int = 5
    features: bool = False
    inception: str | None = None
    threads: int | None = None
    target: float = 0.85
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    shrink: bool = False


@dataclass
class Import:
    weights: str | None = None
    pipeline: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str = "fp32"
    call: dict[str, Any] = field(default_factory=dict)
    name: str = "imported"
    runs_dir: str = "runs"
    out: str | None = None


@dataclass
class Stages:
    method: str = "optimal_denoiser"
    stages: int = 3
    mode: str = "surrogate"
    range: str = "unit"
    eta: Any = "2/256"
    alpha: float = 0.9
    queries: int = 8000
    axis: str = "auto"
    t_min: float | None = None
    t_max: float | None = None
    sustain: float = 0.05
    replicates: int = 200
    nodes: int = 40
    min_share: float | None = None
    max_share: float | None = None
    run: str | None = None
    ema: bool = True
    batch: int = 64
    rounds: int = 4
    split: str = "train"
    seed: int = 0
    precision: str = "fp32"
    devices: int | None = None
    device: str = "auto"
    output: str | None = None


@dataclass
class Plan:
    run: str = MISSING
    budget: float = 0.5
    unit: str = "macs"
    bins: int | None = None
    space: list[str] = field(default_factory=lambda: ["steps", "branches", "depth", "attention", "blocks"])
    search: str = "responses"
    operator: str = "output"
    start: str = "even"
    images: int = 32
    trial_images: int = 8
    validation: int = 64
    longest: int | None = None
    evaluations: int = 150
    restarts: int = 2
    rivals: bool = True
    grade: list[str] = field(default_factory=list)
    timing_batch: int = 32
    timing_rounds: int = 7
    seed: int = 1
    guidance: float | None = None
    guidance_channels: int | None = None
    guidance_interval: list[float] | None = None
    labels: str = "balanced"
    prompts: str | None = None
    ema: bool = True
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    output: str | None = None


@dataclass
class Export:
    run: str = MISSING
    out: str | None = None
    layout: str = "gearshift"
    ema: bool = True
    dtype: str = "fp32"


@dataclass
class ReferenceWeights:
    inception: str | None = None
    vgg16: str | None = None


@dataclass
class Reference:
    extractor: Any = "inception"
    split: str = "train"
    out: str | None = None
    read: str | None = None
    keep: int = 10_000
    device: str = "auto"
    weights: ReferenceWeights = field(default_factory=ReferenceWeights)


@dataclass
class Encode:
    out: str = MISSING
    split: str = "train"
    autoencoder: str | None = None
    text_encoder: str | None = None
    flips: bool = True
    scale: float | None = None
    shard: int = 4096
    batch: int = 32
    dtype: str = "fp16"
    precision: str = "fp32"
    devices: int | None = None
    device: str = "auto"


@dataclass
class Compare:
    paths: list[str] = field(default_factory=list)
    name: list[str] | None = None
    out: str | None = None


@dataclass
class Table:
    paths: list[str] = field(default_factory=list)
    run: str | None = None
    runs_dir: str = "runs"
    out: str | None = None
    train: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)


@dataclass
class List:
    group: str | None = None


SCHEMAS: dict[str, type] = {
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "profile": Profile,
    "bench": Bench,
    "import": Import,
    "export": Export,
    "list": List,
    "reference": Reference,
    "encode": Encode,
    "stages": Stages,
    "plan": Plan,
    "compare": Compare,
    "table": Table,
}


def groups(verb: str) -> tuple[str, ...]:
    """The configuration groups of a verb, from its file's defaults list."""
    cfg = OmegaConf.load(conf_dir() / f"{verb}.yaml")
    assert isinstance(cfg, DictConfig)
    found = [str(key) for entry in cfg.get("defaults", []) if not isinstance(entry, str) for key in entry]
    return tuple(name.removeprefix("optional ") for name in found if "hydra" not in name)


def check(verb: str, cfg: DictConfig) -> DictConfig:
    """The configuration with its plain settings read by the verb's schema.

    Raises:
        UsageError: an unknown key, a missing value or a value of the wrong type.
    """
    own = groups(verb)
    plain = {key: value for key, value in config.plain(cfg).items() if key not in own}
    settings: Any = config.parse(plain, SCHEMAS[verb], owner=SCHEMAS[verb])
    checked = cfg.copy()
    OmegaConf.set_struct(checked, False)
    for name in settings.__dataclass_fields__:
        checked[name] = getattr(settings, name)
    _read_boundaries(checked)
    return checked


def _read_boundaries(cfg: DictConfig) -> None:
    """Puts the numbers of a stages file in the place of its name: `backbone.boundaries=FILE`."""
    node = cfg.get("backbone")
    if node and isinstance(node.get("boundaries"), str):
        node.boundaries = list(load_boundaries(node.boundaries))
