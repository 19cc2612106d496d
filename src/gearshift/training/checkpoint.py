"""Checkpoints of a training: written whole or not at all, read with suspicion.

    checkpoints/last.ckpt       the newest
    checkpoints/previous.ckpt   the one before it

A file is what Lightning saves (raw weights, optimiser, loop counters, loss scale) and under "gearshift" what it does
not: the format, the configuration as text, the averaged weights, and the meters. It holds tensors and plain values
only, so it loads with `weights_only=True`. torch does not look at the check sums in its own files; `read` does.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.run import RunFolder, refuse_pipeline

FORMAT = 1
KEY = "gearshift"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
# The network's place in the Lightning module, which gives its weights their names in the file.
PREFIX = "denoiser.network."


class CheckpointFiles(CheckpointIO):
    """How Lightning writes and reads checkpoints here."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes atomically; what was at `path` becomes the previous checkpoint beside it.

        Raises RunError when the system refuses, for example because the disk is full; the files that were there stay.
        """
        path = Path(path)
        # A second name for the old file, so that `path` itself never goes missing. The suffix lets the owner of the
        # folder clear it away after a kill.
        kept = path.with_name(f".{path.name}.{os.getpid()}.kept.partial")
        kept.unlink(missing_ok=True)
        if path.exists():
            try:
                os.link(path, kept)
            except OSError:  # a file system without links
                atomic_write(kept, path.read_bytes())
        try:
            atomic_write(path, lambda handle: torch.save(checkpoint, handle))
        except BaseException:
            kept.unlink(missing_ok=True)
            raise
        if kept.exists():
            os.replace(kept, path.with_name(PREVIOUS))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """`read`, always restricted to tensors and plain values."""
        return read(path, map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)


def read(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The checkpoint at `path`. Raises RunError when it is absent, damaged, or not one of this program's."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise RunError(_damaged(path, f"{damaged} does not match its check sum"))
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"there is no checkpoint {path}; run the same `gearshift train` command first") from error
    except OSError as error:
        raise RunError(f"could not read the checkpoint {path} ({error.strerror or error}); check its disk") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise RunError(_damaged(path, reason)) from error
    own = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(own, dict) or "format" not in own:
        found = (
            f"the keys {sorted(map(str, checkpoint))[:4]}"
            if isinstance(checkpoint, dict)
            else type(checkpoint).__name__
        )
        raise RunError(
            f"{path} holds {found} and no {KEY!r} entry, so another program wrote it; move it away, "
            "or bring weights in with `gearshift import`"
        )
    if own["format"] != FORMAT:
        raise RunError(
            f"{path} is a checkpoint of format {own['format']}, this program reads format {FORMAT}; "
            "use the version that wrote it, or start a new run"
        )
    return checkpoint


def _damaged(path: Path, what: str) -> str:
    message = f"the checkpoint {path} is damaged ({what}; expected a whole file of torch.save)"
    other = path.with_name(PREVIOUS)
    if path.name == LAST and other.exists():
        return (
            f"{message}; the one before it is kept: `mv {other} {path}` and run the same command again to go on from it"
        )
    return f"{message}; move it away and run the same command again"


def latest(run: RunFolder) -> Path | None:
    """The newest checkpoint of a run, or None where there is none yet.

    Raises RunError when only the previous one is there, which no interruption leaves behind.
    """
    last, previous = run.checkpoints / LAST, run.checkpoints / PREVIOUS
    if last.exists():
        return last
    if previous.exists():
        raise RunError(f"{last} is gone but {previous} is there; `mv {previous} {last}` to go on from it")
    return None


def load_weights(run: RunFolder, *, ema: bool = True) -> dict[str, Tensor]:
    """Weights of a run's newest checkpoint, on the CPU, under the network's own names (`Backbone.load_state_dict`).

    `ema` asks for the averaged weights; a run without an average (trainer.ema_decay=null) has only its own.
    Raises RunError when there is no sound checkpoint, and UsageError when the run is an imported pipeline.
    """
    refuse_pipeline(run.config)
    checkpoint = read(run.checkpoints / LAST if (path := latest(run)) is None else path)
    average = checkpoint[KEY]["ema"]
    if ema and average is not None:
        return dict(average["weights"])
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def check_config(checkpoint: Mapping[str, Any], text: str, path: Path) -> None:
    """Raises RunError unless the checkpoint was made under the configuration `text` (what decides the weights)."""
    was = str(checkpoint[KEY]["config"])
    if was == text:
        return
    old, new = _leaves(was), _leaves(text)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key, "absent") != new.get(key, "absent"))
    if not changed:
        return  # the same values written in another way
    if changed == ["data_digest"]:
        raise RunError(
            f"the images under data.path are not those that {path} was trained on (data_digest: {old['data_digest']} "
            f"there, {new['data_digest']} here); bring the old ones back, or move the run folder away"
        )
    shown = ", ".join(f"{key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} here" for key in changed[:3])
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise RunError(
        f"the checkpoint {path} belongs to another configuration ({shown}{more}); "
        "set these back, or choose another run folder"
    )


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raises RunError unless both have the same names and shapes."""
    for name in sorted(state.keys() | expected.keys()):
        found, wanted = (tuple(s[name].shape) if name in s else "absent" for s in (state, expected))
        if found != wanted:
            raise RunError(
                f"{what} holds {name} of shape {found}, the network has {wanted}; "
                "use the version of the program that wrote it, or start a new run"
            )


def _leaves(text: str) -> dict[str, str]:
    """Dotted keys and values of a configuration in YAML or JSON; the lines themselves where it is neither."""
    import yaml

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        tree = {f"line {number}": line for number, line in enumerate(text.splitlines(), 1)}
    leaves: dict[str, str] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        elif path:
            leaves[path] = json.dumps(node, default=str)

    walk(tree, "")
    return leaves
