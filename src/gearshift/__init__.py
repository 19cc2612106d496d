"""gearshift: diffusion models that do not spend the same compute at every step."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gearshift.api import LoadedRun, Samples, load

__all__ = ["LoadedRun", "Samples", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `gearshift --version` and completion should not.
    if name in ("LoadedRun", "Samples", "load"):
        from gearshift import api

        return getattr(api, name)
    raise AttributeError(f"module 'gearshift' has no attribute {name!r}")
