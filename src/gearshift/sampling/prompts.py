"""Which text an image is asked to show: image i gets prompt i modulo their number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.data.text_rows import TextRows


@dataclass(frozen=True)
class Prompts:
    """Texts and their features.

    Attributes:
        rows: features, one or several per entry; the first of an entry is taken.
        texts: what they say, one for every entry of `rows`.
        digest: of what decides the features; two of one digest give the same condition.
        origin: where they came from, for protocols.
    """

    rows: TextRows
    texts: Sequence[str]
    digest: str
    origin: str

    @classmethod
    def of(cls, texts: Sequence[str], features: Sequence[Tensor], origin: str, fingerprint: str) -> Prompts:
        """Texts with features [n, L, D] (in pieces), which the text encoder of that fingerprint computed."""
        digest = hashlib.sha256(json.dumps([fingerprint, list(texts)]).encode()).hexdigest()[:16]
        return cls(TextRows(tuple(features), torch.arange(len(texts) + 1)), texts, digest, origin)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:  # names the condition: it is part of what identifies a row of an evaluation
        return f"Prompts({len(self)}, {self.digest})"

    @property
    def shape(self) -> tuple[int, int]:
        """(L, D)."""
        return self.rows.shape

    def cond(self, index: Tensor) -> Tensor:
        """Features float32 [B, L, D] for images `index` (int64 [B]), on their device."""
        return self.rows.take(index.cpu() % len(self)).to(index.device).float()

    def text(self, index: int) -> str:
        """What image `index` is asked to show."""
        return self.texts[index % len(self)]

    def describe(self) -> str:
        """For protocols."""
        return f"prompt of image i is number i mod {len(self)} of {self.origin} [digest {self.digest[:8]}]"
