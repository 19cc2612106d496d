"""Reference statistics of a data set, computed once per extractor and kept on disk.

An entry is named by everything it depends on: the content of the split, the extractor's fingerprint, the taps, and how
many features are kept. One that is damaged, or holds something else than its name says, is computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from gearshift.data.dataset import ImageDataset
from gearshift.evaluation.features import FeatureExtractor
from gearshift.evaluation.reference import FORMAT, KEPT, Statistics, load_reference, save_reference
from gearshift.runtime.errors import RunError

# Batches read between two reports of progress. Whole batches, so the cut changes nothing.
_STRIDE = 16


def reference_for(
    extractor: FeatureExtractor,
    dataset: ImageDataset,
    taps: Collection[str],
    cache_root: str | Path,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    keep: int = KEPT,
) -> dict[str, Statistics]:
    """Statistics of every image of `dataset` under `extractor`, by tap.

    They come from `cache_root`/references where they were computed before. `on_progress(done, total)` counts images and
    is called only while they are read. Raises RunError when the folder cannot be written, UsageError for fewer than two
    images.
    """
    wanted = tuple(sorted(set(taps)))
    about = {
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
        "protocol": extractor.protocol,
        "data": dataset.name,
        "split": dataset.split,
        "digest": dataset.digest,
        "source": dataset.provenance,
    }
    path = _place(Path(cache_root), about, wanted, keep)
    found = _cached(path, about, wanted)
    if found is None:
        found = _computed(extractor, dataset, wanted, about, on_progress, keep)
        try:
            save_reference(path, found)
        except OSError as error:  # the folder; writing the file itself raises RunError
            raise RunError(
                f"cannot make the folder {path.parent} for reference statistics ({error.strerror or error}); "
                "set GEARSHIFT_CACHE to a folder that can be written"
            ) from error
    return found


def _place(root: Path, about: Mapping[str, str], taps: tuple[str, ...], keep: int) -> Path:
    text = json.dumps({**about, "taps": taps, "keep": keep, "format": FORMAT}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return root / "references" / f"{about['data']}-{about['split']}-{key}.npz"


def _cached(path: Path, about: Mapping[str, str], taps: tuple[str, ...]) -> dict[str, Statistics] | None:
    """What is stored; None where nothing is, or something else than the name says."""
    if not path.is_file():
        return None
    try:
        found = load_reference(path)
    except RunError:
        return None
    sound = set(found) == set(taps) and all(
        dict(one.provenance) == {**about, "tap": tap} and one.features is not None for tap, one in found.items()
    )
    return found if sound else None


def _computed(
    extractor: FeatureExtractor,
    dataset: ImageDataset,
    taps: tuple[str, ...],
    about: Mapping[str, str],
    on_progress: Callable[[int, int], None] | None,
    keep: int,
) -> dict[str, Statistics]:
    total = len(dataset)
    features = {tap: torch.empty(total, extractor.taps[tap]) for tap in taps}
    stride = _STRIDE * extractor.batch
    for at in range(0, total, stride):
        part = dataset.images_u8[at : at + stride]
        for tap, values in extractor.read(part, taps).items():
            features[tap][at : at + len(part)] = values
        if on_progress is not None:
            on_progress(at + len(part), total)
    return {
        tap: Statistics.of(values, provenance={**about, "tap": tap}, keep=keep, device=extractor.device)
        for tap, values in features.items()
    }
