"""A policy that stands in a file of its own: what `gearshift plan` leaves, or any node somebody wrote down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gearshift.policies.base import Policy
from gearshift.policies.compose import Compose
from gearshift.runtime.config import TARGET, build
from gearshift.runtime.errors import UsageError


@dataclass
class FromFileConfig:
    """Schema of `FromFile`: a YAML file that holds one policy node."""

    file: str


class FromFile(Compose):
    """The policy in a file, as if it had been given itself.

    Args:
        config: the file, or its path.

    Raises:
        UsageError: there is no such file, or it holds no policy.
    """

    Config = FromFileConfig  # type: ignore[assignment]  # its parts come from the file

    def __init__(self, config: FromFileConfig | str | Path) -> None:
        path = Path(config.file if isinstance(config, FromFileConfig) else config).expanduser()
        super().__init__([_read(path)])

    def __repr__(self) -> str:
        return repr(self.parts[0])  # what it says, wherever it lies


def _read(path: Path) -> Policy:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        raise UsageError(f"policy FromFile: there is no file {path}; name one that gearshift plan left")
    try:
        node = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"policy FromFile: {path} is not readable as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(node, DictConfig) or TARGET not in node:
        raise UsageError(f"policy FromFile: {path} holds no policy, which would say what it is by {TARGET}")
    policy = build(node)
    if not isinstance(policy, Policy):
        raise UsageError(f"policy FromFile: {path} holds {type(policy).__name__}, which is no policy")
    return policy
