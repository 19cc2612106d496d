"""Latents on disk: shards that are mapped into memory, and a manifest that says what they are.

    OUT/
        request.json                what the latents are made from and how; written first, kept when resumed
        shards/00000.moments.npy    fp16 or fp32 [n, orientations, 2c, h, w]: mean and log-variance, not scaled, of the
                                    image and (orientation 1) of its mirror image; latents.npy [n, orientations, c,
                                    h, w] where the autoencoder encodes to latents and not to Gaussians
        shards/00000.labels.npy     int64 [n], where there are classes
        shards/00000.indices.npy    int64 [n], positions in the data set
        shards/00000.text.npy       where there are captions, these three: see `text_files`
        shards/00000.starts.npy
        shards/00000.captions.npy
        null_text.npy               and, once, the text features of the empty string
        shards/00000.json           written last: the shard is whole
        manifest.json               written last of all: the set is whole

Plain .npy rather than .npz, because members of an archive cannot be mapped, and a training reads single rows in random
order: labels and moments stand in files of their own, so that reading all labels touches no page of moments. A shard of
some thousand images is large enough that 1.28 million images are some hundred files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.data.cache import VERIFY_BYTES
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write

FORMAT = 1
REQUEST, MANIFEST, SHARDS = "request.json", "manifest.json", "shards"
DTYPES = {"fp16": np.float16, "fp32": np.float32}
_AGAIN = "run the same `gearshift encode` again, which makes what is missing"


@dataclass(frozen=True)
class Shard:
    """A finished shard: its images, and name, size in bytes and SHA-256 of each of its files."""

    number: int
    count: int
    files: Mapping[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True)
class Manifest:
    """What the latents of a folder are. `data` says where the images came from (name, split, provenance, digest),
    `source` is their configuration node, `autoencoder` name, encoder and decoder fingerprint; sizes are in pixels.
    `text` says of their captions' features the encoder and its fingerprint, length L and width D, how many captions
    there are, and the SHA-256 of `null_text.npy`; None without captions. `gaussian`: moments are stored, not
    latents."""

    count: int
    shard: int
    orientations: int
    dtype: str
    channels: int
    latent_size: int
    image_size: int
    scale: float
    num_classes: int | None
    class_names: tuple[str, ...]
    data: Mapping[str, str]
    source: Mapping[str, Any]
    autoencoder: Mapping[str, str]
    shards: tuple[Shard, ...]
    text: Mapping[str, Any] | None = None
    gaussian: bool = True

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides what a training sees: all numbers, and the scale. Not where the images
        came from, nor by what they were encoded."""
        content = [[shard.count, sorted(digest for _, digest in shard.files.values())] for shard in self.shards]
        seen = [FORMAT, self.dtype, self.orientations, self.channels, self.latent_size, self.scale, self.num_classes]
        if self.text is not None:  # which sets without captions, older than they are, know nothing of
            seen += [self.text["length"], self.text["width"], self.text["null"]]
        if not self.gaussian:
            seen.append("latents")
        return hashlib.sha256(json.dumps([seen, content]).encode()).hexdigest()

    @property
    def row(self) -> tuple[int, int, int, int]:
        """Shape of what is stored of one image."""
        return (self.orientations, (1 + self.gaussian) * self.channels, self.latent_size, self.latent_size)


def stored_name(gaussian: bool) -> str:
    """What the arrays of a shard that hold the latents are called."""
    return "moments" if gaussian else "latents"


def write_shard(folder: Path, number: int, arrays: Mapping[str, np.ndarray]) -> Shard:
    """The arrays (moments or latents, labels, indices; first axis images), each to its file, and then the word that
    they are whole. Raises RunError when the system refuses."""
    place = folder / SHARDS
    place.mkdir(exist_ok=True)
    files = {}
    for name, array in arrays.items():
        path = place / f"{number:05d}.{name}.npy"
        atomic_write(path, lambda handle, array=array: np.lib.format.write_array(handle, array, allow_pickle=False))  # type: ignore[misc]
        files[path.name] = (path.stat().st_size, _sha256(path))
    shard = Shard(number, len(next(iter(arrays.values()))), files)
    atomic_write(place / f"{number:05d}.json", json.dumps(asdict(shard), sort_keys=True))
    return shard


def read_shard(folder: Path, number: int, *, deep: bool = True) -> Shard | None:
    """The shard of that number if its files are there with their sizes, and with their contents where `deep`.

    None where it has to be made."""
    try:
        shard = _shard(json.loads((folder / SHARDS / f"{number:05d}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shard if _wrong(folder, shard, deep=deep) is None else None


def _wrong(folder: Path, shard: Shard, *, deep: bool) -> str | None:
    """What is wrong with the files of a shard: sizes, and contents where `deep`."""
    for name, (size, digest) in shard.files.items():
        path = folder / SHARDS / name
        if not path.is_file():
            return f"{path} is not there"
        if (found := path.stat().st_size) != size:
            return f"{path} has {found} bytes and had {size} when it was encoded"
        if deep and _sha256(path) != digest:
            return f"{path} is not what it was when it was encoded (its checksum differs)"
    return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The manifest with its format and digest. Raises RunError when the system refuses."""
    fields = asdict(manifest)
    if manifest.text is None:
        del fields["text"]
    if manifest.gaussian:
        del fields["gaussian"]
    text = json.dumps({"format": FORMAT, "digest": manifest.digest, **fields}, indent=1, allow_nan=False)
    atomic_write(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path, named: str) -> Manifest:
    """What `folder` holds; `named` is how the user named it.

    Raises UsageError when there are no finished latents and RunError when the manifest is damaged or was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / REQUEST).is_file():
            raise UsageError(f"{named} holds latents that are not finished (no {MANIFEST}); {_AGAIN}")
        raise UsageError(f"{named} holds no latents (no {MANIFEST}); make them with `gearshift encode`")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        form, digest = stored.pop("format"), stored.pop("digest")
        if form != FORMAT:
            raise RunError(f"{path} has format {form} and this program reads {FORMAT}; encode again")
        shards = tuple(_shard(entry) for entry in stored.pop("shards"))
        manifest = Manifest(**{**stored, "class_names": tuple(stored["class_names"]), "shards": shards})
        found = manifest.digest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not readable as a manifest ({error}); {_AGAIN}") from error
    if found != digest:
        raise RunError(f"{path} was changed: it says digest {digest[:12]} and describes {found[:12]}; {_AGAIN}")
    return manifest


def open_shards(folder: Path, manifest: Manifest) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Moments or latents of every shard, memory-mapped copy on write, and all labels int64 [N].

    Sizes of all files are checked, and their contents where they are at most a gigabyte together. Raises RunError
    naming a file that is absent or changed.
    """
    deep = sum(shard.bytes for shard in manifest.shards) <= VERIFY_BYTES
    moments, labels = [], []
    for shard in manifest.shards:
        wrong = _wrong(folder, shard, deep=deep)
        if wrong is not None:
            raise RunError(f"{wrong}; {_AGAIN}")
        stem = f"{folder / SHARDS}/{shard.number:05d}"
        file = f"{stem}.{stored_name(manifest.gaussian)}.npy"
        try:
            # Copy on write: torch wants writable memory, and whoever writes to it must not change the file.
            mapped = np.load(file, mmap_mode="c", allow_pickle=False)
            if manifest.num_classes is not None:
                labels.append(np.load(f"{stem}.labels.npy", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise RunError(f"{stem}.*.npy are not readable ({error}); {_AGAIN}") from error
        expected = (shard.count, *manifest.row)
        if mapped.shape != expected or mapped.dtype != DTYPES[manifest.dtype]:
            raise RunError(
                f"{file} holds {mapped.dtype} {mapped.shape} and the manifest says {manifest.dtype} "
                f"{expected}; {_AGAIN}"
            )
        moments.append(mapped)
    return moments, np.concatenate(labels) if labels else None


def _shard(entry: Mapping[str, Any]) -> Shard:
    files = {str(name): (int(size), str(digest)) for name, (size, digest) in entry["files"].items()}
    return Shard(int(entry["number"]), int(entry["count"]), files)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
