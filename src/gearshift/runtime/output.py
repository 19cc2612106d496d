"""What a verb says to programs: one JSON object, the last line of standard output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def emit_json(answer: Mapping[str, Any]) -> None:
    """Prints `answer` as one line of strict JSON at the end of standard output.

    Paths become strings, NumPy and torch scalars numbers, and figures that are not finite null (JSON has none).
    Call it once, on the main process.
    """
    sys.stdout.flush()
    sys.stdout.write(json.dumps(jsonable(answer), allow_nan=False) + "\n")
    sys.stdout.flush()


def jsonable(value: Any) -> Any:
    """`value` in types that strict JSON has. Raises TypeError on what has no meaning there."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
