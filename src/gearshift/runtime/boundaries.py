"""A file of stage boundaries: `boundaries` as noise-to-signal ratios, ascending, and how they were found."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gearshift.runtime.errors import UsageError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.output import jsonable

KEY = "boundaries"


def load_boundaries(path: str | os.PathLike[str]) -> tuple[float, ...]:
    """Noise-to-signal ratios sigma(t)/alpha(t) at which stages end, ascending, from a file of `gearshift stages`, or
    from any YAML file with a list `boundaries`.

    Raises:
        UsageError: no such file, no such list, or one that is not of positive finite numbers in ascending order.
    """
    file = Path(path).expanduser()
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}); gearshift stages makes one") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML ({str(error).splitlines()[0]}); gearshift stages makes one") from error
    given = found.get(KEY) if isinstance(found, Mapping) else None
    if not isinstance(given, list) or not given:
        what = f"its keys are {', '.join(map(str, found))}" if isinstance(found, Mapping) else "it holds no mapping"
        raise UsageError(f"{file} has no list '{KEY}' ({what}); give a file that gearshift stages wrote")
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise UsageError(f"{file}: {KEY}={given}, and {value!r} is no noise-to-signal ratio above 0")
    for before, after in itertools.pairwise(given):
        if not before < after:
            raise UsageError(f"{file}: {KEY}={given}, and {before} stands before {after}; they must ascend strictly")
    return tuple(float(value) for value in given)


def save_boundaries(
    path: str | os.PathLike[str], boundaries: Sequence[float], header: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Writes a file that `load_boundaries` reads: comment lines `header`, the boundaries, and the keys of `about`."""
    body = {KEY: [float(value) for value in boundaries], **jsonable(about)}
    text = "".join(f"# {line}\n" for line in header)
    atomic_write(path, text + yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=110))
