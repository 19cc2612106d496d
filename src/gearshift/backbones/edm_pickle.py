"""Official EDM checkpoints (`network-snapshot-*.pkl`) to a state dict and the configuration that fits it.

Such a file is a dictionary whose entry `ema` is the preconditioned network as an object, with the source of its
classes. Its state says all that is needed: parameters, buffers, submodules, and the arguments that it was made with. It
is read by `inert_pickle`, so nothing in it runs. Layouts: SongUNet (DDPM++ and NCSN++) under EDMPrecond, VPPrecond or
VEPrecond (arXiv 2206.00364). `write_converted` puts the same into a safetensors file, which `read_edm` takes, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from gearshift.backbones.inert_pickle import Record, read_pickle
from gearshift.backbones.weights import StateDict, write_safetensors
from gearshift.runtime.errors import RunError

SUFFIX = ".pkl"
HEADER = "edm_network"
_INNER = "model"
_DEEPEST = 16
# What the constructor of SongUNet takes besides img_resolution, in_channels and out_channels, and its defaults.
_DEFAULTS: Mapping[str, Any] = {
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.10,
    "label_dropout": 0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_SIZES = ("img_resolution", "in_channels", "out_channels")


@dataclass(frozen=True)
class EDMNetwork:
    """An official network.

    Attributes:
        state: under the names of SongUNet (`map_layer0.weight`, `enc.32x32_conv.weight`, ...), on the host.
        backbone, process: nodes of the configuration groups of these names, with `_target_`.
    """

    state: StateDict
    backbone: dict[str, Any]
    process: dict[str, Any]


def is_edm(path: str | os.PathLike[str]) -> bool:
    """Whether a file is for `read_edm`: a .pkl, or what `write_converted` wrote."""
    file = Path(path)
    if not file.is_file():
        return False
    if file.suffix != ".safetensors":
        return file.suffix == SUFFIX
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            return HEADER in (handle.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False  # whoever reads it as weights says what is wrong


def read_edm(path: str | os.PathLike[str]) -> EDMNetwork:
    """The averaged network of an official checkpoint.

    Raises:
        UsageError: there is no such file.
        RunError: it is damaged, asks for anything but tensors, or holds another network than SongUNet.
    """
    file = Path(path)
    if file.suffix == ".safetensors":
        return _read_converted(file)
    found = read_pickle(file)
    wrapper = found.get("ema") if isinstance(found, dict) else None
    if not isinstance(wrapper, Record):
        keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, dict) else type(found).__name__
        raise RunError(f"{file} holds {keys or 'nothing'} and no network under 'ema'; give an official EDM checkpoint")
    loss = found.get("loss_fn")
    process = _process(wrapper, loss.state or {} if isinstance(loss, Record) else {}, file)
    network = _part(wrapper, "_modules", file).get(_INNER)
    if not isinstance(network, Record) or network.kind != "SongUNet":
        kind = network.kind if isinstance(network, Record) else "nothing"
        raise RunError(
            f"{file} holds a {kind!r:.80} under {wrapper.kind}, and only SongUNet (DDPM++, NCSN++) has a backbone "
            "here; give a checkpoint of one of those"
        )
    arguments = _arguments(network, file)
    return EDMNetwork(dict(_tensors(network, "", file, set())), backbone_of(arguments, file), process)


def write_converted(path: str | os.PathLike[str], network: EDMNetwork) -> None:
    """The same as a safetensors file with both nodes in its header. Raises RunError when it cannot be written."""
    nodes = {"backbone": network.backbone, "process": network.process}
    write_safetensors(path, network.state, {HEADER: json.dumps(nodes, sort_keys=True)})


def _read_converted(file: Path) -> EDMNetwork:
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            nodes = json.loads(dict(handle.metadata() or {})[HEADER])
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return EDMNetwork(state, dict(nodes["backbone"]), dict(nodes["process"]))
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{file} is no converted EDM network ({error}); convert the .pkl again") from error


# What the objects say -----------------------------------------------------------------------------------------------


def backbone_of(arguments: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The configuration of `backbones.unet.UNet` for the arguments of SongUNet.

    Raises RunError naming an argument that it has no counterpart for.
    """
    unknown = sorted(set(arguments) - set(_DEFAULTS) - set(_SIZES))
    missing = [name for name in _SIZES if name not in arguments]
    if unknown or missing:
        what = f"the unknown argument {unknown[0]!r:.80}" if unknown else f"no argument {missing[0]}"
        raise RunError(f"{source}: SongUNet was made with {what}; known ones: {', '.join([*_SIZES, *_DEFAULTS])}")
    given = {**_DEFAULTS, **arguments}
    wanted: Mapping[str, tuple[Any, ...]] = {
        "channel_mult_emb": (4,),
        "decoder_type": ("standard",),
        "encoder_type": ("standard", "residual"),
        "embedding_type": ("positional", "fourier"),
        "channel_mult_noise": (2,) if given["embedding_type"] == "fourier" else (1,),
        "out_channels": (given["in_channels"],),
    }
    for name, allowed in wanted.items():
        if given[name] not in allowed:
            raise RunError(
                f"{source}: SongUNet was made with {name}={given[name]!r:.80}, and the backbone here knows "
                f"{' and '.join(map(repr, allowed))}"
            )
    try:
        return _node(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{source}: SongUNet was made with something else than numbers ({error})") from error


def _node(given: Mapping[str, Any]) -> dict[str, Any]:
    classes = int(given["label_dim"])
    return {
        "_target_": "gearshift.backbones.unet.UNet",
        "image_size": int(given["img_resolution"]),
        "in_channels": int(given["in_channels"]),
        "model_channels": int(given["model_channels"]),
        "channel_mult": [int(factor) for factor in given["channel_mult"]],
        "num_blocks": int(given["num_blocks"]),
        "attention_resolutions": [int(side) for side in given["attn_resolutions"]],
        "embedding": given["embedding_type"],
        "encoder": given["encoder_type"],
        "resample_filter": [int(tap) for tap in given["resample_filter"]],
        "dropout": float(given["dropout"]),
        "num_classes": classes or None,
        # It has met images without a label only where labels were dropped.
        "null_class": bool(classes and given["label_dropout"]),
        "augment_dim": int(given["augment_dim"] or 0),
    }


def _process(wrapper: Record, loss: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The process of a preconditioning; its settings are those of the file where they are numbers."""
    sources: Mapping[str, tuple[str, Mapping[str, tuple[Mapping[str, Any], str]]]] = {
        "EDMPrecond": (
            "gearshift.diffusion.edm.EDM",
            {
                "sigma_data": (wrapper.state or {}, "sigma_data"),
                "P_mean": (loss, "P_mean"),
                "P_std": (loss, "P_std"),
            },
        ),
        "VEPrecond": (
            "gearshift.diffusion.edm.VE",
            {"sigma_min": (wrapper.state or {}, "sigma_min"), "sigma_max": (wrapper.state or {}, "sigma_max")},
        ),
        "VPPrecond": (
            "gearshift.diffusion.process.VPSDE",
            {"beta_min": (wrapper.state or {}, "beta_min"), "t_min": (wrapper.state or {}, "epsilon_t")},
        ),
    }
    if wrapper.kind not in sources:
        raise RunError(
            f"{file} holds a {wrapper.kind!r:.80}, and of the preconditionings {', '.join(sources)} are known here"
        )
    target, settings = sources[wrapper.kind]
    node: dict[str, Any] = {"_target_": target}
    for name, (state, key) in settings.items():
        if isinstance(state.get(key), (int, float)):
            node[name] = float(state[key])
    if wrapper.kind == "VPPrecond":
        state, least = wrapper.state or {}, node.get("beta_min", 0.1)
        node["beta_max"] = least + float(state.get("beta_d", 19.9))
        node.setdefault("t_min", 1e-5)
        if state.get("M", 1000) != 1000:
            raise RunError(f"{file}: VPPrecond feeds {state['M']} - 1 times the time, and VPSDE feeds 999 times")
    return node


def _arguments(network: Record, file: Path) -> dict[str, Any]:
    state = network.state or {}
    positional, named = state.get("_init_args", ()), state.get("_init_kwargs")
    if positional or not isinstance(named, dict):
        raise RunError(
            f"{file}: {network.kind} does not say by name what it was made with (_init_kwargs); give a checkpoint that "
            "the official training wrote"
        )
    for name, value in named.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        if not all(item is None or isinstance(item, (bool, int, float, str)) for item in items):
            raise RunError(
                f"{file}: {network.kind} was made with {name!r:.80} that is no number, text or list of those"
            )
    return named


def _part(record: Record, name: str, file: Path) -> dict[str, Any]:
    part = (record.state or {}).get(name, {})
    if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
        raise RunError(f"{file}: {name} of a {record.kind!r:.80} is not a dictionary; fetch it again")
    return part


def _tensors(record: Record, prefix: str, file: Path, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under the names that a state dict would have."""
    if id(record) in seen:
        raise RunError(f"{file}: a module stands at two places, one of them {prefix:.80}; no official network has that")
    seen.add(id(record))
    apart = (record.state or {}).get("_non_persistent_buffers_set")
    for name, value in [*_part(record, "_parameters", file).items(), *_part(record, "_buffers", file).items()]:
        if value is None or (isinstance(apart, set) and name in apart):
            continue
        if not isinstance(value, Tensor):
            raise RunError(f"{file}: {prefix}{name} is a {type(value).__name__} and no tensor; fetch it again")
        yield prefix + name, value
    for name, value in _part(record, "_modules", file).items():
        if isinstance(value, Record) and prefix.count(".") < _DEEPEST:
            yield from _tensors(value, f"{prefix}{name}.", file, seen)
        elif value is not None:
            raise RunError(f"{file}: {prefix}{name} is a {type(value).__name__}, or too deep; fetch it again")
