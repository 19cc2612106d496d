"""What one chunk of images left: arrays per image in one file, so that processes share work and work survives them.

A file is named by the number of its chunk within a folder named by a fingerprint of everything that decides its
content. Files are written whole or not at all; they are plain .npz files in which long runs of equal numbers (ledgers)
are compressed and features are not.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write

Array = NDArray[Any]
# Compressing features costs more than sampling small images does and saves a tenth of them.
_COMPRESSED = ("ledger/", "images", "labels")


class Shards:
    """The files of one row of an evaluation: chunk number -> arrays whose first axis is the image (ledgers aside)."""

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder) / fingerprint

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def has(self, number: int, names: Collection[str] = ()) -> bool:
        """Whether a readable file of chunk `number` is there with at least the arrays `names`."""
        try:
            with zipfile.ZipFile(self.path(number)) as archive:
                held = set(archive.namelist())
        except (OSError, zipfile.BadZipFile):
            return False
        return all(f"{name}.npy" in held for name in names)

    def save(self, number: int, arrays: Mapping[str, Array]) -> None:
        """Write one chunk, atomically. Raises RunError when the system refuses."""
        self.folder.mkdir(parents=True, exist_ok=True)

        def write(handle: Any) -> None:
            with zipfile.ZipFile(handle, "w") as archive:
                for name, array in arrays.items():
                    packed = name.startswith(_COMPRESSED)
                    archive.compression = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)

        atomic_write(self.path(number), write)

    def load(self, number: int, names: Sequence[str]) -> dict[str, Array]:
        """The arrays `names` of one chunk. Raises RunError where the file is absent, damaged or lacks one."""
        path = self.path(number)
        try:
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as stored:
                return {name: stored[name] for name in names}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(
                f"{path} is not a whole shard ({error}); remove it and run the same command again, which makes it anew"
            ) from error

    def names(self, number: int) -> tuple[str, ...]:
        """The arrays that the file of a chunk holds. Raises RunError as `load` does."""
        try:
            with zipfile.ZipFile(self.path(number)) as archive:
                return tuple(name.removesuffix(".npy") for name in archive.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise RunError(f"{self.path(number)} is not a whole shard ({error}); remove it and run again") from error

    def remove(self) -> None:
        """Delete all files of the row."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Column:
    """One array of a row over an index range, read from its shards in order of the chunks.

    Args:
        shards: of the row.
        chunk: images per chunk; chunk k holds the indices k * chunk to (k + 1) * chunk - 1.
        start, stop: the range.
    """

    def __init__(self, shards: Shards, chunk: int, start: int, stop: int) -> None:
        self.shards, self.chunk, self.start, self.stop = shards, chunk, start, stop

    @property
    def numbers(self) -> range:
        """The chunks that hold the range."""
        return range(self.start // self.chunk, -(-self.stop // self.chunk))

    def parts(self, name: str, axis: int = 0) -> list[Array]:
        """The pieces of array `name` along the axis of images, every index once and in order."""
        pieces = []
        for number in self.numbers:
            array = self.shards.load(number, [name])[name]
            first = number * self.chunk
            kept = slice(max(self.start - first, 0), min(self.stop - first, self.chunk))
            pieces.append(array[(slice(None),) * axis + (kept,)])
        return pieces

    def read(self, name: str, axis: int = 0) -> Array:
        """The whole array `name`: [stop - start, ...] where images are the first axis."""
        return np.concatenate(self.parts(name, axis), axis=axis)
