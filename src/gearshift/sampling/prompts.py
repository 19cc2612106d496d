"""Which text an image is asked to show: image i gets prompt i modulo their number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gearshift.data.text_rows import TextRows
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True, repr=False)
class Texts:
    """Prompts by themselves, for networks that read them on their own.

    Attributes:
        texts: what they say.
        digest: of them.
        origin: where they came from, for protocols.
    """

    texts: Sequence[str]
    digest: str
    origin: str

    @classmethod
    def listed(cls, texts: Sequence[str], origin: str) -> Texts:
        """Raises UsageError where there are none."""
        if not texts:
            raise UsageError(f"prompts: {origin} holds no prompt; write one per line")
        return cls(tuple(texts), hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16], origin)

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:  # names the condition: it is part of what identifies a row of an evaluation
        return f"{type(self).__name__}({len(self)}, {self.digest})"

    def text(self, index: int) -> str:
        """What image `index` is asked to show."""
        return self.texts[index % len(self)]

    def describe(self) -> str:
        """For protocols."""
        return f"prompt of image i is number i mod {len(self)} of {self.origin} [digest {self.digest[:8]}]"


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file that are not empty. Raises UsageError where it cannot be read as text."""
    try:
        lines = [line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"prompts={path} is not readable as text ({error}); write one prompt per line") from error
    return [line for line in lines if line]


@dataclass(frozen=True, repr=False)
class Prompts(Texts):
    """Texts and their features.

    Attributes:
        texts: what they say, one for every entry of `rows`.
        digest: of what decides the features; two of one digest give the same condition.
        origin: where they came from, for protocols.
        rows: features, one or several per entry; the first of an entry is taken.
    """

    rows: TextRows

    @classmethod
    def of(cls, texts: Sequence[str], features: Sequence[Tensor], origin: str, fingerprint: str) -> Prompts:
        """Texts with features [n, L, D] (in pieces), which the text encoder of that fingerprint computed."""
        digest = hashlib.sha256(json.dumps([fingerprint, list(texts)]).encode()).hexdigest()[:16]
        return cls(texts, digest, origin, TextRows(tuple(features), torch.arange(len(texts) + 1)))

    @property
    def shape(self) -> tuple[int, int]:
        """(L, D)."""
        return self.rows.shape

    def cond(self, index: Tensor) -> Tensor:
        """Features float32 [B, L, D] for images `index` (int64 [B]), on their device."""
        return self.rows.take(index.cpu() % len(self)).to(index.device).float()
