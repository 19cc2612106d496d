"""Text features on disk, beside the latents of the images they describe (`latent_files`).

    shards/00000.text.npy       fp16 or fp32 [rows, L, D]: features of all captions of the shard's images, in order
    shards/00000.starts.npy     int64 [n + 1]: captions of image i are rows starts[i]..starts[i + 1] - 1
    shards/00000.captions.npy   uint8: the captions themselves, as JSON, a list of texts for every image
    null_text.npy               [L, D]: features of the empty string, which guidance and caption dropout put in place

Rows are not padded to the greatest number of captions: most images of COCO have five, a few have seven, and features
of one by CLIP ViT-L/14 take 118 KB.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gearshift.data.latent_files import DTYPES, SHARDS, Manifest
from gearshift.data.text_rows import TextRows
from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write

NULL = "null_text.npy"
_AGAIN = "run the same `gearshift encode` again, which makes what is missing"


def text_arrays(features: np.ndarray, texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """What a shard keeps of its captions: features [rows, L, D] of all `texts` of its images, in order."""
    written = json.dumps([list(of_image) for of_image in texts], ensure_ascii=False).encode()
    return {
        "text": features,
        "starts": np.concatenate([[0], np.cumsum([len(of_image) for of_image in texts])]).astype(np.int64),
        "captions": np.frombuffer(written, dtype=np.uint8),
    }


def write_null(folder: Path, features: np.ndarray) -> str:
    """The features [L, D] of the empty string to their file; its SHA-256. Raises RunError when the system refuses."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, features, allow_pickle=False)
    atomic_write(folder / NULL, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_null(folder: Path, manifest: Manifest) -> Tensor:
    """Features float32 [L, D] of the empty string. Raises RunError when the file is absent or was changed."""
    assert manifest.text is not None
    path = folder / NULL
    try:
        content = path.read_bytes()
        found = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not readable ({error}); {_AGAIN}") from error
    if hashlib.sha256(content).hexdigest() != manifest.text["null"]:
        raise RunError(f"{path} is not what it was when it was encoded (its checksum differs); {_AGAIN}")
    return torch.from_numpy(found).float()


def open_text(folder: Path, manifest: Manifest) -> TextRows:
    """Features of all captions, memory-mapped copy on write. Sizes were checked by `latent_files.open_shards`.

    Raises RunError naming a file that is absent or changed.
    """
    assert manifest.text is not None
    shape = (manifest.text["length"], manifest.text["width"])
    pieces, starts, done = [], [np.zeros(1, dtype=np.int64)], 0
    for shard in manifest.shards:
        stem = f"{folder / SHARDS}/{shard.number:05d}"
        try:
            mapped = np.load(f"{stem}.text.npy", mmap_mode="c", allow_pickle=False)
            own = np.load(f"{stem}.starts.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise RunError(f"{stem}.text.npy and .starts.npy are not readable ({error}); {_AGAIN}") from error
        rows = int(own[-1]) if len(own) else -1
        sound = len(own) == shard.count + 1 and own[0] == 0 and bool((np.diff(own) > 0).all())
        if not sound or mapped.shape != (rows, *shape) or mapped.dtype != DTYPES[manifest.dtype]:
            raise RunError(
                f"{stem}.text.npy holds {mapped.dtype} {mapped.shape} for {shard.count} images and the manifest says "
                f"{manifest.dtype} {(rows, *shape)}; {_AGAIN}"
            )
        pieces.append(torch.from_numpy(mapped))
        starts.append(own[1:] + done)
        done += rows
    return TextRows(tuple(pieces), torch.from_numpy(np.concatenate(starts)))


def read_captions(folder: Path, manifest: Manifest) -> list[tuple[str, ...]]:
    """The captions of every image. Raises RunError for files that cannot be read."""
    found: list[tuple[str, ...]] = []
    for shard in manifest.shards:
        path = folder / SHARDS / f"{shard.number:05d}.captions.npy"
        try:
            found += map(tuple, json.loads(np.load(path, allow_pickle=False).tobytes()))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is not readable ({error}); {_AGAIN}") from error
    return found
