"""Weights of the latent-diffusion U-Net, both ways and bit by bit.

Names and shapes are the same on both sides. What differs is the order of rows in attention's `qkv`: the official
(legacy) order is head by head, each with its own q, k and v; the project's is all of q, all of k, all of v. Nothing in
a file tells the two apart, so files of the official code have to be converted, and files of the project must not be.

A whole checkpoint keeps the network beside the autoencoder, under `model.diffusion_model.`, and the averaged weights,
which sampling uses, under `model_ema.` with every dot of the name left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gearshift.runtime.errors import RunError

StateDict = dict[str, Tensor]

NETWORK, AVERAGED = "model.diffusion_model.", "model_ema."
_QKV = (".qkv.weight", ".qkv.bias")


def from_official(state: Mapping[str, Tensor], head_dim: int) -> StateDict:
    """An official state dict, or a whole checkpoint's, in the project's order; of a checkpoint the averaged weights.

    Args:
        state: the network alone, or all of a checkpoint's `state_dict`.
        head_dim: channels per attention head.

    Raises:
        RunError: a `qkv` that is not three times a multiple of `head_dim` rows, or averaged weights that lack a tensor.
    """
    names = [name for name in state if name.startswith(NETWORK)]
    if not names:
        return {name: _permute(name, tensor, head_dim, official=True) for name, tensor in state.items()}
    averaged = any(name.startswith(AVERAGED) for name in state)
    chosen = {}
    for name in names:
        source = AVERAGED + name.removeprefix("model.").replace(".", "") if averaged else name
        if source not in state:
            raise RunError(
                f"the checkpoint has averaged weights, but not of {name} (no {source}); fetch the whole file"
            )
        own = name.removeprefix(NETWORK)
        chosen[own] = _permute(own, state[source], head_dim, official=True)
    return chosen


def to_official(state: Mapping[str, Tensor], head_dim: int) -> StateDict:
    """The project's state dict in the official order; what is not permuted shares storage with `state`."""
    return {name: _permute(name, tensor, head_dim, official=False) for name, tensor in state.items()}


def _permute(name: str, tensor: Tensor, head_dim: int, official: bool) -> Tensor:
    """Rows [heads, 3, head_dim] to [3, heads, head_dim], or back."""
    if not name.endswith(_QKV):
        return tensor
    if tensor.shape[0] % (3 * head_dim):
        raise RunError(
            f"{name} has {tensor.shape[0]} rows, which is no multiple of 3 x {head_dim} (head_dim); "
            "choose the backbone configuration that the file was trained with"
        )
    heads = tensor.shape[0] // (3 * head_dim)
    order = (heads, 3, head_dim) if official else (3, heads, head_dim)
    return tensor.unflatten(0, order).transpose(0, 1).flatten(0, 2)
