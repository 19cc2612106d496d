"""What a text-conditional network knows of "no text": features of the empty string, and who computed them.

They are no weights (no official file has them), yet guidance needs them, and prompts have to be read by the same text
encoder. A run folder keeps them in `null_context.safetensors`; a file of `gearshift export` under `null_context`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors
from torch import Tensor

from gearshift.backbones.weights import write_safetensors
from gearshift.runtime.errors import RunError

FILE, KEY = "null_context.safetensors", "null_context"
_ENCODER, _FINGERPRINT = "text_encoder", "text_fingerprint"


@dataclass(frozen=True)
class NullContext:
    """features: float [L, D] of the empty string. encoder, fingerprint: `TextEncoder.name` and `.fingerprint`."""

    features: Tensor
    encoder: str
    fingerprint: str

    def header(self) -> dict[str, str]:
        """Who computed the features, for the header of the file that holds them."""
        return {_ENCODER: self.encoder, _FINGERPRINT: self.fingerprint}

    def save(self, folder: Path) -> None:
        """Into a run folder. Raises RunError when the system refuses."""
        write_safetensors(folder / FILE, {KEY: self.features}, self.header())

    @classmethod
    def load(cls, folder: Path) -> NullContext | None:
        """That of a run folder; None where it has none. Raises RunError when the file is damaged."""
        return cls.inside(folder / FILE) if (folder / FILE).is_file() else None

    @classmethod
    def inside(cls, file: Path) -> NullContext | None:
        """That in a safetensors file; None where the file is of another kind or has none. Raises RunError when it is
        damaged."""
        if file.suffix != ".safetensors" or not file.is_file():
            return None
        try:
            with safetensors.safe_open(file, framework="pt") as handle:
                header = dict(handle.metadata() or {})
                if KEY not in handle.keys() or not {_ENCODER, _FINGERPRINT} <= header.keys():  # noqa: SIM118
                    return None
                return cls(handle.get_tensor(KEY).float(), header[_ENCODER], header[_FINGERPRINT])
        except (safetensors.SafetensorError, OSError) as error:
            raise RunError(f"{file} is corrupt ({error}); make it again") from error
