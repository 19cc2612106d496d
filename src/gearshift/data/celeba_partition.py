"""CelebA's official partition: which image belongs to which split.

`list_eval_partition.txt` has a line `000001.jpg 0` for every image, 0 train, 1 validation, 2 test; Kaggle's copy is a
.csv of the same with a heading. Images are matched by their names without ending, because the aligned ones also come
as PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gearshift.runtime.errors import RunError

PARTS = {"train": 0, "valid": 1, "test": 2}
_NAMES = ("list_eval_partition.txt", "list_eval_partition.csv")


def find_partition(root: Path) -> Path | None:
    """The file in `root`, in `root/Eval` (as it is published) or beside `root`; None without one."""
    places = (root, root / "Eval", root.resolve().parent)
    return next((place / name for place in places for name in _NAMES if (place / name).is_file()), None)


def read_partition(file: Path) -> dict[str, int]:
    """Part by name of the image, without ending. Raises RunError, naming the line, where it is none."""
    found: dict[str, int] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"{file} is not readable ({error}); fetch it again") from error
    for number, line in enumerate(lines, start=1):
        cells = line.replace(",", " ").split()
        if not cells or (number == 1 and cells == ["image_id", "partition"]):
            continue
        if len(cells) != 2 or cells[1] not in ("0", "1", "2"):
            raise RunError(f"{file}, line {number}: {line[:60]!r} is no image and 0, 1 or 2; fetch it again")
        found[Path(cells[0]).stem] = int(cells[1])
    return found


def part_of(images: Sequence[Path], file: Path) -> list[tuple[Path, int]]:
    """(image, part) in the order of names. Raises RunError where images and the partition in `file` are not the same
    ones."""
    parts = read_partition(file)
    placed: dict[str, Path] = {}
    for path in images:
        if path.stem not in parts:
            raise RunError(f"{path} is not in {file}, which has {len(parts)} images; remove it, or the partition")
        if path.stem in placed:
            raise RunError(f"{placed[path.stem]} and {path} are both {path.stem} of {file}; remove one")
        placed[path.stem] = path
    absent = next((name for name in parts if name not in placed), None)
    if absent is not None:
        raise RunError(
            f"{file} has {len(parts)} images and {len(placed)} of them are there, {absent} is not; unpack "
            "them again, or take the file away to split what is there by names"
        )
    return [(placed[name], parts[name]) for name in sorted(placed)]
