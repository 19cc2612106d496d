"""Weights from elsewhere into a network: official files, AdaDiff and EDM files, and files of `gearshift export`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.backbones.edm_pickle import is_edm, read_edm
from gearshift.backbones.exits import EarlyExit
from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_weights import from_official
from gearshift.backbones.weights import exported_state, import_official, load_strict, uncertainty_heads
from gearshift.runtime.errors import UsageError

_BACKBONE, _UNCERTAINTY = "backbone.", "uncertainty_heads."


def load_into(network: Backbone, source: str | os.PathLike[str], *, heads: bool) -> None:
    """Load the file or folder `source` into `network`, strictly.

    Args:
        heads: the network's uncertainty heads have to be in the file (a finished model). Without it they may keep the
            values they were drawn with (fine-tuning); exit heads of their own start as copies of the loaded readout.

    Raises:
        UsageError: no such file, or it holds heads that the network has no place for, or lacks those it needs.
        RunError: the file is damaged or does not fit.
    """
    if not Path(source).exists():
        raise UsageError(f"{source}: there is no such file or folder; name a weights file")
    if is_edm(source):
        load_edm(network, read_edm(source).state, source, heads=heads)
        return
    state = exported_state(source)
    if state is None:
        _official(network, source, heads)
    else:
        load_state(network, state, source, heads=heads)


def load_edm(network: Backbone, state: Mapping[str, Tensor], source: str | os.PathLike[str], *, heads: bool) -> None:
    """`load_into` for the `state` of an official EDM network that was read from `source`."""
    backbone = network.backbone if isinstance(network, EarlyExit) else network
    if not isinstance(backbone, UNet):
        raise UsageError(
            f"{source} holds an EDM U-Net and the backbone is {backbone.name}; choose a U-Net, e.g. ddpmpp"
        )
    load_state(network, from_official(state, backbone), source, heads=heads)


def load_state(network: Backbone, state: Mapping[str, Tensor], source: str | os.PathLike[str], *, heads: bool) -> None:
    """`load_into` for weights under the network's own names, with or without exits, that came from `source`."""
    inside = {name.removeprefix(_BACKBONE): v for name, v in state.items() if name.startswith(_BACKBONE)}
    if isinstance(network, EarlyExit):
        if inside:
            load_strict(network, state, source)
            return
        if heads and network.has_uncertainty:
            raise UsageError(f"{source} holds no uncertainty heads; use exits=none")
        if heads and (bare := network.untold_heads()):
            raise UsageError(
                f"{source} holds no exit heads, and at the depths {bare} {network.name} has no readout to begin them "
                "with; use exits=none"
            )
        load_strict(network.backbone, state, source)
        network.copy_readout()
    else:
        if inside and heads:
            raise UsageError(
                f"{source} holds exits, and exits=none has no place for them; use the exits it was made with"
            )
        load_strict(network, inside or state, source)


def _official(network: Backbone, source: str | os.PathLike[str], heads: bool) -> None:
    backbone = network.backbone if isinstance(network, EarlyExit) else network
    found = import_official(source, backbone)
    if not isinstance(network, EarlyExit):
        if found and heads:
            raise UsageError(
                f"{source} also holds {len(found)} tensors of AdaDiff's uncertainty heads, and exits=none has no place "
                "for them; use exits=adadiff"
            )
        return
    network.copy_readout()
    if found:
        rest = {name: value for name, value in network.state_dict().items() if not name.startswith(_UNCERTAINTY)}
        load_strict(network, {**rest, **uncertainty_heads(found)}, source)
    elif heads and network.has_uncertainty:
        raise UsageError(f"{source} holds no uncertainty heads; use exits=none")
