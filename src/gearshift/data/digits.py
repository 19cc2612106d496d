"""Handwritten digits that come with scikit-learn: 1797 images of 8 x 8, ten classes, no network needed.

The test half of the UCI "Optical Recognition of Handwritten Digits" set. Values 0..16 are scaled to 0..255 and
rounded to nearest. The split is fixed: of each class an even share (297 of 1797, largest remainders first) of evenly
spaced images is the test split, 1500 the train split. Writers appear in both, so it measures fit to this set and not
to new hands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from gearshift.data.dataset import ImageDataset, check_split, content_digest

TEST_IMAGES = 297


@dataclass(frozen=True)
class DigitsConfig:
    """flip: mirror images in training (a mirrored 2 is not a 2, so no)."""

    flip: bool = False


class Digits:
    """1500 train and 297 test images, uint8 [N, 1, 8, 8]."""

    Config: ClassVar[type[DigitsConfig]] = DigitsConfig
    image_size: int = 8
    channels: int = 1
    num_classes: int | None = 10

    def __init__(self, config: DigitsConfig) -> None:
        self.flip = config.flip

    def load(self, split: str) -> ImageDataset:
        """The split "train" or "test". Raises UsageError for another name."""
        check_split(split, "digits")
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.floor(np.asarray(bunch.images) * (255.0 / 16.0) + 0.5).astype(np.uint8)[:, None]
        labels = np.asarray(bunch.target).astype(np.int64)
        chosen = np.isin(np.arange(len(labels)), held_out_indices(labels, TEST_IMAGES))
        chosen = chosen if split == "test" else ~chosen
        images, labels = np.ascontiguousarray(images[chosen]), labels[chosen]
        return ImageDataset(
            images_u8=torch.from_numpy(images),
            labels=torch.from_numpy(labels),
            num_classes=10,
            class_names=tuple(str(digit) for digit in range(10)),
            name="digits",
            split=split,
            digest=content_digest(images, labels),
            provenance=f"scikit-learn digits 8x8, 0..16 scaled to 0..255, {split} {len(labels)} of 1797 (stratified)",
        )


def held_out_indices(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` test images: per class its share by largest remainder, evenly spaced through the class."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / len(labels))
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - shares), kind="stable")
    shares[order[: count - shares.sum()]] += 1
    picked = []
    for label, size, share in zip(classes, sizes, shares, strict=True):
        spaced = np.floor((np.arange(share) + 0.5) * size / share).astype(np.int64)
        picked.append(np.flatnonzero(labels == label)[spaced])
    return np.sort(np.concatenate(picked))
