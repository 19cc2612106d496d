"""What modules of `diffusers` take and give: tensors in tuples, lists, dictionaries and output classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor changed; what is no tensor stays what it is."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        changed = {key: mapped(value, change) for key, value in tree.items()}
        # The library's output classes are dictionaries, and dataclasses with a field per key.
        return changed if type(tree) is dict else type(tree)(**changed)
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(value, change) for value in tree)
    return tree


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a structure, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors(value)


def refilled(tree: Any, values: Iterator[Tensor]) -> Any:
    """The same structure with its tensors replaced by `values`, in order."""
    return mapped(tree, lambda _: next(values))


def copied(tree: Any) -> Any:
    """The same structure with tensors of its own."""
    return mapped(tree, torch.clone)


def describing(tree: Any) -> Any:
    """The same structure on the meta device: shapes and dtypes, and no memory."""
    return mapped(tree, lambda tensor: torch.empty_like(tensor, device="meta"))
