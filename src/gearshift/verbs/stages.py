"""`gearshift stages`: where a diffusion model should change networks, found on a data set, to a file and a picture."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from gearshift.assembly import device_of
from gearshift.data.dataset import DataSource, check_split
from gearshift.data.latents import Latents
from gearshift.diffusion.process import Process
from gearshift.runtime import config, launch, peers
from gearshift.runtime.boundaries import save_boundaries
from gearshift.runtime.errors import UsageError
from gearshift.runtime.files import atomic_write, slug
from gearshift.runtime.progress import note
from gearshift.stages import affinity, baselines, finder, grid, plots
from gearshift.stages.axis import Axis
from gearshift.stages.finder import Search
from gearshift.stages.optimal import OptimalDenoiser
from gearshift.stages.rows import Rows
from gearshift.stages.thresholds import Found, three_stages

METHODS = ("optimal_denoiser", "uniform_time", "log_snr", "gradient_affinity")
_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Answer:
    """What a method found, and what it was found on.

    `search` is None for methods that look at no similarity, `count` and `data` where no images were looked at.
    """

    found: Found
    axis: Axis
    picture: bytes
    search: Search | None = None
    range: str | None = None
    count: int | None = None
    data: str | None = None
    digest: str | None = None


def run(cfg: DictConfig) -> dict[str, Any] | None:
    began = time.monotonic()
    _check(cfg)
    search = Search(_number("eta", cfg.eta), cfg.alpha, cfg.queries, cfg.mode, cfg.seed)
    process: Process | None = None if not cfg.get("process") else config.build(cfg.process)
    data: DataSource | Latents | None = None if not cfg.get("data") else config.build(cfg.data)
    _check_needs(cfg, process, data)
    place = None if cfg.output is None else _place(cfg.output)
    if cfg.devices is not None:
        launch.ensure_processes(cfg.devices, ["stages", *sys.argv[1:]], multirun=_in_sweep(), name="devices")
    peers.meet()
    if cfg.method == "gradient_affinity":
        answer = _by_gradients(cfg, data)
    else:
        assert process is not None
        axis = Axis.of(process, cfg.axis, cfg.t_min, cfg.t_max)
        if cfg.method == "optimal_denoiser":
            assert data is not None
            answer = _by_denoiser(cfg, search, axis, data)
        else:
            answer = _by_levels(cfg, axis)
    if answer is None:
        return None
    return _written(cfg, answer, place, began)


def _by_denoiser(cfg: DictConfig, search: Search, axis: Axis, data: DataSource | Latents) -> Answer | None:
    if isinstance(data, Latents):
        note(f"{cfg.data.path} holds latents: their means are taken as they are, and range={cfg.range} has no meaning")
    with _main_first():
        split = data.load(cfg.split)
    rows = Rows.of(split, cfg.range)
    note(f"{split.name}: {rows.count} images of {rows.width} numbers, range {rows.range}; {axis.describe()}")
    denoiser = OptimalDenoiser(rows, device=device_of(cfg.device), dtype=_DTYPES[cfg.precision])
    title = f"{split.name}, {axis.process.name}, range {rows.range}, eta = {search.eta:g}"
    if cfg.stages == 3:
        curves = finder.measure(denoiser, axis, search)
        if curves is None:
            return None
        found = three_stages(curves, search, cfg.sustain, cfg.replicates)
        picture = plots.curves_png(curves, axis, search.alpha, found.share, f"{title}, {search.mode}")
    else:
        note(f"stages={cfg.stages}: the published rule is for 3; this cuts a grid of {cfg.nodes} into alike segments")
        pairs = grid.similarities(denoiser, axis, search, cfg.nodes)
        if pairs is None:
            return None
        found = grid.any_stages(pairs, cfg.stages, search.seed, cfg.replicates, (cfg.min_share, cfg.max_share))
        picture = plots.matrix_png(pairs.mean(0), axis, found.share, title, "similarity")
    return Answer(found, axis, picture, search, rows.range, rows.count, split.name, split.digest)


def _by_levels(cfg: DictConfig, axis: Axis) -> Answer | None:
    if not launch.is_main():
        return None
    if cfg.method == "uniform_time":
        share = baselines.uniform_time(axis, cfg.stages)
    else:
        share = baselines.log_snr(axis, cfg.stages, (cfg.min_share, cfg.max_share))
    found = Found(share, torch.empty(0, len(share), dtype=torch.float64), 0)
    return Answer(found, axis, plots.log_snr_png(axis, share, f"{axis.process.name}, {cfg.method}"))


def _by_gradients(cfg: DictConfig, data: DataSource | Latents | None) -> Answer | None:
    from gearshift import api

    loaded = api.load_run(cfg.run, ema=cfg.ema, device=cfg.device)
    axis = Axis.of(loaded.denoiser.process, cfg.axis, cfg.t_min, cfg.t_max)
    network = loaded.denoiser.network
    source: Any = data if data is not None else config.build(loaded.config.data)
    if (source.image_size, source.channels) != (network.image_size, network.in_channels):
        raise UsageError(
            f"the data has images of {source.channels} x {source.image_size} x {source.image_size}, and run={cfg.run} "
            f"was trained on {network.in_channels} x {network.image_size} x {network.image_size}; leave data away"
        )
    with _main_first():
        split = source.load(cfg.split)
    times = axis.time(grid.centres(cfg.nodes))
    with finder.told(cfg.nodes * cfg.rounds, f"gradients of {network.name}", "gradients") as done:
        cosine = affinity.affinities(
            loaded.denoiser, split, times, batch=cfg.batch, rounds=cfg.rounds, seed=cfg.seed, done=done
        )
    if cosine is None:
        return None
    share = baselines.by_affinity(cosine, cfg.stages, (cfg.min_share, cfg.max_share))
    found = Found(share, torch.empty(0, len(share), dtype=torch.float64), 0)
    picture = plots.matrix_png(cosine, axis, share, f"{network.name}, {split.name}", "cosine of gradients")
    return Answer(found, axis, picture, None, None, len(split), split.name, split.digest)


def _written(cfg: DictConfig, answer: Answer, place: Path | None, began: float) -> dict[str, Any]:
    """The file, the picture, and the JSON line."""
    axis, search, found = answer.axis, answer.search, answer.found
    share = torch.tensor(found.share, dtype=torch.float64)
    levels = {"t": axis.time(share), "sigma": axis.sigma(share), "log_snr": axis.log_snr(share)}
    paper = search is not None and cfg.stages == 3
    about: dict[str, Any] = {
        "method": cfg.method,
        "stages": cfg.stages,
        "mode": search.mode if search is not None and paper else None,
        "eta": search.eta if search is not None else None,
        "alpha": search.alpha if search is not None and paper else None,
        "queries": search.queries if search is not None else None,
        "images": answer.count,
        "range": answer.range,
        "uncertainty": _uncertainty(axis, found),
        "process": axis.process.name,
        "axis": axis.name,
        "t_min": axis.t_min,
        "t_max": axis.t_max,
        "data": answer.data,
        "digest": answer.digest,
        "settings": _settings(cfg),
    }
    kind = about["mode"] or (f"{cfg.stages}-stages" if search is not None else slug(cfg.method))
    if place is None:
        settings = about["settings"]
        data = {key: value for key, value in (settings.get("data") or {}).items() if key != "path"}  # its digest counts
        key = json.dumps([{**settings, "data": data}, about["digest"]], sort_keys=True, default=str)
        of = slug(answer.data or "any-data")
        name = f"{of}-{slug(axis.process.name)}-{kind}-{hashlib.sha256(key.encode()).hexdigest()[:10]}.yaml"
        place = Path("runs") / "stages" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    header = [
        f"Stage boundaries by gearshift stages, method {cfg.method}: {axis.describe()}.",
        *([f"Data: {answer.data}, {answer.count} images, digest {answer.digest}."] if answer.data else []),
        "boundaries: noise-to-signal ratios sigma/alpha at which a stage ends, inclusive; t and log_snr say the same.",
        "Use: backbone.boundaries=THIS_FILE",
    ]
    numbers = {key: [float(value) for value in values] for key, values in levels.items()}
    save_boundaries(place, numbers["sigma"], header, {"t": numbers["t"], "log_snr": numbers["log_snr"], **about})
    picture = place.with_suffix(".png")
    atomic_write(picture, answer.picture)
    where = zip(numbers["t"], numbers["sigma"], strict=True)
    note(f"{place}: boundaries at " + ", ".join(f"t={t:.4f} (sigma={sigma:.4f})" for t, sigma in where))
    seconds = round(time.monotonic() - began, 1)
    shown = {key: value for key, value in about.items() if key not in ("settings", "t_min", "t_max", "digest")}
    return {**numbers, **shown, "seconds": seconds, "file": str(place), "plot": str(picture)}


def _uncertainty(axis: Axis, found: Found) -> dict[str, Any] | None:
    """Standard deviations over replicates, in every unit; None where there were none."""
    if len(found.replicates) < 2:
        return None
    levels = {"t": axis.time, "sigma": axis.sigma, "log_snr": axis.log_snr}
    spread = {key: [float(v) for v in of(found.replicates).std(0)] for key, of in levels.items()}
    return {**spread, "replicates": len(found.replicates), "failed": found.failed}


def _check(cfg: DictConfig) -> None:
    if cfg.method not in METHODS:
        raise UsageError(f"method={cfg.method} is not one of {', '.join(METHODS)}")
    if cfg.stages < 2:
        raise UsageError(f"stages={cfg.stages} leave nothing to divide; take 2 or more")
    if not 0 < cfg.sustain < 1:
        raise UsageError(f"sustain={cfg.sustain:g} is a share of the axis and must lie between 0 and 1")
    for name, least in (("nodes", 2), ("batch", 1), ("rounds", 1), ("replicates", 0)):
        if cfg[name] < least:
            raise UsageError(f"{name}={cfg[name]} must be at least {least}")
    if cfg.precision not in _DTYPES:
        raise UsageError(f"precision={cfg.precision} of the products is not one of fp32, fp64")
    check_split(cfg.split, "a data set")


def _check_needs(cfg: DictConfig, process: Process | None, data: DataSource | Latents | None) -> None:
    if cfg.method == "gradient_affinity":
        if cfg.run is None:
            raise UsageError("method=gradient_affinity takes the gradients of a network; add run=FOLDER")
        if process is not None:
            raise UsageError(f"method=gradient_affinity takes the process of run={cfg.run}; leave process away")
        return
    if cfg.run is not None:
        raise UsageError(f"run={cfg.run} serves method=gradient_affinity only, and this is method={cfg.method}")
    if process is None:
        raise UsageError("stages needs a process; add e.g. process=vp")
    if cfg.method == "optimal_denoiser" and data is None:
        raise UsageError("method=optimal_denoiser needs a data set; add e.g. data=cifar10")


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The configuration, but for where it ran and what is written."""
    return {key: value for key, value in config.plain(cfg).items() if key not in ("output", "devices", "device")}


def _number(name: str, value: Any) -> float:
    """A number, or a fraction as papers write them: 2/256."""
    try:
        found = float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{name}={value} is no number; write e.g. {name}=2/256 or {name}=0.0078125") from error
    if not math.isfinite(found):
        raise UsageError(f"{name}={value} is not finite")
    return found


def _place(output: str) -> Path:
    """The file to write, refused before the work where it cannot be one."""
    path = Path(output).expanduser()
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        raise UsageError(f"output={output} is not the name of a YAML file; say output=FILE.yaml")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"output={output} cannot be written, because {above} cannot; choose another place")
    return path


@contextlib.contextmanager
def _main_first() -> Iterator[None]:
    """The main process reads the data, and may decode it into the cache, before the others do."""
    if not launch.is_main():
        peers.barrier("the main process had read the data")
    yield
    if launch.is_main():
        peers.barrier("the main process had read the data")


def _in_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.initialized() and "MULTIRUN" in str(HydraConfig.get().mode)
