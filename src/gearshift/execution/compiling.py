"""Compilation of blocks, one by one; decisions stay outside.

A graph holds one block and knows no plan, so depths, dropped blocks and packed rows change which graphs are called and
how many rows they are given, never what they are. Blocks of one class share their graphs. The first number of rows gets
a graph of its own, the second one for every number from two on, and a single row a third; after that nothing is
compiled again, however many rows are left. Training and sampling, autocast and plain, each have theirs.
"""

from __future__ import annotations

from torch import nn

from gearshift.execution.network import Network
from gearshift.runtime.errors import UsageError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPHS = 512
"""Graphs that one class of blocks may have: widths and sizes (a U-Net has some dozens) x with and without a skip x
gradients x precisions x layouts."""


def compile_blocks(network: Network, mode: str | None = None) -> None:
    """Compile every block of `network` in place; the names in its state dict stay what they are.

    Nothing is compiled before a block is first called. Blocks that are compiled already are compiled anew.

    Args:
        mode: of `torch.compile`, one of `MODES`; None is the default one.

    Raises:
        UsageError: another mode.
    """
    if mode is not None and mode not in MODES:
        raise UsageError(f"compile mode {mode!r} is not one of {list(MODES)}")
    import torch._dynamo.config as settings

    # Past its limit, 8 by default, the compiler goes on uncompiled.
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
    setattr(settings, name, max(getattr(settings, name), GRAPHS))
    total = "accumulated_recompile_limit" if hasattr(settings, "accumulated_recompile_limit") else None
    if total is not None:
        setattr(settings, total, max(getattr(settings, total), 4 * GRAPHS))
    for index in range(len(network.blocks)):
        block = network.blocks[index]
        if isinstance(block, nn.Module):
            block.compile(mode=mode)
