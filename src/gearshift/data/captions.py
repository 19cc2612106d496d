"""Images with captions: a folder with a captions.jsonl, or a data set of the hub. COCO has a file of its own (`coco`).

    path    {train,test}/captions.jsonl (or metadata.jsonl) beside the images, lines {"file_name": "0001.png", "text":
            "a red square"} or with a list of texts; or one such file at the top, where an image is a test image when
            the hash of its name falls below `test_fraction`
    hub     an id, with the names of its columns and splits

Every image has at least one caption. Images are streamed as those of ImageNet are, by the same centre crop; training on
captions goes by `gearshift encode`, which reads the captions with `captions`.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
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

_FILES = ("captions.jsonl", "metadata.jsonl")
_FOLDERS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
_BLOCK = 256
# What an image is (a file or a stream) with what to call it when it is broken.
Cell = tuple[Any, str]
Texts = tuple[str, ...]


@dataclass(frozen=True)
class CaptionsConfig:
    """path: a folder. hub, subset: id on the hub and its configuration, instead of a path. image, caption: column names
    (the latter also in .jsonl files). train, test: names of the hub's splits. size: side in pixels. captions: keep the
    first so many of every image. flip: mirror images in training, which makes a lie of left and right in captions.
    test_fraction: see the top of the file."""

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    image: str = "image"
    caption: str = "text"
    train: str = "train"
    test: str = "validation"
    size: int = 256
    captions: int | None = None
    flip: bool = False
    test_fraction: float = 0.1


@dataclass(frozen=True)
class CaptionStream:
    """An `ImageSource` whose images are decoded when they are read, and their captions."""

    cells: Callable[[int, int], Sequence[Cell]]
    texts: Sequence[Texts]
    image_size: int
    split: str
    digest: str
    provenance: str
    name: str
    channels: int = 3
    labels: None = None
    num_classes: None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start..stop-1, uint8 [stop - start, 3, size, size], decoded by several threads. Raises RunError naming
        an image that is broken."""

        def decode(cell: Cell) -> np.ndarray:
            return read_image(cell[0], self.image_size, 3, what=cell[1])

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return torch.from_numpy(np.stack(list(pool.map(decode, self.cells(start, stop)))))

    def captions(self, start: int, stop: int) -> Sequence[Texts]:
        """The captions of images start..stop-1, at least one each."""
        return self.texts[start:stop]


class CaptionSet(ABC):
    """uint8 [N, 3, size, size] without classes, and captions, from files."""

    # Another folder is another data set.
    path_is_identity: ClassVar[bool] = True
    channels: int = 3
    num_classes: int | None = None

    def __init__(self, path: str | None, size: int, captions: int | None, flip: bool) -> None:
        """Opens nothing. Raises UsageError for options out of range and a path that is no folder."""
        if size < 1 or (captions is not None and captions < 1):
            raise UsageError(f"size={size} and captions={captions} of images with captions must be at least 1")
        if path is not None and not Path(path).expanduser().is_dir():
            raise UsageError(f"data.path={path} is not a folder. {self.expected()}")
        self.path, self.image_size, self.most, self.flip = path, size, captions, flip

    @abstractmethod
    def expected(self) -> str:
        """Sentences on what is wanted, and how to get it."""

    @abstractmethod
    def files(self, root: Path, split: str) -> list[tuple[Path, Texts]]:
        """Image files below `root` and their captions, in an order that never changes; nothing for an absent split."""

    @property
    def name(self) -> str:
        return Path(self.path or ".").expanduser().resolve().name

    def stream(self, split: str) -> CaptionStream:
        """The split "train" or "test" to be read by index ranges.

        Raises UsageError for another name or an absent split, RunError when files cannot be read.
        """
        check_split(split, "a data set of captions")
        if self.path is None:
            raise UsageError(f"data.path=null names no folder. {self.expected()}")
        root = Path(self.path).expanduser()
        found = self.files(root, split)
        if not found:
            raise UsageError(f"data.path={self.path} has no captions in its {split} split. {self.expected()}")
        paths = [path for path, _ in found]
        identity: list[tuple[str, int]] = []
        for path in paths:
            try:
                identity.append((path.relative_to(root).as_posix(), path.stat().st_size))
            except (OSError, ValueError) as error:
                raise RunError(f"{path} has a caption and is not there ({error}); bring it, or remove it") from error

        def cells(start: int, stop: int) -> Sequence[Cell]:
            return [(path, "") for path in paths[start:stop]]

        return self.streamed(cells, [texts for _, texts in found], split, identity, self.name, f"folder {self.path}")

    def load(self, split: str) -> ImageDataset:
        """The images of the split decoded in the cache, without their captions. Raises as `stream` does."""
        stream = self.stream(split)

        def items() -> Iterator[tuple[np.ndarray, int]]:
            for start in range(0, len(stream), _BLOCK):
                for image in stream.read(start, min(start + _BLOCK, len(stream))).numpy():
                    yield image, 0

        shape = (3, self.image_size, self.image_size)
        key = {"source": "captions", "digest": stream.digest}
        decoded = decode_once(key, lambda: Encoded(len(stream), shape, False, items))
        return ImageDataset(
            images_u8=torch.from_numpy(decoded.images),
            labels=None,
            num_classes=None,
            class_names=(),
            name=stream.name,
            split=split,
            digest=decoded.digest,
            provenance=stream.provenance,
        )

    def streamed(
        self,
        cells: Callable[[int, int], Sequence[Cell]],
        texts: Sequence[Texts],
        split: str,
        identity: Sequence[tuple[str, int]],
        name: str,
        origin: str,
    ) -> CaptionStream:
        """The stream of these images; `identity` changes when a file does."""
        text = json.dumps([split, self.image_size, identity, texts])
        return CaptionStream(
            cells=cells,
            texts=texts,
            image_size=self.image_size,
            split=split,
            digest=hashlib.sha256(text.encode()).hexdigest(),
            provenance=f"{name} {split} {len(texts)} with {sum(map(len, texts))} captions, {origin}, "
            f"{self.image_size}px by box and bicubic (ADM)",
            name=name,
        )


class Captions(CaptionSet):
    """Captions of a folder or of the hub."""

    Config: ClassVar[type[CaptionsConfig]] = CaptionsConfig

    def __init__(self, config: CaptionsConfig) -> None:
        """Opens nothing. Raises UsageError for options out of range, and unless one place to read from is named."""
        self.config = config
        super().__init__(config.path, config.size, config.captions, config.flip)
        if not 0 < config.test_fraction < 1:
            raise UsageError(f"test_fraction={config.test_fraction} must lie between 0 and 1")
        if (config.path is None) == (config.hub is None):
            raise UsageError(f"data.path={config.path} and data.hub={config.hub}: give one of them. {self.expected()}")

    def expected(self) -> str:
        return (
            "Expected is data.path=FOLDER with images and captions.jsonl or metadata.jsonl in train/ and test/ (or at "
            f'the top), lines like {{"file_name": "0001.png", "{self.config.caption}": "a red square"}}; or '
            "data.path=null data.hub=ID"
        )

    def stream(self, split: str) -> CaptionStream:
        if self.config.hub is None:
            return super().stream(split)
        check_split(split, "a data set of captions")
        return self._of_hub(split)

    def files(self, root: Path, split: str) -> list[tuple[Path, Texts]]:
        """What the .jsonl file of the split lists, in the order of file names; of the one at the top its share."""
        config = self.config
        places = [root / folder for name in ("train", "test") for folder in _FOLDERS[name]]
        apart = any((place / file).is_file() for place in places for file in _FILES)
        homes = [root / folder for folder in _FOLDERS[split]] if apart else [root]
        listing = next((home / file for home in homes for file in _FILES if (home / file).is_file()), None)
        if listing is None:
            return []
        found = _lines(listing, config.caption)
        names = sorted(found)
        if not apart:
            names = [name for name in names if (_share(name) < config.test_fraction) == (split == "test")]
        return [(listing.parent / name, texts_of(found[name], name, self.most)) for name in names]

    def _of_hub(self, split: str) -> CaptionStream:
        config = self.config
        hub, part = str(config.hub), {"train": config.train, "test": config.test}[split]
        with reaching_hub(hub, "data.path=FOLDER data.hub=null", split=part):
            import datasets

            table = datasets.load_dataset(hub, config.subset, split=part)
        absent = [name for name in (config.image, config.caption) if name not in table.column_names]
        if absent:
            raise UsageError(
                f"{hub} has the columns {', '.join(table.column_names)} and no {absent[0]}; name them by data.image "
                "and data.caption"
            )
        table = table.cast_column(config.image, datasets.Image(decode=False))
        column = table.select_columns(config.caption)[:][config.caption]
        texts = [texts_of(value, f"row {row} of {hub} {part}", self.most) for row, value in enumerate(column)]

        def cells(start: int, stop: int) -> Sequence[Cell]:
            values = table[start:stop][config.image]
            return [(encoded(value)[0], f"image {i} of {hub} {part}") for i, value in enumerate(values, start)]

        identity = [(str(table._fingerprint), len(table))]
        return self.streamed(cells, texts, split, identity, hub.rpartition("/")[2], f"hub {hub}")


def _lines(listing: Path, caption: str) -> dict[str, list[str]]:
    """File names and captions of a .jsonl file. Raises RunError where it is damaged and UsageError for other keys."""
    found: dict[str, list[str]] = {}
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"{listing} is not readable ({error}); mend it") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{listing}, line {number},"
        try:
            entry = dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise RunError(f"{where} is no JSON object ({error}); mend it") from error
        missing = [key for key in ("file_name", caption) if key not in entry]
        if missing:
            raise UsageError(
                f"{where} has the keys {', '.join(entry)} and no {missing[0]}; name the captions by data.caption"
            )
        # An image may stand in several lines, one for each caption.
        found.setdefault(str(entry["file_name"]), []).extend(texts_of(entry[caption], where, None))
    return found


def texts_of(value: Any, what: str, most: int | None) -> Texts:
    """One caption or several as a tuple of at least one. Raises RunError."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        shown = str(value)[:60]
        raise RunError(f"{what} has the caption {shown!r}; needed is a text, or a list of texts, none of them empty")
    return tuple(text.strip() for text in texts[:most])


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name only, uniform over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2.0**64
