"""Where pretrained weights of metrics are looked for, and the answer when they are not there.

Order: an explicit path, an environment variable, the cache of torch.hub. Nothing is downloaded and nothing is
replaced in silence: what is missing is said as data (`Unavailable`) with the line that fetches it, and the report
prints both.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The switch and its strict value: torch 2.9 replaced the flag by a precision and forbids reading the one after
# setting the other.
_STRICT = {True: ("fp32_precision", "ieee"), False: ("allow_tf32", False)}


@dataclass(frozen=True)
class Unavailable:
    """A metric that cannot be computed here: its name, why, and the command that fetches what is missing."""

    name: str
    reason: str
    fetch_line: str

    def as_row(self) -> dict[str, str]:
        """As it stands in the list `unavailable` of the results."""
        return {"name": self.name, "reason": self.reason, "fetch": self.fetch_line}


@dataclass(frozen=True)
class WeightFile:
    """A released file: its name, where it is published, the first digits of its SHA-256, and the variable that points
    to it."""

    file_name: str
    url: str
    sha256_prefix: str
    variable: str | None = None

    def fetch_line(self) -> str:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        return f"curl -L --create-dirs -o {folder / self.file_name} {self.url}"


def locate(weights: WeightFile, metric: str, path: str | Path | None = None) -> Path | Unavailable:
    """The first place that is set: `path`, the variable, the cache of torch.hub; its checksum must begin as released.

    A place that was named and does not hold the file is reported rather than passed over.
    """
    named = path or (os.environ.get(weights.variable) if weights.variable else None)
    place = Path(named).expanduser() if named else Path(torch.hub.get_dir()) / "checkpoints" / weights.file_name
    if not place.is_file():
        how = f" (or set {weights.variable} to its path)" if weights.variable else ""
        return Unavailable(metric, f"{weights.file_name} is not at {place}{how}", weights.fetch_line())
    digest = sha256_of(place)
    if not digest.startswith(weights.sha256_prefix):
        reason = (
            f"{place} has sha256 {digest[:12]}..., the released {weights.file_name} begins with {weights.sha256_prefix}"
        )
        return Unavailable(metric, reason, weights.fetch_line())
    return place


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """No TensorFloat-32 and no autocast inside, whatever holds outside: features must not depend on the training's
    settings."""
    modern = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    cudnn: Any = torch.backends.cudnn
    switches: list[tuple[Any, str, Any]] = [
        (cudnn.conv if modern else cudnn, *_STRICT[modern]),
        (torch.backends.cuda.matmul, *_STRICT[modern]),
    ]
    before = [getattr(holder, attribute) for holder, attribute, _ in switches]
    try:
        for holder, attribute, strict in switches:
            setattr(holder, attribute, strict)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (holder, attribute, _), value in zip(switches, before, strict=True):
            setattr(holder, attribute, value)
