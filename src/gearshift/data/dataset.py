"""A split of a data set: every image in one uint8 array, and what is known of it before it is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gearshift.data.pixels import to_pm1
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

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same split with its two tensors on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images_u8=self.images_u8.to(device), labels=labels)

    def gather(self, index: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Images of `index` (int64 [B], on the device of the split) as float32 [B, C, H, W] in [-1, 1], and their
        labels.

        `flip` (bool [B]) says which of them are mirrored left to right; who draws it is the trainer's business.
        """
        images = to_pm1(self.images_u8[index])
        if flip is not None:
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return images, None if self.labels is None else self.labels[index]


class DataSource(Protocol):
    """What a data set tells before it is loaded (enough to build the backbone), and how it is loaded."""

    image_size: int
    channels: int
    num_classes: int | None
    flip: bool

    def load(self, split: str) -> ImageDataset:
        """The split "train" or "test". Raises UsageError for another name, RunError when the data cannot be read."""
        ...


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
