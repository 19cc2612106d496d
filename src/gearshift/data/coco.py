"""MS-COCO with its captions (arXiv 1405.0312, 1504.00325), as it is unpacked.

    FOLDER/annotations/captions_train2014.json, captions_val2014.json
    FOLDER/train2014/*.jpg, val2014/*.jpg

82,783 train and 40,504 validation images of 2014, five captions or a few more each. "test" is the validation set.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gearshift.data.captions import CaptionSet, Texts, texts_of
from gearshift.runtime.errors import RunError, UsageError

_PARTS = {"train": "train", "test": "val"}


@dataclass(frozen=True)
class CocoConfig:
    """path: the folder. year: "2014" or "2017". size: side in pixels. captions: keep the first so many of every image.
    flip: mirror images in training."""

    path: str | None = None
    year: str = "2014"
    size: int = 256
    captions: int | None = None
    flip: bool = False


class Coco(CaptionSet):
    """Images by ADM's centre crop, in the order of their ids; captions in that of the file."""

    Config: ClassVar[type[CocoConfig]] = CocoConfig

    def __init__(self, config: CocoConfig) -> None:
        """Opens nothing. Raises UsageError for options out of range and a path that is no folder."""
        self.config = config
        super().__init__(config.path, config.size, config.captions, config.flip)

    @property
    def name(self) -> str:
        return f"coco{self.config.year}"

    def expected(self) -> str:
        year = self.config.year
        return (
            f"COCO {year} needs no account: unpack train{year}.zip and val{year}.zip from images.cocodataset.org/zips "
            f"and annotations_trainval{year}.zip from images.cocodataset.org/annotations into one folder, and name it "
            "(data.path=FOLDER)"
        )

    def files(self, root: Path, split: str) -> list[tuple[Path, Texts]]:
        part = f"{_PARTS[split]}{self.config.year}"
        name = f"captions_{part}.json"
        file = next((path for path in (root / "annotations" / name, root / name) if path.is_file()), None)
        home = next((path for path in (root / part, root / "images" / part) if path.is_dir()), None)
        if file is None or home is None:
            absent = f"annotations/{name}" if file is None else f"folder {part} with images"
            raise UsageError(f"data.path={self.path} has no {absent}. {self.expected()}")
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            files = {int(entry["id"]): str(entry["file_name"]) for entry in stored["images"]}
            texts: dict[int, list[Any]] = {number: [] for number in files}
            for entry in stored["annotations"]:
                texts[int(entry["image_id"])].append(entry["caption"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} is not readable as captions of COCO ({error!r}); unpack it again") from error
        return [
            (home / files[number], texts_of(texts[number], f"image {files[number]} in {file}", self.most))
            for number in sorted(files)
        ]
