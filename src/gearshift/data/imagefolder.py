"""Any tree of image files: class folders or a flat folder, cropped and resized to squares of one size.

Preprocessing: see `crops`; `crop` cuts a box out of every image before it.

Splits: folders `train` and `test` (or `val`, `valid`, `validation`) where present; otherwise an image is a test image
when the hash of its path falls below `test_fraction`, so that adding images never moves one from one split to the
other.

A data set with rules of its own (`celeba`) overrides `listed`, `rule`, `read` and `options`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from gearshift.data.cache import Encoded, decode_once, fingerprint
from gearshift.data.crops import Box, read_image
from gearshift.data.dataset import ImageDataset, check_split
from gearshift.runtime.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_TEST_NAMES = ("test", "val", "valid", "validation")
_EXPECTED = "expected a folder of images, of class folders with images, or of train/ and test/ with either"


@dataclass(frozen=True)
class ImageFolderConfig:
    """path: the folder. size: side in pixels. channels: 1 (grey) or 3 (RGB). flip: mirror images in training.
    test_fraction: share of test images where the tree has no split of its own. crop: (left, top, right, bottom) in
    pixels, cut out of every image first."""

    path: str
    size: int
    channels: int = 3
    flip: bool = True
    test_fraction: float = 0.1
    crop: Box | None = None


class ImageFolder:
    """uint8 [N, channels, size, size]; classes are the class folders in alphabetical order, none for a flat folder."""

    Config: ClassVar[type[ImageFolderConfig]] = ImageFolderConfig
    # Another folder is another data set.
    path_is_identity: ClassVar[bool] = True
    expected: ClassVar[str] = _EXPECTED

    def __init__(self, config: ImageFolderConfig) -> None:
        """Lists the folder; no image is opened. Raises UsageError when there is nothing to read or an option is out
        of range."""
        if config.channels not in (1, 3):
            raise UsageError(f"channels={config.channels} of an image folder; choose 1 (grey) or 3 (RGB)")
        if config.size < 1 or not 0 < config.test_fraction < 1:
            raise UsageError(
                f"size={config.size}, test_fraction={config.test_fraction}: need size >= 1 and 0 < fraction < 1"
            )
        if config.crop is not None and not _is_box(config.crop):
            raise UsageError(
                f"crop={list(config.crop)} is not left, top, right, bottom with 0 <= left < right and so on"
            )
        self.config = config
        self.root = Path(config.path).expanduser()
        if not self.root.is_dir():
            raise UsageError(f"data.path={config.path} is not a folder; {self.expected}")
        self.image_size = config.size
        self.channels = config.channels
        self.flip = config.flip
        folders = subfolders(self.root)
        self._parts: dict[str, Path] = {}
        if "train" in folders and set(folders) <= {"train", *_TEST_NAMES}:
            self._parts["train"] = self.root / "train"
            for name in _TEST_NAMES:
                if name in folders:
                    self._parts.setdefault("test", self.root / name)
        self.class_names = tuple(subfolders(self._parts.get("train", self.root)))
        self.num_classes: int | None = len(self.class_names) or None

    def load(self, split: str) -> ImageDataset:
        """The split "train" or "test". Raises UsageError for another name or an empty split, RunError for a broken
        image."""
        check_split(split, str(self.root))
        pairs = self.listed(split)
        config = self.config
        if not pairs:
            raise UsageError(f"data.path={config.path} has no images in its {split} split; {self.expected}")
        key: dict[str, Any] = {
            "source": str(self.root.resolve()),
            "size": config.size,
            "channels": config.channels,
            "files": fingerprint([path for path, _ in pairs], self.root),
            "classes": self.class_names,
            **self.options(),
        }

        def items() -> Iterator[tuple[np.ndarray, int]]:
            for path, label in pairs:
                yield self.read(path), label

        shape = (config.channels, config.size, config.size)
        decoded = decode_once(key, lambda: Encoded(len(pairs), shape, self.num_classes is not None, items))
        size = f"{config.size}px by box and bicubic"
        size = size if config.crop is None else f"box {list(config.crop)}, {size}"
        return ImageDataset(
            images_u8=torch.from_numpy(decoded.images),
            labels=None if decoded.labels is None else torch.from_numpy(decoded.labels),
            num_classes=self.num_classes,
            class_names=self.class_names,
            name=self.root.resolve().name,
            split=split,
            digest=decoded.digest,
            provenance=f"image folder {config.path}, {split} {len(pairs)} ({self.rule(split)}), {size}",
        )

    def listed(self, split: str) -> list[tuple[Path, int]]:
        """(file, class) of the split in the order of paths; class 0 throughout where there are no classes."""
        if "test" in self._parts:
            return self._pairs(self._parts[split])
        pairs = self._pairs(self._parts.get("train", self.root))
        bound = self.config.test_fraction
        return [pair for pair in pairs if (_share(pair[0].relative_to(self.root)) < bound) == (split == "test")]

    def rule(self, split: str) -> str:
        """How the images of the split were told from the others."""
        return f"{split}/" if self._parts.get("test") else f"{self.config.test_fraction:g} of the paths' hashes is test"

    def read(self, path: Path) -> np.ndarray:
        """One file as uint8 [channels, size, size]. Raises RunError where it cannot be."""
        return read_image(path, self.config.size, self.config.channels, box=self.config.crop)

    def options(self) -> dict[str, Any]:
        """What `read` depends on besides size and channels, for the cache."""
        return {} if self.config.crop is None else {"crop": self.config.crop}

    def _pairs(self, root: Path) -> list[tuple[Path, int]]:
        names = subfolders(root)
        foreign = sorted(set(names) - set(self.class_names))
        if foreign:
            raise UsageError(
                f"{root} has the class folder '{foreign[0]}', which the train split {self.class_names} has not"
            )
        if not self.class_names:
            return [(path, 0) for path in images_below(root)]
        return [(path, self.class_names.index(name)) for name in names for path in images_below(root / name)]


def _is_box(box: Box) -> bool:
    left, top, right, bottom = box
    return 0 <= left < right and 0 <= top < bottom


def subfolders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_below(root: Path) -> list[Path]:
    """Image files below `root`, at any depth, in the order of their paths."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _share(path: Path) -> float:
    """A number in [0, 1) that depends on the path only, uniform over paths."""
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big") / 2.0**64
