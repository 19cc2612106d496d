"""Some rows of a denoiser's inputs: which arguments have a row per sample and branch is known for a few models."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from gearshift.integrations.diffusers import trees

ALIGNED = {
    "UNet2DConditionModel": [
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "encoder_attention_mask",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    ],
    "UNet2DModel": ["sample", "timestep", "class_labels"],
    "DiTTransformer2DModel": ["hidden_states", "timestep", "class_labels"],
    "PixArtTransformer2DModel": [
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "added_cond_kwargs",
        "attention_mask",
        "encoder_attention_mask",
    ],
}
"""Arguments with a row per sample and branch, where they are tensors of that many rows; all others are left alone."""


def can_be_picked(model: nn.Module) -> bool:
    """Whether a model can be called for some of its rows."""
    return type(model).__name__ in ALIGNED


def picked(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor, rows: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call for the rows `index` (on the device of the tensors) of `rows`."""
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    aligned = ALIGNED[type(model).__name__]

    def take(value: Any) -> Any:
        def pick(tensor: Tensor) -> Tensor:
            fits = tensor.ndim > 0 and tensor.shape[0] == rows
            return tensor.index_select(0, index.to(tensor.device)) if fits else tensor

        return trees.mapped(value, pick)

    taken = [take(value) if name in aligned else value for name, value in zip(names, args, strict=False)]
    return tuple(taken), {name: take(value) if name in aligned else value for name, value in kwargs.items()}


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The noisy latents of a call.

    Raises:
        LookupError: there are none where models of the library take them.
    """
    for name in ("sample", "hidden_states"):
        if isinstance(kwargs.get(name), Tensor):
            found: Tensor = kwargs[name]
            return found
    if args and isinstance(args[0], Tensor):
        return args[0]
    raise LookupError("the denoiser was called without a tensor of latents")


def timestep_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | float | None:
    """The timesteps of a call, if they are given where models of the library take them."""
    value = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    if isinstance(value, Tensor):
        return value if value.numel() else None
    return float(value) if isinstance(value, int | float) else None


def timestep_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The first of them, as a number."""
    value = timestep_argument(args, kwargs)
    return float(value.flatten()[0]) if isinstance(value, Tensor) else value


Signature = tuple[Any, ...]


def signature_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
    """Shape, dtype and device of the latents of a call, and how its output is to be returned."""
    x = first_tensor(args, kwargs)
    return tuple(x.shape), x.dtype, x.device, bool(kwargs.get("return_dict", True))


def same_but_rows(a: Signature, b: Signature) -> bool:
    """Whether two calls differ in their number of rows at most."""
    return bool(a[0][1:] == b[0][1:] and a[1:] == b[1:])


def shown(signature: Signature) -> str:
    """For messages."""
    shape, dtype, device, as_object = signature
    kind = str(dtype).removeprefix("torch.")
    return f"{'x'.join(map(str, shape))} {kind} on {device}{'' if as_object else ' (return_dict=False)'}"
