"""Decode once: images of any source in one memory-mapped .npy file, kept between runs.

An entry is a folder named by a hash of everything its content depends on (the files with their sizes and times, the
options, the version of the decoding rules). It is written beside its final place and renamed, so a reader never sees
half an entry and two processes that decode at the same time end with one. An entry that does not check out is decoded
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.data.dataset import content_digest
from gearshift.runtime.errors import RunError

# Raised whenever a decoding rule changes: old entries are then no longer found.
RULES_VERSION = 1
# Up to this size the whole content is checked against its digest on opening (about a second); above it shapes and
# sizes only.
VERIFY_BYTES = 1 << 30


@dataclass(frozen=True)
class Decoded:
    """images uint8 [N, C, H, W] and labels int64 [N] or None, memory-mapped copy on write, and the digest of both."""

    images: np.ndarray
    labels: np.ndarray | None
    digest: str


@dataclass(frozen=True)
class Encoded:
    """What is to be decoded: how many images, of which shape [C, H, W], and a way to go through them once.

    `items` yields (uint8 [C, H, W], label); the label is not looked at where `labelled` is false.
    """

    count: int
    shape: tuple[int, int, int]
    labelled: bool
    items: Callable[[], Iterator[tuple[np.ndarray, int]]]


def cache_root() -> Path:
    """$GEARSHIFT_CACHE, or ~/.cache/gearshift where it is not set."""
    return Path(os.environ.get("GEARSHIFT_CACHE") or Path.home() / ".cache" / "gearshift")


def fingerprint(files: list[Path], root: Path) -> list[tuple[str, int, int]]:
    """(path relative to root, size in bytes, modification time in ns) of each file: changes when a file is replaced."""
    return [(p.relative_to(root).as_posix(), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]


def decode_once(key: Mapping[str, Any], source: Callable[[], Encoded]) -> Decoded:
    """The decoded images of `key` from the cache; `source` is called, and its images decoded, only if they are not
    there.

    `key` is anything that JSON can write. Raises RunError when the cache folder cannot be written.
    """
    text = json.dumps({**key, "rules": RULES_VERSION}, sort_keys=True)
    folder = cache_root() / "data" / hashlib.sha256(text.encode()).hexdigest()[:24]
    found = _open(folder)
    if found is not None:
        return found
    encoded = source()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(scratch, encoded, text)
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"cannot write decoded images to the cache folder {folder.parent} ({error.strerror or error}); "
            "free some space there or set GEARSHIFT_CACHE to a folder that can be written"
        ) from error
    found = _open(folder)
    if found is None:
        raise RunError(f"the cache entry {folder} changed while it was written; remove it and run again")
    return found


def _write(folder: Path, encoded: Encoded, key: str) -> None:
    shape = (encoded.count, *encoded.shape)
    images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    labels = np.zeros(encoded.count, dtype=np.int64) if encoded.labelled else None
    done = 0
    for done, (image, label) in enumerate(encoded.items(), start=1):
        images[done - 1] = image
        if labels is not None:
            labels[done - 1] = label
    if done != encoded.count:
        raise RunError(f"expected {encoded.count} images, read {done}; the source changed while it was read: run again")
    images.flush()
    if labels is not None:
        np.save(folder / "labels.npy", labels)
    meta = {"key": key, "shape": shape, "labelled": encoded.labelled, "digest": content_digest(images, labels)}
    (folder / "meta.json").write_text(json.dumps(meta))


def _publish(scratch: Path, folder: Path) -> None:
    """Rename the finished entry into place; what is there already is another process's equal one, or one that is
    broken."""
    if folder.exists() and _open(folder) is None:
        shutil.rmtree(folder)
    try:
        os.rename(scratch, folder)
    except OSError:
        if _open(folder) is None:
            raise


def _open(folder: Path) -> Decoded | None:
    """The entry, or None where there is none or it does not check out."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        # Copy on write: torch wants writable memory, and whoever writes to it must not change the file.
        images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False) if meta["labelled"] else None
        sound = images.dtype == np.uint8 and list(images.shape) == list(meta["shape"])
        sound = sound and (labels is None or (labels.dtype == np.int64 and len(labels) == len(images)))
        if sound and images.nbytes <= VERIFY_BYTES:
            sound = content_digest(images, labels) == meta["digest"]
        return Decoded(images, labels, str(meta["digest"])) if sound else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
