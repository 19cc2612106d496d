"""A paper's table as data: what is published, and how far that can be trusted; what is measured here; what is missing.

A figure goes by the key that it has in the rows of metrics.json (`fid`, `kid`, `precision_vgg16`, `label_agreement`,
`images_per_s`, ...). Costs are printed in other units than metrics.json keeps them in and have names of their own:
`COSTS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gearshift.runtime import config
from gearshift.runtime.errors import RunError, UsageError

STATUSES: Mapping[str, str] = {
    "verified": "read in the paper or in its authors' repository",
    "summary": "from somebody's summary, not read in the paper itself",
    "recalled": "recalled, not looked up",
    "unknown": "not known here",
}
MISSING: Any = "???"


@dataclass
class Published:
    """A figure of the paper. Raises UsageError on an unknown status, on an unknown figure that has a value, on another
    one that has none, and on a verified one without a source."""

    value: float | None = None
    status: str = MISSING
    source: str | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise UsageError(f"status {self.status!r} is not one of {', '.join(STATUSES)}")
        if (self.value is None) != (self.status == "unknown"):
            raise UsageError(
                f"a figure of status {self.status} has the value {self.value}; exactly the unknown ones have none"
            )
        if self.status == "verified" and not self.source:
            raise UsageError(f"the figure {self.value} is called verified and has no source; say where it was read")


@dataclass
class PaperRow:
    """A row of the table.

    Attributes:
        name: as in the paper.
        overrides: of `gearshift train`; empty where there is no configuration yet.
        published: by figure.
        evaluate: overrides of `gearshift evaluate`, after those of the table.
        row: which row of that evaluation; "full" is full compute.
        measured: a metrics.json to take the figures from, relative to the table's folder or to the repository, instead
            of the place where the run of `overrides` leaves it.
    """

    name: str = MISSING
    overrides: list[str] = field(default_factory=list)
    published: dict[str, Published] = field(default_factory=dict)
    evaluate: list[str] = field(default_factory=list)
    row: str = "full"
    measured: str | None = None


@dataclass
class PaperTable:
    """One table of a paper. `evaluate`: overrides of `gearshift evaluate` for every row."""

    paper: str = MISSING
    table: str = MISSING
    protocol: str = MISSING
    rows: list[PaperRow] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if not names:
            raise UsageError("a table without rows")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"two rows are called {twice[0]!r}; a row goes by its name")

    @property
    def figures(self) -> tuple[str, ...]:
        """Every figure that some row has, in order of appearance."""
        return tuple(dict.fromkeys(key for row in self.rows for key in row.published))


def load_table(path: str | Path) -> PaperTable:
    """The table in a YAML file. Raises UsageError, naming the file, where it is absent or not after the schema."""
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{path}: there is no such file; give a table such as experiments/uvit/fid.yaml")
    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not readable as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{path} holds no table: its top level has to be paper, table, protocol and rows")
    try:
        rows = loaded.get("rows")
        for number, row in enumerate(rows if isinstance(rows, ListConfig) else ()):
            if isinstance(row, DictConfig):  # one by one first, so that a message says which
                config.parse(row, PaperRow, path=f"rows[{number}]")
        return config.parse(loaded, PaperTable)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


# What is measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """A figure of cost: what it is, and how it follows from a row of metrics.json (None: from no row, see `what`)."""

    what: str
    of: Callable[[Mapping[str, Any]], float | None] | None = None


def _ratio(row: Mapping[str, Any], key: str, unit: float, per: str | None = None) -> float | None:
    value, count = row.get(key), 1 if per is None else row.get(per)
    return None if value is None or not count else value / unit / count


COSTS: Mapping[str, Cost] = {
    "gmacs": Cost("GMACs per image, all calls and guidance branches", lambda r: _ratio(r, "macs_per_image", 1e9)),
    "gflops": Cost("GFLOPs per image (2 per MAC)", lambda r: _ratio(r, "flops_per_image", 1e9)),
    "gmacs_per_call": Cost("GMACs per network call that was made", lambda r: _ratio(r, "macs_per_image", 1e9, "calls")),
    "gflops_per_call": Cost(
        "GFLOPs per network call that was made (2 per MAC)", lambda r: _ratio(r, "flops_per_image", 1e9, "calls")
    ),
    "calls": Cost("network calls per image, in all guidance branches", lambda r: _ratio(r, "calls", 1)),
    "gmacs_conv_linear": Cost("GMACs of a call in convolutions and linear layers alone, averaged; profile gives them"),
    "iterations": Cost("training steps, from its configuration"),
    "pflops": Cost("training steps times MACs of an image, as the paper counts; evaluate has all MACs of a training"),
    "t1": Cost("time at which the first stage ends, from its configuration"),
    "t2": Cost("time at which the second stage ends, from its configuration"),
    "params_m": Cost("million parameters of the network, from its configuration"),
    "gflops_conv_linear_per_call": Cost(
        "GFLOPs per call without attention products; evaluate counts those too, so gmacs_per_call is what compares"
    ),
}


@dataclass(frozen=True)
class Measured:
    """A figure that was measured here: over `count` images and `repeats` repeats (sd: over these), how, and where it
    stands."""

    value: float
    sd: float | None
    count: int | None
    repeats: int
    protocol: str
    source: str


def read_results(path: Path) -> dict[str, Any]:
    """A metrics.json. Raises RunError where it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["name"] for row in found["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not what `gearshift evaluate` writes ({error}); evaluate again") from error
    if not rows:
        raise RunError(f"{path} has no rows; evaluate again")
    return dict(found)


def row_of(results: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The row called `name`. Raises UsageError where there is none."""
    for row in results["rows"]:
        if row["name"] == name:
            return dict(row)
    known = ", ".join(row["name"] for row in results["rows"])
    raise UsageError(f"{path} has no row {name!r}; its rows are {known}")


def measured(figure: str, results: Mapping[str, Any], row: Mapping[str, Any], source: str) -> Measured | None:
    """What a row of an evaluation says about a figure; None where it says nothing."""
    cost = COSTS.get(figure)
    value = row.get(figure) if cost is None else cost.of(row) if cost.of is not None else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    sd = (row.get("sd") or {}).get(figure)
    protocols = results.get("protocol", {})
    parts = [str(text) for key, text in protocols.items() if _describes(key, figure)]
    parts = [cost.what] if cost is not None else parts
    # Fewer images than a metric asks for are let through for trials, and have to be called one.
    parts += [text for text in results.get("warnings", ()) if "min_images" in text]
    settings = {key: protocols[key] for key in ("guidance", "labels", "data") if key in protocols}
    count = row.get("num_images")
    if count is None and str(protocols.get("images", "")).partition(",")[0].isdigit():
        count = int(str(protocols["images"]).partition(",")[0])
    described = "; ".join(
        [*parts, f"{row.get('solver', '?')}, {row.get('steps', '?')} steps", *(f"{k} {v}" for k, v in settings.items())]
    )
    return Measured(float(value), sd, count, int(row.get("repeats") or 1), described, source)


_PROTOCOLS = {"psnr_to_full": "psnr", "psnr_to_full_per_image": "psnr", "ssim_to_full": "ssim"}
_PROTOCOLS |= {"label_agreement": "classifier"}


def _describes(key: str, figure: str) -> bool:
    """Whether the entry `key` of the protocol (the name of a metric, `precision_recall@vgg16`) is that of `figure`."""
    if key in (figure, _PROTOCOLS.get(figure)):
        return True
    metric, _, extractor = key.partition("@")
    kinds = metric.split("_") if metric in ("precision_recall", "density_coverage") else [metric]
    if kinds != [metric]:
        extractor = extractor or "vgg16"
    return any(figure.startswith(f"{kind}_{extractor}") for kind in kinds if extractor)


_LPIPS = {"lpips": "lpips_alex_to_full", "lpips@vgg": "lpips_vgg_to_full"}


def gives(metric: str, figure: str) -> bool:
    """Whether a metric of an evaluation, by its name there, gives a figure that needs a pretrained network."""
    return _LPIPS.get(metric) == figure or _describes(metric, figure)


def differences(asked: Mapping[str, Any], found: Mapping[str, Any], row: str) -> list[str]:
    """What two configurations of an evaluation (plain trees, as `gearshift evaluate` composes them) would measure
    differently in `row`: "key: asked there, found here" each. Timing, further policies and the list of metrics do not
    change a figure that is there."""
    wanted, had = _deciding(asked, row), _deciding(found, row)
    return [f"{key}: {wanted[key]} asked, {had[key]} found" for key in wanted if wanted[key] != had[key]]


_DECIDING = (
    *("num_images", "repeats", "start", "seed", "labels", "guidance", "guidance_channels", "guidance_interval"),
    *("split", "references", "min_images", "solvers"),
)


def _deciding(composed: Mapping[str, Any], row: str) -> dict[str, Any]:
    evaluation = composed["evaluation"]
    out = {key: composed.get(key) for key in ("ema", "precision")}
    out |= {f"evaluation.{key}": evaluation.get(key) for key in _DECIDING}
    policy = row.partition(" @ ")[0]
    out[f"evaluation.policies.{policy}"] = (evaluation.get("policies") or {}).get(policy)
    return out
