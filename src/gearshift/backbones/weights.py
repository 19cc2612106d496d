"""Weights in and out: official state dicts (U-ViT, AdaDiff, DiT, EDM), and safetensors that carry their configuration.

Official files are flat dictionaries of tensors (`nnet_ema.pth` of a training folder, or a released EMA file), or what
the training script of DiT writes, which holds one under `ema`. A DiT may also come in the layout of diffusers. All
files are read as safetensors or with `weights_only=True`, so one from elsewhere cannot run code.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gearshift.backbones import dit_weights, unet_weights
from gearshift.backbones.ldm_unet import LdmUNet
from gearshift.backbones.unet import UNet
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write

StateDict = dict[str, Tensor]

# The official AdaDiff code keeps its uncertainty heads under this name (its spelling), one per block:
# lte_classifer.{i}.lte.{weight,bias}.
ADADIFF_HEADS = "lte_classifer."
_HEAD_NAME = re.compile(re.escape(ADADIFF_HEADS) + r"(\d+)\.lte\.(weight|bias)")
_OTHER = {"weight": "bias", "bias": "weight"}
EMA_FILE = "nnet_ema.pth"
TRAINING_EMA = "ema"  # where DiT's training script has its averaged weights
CHECKPOINT = "state_dict"  # where Lightning, and so LDM, has all of them
CONFIG_KEY = "gearshift_config"
_SHOWN = 3


def import_official(path: str | os.PathLike[str], backbone: nn.Module) -> StateDict:
    """Load an official state dict into `backbone`, strictly, and return what AdaDiff's heads are under their own names.

    Args:
        path: `.safetensors` file or any file of torch.save, with a flat state dict or one under `ema`; or a folder: of
            a U-ViT training (with `nnet_ema.pth`), of a DiT in diffusers, or of its pipeline.
        backbone: takes the weights in place, in its own precision; on the meta device it takes the tensors themselves.

    Returns:
        The entries `lte_classifer.{i}.lte.{weight,bias}`, i = 0..depth, for `uncertainty_heads`; empty for a plain
        U-ViT file.

    Raises:
        UsageError: there is no such file.
        RunError: the file cannot be read, is no flat state dict, or does not fit the backbone.
    """
    file = _official_file(Path(path))
    state = _read_safetensors(file)[0] if file.suffix == ".safetensors" else _read_pickle(file)
    if dit_weights.is_diffusers(state):
        positions = backbone.state_dict().get("pos_embed")
        state = dit_weights.from_diffusers(state, 0 if positions is None else positions.shape[1])
    if isinstance(backbone, UNet):
        state = unet_weights.from_official(state, backbone)
    elif isinstance(backbone, LdmUNet):
        state = backbone.from_official(state)
    heads = {name: state.pop(name) for name in list(state) if name.startswith(ADADIFF_HEADS)}
    load_strict(backbone, state, file)
    return heads


def exported_state(path: str | os.PathLike[str]) -> StateDict | None:
    """The weights of a file of `export_safetensors`, under the network's own names; None for any other file."""
    file = Path(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    state, header = _read_safetensors(file)
    state.pop("null_context", None)  # no weight: see `null_context`
    return state if CONFIG_KEY in header else None


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Load `state` into `module` if names and shapes are exactly its own; otherwise leave the module as it is.

    Raises:
        RunError: names a few keys that are missing, unexpected or of another shape (with both shapes), and `source`.
    """
    own = module.state_dict()
    misshaped = [
        f"{name} (file {list(state[name].shape)}, network {list(own[name].shape)})"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = [
        _few("missing", (name for name in own if name not in state)),
        _few("unexpected", (name for name in state if name not in own)),
        _few("of another shape", misshaped),
    ]
    if any(faults):
        raise RunError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(fault for fault in faults if fault)}. "
            "Choose the backbone configuration that the file was trained with"
        )
    on_meta = any(tensor.is_meta for tensor in own.values())
    module.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in own.items()}, assign=on_meta)


def uncertainty_heads(heads: Mapping[str, Tensor]) -> StateDict:
    """AdaDiff's heads, as `import_official` returns them, under the names of `backbones.exits.EarlyExit`.

    They fit `uncertainty: pixel_map` and `time_embed: none`. Head i of the official code stands after block i, which is
    depth i + 1. It predicts certainty c = sigmoid(Wx + b), and uncertainty 1 - c is sigmoid(-Wx - b): every sign turns.

    Raises:
        RunError: an entry with an unknown name, or a head with only one of weight and bias.
    """
    state: StateDict = {}
    lone = []
    for name, tensor in heads.items():
        match = _HEAD_NAME.fullmatch(name)
        if match is None:
            raise RunError(f"{name} is no AdaDiff head; their names are {ADADIFF_HEADS}{{block}}.lte.{{weight,bias}}")
        state[f"uncertainty_heads.0_{int(match[1]) + 1}.linear.{match[2]}"] = -tensor
        if f"{ADADIFF_HEADS}{match[1]}.lte.{_OTHER[match[2]]}" not in heads:
            lone.append(name)
    if lone:
        raise RunError(f"AdaDiff heads come with weight and bias; {_few('alone', lone)}; fetch the whole file")
    return state


def export_safetensors(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config_yaml: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`write_safetensors` with the configuration as text in the header.

    Args:
        state_dict: the tensors.
        config_yaml: whatever rebuilds the network.
        metadata: further strings for the header (origin, step, and the like).

    Raises:
        RunError: the file could not be written.
        ValueError: `metadata` uses the key that holds the configuration.
    """
    header = dict(metadata or {})
    if CONFIG_KEY in header:
        raise ValueError(f"metadata key {CONFIG_KEY!r} is where the configuration goes; choose another")
    header[CONFIG_KEY] = config_yaml
    write_safetensors(path, state_dict, header)


def write_safetensors(
    path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], header: Mapping[str, str]
) -> None:
    """Write tensors of any device and layout to a safetensors file, atomically; those that share storage, apart.

    Raises:
        RunError: the file could not be written.
    """
    seen: set[int] = set()
    tensors: StateDict = {}
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        # The format has no aliases.
        tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    atomic_write(path, safetensors.torch.save(tensors, metadata=dict(header)))


def read_safetensors(path: str | os.PathLike[str]) -> tuple[StateDict, str, dict[str, str]]:
    """Read what `export_safetensors` wrote: tensors on the host, configuration text, the other metadata.

    Raises:
        UsageError: there is no such file.
        RunError: the file is corrupt, or carries no configuration.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"there is no file {file}; give the path of a .safetensors file")
    state, header = _read_safetensors(file)
    if CONFIG_KEY not in header:
        raise RunError(
            f"{file} holds weights but no configuration ({CONFIG_KEY} is not among its header keys {sorted(header)}); "
            "it was not written by gearshift export: import it as official weights instead"
        )
    config = header.pop(CONFIG_KEY)
    return state, config, header


def _official_file(path: Path) -> Path:
    theirs = [Path(folder, name) for folder in ("", dit_weights.SUBFOLDER) for name in dit_weights.WEIGHTS]
    if path.is_dir():
        for name in (Path(EMA_FILE), *theirs):
            if (path / name).is_file():
                return path / name
        found = sorted(entry.name for entry in path.iterdir())[:_SHOWN] or ["nothing"]
        raise UsageError(
            f"{path} is no folder of weights: it has no {EMA_FILE}, but {', '.join(found)}; "
            f"a folder of diffusers would have {' or '.join(map(str, theirs))}"
        )
    if not path.is_file():
        raise UsageError(
            f"there is no file {path}; give a .pth, .pt or .safetensors file, a folder with {EMA_FILE}, or one of "
            "diffusers"
        )
    return path


def _read_safetensors(file: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(
            f"{file} is corrupt or no safetensors file ({_line(error)}); fetch or export it again"
        ) from error


def _read_pickle(file: Path) -> StateDict:
    try:
        # DiT's training script keeps its command line beside the weights. Mapped, because it keeps the optimiser too:
        # only what is copied below is read.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(
                os.fspath(file), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
            )
    except Exception as error:  # the reader fails in as many ways as a file can be broken
        raise RunError(
            f"{file} is corrupt, or holds more than tensors ({_line(error)}); only weights are read, never code"
        ) from error
    if not isinstance(loaded, dict):
        raise RunError(f"{file} holds a {type(loaded).__name__}, not a state dict; give a file of names and tensors")
    for place in (TRAINING_EMA, CHECKPOINT):
        if isinstance(loaded.get(place), dict):
            loaded = loaded[place]
    foreign = [f"{name} ({type(value).__name__})" for name, value in loaded.items() if not isinstance(value, Tensor)]
    if foreign or not loaded:
        what = _few("among its entries", foreign) or "it is empty"
        raise RunError(f"{file} is no flat state dict: {what}; save the state dict of the network alone")
    return {str(name): value.clone() for name, value in loaded.items()}


def _few(what: str, names: Iterable[str]) -> str:
    """'3 missing: a, b, c' with at most a few names; empty without any."""
    listed = list(names)
    if not listed:
        return ""
    rest = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"{len(listed)} {what}: {', '.join(listed[:_SHOWN])}{rest}"


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
