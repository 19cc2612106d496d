"""`gearshift reference`: statistics of a data set under an extractor, to a file; or what such a file holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from gearshift.assembly import device_of
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.launch import world_size
from gearshift.runtime.progress import Progress, note

if TYPE_CHECKING:
    from gearshift.data.dataset import DataSource
    from gearshift.evaluation.classifier import Classifier
    from gearshift.evaluation.features import FeatureExtractor
    from gearshift.evaluation.reference import Statistics

# Everything a metric compares with a reference; logits are compared with nothing.
_TAPS = ("features", "spatial")


def run(cfg: DictConfig) -> dict[str, Any]:
    if world_size() > 1:
        raise UsageError(f"reference works on one process, and {world_size()} were started; start one")
    if cfg.read is not None:
        if cfg.out is not None:
            raise UsageError(f"read={cfg.read} describes a file and out={cfg.out} makes one; give one of them")
        return _describe(Path(cfg.read))
    return _make(cfg)


def _make(cfg: DictConfig) -> dict[str, Any]:
    from gearshift.data.cache import cache_root
    from gearshift.evaluation.reference import save_reference
    from gearshift.evaluation.references import reference_for

    if not cfg.get("data"):
        raise UsageError("reference needs a data set; add e.g. data=cifar10")
    if cfg.keep < 2:
        raise UsageError(f"keep={cfg.keep} is below 2; kernels and neighbours need more features than that")
    out = None if cfg.out is None else _place(cfg.out)
    source: DataSource = config.build(cfg.data)
    extractors = _extractors(cfg, source, device_of(cfg.device))
    dataset = source.load(cfg.split)
    answers = []
    for seed, extractor in enumerate(extractors):
        taps = tuple(tap for tap in extractor.taps if tap in _TAPS)
        with Progress(len(dataset), f"reference, {extractor.name}", unit="images") as progress:

            def tell(done: int, total: int, bar: Progress = progress) -> None:
                bar.update(done - bar.done)

            statistics = reference_for(extractor, dataset, taps, cache_root(), tell, keep=cfg.keep)
            progress.update(len(dataset) - progress.done)  # where they came from the cache
        if out is None:
            path = Path(f"{dataset.name}-{dataset.split}-{extractor.name.replace('[', '-').replace(']', '')}.npz")
        else:
            path = out if len(extractors) == 1 else out.with_stem(f"{out.stem}-s{seed}")
        save_reference(path, statistics)
        note(f"{path}: {', '.join(taps)} of {statistics['features'].describe()} under {extractor.name}")
        answers.append(_answer(path, extractor, statistics))
    return answers[0] if len(answers) == 1 else {"references": answers}


def _place(out: str) -> Path:
    """The file to write, refused before hours of work where it cannot be one."""
    path = Path(out).expanduser()
    if path.suffix != ".npz" or path.is_dir():
        raise UsageError(f"out={out} is not the name of an .npz file; say out=FILE.npz")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"out={out} cannot be written, because {above} cannot; choose another place")
    return path


def _extractors(cfg: DictConfig, source: DataSource, device: torch.device) -> list[FeatureExtractor]:
    """Built before the images are loaded, so that missing weights and unknown names are told at once."""
    from gearshift.evaluation.features import build_extractor
    from gearshift.evaluation.weights import Unavailable

    name = config.plain(cfg.extractor) if isinstance(cfg.extractor, DictConfig) else str(cfg.extractor)
    classifier = _classifier(source, device) if name == "classifier" else None
    found = build_extractor(
        name,
        image_size=source.image_size,
        data_name="" if classifier is None else classifier.data,
        classifier=classifier,
        device=device,
        weights={"inception": cfg.weights.inception, "vgg16": cfg.weights.vgg16},
    )
    if isinstance(found, Unavailable):
        raise UsageError(f"extractor={name} cannot be had here: {found.reason}; fetch it: {found.fetch_line}")
    return found


def _classifier(source: DataSource, device: torch.device) -> Classifier:
    """Trained on the train split, or read from the cache. Raises UsageError for data without classes."""
    from gearshift.data.cache import cache_root
    from gearshift.evaluation.classifier import get_classifier

    train, test = source.load("train"), source.load("test")
    with Progress(0, f"classifier on {train.name}", unit="steps") as progress:

        def tell(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.done)

        return get_classifier(train, test, cache_root() / "classifiers", device, tell)


def _answer(path: Path, extractor: FeatureExtractor, statistics: Mapping[str, Statistics]) -> dict[str, Any]:
    about = statistics["features"].provenance
    return {
        "path": str(path),
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
        "protocol": extractor.protocol,
        "count": statistics["features"].count,
        "split": about["split"],
        "digest": about["digest"],
        "taps": {tap: one.dim for tap, one in statistics.items()},
    }


def _describe(path: Path) -> dict[str, Any]:
    """What a file of statistics holds, in words on standard error and as the answer."""
    from gearshift.evaluation.reference import load_reference

    statistics = load_reference(path.expanduser())
    taps = {}
    for tap, one in statistics.items():
        kept = 0 if one.features is None else len(one.features)
        taps[tap] = {"dim": one.dim, "count": one.count or None, "kept_features": kept, **one.provenance}
        note(f"{tap}: {one.describe()}, {one.dim} wide, {kept or 'no'} features kept")
        for key, value in one.provenance.items():
            note(f"  {key}: {value}")
    own = all("data" in one.provenance for one in statistics.values())
    return {"path": str(path), "layout": "gearshift" if own else "published", "taps": taps}
