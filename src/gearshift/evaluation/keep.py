"""The samples of a row as files for other programs: one .npz in the layout of ADM's evaluator, or a folder of PNGs."""

from __future__ import annotations

from pathlib import Path

from gearshift.evaluation.sample_files import AdmWriter, PngFolder
from gearshift.evaluation.shards import Column
from gearshift.runtime.files import slug


def keep_samples(folder: Path, name: str, column: Column, kind: str) -> Path:
    """Writes the images (and labels) of `column` below `folder`, chunk by chunk, and returns where.

    `kind` is "npz" (arr_0 uint8 [N, H, W, C], arr_1 labels) or "png" (000000.png by image index).
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = column.parts("images")
    if kind == "png":
        target = folder / slug(name)
        pictures = PngFolder(target)
        index = column.start
        for piece in pieces:
            pictures.write(piece, start=index)
            index += len(piece)
        pictures.clear_others(range(column.start, column.stop))
        return target
    target = folder / f"{slug(name)}.npz"
    labelled = "labels" in column.shards.names(column.numbers[0])
    with AdmWriter(target, column.stop - column.start, pieces[0].shape[1:]) as writer:
        for piece in pieces:
            writer.write(piece)
        if labelled:
            writer.labels(column.read("labels"))
    return target
