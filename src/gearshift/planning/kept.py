"""What a search has measured, in a file: one that was stopped goes on, and another budget begins with it."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gearshift.policies.base import Policy
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


class KeptMeasures:
    """Cost and loss of policies, each measured once: a function of a policy as `measure` is.

    Args:
        path: of the file, named by whatever decides the numbers besides the policy. One that cannot be read counts as
            none.
    """

    def __init__(self, path: Path, measure: Callable[[Policy], tuple[float, float]]) -> None:
        self.path, self.measure = path, measure
        try:
            self.known: dict[str, list[float]] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self.known = {}

    def __call__(self, policy: Policy) -> tuple[float, float]:
        key = repr(policy)
        if " at 0x" in key:  # an address, which says nothing of what it is
            return self.measure(policy)
        if key not in self.known:
            self.known[key] = list(self.measure(policy))
            atomic_write(self.path, json.dumps(self.known, indent=0) + "\n")
        cost, loss = self.known[key]
        return cost, loss
