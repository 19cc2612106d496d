"""ImageNet (ILSVRC 2012): 1,281,167 train and 50,000 validation photographs, 1000 classes, by ADM's centre crop.

From a class-folder tree (`train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`, also below `ILSVRC/Data/CLS-LOC`), from
local parquet files with the hub's columns (`image`, `label`), or from the hub through `datasets`. Classes are numbered
in the order of their WordNet ids, as every released network numbers them. "test" is the validation set: the labels of
the test set were never released.

Images are streamed: nothing holds them all. `load` decodes them into the cache once (15.7 GB at 64 pixels, 252 GB at
256) for who trains on pixels; `gearshift encode` needs no such thing.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gearshift.data.cache import Encoded, decode_once
from gearshift.data.crops import read_image
from gearshift.data.dataset import ImageDataset, check_split
from gearshift.data.tables import encoded, reaching_hub
from gearshift.runtime.errors import RunError, UsageError

_HOMES = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "data")
_FOLDERS = {"train": ("train",), "test": ("val", "validation")}
_WNID = re.compile(r"n\d{8}")
_SUFFIXES = (".jpeg", ".jpg", ".png")
_EXPECTED = (
    "expected train/ and val/ with one folder per WordNet id (n01440764, ...), or train-*.parquet and "
    "validation-*.parquet with the columns image and label"
)
_BLOCK = 256
# What an image is: a file or a stream, and what to call it when it is broken.
Cell = tuple[Any, str]


@dataclass(frozen=True)
class ImageNetConfig:
    """path: a local copy, or null for the hub. hub: name on the hub. size: side in pixels. classes: how many there are
    (a subset has fewer). flip: mirror images in training."""

    path: str | None = None
    hub: str = "ILSVRC/imagenet-1k"
    size: int = 256
    classes: int = 1000
    flip: bool = True


@dataclass(frozen=True)
class ImageStream:
    """An `ImageSource` whose images are decoded when they are read. `cells` finds those of an index range."""

    cells: Callable[[int, int], Sequence[Cell]]
    labels: Tensor
    class_names: tuple[str, ...]
    image_size: int
    split: str
    digest: str
    provenance: str
    name: str = "imagenet"
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start..stop-1, uint8 [stop - start, 3, size, size], decoded by several threads. Raises RunError naming
        an image that is broken."""

        def decode(cell: Cell) -> np.ndarray:
            return read_image(cell[0], self.image_size, 3, what=cell[1])

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return torch.from_numpy(np.stack(list(pool.map(decode, self.cells(start, stop)))))


class ImageNet:
    """uint8 [N, 3, size, size]."""

    Config: ClassVar[type[ImageNetConfig]] = ImageNetConfig
    channels: int = 3

    def __init__(self, config: ImageNetConfig) -> None:
        """Looks at the path and opens no image. Raises UsageError when there is no ImageNet at it."""
        if config.size < 1 or config.classes < 1:
            raise UsageError(f"size={config.size} and classes={config.classes} of imagenet must be at least 1")
        self.config = config
        self.image_size, self.flip = config.size, config.flip
        self.num_classes: int | None = config.classes
        self._home: Path | None = None
        if config.path is None:
            return
        root = Path(config.path).expanduser()
        if not root.is_dir():
            raise UsageError(f"data.path={config.path} is not a folder; {_EXPECTED}")
        homes = [root / home for home in _HOMES]
        found = [home for home in homes if any(_tree(home, split) or _parquet(home, split) for split in _FOLDERS)]
        if not found:
            raise UsageError(f"data.path={config.path} holds no ImageNet; {_EXPECTED}")
        self._home = found[0]

    def stream(self, split: str) -> ImageStream:
        """The split "train" or "test" to be read by index ranges.

        Raises UsageError for another name, an absent split or other classes, RunError when files cannot be read.
        """
        check_split(split, "imagenet")
        if self._home is None:
            return self._of_hub(split)
        tree = _tree(self._home, split)
        if tree is not None:
            return self._of_tree(tree, split)
        files = _parquet(self._home, split)
        if not files:
            raise UsageError(f"data.path={self.config.path} has no {split} split; {_EXPECTED}")
        return self._of_parquet(files, split)

    def load(self, split: str) -> ImageDataset:
        """The split decoded in the cache, of the size that the top of this file says. Raises as `stream` does."""
        stream = self.stream(split)

        def items() -> Iterator[tuple[np.ndarray, int]]:
            for start in range(0, len(stream), _BLOCK):
                stop = min(start + _BLOCK, len(stream))
                yield from zip(stream.read(start, stop).numpy(), stream.labels[start:stop].tolist(), strict=True)

        shape = (3, self.image_size, self.image_size)
        key = {"source": "imagenet", "digest": stream.digest}
        decoded = decode_once(key, lambda: Encoded(len(stream), shape, True, items))
        assert decoded.labels is not None
        return ImageDataset(
            images_u8=torch.from_numpy(decoded.images),
            labels=torch.from_numpy(decoded.labels),
            num_classes=self.num_classes,
            class_names=stream.class_names,
            name=stream.name,
            split=split,
            digest=decoded.digest,
            provenance=stream.provenance,
        )

    def _of_tree(self, root: Path, split: str) -> ImageStream:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        odd = [name for name in names if not _WNID.fullmatch(name)]
        if odd or len(names) != self.config.classes:
            what = f"a folder '{odd[0]}', which is no WordNet id" if odd else f"{len(names)} class folders"
            hint = "" if odd else f", and data.classes={self.config.classes}"
            raise UsageError(f"{root} has {what}{hint}; {_EXPECTED}")
        files: list[tuple[str, int]] = []  # path below the root and size
        labels: list[int] = []
        for label, name in enumerate(names):
            inside = [entry for entry in os.scandir(root / name) if entry.name.lower().endswith(_SUFFIXES)]
            files += [(f"{name}/{entry.name}", entry.stat().st_size) for entry in sorted(inside, key=lambda e: e.name)]
            labels += [label] * len(inside)
        if not files:
            raise UsageError(f"{root} has no images in its class folders; {_EXPECTED}")

        def cells(start: int, stop: int) -> Sequence[Cell]:
            return [(root / path, "") for path, _ in files[start:stop]]

        return self._stream(cells, labels, tuple(names), split, files, f"folder {root}")

    def _of_parquet(self, files: list[Path], split: str) -> ImageStream:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile, read_table

        groups: list[tuple[Path, int]] = []
        ends: list[int] = []
        labels: list[int] = []
        for path in files:
            try:
                opened = ParquetFile(path)
                if missing := {"image", "label"} - set(opened.schema_arrow.names):
                    raise UsageError(f"{path} has no column {sorted(missing)[0]}; {_EXPECTED}")
                for number in range(opened.num_row_groups):
                    groups.append((path, number))
                    ends.append((ends[-1] if ends else 0) + opened.metadata.row_group(number).num_rows)
                labels += read_table(path, columns=["label"])["label"].to_pylist()
            except (ArrowException, OSError) as error:
                raise RunError(f"{path} is not a parquet file that can be read ({error}); fetch it again") from error

        @functools.lru_cache(maxsize=2)  # a range begins in the group in which the one before ended
        def group(number: int) -> list[Any]:
            path, within = groups[number]
            try:
                column: list[Any] = ParquetFile(path).read_row_group(within, columns=["image"])["image"].to_pylist()
            except (ArrowException, OSError) as error:
                raise RunError(f"{path} ends in the middle ({error}); fetch it again") from error
            return column

        def cells(start: int, stop: int) -> Sequence[Cell]:
            found: list[Cell] = []
            while start < stop:
                number = bisect.bisect_right(ends, start)
                first, end = ends[number - 1] if number else 0, min(ends[number], stop)
                path = groups[number][0]
                for index, value in enumerate(group(number)[start - first : end - first], start):
                    found.append(_cell(value, f"image {index} of the {split} split, in {path}"))
                start = end
            return found

        identity = [(path.name, path.stat().st_size) for path in files]
        return self._stream(cells, labels, _names(files[0]), split, identity, f"parquet {self.config.path}")

    def _of_hub(self, split: str) -> ImageStream:
        hub, part = self.config.hub, {"train": "train", "test": "validation"}[split]
        with reaching_hub(hub, f"data.path=FOLDER: {_EXPECTED}"):
            import datasets

            table = datasets.load_dataset(hub, split=part).cast_column("image", datasets.Image(decode=False))
            labels = table.select_columns("label").with_format("numpy")[:]["label"].tolist()
            names = tuple(getattr(table.features["label"], "names", None) or ())

        def cells(start: int, stop: int) -> Sequence[Cell]:
            values = table[start:stop]["image"]
            return [_cell(value, f"image {i} of {hub} {part}") for i, value in enumerate(values, start)]

        return self._stream(cells, labels, names, split, [(table._fingerprint, len(table))], f"hub {hub}")

    def _stream(
        self,
        cells: Callable[[int, int], Sequence[Cell]],
        labels: list[int],
        names: tuple[str, ...],
        split: str,
        identity: Sequence[tuple[str, int]],
        origin: str,
    ) -> ImageStream:
        known = self.config.classes
        if not labels or min(labels) < 0 or max(labels) >= known:
            span = f"labels {min(labels)}..{max(labels)}" if labels else "no images"
            raise RunError(f"{origin}, {split}: {span}, and data.classes={known} needs 0..{known - 1}")
        text = json.dumps([split, self.image_size, known, identity, labels])
        return ImageStream(
            cells=cells,
            labels=torch.tensor(labels),
            class_names=names if len(names) == known else tuple(map(str, range(known))),
            image_size=self.image_size,
            split=split,
            digest=hashlib.sha256(text.encode()).hexdigest(),
            provenance=f"ImageNet {split} {len(labels)}, {origin}, {self.image_size}px by box and bicubic (ADM)",
        )


def _tree(home: Path, split: str) -> Path | None:
    return next((home / name for name in _FOLDERS[split] if (home / name).is_dir()), None)


def _parquet(home: Path, split: str) -> list[Path]:
    return sorted(path for name in _FOLDERS[split] for path in home.glob(f"{name}-*.parquet"))


def _cell(value: Any, what: str) -> Cell:
    """A cell of column `image`, called by its path where it has one."""
    opened, path = encoded(value)
    return opened, f"{what} ({path})" if path else what


def _names(path: Path) -> tuple[str, ...]:
    """Class names that the hub writes into the file's schema, if it did."""
    from pyarrow.parquet import read_schema

    try:
        info = json.loads((read_schema(path).metadata or {})[b"huggingface"])
        return tuple(map(str, info["info"]["features"]["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
