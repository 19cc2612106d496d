"""Dropout as a function of the micro-batch, so that a resumed training drops what an uninterrupted one does.

torch draws the masks of dropout from generators of its own. For the forward pass of a micro-batch those are set from
(seed, micro-batch, rank), and put back afterwards; the backward pass uses the masks that the forward pass left. The
masks of another number of processes are others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from gearshift.runtime import keys


def drops(network: nn.Module) -> bool:
    """Whether a module of the network is a dropout that drops something."""
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in network.modules())


@contextlib.contextmanager
def keyed(seed: int, micro_batch: int, rank: int, device: torch.device) -> Iterator[None]:
    """Within it the generators of the host and of `device` start from (seed, micro-batch, rank).

    Nobody waits for the device: the state of its generator lives on the host.
    """
    on_device = device.type == "cuda"
    high, low = keys.integers(seed, "dropout", torch.tensor([rank]), micro_batch, 1 << 31, (2,))[0].tolist()
    with torch.random.fork_rng([device] if on_device else []):
        torch.default_generator.manual_seed(high << 31 | low)
        if on_device:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(high << 31 | low)
        yield
