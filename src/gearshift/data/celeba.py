"""CelebA (Liu et al. 2015, arXiv 1411.7766): 202,599 aligned faces of 178 x 218 pixels, without classes.

    path    the aligned images (`img_align_celeba`) with `list_eval_partition.txt` in the folder, in its `Eval/` or
            beside it; or any tree that `imagefolder` splits; or parquet files {train,valid,test}-*.parquet
    hub     an id, with the names of its column and splits

The official partition is train 1..162770, validation to 182637, and test, the last 19,962. "test" is the test part;
nothing is validated on, so the validation part is left out unless `all_splits` trains on everything there is.

What the papers cut out: U-ViT (arXiv 2209.12152) 128 x 128 around row 121 and column 89, mirrored in training, from the
train part; DuoDiff (arXiv 2410.09633) the central 178 x 178, not mirrored, from all parts. Both then resize.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from gearshift.data.cache import Encoded, decode_once, fingerprint
from gearshift.data.celeba_partition import PARTS, find_partition, part_of
from gearshift.data.crops import Box, open_image, square
from gearshift.data.dataset import ImageDataset, check_split
from gearshift.data.imagefolder import ImageFolder, ImageFolderConfig, images_below, subfolders
from gearshift.data.tables import count_rows, encoded, reaching_hub, read_rows
from gearshift.runtime.errors import RunError, UsageError

ALIGNED = (178, 218)
"""Width and height of every aligned image."""
UVIT_CROP: Box = (25, 57, 153, 185)
_PREFIXES = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
_EXPECTED = (
    f"expected img_align_celeba with list_eval_partition.txt (both from {_PAGE}, free for research), a folder with "
    "train/ and test/, or train-*.parquet and test-*.parquet"
)


@dataclass(frozen=True)
class CelebAConfig:
    """path: a local copy, or null for the hub. hub, subset: id on the hub and its configuration. image: its column of
    images, also in parquet files. train, valid, test: its splits, slices allowed (train[:162770]). size: side in
    pixels. channels: 1 (grey) or 3 (RGB). flip: mirror images in training. crop: (left, top, right, bottom) in pixels,
    cut out of the aligned image first; null is all of it. all_splits: train on every image, those of the test split
    too. test_fraction: of a folder without splits of its own."""

    path: str | None = None
    hub: str = "flwrlabs/celeba"
    subset: str | None = None
    image: str = "image"
    train: str = "train"
    valid: str = "valid"
    test: str = "test"
    size: int = 64
    channels: int = 3
    flip: bool = True
    crop: Box | None = UVIT_CROP
    all_splits: bool = False
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3):
            raise UsageError(
                f"size={self.size} and channels={self.channels} of celeba: need a size of at least 1, and 1 (grey) or "
                "3 (RGB) channels"
            )
        left, top, right, bottom = self.crop or UVIT_CROP
        if not (0 <= left < right <= ALIGNED[0] and 0 <= top < bottom <= ALIGNED[1]):
            raise UsageError(
                f"crop={[left, top, right, bottom]} is not left, top, right, bottom within the 178 x 218 of CelebA's "
                f"aligned images; U-ViT's is {list(UVIT_CROP)}"
            )


class CelebA:
    """uint8 [N, channels, size, size] without classes."""

    Config: ClassVar[type[CelebAConfig]] = CelebAConfig
    # Another folder is another data set: how it is split depends on what lies there.
    path_is_identity: ClassVar[bool] = True

    def __init__(self, config: CelebAConfig) -> None:
        """Looks at the path and opens no image. Raises UsageError when it is no folder or an option is out of range."""
        self.config = config
        self.image_size, self.channels, self.flip = config.size, config.channels, config.flip
        self.num_classes: int | None = None
        self._folder: AlignedFolder | None = None
        self._home: Path | None = None
        if config.path is None:
            return
        root = Path(config.path).expanduser()
        if not root.is_dir():
            raise UsageError(f"data.path={config.path} is not a folder; {_EXPECTED}")
        # A clone from the hub keeps its files one level down.
        below = sorted(place for place in root.iterdir() if place.is_dir())
        self._home = next((place for place in (root, *below) if _parquet(place, "train")), None)
        if self._home is None:
            self._folder = AlignedFolder(config)
            self.num_classes = self._folder.num_classes

    def load(self, split: str) -> ImageDataset:
        """The split "train" or "test". Raises UsageError for another name or an absent split, RunError when the data
        cannot be read, an image of another size included."""
        check_split(split, "celeba")
        if self._folder is not None:
            return self._folder.load(split)
        config = self.config
        whole = config.all_splits and split == "train"
        key: dict[str, Any] = {"size": config.size, "channels": config.channels, "column": config.image}
        key |= _options(config)
        if self._home is not None:
            files = [path for part in (_PREFIXES if whole else (split,)) for path in _parquet(self._home, part)]
            if not files:
                raise UsageError(f"data.path={config.path} has no {split}-*.parquet; {_EXPECTED}")
            key |= {"source": str(self._home.resolve()), "files": fingerprint(files, self._home)}
            decoded = decode_once(key, lambda: self._from_parquet(files))
            origin = f"parquet {config.path}"
        else:
            part = {"train": config.train, "test": config.test}[split]
            part = "+".join([config.train, config.valid, config.test]) if whole else part
            key |= {"source": f"hub:{config.hub}", "subset": config.subset, "split": part}
            decoded = decode_once(key, lambda: self._from_hub(part))
            origin = f"hub {config.hub}, {part}"
        box = "" if config.crop is None else f"box {list(config.crop)}, "
        return ImageDataset(
            images_u8=torch.from_numpy(decoded.images),
            labels=None,
            num_classes=None,
            class_names=(),
            name="celeba",
            split=split,
            digest=decoded.digest,
            provenance=f"CelebA {split} {len(decoded.images)}{' (all splits)' if whole else ''}, {origin}, {box}"
            f"{config.size}px by box and bicubic",
        )

    def _from_parquet(self, files: list[Path]) -> Encoded:
        column = self.config.image
        count = count_rows(files, [column], f"name the one with the images by data.image, or bring others: {_EXPECTED}")

        def items() -> Iterator[tuple[np.ndarray, int]]:
            for number, (path, row) in enumerate(read_rows(files, [column])):
                yield read_face(encoded(row[column])[0], self.config, f"image {number} in {path}"), 0

        return Encoded(count, (self.channels, self.image_size, self.image_size), False, items)

    def _from_hub(self, part: str) -> Encoded:
        config, column = self.config, self.config.image
        with reaching_hub(config.hub, f"data.path=FOLDER: {_EXPECTED}", split=part):
            import datasets

            table = datasets.load_dataset(config.hub, config.subset, split=part)
        if column not in table.column_names:
            raise UsageError(
                f"{config.hub} has the columns {', '.join(table.column_names)} and no {column}; name the one with the "
                "images by data.image"
            )
        table = table.select_columns(column).cast_column(column, datasets.Image(decode=False))

        def items() -> Iterator[tuple[np.ndarray, int]]:
            for number, row in enumerate(table):
                yield read_face(encoded(row[column])[0], config, f"image {number} of {config.hub} {part}"), 0

        return Encoded(len(table), (self.channels, self.image_size, self.image_size), False, items)


class AlignedFolder(ImageFolder):
    """Aligned images as files: split by the official partition where it is there, else as every image folder."""

    expected: ClassVar[str] = _EXPECTED

    def __init__(self, config: CelebAConfig) -> None:
        """Lists the folder; no image is opened. Raises as `ImageFolder` does."""
        assert config.path is not None
        common = {name: getattr(config, name) for name in ImageFolderConfig.__dataclass_fields__}
        super().__init__(ImageFolderConfig(**common))
        self._celeba = config
        # Folders of the splits say what they are themselves.
        self._partition = None if "train" in self._parts else find_partition(self.root)
        if self._partition is not None:
            self.class_names, self.num_classes = (), None

    def listed(self, split: str) -> list[tuple[Path, int]]:
        whole = self._celeba.all_splits and split == "train"
        if self._partition is not None:
            parts = part_of(images_below(self.root), self._partition)
            return [(path, 0) for path, part in parts if whole or part == PARTS[split]]
        if not whole:
            return super().listed(split)
        homes = [self.root / name for name in subfolders(self.root)] if "train" in self._parts else [self.root]
        return [pair for home in homes for pair in self._pairs(home)]

    def rule(self, split: str) -> str:
        if self._celeba.all_splits and split == "train":
            return "all splits"
        return super().rule(split) if self._partition is None else self._partition.name

    def read(self, path: Path) -> np.ndarray:
        return read_face(path, self._celeba, str(path))

    def options(self) -> dict[str, Any]:
        return _options(self._celeba)


def read_face(source: Path | Any, config: CelebAConfig, what: str) -> np.ndarray:
    """An aligned image as uint8 [channels, size, size]. Raises RunError where it cannot be read or is none."""
    image = open_image(source, config.channels, what)
    if image.size != ALIGNED:
        raise RunError(
            f"{what} is {image.width} x {image.height}, and the aligned images of CelebA are 178 x 218; bring those "
            f"(img_align_celeba), or take faces that are cut out already by data=imagefolder data.path=FOLDER "
            f"data.size={config.size}"
        )
    return square(image, config.size, what, config.crop)


def _options(config: CelebAConfig) -> dict[str, Any]:
    """What decoding depends on besides the source, for the cache."""
    return {"crop": config.crop, "aligned": ALIGNED}


def _parquet(folder: Path, part: str) -> list[Path]:
    return sorted(path for prefix in _PREFIXES[part] for path in folder.glob(f"{prefix}-*.parquet"))
