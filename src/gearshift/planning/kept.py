"""Single decisions that were tried, in a file: a search that was stopped goes on, another budget begins with them."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gearshift.runtime.files import atomic_write

EVERY_SECONDS = 20.0


class KeptResponses:
    """The differences in the images of decisions 0, 1, ..., as they are tried; at the end their Gram matrix alone.

    Args:
        path: of the file, named by whatever decides the differences. A file that cannot be read counts as none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gram: NDArray[np.float64] | None = None
        self.errors: list[Tensor] = []
        self._saved = time.monotonic()
        found = self._load()
        if "gram" in found:
            self.gram = found["gram"]
        elif "errors" in found:
            self.errors = list(torch.from_numpy(found["errors"]).double())

    def _load(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as data:
                return {name: data[name] for name in data}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return {}

    def add(self, error: Tensor) -> None:
        """One more difference, float64 [n * C * H * W]; now and then they are written."""
        self.errors.append(error)
        if time.monotonic() - self._saved > EVERY_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what there is."""
        if self.gram is None and self.errors:
            # They are differences of float32 images.
            errors = torch.stack(self.errors).float().numpy()
            atomic_write(self.path, lambda file: np.savez(file, errors=errors))
        self._saved = time.monotonic()

    def close(self, gram: NDArray[np.float64]) -> None:
        """All were tried."""
        self.gram, self.errors = gram, []
        atomic_write(self.path, lambda file: np.savez(file, gram=gram))
