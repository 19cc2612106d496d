"""A split of a data set, and what is known of it before it is loaded.

Three views: `ImageDataset` holds every image in one uint8 array; `ImageSource` is what can be read by index ranges, for
sets whose pixels should never all lie somewhere; `TrainingData` is what a training takes its batches from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gearshift.data.pixels import to_pm1
from gearshift.data.text_rows import TextRows
from gearshift.runtime.errors import UsageError

SPLITS = ("train", "test")


@dataclass(frozen=True)
class ImageDataset:
    """One split. `images_u8` is uint8 [N, C, H, W]; `labels` int64 [N] in [0, num_classes), or None without classes.

    `digest` is the SHA-256 of the content (shape, pixels, labels), so two copies of the same data share it wherever
    they come from; `provenance` says in one line where it came from and what was done to it.
    """

    images_u8: Tensor
    labels: Tensor | None
    num_classes: int | None
    class_names: tuple[str, ...]
    name: str
    split: str
    digest: str
    provenance: str

    def __len__(self) -> int:
        return self.images_u8.shape[0]

    @property
    def channels(self) -> int:
        return self.images_u8.shape[1]

    @property
    def image_size(self) -> int:
        """Height in pixels, which is the width too."""
        return self.images_u8.shape[-1]

    @property
    def nbytes(self) -> int:
        """Size of the images."""
        return self.images_u8.nbytes

    @property
    def noise_shape(self) -> None:
        """Nothing about an image is random."""
        return None

    @property
    def text(self) -> None:
        """Captions have features where they were encoded, beside latents."""
        return None

    def apply(self, function: Callable[[Tensor], Tensor]) -> ImageDataset:
        """The same split with `function` of its two tensors in their place."""
        labels = None if self.labels is None else function(self.labels)
        return replace(self, images_u8=function(self.images_u8), labels=labels)

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same split with its two tensors on `device`."""
        return self.apply(lambda tensor: tensor.to(device))

    def read(self, start: int, stop: int) -> Tensor:
        """Images start..stop-1, uint8 [stop - start, C, H, W]."""
        return self.images_u8[start:stop]

    def take(self, index: Tensor, flip: Tensor | None = None) -> ImageDataset:
        """The images of `index` (int64 [B], on the device of the split) alone, in that order.

        `flip` (bool [B]) says which of them are mirrored left to right; who draws it is the trainer's business.
        """
        images = self.images_u8[index]
        if flip is not None:
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return replace(self, images_u8=images, labels=None if self.labels is None else self.labels[index])

    def floats(self, noise: None = None) -> Tensor:
        """All images as float32 [N, C, H, W] in [-1, 1]."""
        return to_pm1(self.images_u8)

    def gather(self, index: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Images of `index` as float32 [B, C, H, W] in [-1, 1], and their labels; `flip` as in `take`."""
        taken = self.take(index, flip)
        return taken.floats(), taken.labels


class ImageSource(Protocol):
    """Images of one split that are read by index ranges; the fields mean what those of `ImageDataset` do, but `digest`
    may be one of the files where that of the content would take reading them all."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def provenance(self) -> str: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def channels(self) -> int: ...
    @property
    def image_size(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Images start..stop-1, uint8 [stop - start, C, H, W]. Raises RunError naming an image that is broken."""
        ...


Self = TypeVar("Self", bound="TrainingData")


class TrainingData(Protocol):
    """A split as a training needs it: rows are taken, moved, and made into what the network is trained on.

    `noise_shape` is that of the standard normal noise per row that `floats` wants, None where it wants none; `text` are
    features of captions, None without captions.
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def channels(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def noise_shape(self) -> tuple[int, ...] | None: ...
    @property
    def text(self) -> TextRows | None: ...

    def __len__(self) -> int: ...

    def apply(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same rows with `function` of every tensor in its place."""
        ...

    def to(self: Self, device: torch.device | str) -> Self:
        """The same rows on `device`."""
        ...

    def take(self: Self, index: Tensor, flip: Tensor | None = None) -> Self:
        """The rows of `index` (int64 [B]) alone, those in `flip` (bool [B]) mirrored left to right."""
        ...

    def floats(self, noise: Any = None) -> Tensor:
        """Rows that were taken, as float32 [B, C, H, W]; `noise` is [B, *noise_shape]."""
        ...


class DataSource(Protocol):
    """What a data set tells before it is loaded (enough to build the backbone), and how it is loaded."""

    image_size: int
    channels: int
    num_classes: int | None
    flip: bool

    def load(self, split: str) -> ImageDataset:
        """The split "train" or "test". Raises UsageError for another name, RunError when the data cannot be read."""
        ...


def source_of(data: DataSource, split: str) -> ImageSource:
    """A split to be read by index ranges: from its stream where it has one, else loaded. Raises as `load` does."""
    stream = getattr(data, "stream", data.load)
    found: ImageSource = stream(split)
    return found


def content_digest(images_u8: np.ndarray, labels: np.ndarray | None) -> str:
    """SHA-256 of shape, pixels and labels, read in pieces so that a memory-mapped array never has to fit in memory."""
    digest = hashlib.sha256(repr((images_u8.shape, labels is not None)).encode())
    for start in range(0, len(images_u8), 4096):
        digest.update(np.ascontiguousarray(images_u8[start : start + 4096]).data)
    if labels is not None:
        digest.update(np.ascontiguousarray(labels.astype("<i8", copy=False)).data)
    return digest.hexdigest()


def check_split(split: str, name: str) -> None:
    """Raises UsageError unless `split` is one that every data set has."""
    if split not in SPLITS:
        raise UsageError(f"{name} has no split '{split}'; choose one of {', '.join(SPLITS)}")
