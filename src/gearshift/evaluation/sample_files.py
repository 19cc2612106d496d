"""Samples as files that other evaluators read: one .npz in ADM's layout, or a folder of PNGs.

Both take images chunk by chunk and hold no more than a chunk in memory. A file has its final name only when it is
whole.
"""

from __future__ import annotations

import io
import os
import uuid
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write

Images = Tensor | NDArray[np.uint8]


class AdmWriter:
    """An .npz whose `arr_0` [N, H, W, C] uint8 grows chunk by chunk; `arr_1` are labels, where there are any.

        with AdmWriter(path, count, (C, H, W)) as writer:
            for images in chunks:
                writer.write(images)

    The layout of guided-diffusion's (ADM's) evaluator; `numpy.load(path, allow_pickle=False)` reads it. Nothing is
    compressed, as there.

    Args:
        path: of the file, which appears when the block ends without an error; the one before stays until then.
        count: N, all images that will be written.
        shape: (C, H, W) of one image.

    Raises:
        ValueError: other images or another number of them than was said.
        RunError: the system refuses (a full disk, a missing permission).
    """

    def __init__(self, path: str | os.PathLike[str], count: int, shape: tuple[int, ...]) -> None:
        self.path, self.count, self.shape = Path(path), count, tuple(shape)
        if len(self.shape) != 3:
            raise ValueError(f"images of shape {self.shape}; one image is (C, H, W)")
        self.written = 0
        self._arrays: dict[str, NDArray[Any]] = {}
        # The suffix lets the owner of the folder clear it away after a kill (`runtime.files.remove_partial`).
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
        self._handle: IO[bytes] | None = None
        self._archive: zipfile.ZipFile | None = None
        self._member: IO[bytes] | None = None

    def __enter__(self) -> AdmWriter:
        try:
            self._handle = open(self._partial, "wb")
            self._archive = zipfile.ZipFile(self._handle, "w", zipfile.ZIP_STORED)
            self._member = self._archive.open("arr_0.npy", "w", force_zip64=True)
            channels, height, width = self.shape
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, height, width, channels)}
            np.lib.format.write_array_header_1_0(self._member, header)
        except OSError as error:
            self._abandon()
            raise self._refused(error) from error
        return self

    def write(self, images: Images) -> None:
        """The next images: uint8 [n, C, H, W]."""
        assert self._member is not None
        pixels = _pixels(images)
        if tuple(pixels.shape[1:]) != self.shape or self.written + len(pixels) > self.count:
            raise ValueError(
                f"{len(pixels)} images of shape {tuple(pixels.shape[1:])} after {self.written}; "
                f"{self.path.name} takes {self.count} of shape {self.shape}"
            )
        try:
            self._member.write(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).data)
        except OSError as error:
            raise self._refused(error) from error
        self.written += len(pixels)

    def labels(self, values: Any) -> None:
        """Labels of all images, int64 [N]: `arr_1`."""
        self.array("arr_1", np.asarray(values, dtype=np.int64))

    def array(self, name: str, values: Any) -> None:
        """A further array, one entry per image."""
        array = np.asarray(values)
        if len(array) != self.count:
            raise ValueError(f"{name} has {len(array)} entries for {self.count} images")
        self._arrays[name] = array

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon()
            return
        try:
            if self.written != self.count:
                raise ValueError(f"{self.path.name} was to hold {self.count} images and got {self.written}")
            assert self._handle is not None and self._archive is not None and self._member is not None
            self._member.close()
            for name, array in self._arrays.items():
                with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            self._archive.close()
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._handle.close()
            os.replace(self._partial, self.path)
        except OSError as failure:
            self._abandon()
            raise self._refused(failure) from failure
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        # Closing in order would write the directory of an archive that nobody wants; each may fail on a full disk.
        for part in (self._member, self._archive, self._handle):
            try:
                if part is not None:
                    part.close()
            except (OSError, ValueError):
                continue
        self._partial.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> RunError:
        left = "the previous file is intact" if self.path.exists() else "nothing was left behind"
        reason = error.strerror or str(error)
        return RunError(f"could not write {self.path} ({reason}): make room or choose another place; {left}")


class PngFolder:
    """A folder of 000000.png, 000001.png, ... named by image index: grey or RGB, each written whole or not at all.

    Several processes may write into one folder, each its own images.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"could not make the folder {path} ({error.strerror}); choose another place") from error

    def file(self, index: int) -> Path:
        """Where image `index` is."""
        return self.path / f"{index:06d}.png"

    def write(self, images: Images, start: int) -> None:
        """Images `start`, `start + 1`, ...: uint8 [n, C, H, W] with one channel or three. Raises RunError when the
        system refuses; images before the one that failed stay."""
        from PIL import Image

        pixels = _pixels(images)
        if pixels.shape[1] not in (1, 3):
            raise ValueError(f"images of {pixels.shape[1]} channels; a PNG has 1 (grey) or 3 (RGB) here")
        for index, image in enumerate(pixels, start):
            picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            atomic_write(self.file(index), buffer.getvalue())

    def clear_others(self, indices: range) -> None:
        """Removes images of other indices, which an earlier writer left: whoever reads a folder reads all of it."""
        for file in self.path.glob("*.png"):
            if file.stem.isdigit() and (int(file.stem) not in indices or file != self.file(int(file.stem))):
                file.unlink(missing_ok=True)


def _pixels(images: Images) -> NDArray[np.uint8]:
    """uint8 [n, C, H, W] on the host."""
    array = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(f"images must be uint8 [n, C, H, W], got {array.dtype} of shape {array.shape}")
    return array
