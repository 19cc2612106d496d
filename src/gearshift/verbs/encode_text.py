"""The captions' part of `gearshift encode`: text features of a shard, and of the empty string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gearshift.data.captions import CaptionStream
from gearshift.data.dataset import ImageSource
from gearshift.data.latent_files import DTYPES
from gearshift.data.text_encoder import TextEncoder
from gearshift.data.text_files import text_arrays, write_null
from gearshift.runtime.errors import RunError


def captions_of(source: ImageSource) -> CaptionStream:
    """The source, whose data set says that it has captions."""
    assert isinstance(source, CaptionStream)
    return source


def features_of(encoder: TextEncoder, texts: Sequence[str], batch: int, dtype: str) -> np.ndarray:
    """Features [n, L, D] of the texts, `batch` at a time, as they are stored. Raises RunError where they overflow."""
    from gearshift.evaluation.batches import in_batches

    def made(tokens: Tensor) -> Tensor:
        return encoder.features(tokens).cpu()

    features = np.empty((len(texts), encoder.length, encoder.width), dtype=DTYPES[dtype])
    done = 0
    for piece in in_batches(made, [encoder.tokens(texts)], batch, encoder.device):
        with np.errstate(over="ignore"):
            features[done : done + len(piece)] = piece.numpy()
        done += len(piece)
    finite = np.isfinite(features).all(axis=(1, 2))
    if not finite.all():
        bad = texts[int(np.flatnonzero(~finite)[0])]
        raise RunError(f"the text features of {bad!r} are not finite in {dtype}; use dtype=fp32")
    return features


def shard_arrays(
    encoder: TextEncoder, source: ImageSource, request: Mapping[str, Any], start: int, stop: int
) -> dict[str, np.ndarray]:
    """What the shard of images start..stop-1 keeps of their captions."""
    texts = captions_of(source).captions(start, stop)
    flat = [text for of_image in texts for text in of_image]
    return text_arrays(features_of(encoder, flat, request["batch"], request["dtype"]), texts)


def manifest_entry(
    encoder: TextEncoder, source: ImageSource, request: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """What the manifest says of the text; leaves the features of the empty string in the folder."""
    return {
        "encoder": encoder.name,
        "fingerprint": encoder.fingerprint,
        "length": encoder.length,
        "width": encoder.width,
        "captions": sum(map(len, captions_of(source).captions(0, len(source)))),
        "null": write_null(folder, features_of(encoder, [""], 1, request["dtype"])[0]),
    }
