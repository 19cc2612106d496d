"""Where pretrained weights of metrics are looked for, and the answer when they are not there.

Order: an explicit path, an environment variable, the cache of torch.hub. Nothing is downloaded and nothing is
replaced in silence: what is missing is said as data (`Unavailable`) with the line that fetches it, and the report
prints both.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Unavailable:
    """A metric that cannot be computed here: its name, why, and the command that fetches what is missing ("" where
    none does)."""

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
    variable: str

    def cached(self) -> Path:
        """Where torch.hub would keep it."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file_name

    def fetch_line(self) -> str:
        return f"curl -L --create-dirs -o {self.cached()} {self.url}"


INCEPTION = WeightFile(
    file_name="weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256_prefix="6726825d",
    variable="GEARSHIFT_INCEPTION",
)
VGG16 = WeightFile(
    file_name="vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256_prefix="397923af",
    variable="GEARSHIFT_VGG16",
)
ALEXNET = WeightFile(
    file_name="alexnet-owt-7be5be79.pth",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256_prefix="7be5be79",
    variable="GEARSHIFT_ALEXNET",
)
FILES = {"inception": INCEPTION, "vgg16": VGG16, "alexnet": ALEXNET}
"""By the names that settings give them."""


def locate(weights: WeightFile, metric: str, path: str | Path | None = None) -> Path | Unavailable:
    """The first place that is set: `path`, the variable, the cache of torch.hub; its checksum must begin as released.

    A place that was named and does not hold the file is reported rather than passed over.
    """
    named = path or os.environ.get(weights.variable)
    place = Path(named).expanduser() if named else weights.cached()
    if not place.is_file():
        reason = (
            f"{weights.file_name} (sha256 {weights.sha256_prefix}...) is not at {place} "
            f"(or set {weights.variable} to its path)"
        )
        return Unavailable(metric, reason, weights.fetch_line())
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


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of everything a network stores, in hexadecimal; and of the features
    of the empty string, which guidance of a text model depends on."""
    digest = hashlib.sha256()
    beside = {name: value for name, value in network.named_buffers() if name.rpartition(".")[2] == "null_context"}
    for name, value in sorted({**network.state_dict(), **beside}.items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        # As bytes: NumPy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
