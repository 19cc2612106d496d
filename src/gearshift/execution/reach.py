"""Which blocks nobody reads: what lies before a block that is taken whole from memory.

A block whose output comes from memory needs no input. So nothing before it runs, except what pushes a long skip that a
later block still pops: reusing the deep features of a U-Net (DeepCache, arXiv 2312.00858) is the reuse of one block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gearshift.execution.network import Network


def embedded_skips(network: Network, path: Sequence[int]) -> int:
    """Long skips that the embedding pushes: those that the blocks of a path pop and none of them has pushed."""
    return sum(block in network.pops for block in path) - sum(block in network.pushes for block in path)


def unread(network: Network, blocks: Sequence[int], whole: Collection[int], embedded: int) -> frozenset[int]:
    """Blocks whose output has no reader, when `whole` are taken from memory and the last block is read out.

    Args:
        blocks: that the rows run, in order (a path up to its depth).
        whole: blocks taken whole from memory.
        embedded: long skips that the embedding has pushed.
    """
    if not whole:
        return frozenset()
    pending = [-1] * embedded  # positions that pushed what is still to be popped
    origin: dict[int, int] = {}
    for position, block in enumerate(blocks):
        if block in network.pops:
            origin[position] = pending.pop()
        if block in network.pushes:
            pending.append(position)
    # A carried state is seen by blocks and readouts that do not say so.
    read = [block in network.carries for block in blocks]
    if read:
        read[-1] = True
    for position in reversed(range(len(blocks))):
        if not read[position] or blocks[position] in whole:
            continue
        for before in (position - 1, origin.get(position, -1)):
            if before >= 0:
                read[before] = True
    return frozenset(block for block, seen in zip(blocks, read, strict=True) if not seen)
