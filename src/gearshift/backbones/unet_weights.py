"""Weights of the EDM U-Nets (DDPM++, NCSN++), both ways and bit by bit.

Names and shapes are the same on both sides. What differs is the order of rows in attention's `qkv`: the official files
have q, k and v of one channel side by side (q0, k0, v0, q1, ...), the project all of q, all of k, all of v. Nothing in
a file tells the two apart, so official files have to be converted, and files of the project must not be.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gearshift.backbones.unet import UNet
from gearshift.runtime.errors import RunError

StateDict = dict[str, Tensor]

WRAPPER = "model."
"""Prefix of the network's names inside the official preconditioning module."""
_PLAIN, _STAGED = "dec.", "decs.0."
_QKV = (".qkv.weight", ".qkv.bias")


def from_official(state: Mapping[str, Tensor], network: UNet) -> StateDict:
    """An official state dict, of the network alone or inside its wrapper, in the project's names and order.

    The one decoder of the file goes to the decoder of a multi-decoder network of one stage, too. Names that are no part
    of the network are handed on as they are, for a strict load to refuse.

    Raises:
        RunError: rows of a `qkv` that are no multiple of three.
    """
    prefix = WRAPPER if state and all(name.startswith(WRAPPER) for name in state) else ""
    converted = {}
    for name, tensor in state.items():
        own = name.removeprefix(prefix)
        if _one_staged(network) and own.startswith(_PLAIN):
            own = _STAGED + own.removeprefix(_PLAIN)
        converted[own] = _reordered(own, tensor, official=True)
    return converted


def to_official(state: Mapping[str, Tensor], network: UNet) -> StateDict:
    """The inverse of `from_official`, without a wrapper; what is not permuted shares storage with `state`.

    Raises:
        RunError: the network has several decoders, which the official layout has no names for.
    """
    if len(network.paths) > 1:
        raise RunError(f"the official layout has one decoder, and this network has {len(network.paths)}")
    converted = {}
    for name, tensor in state.items():
        theirs = _PLAIN + name.removeprefix(_STAGED) if name.startswith(_STAGED) else name
        converted[theirs] = _reordered(name, tensor, official=False)
    return converted


def _one_staged(network: UNet) -> bool:
    return len(network.config.decoders) == 1


def _reordered(name: str, tensor: Tensor, official: bool) -> Tensor:
    """Rows [C, 3] to [3, C], or back."""
    if not name.endswith(_QKV):
        return tensor
    rows = tensor.shape[0]
    if rows % 3:
        raise RunError(f"{name} has {rows} rows, which are no queries, keys and values of as many channels each")
    order = torch.arange(rows, device=tensor.device).reshape((rows // 3, 3) if official else (3, rows // 3))
    return tensor[order.t().flatten()]
