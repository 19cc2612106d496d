"""Where things are on disk that belong to the program rather than to a run."""

from __future__ import annotations

from pathlib import Path

from gearshift.runtime.errors import RunError

_PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """The directory of the configuration groups: inside an installed package, or at the top of the repository.

    Raises RunError when neither is there, which means a broken installation.
    """
    candidates = (_PACKAGE / "conf", _PACKAGE.parent.parent / "conf")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    looked = " nor ".join(str(candidate) for candidate in candidates)
    raise RunError(f"the configuration groups are neither in {looked}; install gearshift again")
