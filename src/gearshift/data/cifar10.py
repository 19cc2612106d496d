"""CIFAR-10 (Krizhevsky, 2009): 50,000 train and 10,000 test photographs of 32 x 32, ten classes.

From the hub through `datasets`, or, with `path`, from what is on this disk: parquet files with the hub's columns
(`img`, `label`) or a folder with one folder per class. Copies that went through JPEG are good to train on and to
compare runs with each other; Fréchet distances measured on them are not comparable with published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from gearshift.data.cache import Decoded, Encoded, decode_once, fingerprint
from gearshift.data.crops import read_image
from gearshift.data.dataset import ImageDataset, check_split
from gearshift.data.imagefolder import ImageFolder, ImageFolderConfig
from gearshift.data.tables import count_rows, encoded, reaching_hub, read_rows
from gearshift.runtime.errors import RunError, UsageError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_EXPECTED = "expected train-*.parquet and test-*.parquet (columns img, label) or one folder per class"


@dataclass(frozen=True)
class Cifar10Config:
    """path: local copy, or null for the hub. hub: name on the hub. flip: mirror images in training."""

    path: str | None = None
    hub: str = "uoft-cs/cifar10"
    flip: bool = True


class Cifar10:
    """uint8 [N, 3, 32, 32]."""

    Config: ClassVar[type[Cifar10Config]] = Cifar10Config
    image_size: int = 32
    channels: int = 3
    num_classes: int | None = 10

    def __init__(self, config: Cifar10Config) -> None:
        """Looks at the path and loads nothing. Raises UsageError when there is no CIFAR-10 at it."""
        self.config = config
        self.flip = config.flip
        self._folder: ImageFolder | None = None
        self._parquet: Path | None = None
        if config.path is None:
            return
        root = Path(config.path).expanduser()
        if not root.is_dir():
            raise UsageError(f"data.path={config.path} is not a folder; {_EXPECTED}")
        # A clone from the hub keeps its files one level down.
        for place in (root, root / "plain_text", root / "data"):
            if all(_shards(place, split) for split in ("train", "test")):
                self._parquet = place
                return
        parquet = sorted(path.name for path in root.glob("*.parquet"))
        if parquet:
            raise UsageError(f"data.path={config.path} holds {', '.join(parquet[:4])}; {_EXPECTED}")
        self._folder = ImageFolder(ImageFolderConfig(path=config.path, size=32, flip=config.flip))
        if self._folder.num_classes != self.num_classes:
            raise UsageError(
                f"data.path={config.path} has {self._folder.num_classes or 0} class folders, CIFAR-10 has 10; "
                f"{_EXPECTED}"
            )

    def load(self, split: str) -> ImageDataset:
        """The split "train" or "test". Raises UsageError for another name, RunError when the data cannot be read."""
        check_split(split, "cifar10")
        if self._folder is not None:
            return replace(self._folder.load(split), name="cifar10")
        if self._parquet is not None:
            files = _shards(self._parquet, split)
            key: dict[str, Any] = {"source": str(self._parquet.resolve()), "files": fingerprint(files, self._parquet)}
            origin = f"parquet {self.config.path}"
            return self._dataset(decode_once(key, lambda: _from_parquet(files)), split, _names(files[0]), origin)
        key = {"source": f"hub:{self.config.hub}", "split": split}
        return self._dataset(decode_once(key, lambda: self._from_hub(split)), split, CLASSES, f"hub {self.config.hub}")

    def _dataset(self, decoded: Decoded, split: str, names: tuple[str, ...], origin: str) -> ImageDataset:
        labels = decoded.labels
        assert labels is not None
        if labels.min() < 0 or labels.max() >= len(CLASSES):
            raise RunError(
                f"{origin}: labels {labels.min()}..{labels.max()}, CIFAR-10 has 0..9; this is another data set"
            )
        return ImageDataset(
            images_u8=torch.from_numpy(decoded.images),
            labels=torch.from_numpy(labels),
            num_classes=10,
            class_names=names,
            name="cifar10",
            split=split,
            digest=decoded.digest,
            provenance=f"CIFAR-10 {split} {len(labels)}, {origin}",
        )

    def _from_hub(self, split: str) -> Encoded:
        with reaching_hub(self.config.hub, f"data.path=FOLDER: {_EXPECTED}"):
            import datasets

            table = datasets.load_dataset(self.config.hub, split=split)
            table = table.cast_column("img", datasets.Image(decode=False))

        def items() -> Iterator[tuple[np.ndarray, int]]:
            for row in table:
                yield _decode(row["img"], f"{self.config.hub} {split}"), int(row["label"])

        return Encoded(len(table), (3, 32, 32), True, items)


def _shards(folder: Path, split: str) -> list[Path]:
    return sorted([*folder.glob(f"{split}-*.parquet"), *folder.glob(f"{split}.parquet")])


def _from_parquet(files: list[Path]) -> Encoded:
    columns = ("img", "label")
    count = count_rows(files, columns, _EXPECTED)

    def items() -> Iterator[tuple[np.ndarray, int]]:
        for path, row in read_rows(files, columns):
            yield _decode(row["img"], str(path)), int(row["label"])

    return Encoded(count, (3, 32, 32), True, items)


def _decode(cell: dict[str, Any] | bytes, where: str) -> np.ndarray:
    """A cell of column `img`."""
    return read_image(encoded(cell)[0], 32, 3, what=f"an image in {where}")


def _names(path: Path) -> tuple[str, ...]:
    """Class names that the hub writes into the file's schema, or the usual ones."""
    from pyarrow.parquet import read_schema

    try:
        info = json.loads((read_schema(path).metadata or {})[b"huggingface"])
        names = tuple(info["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return CLASSES
    return names if len(names) == len(CLASSES) else CLASSES
