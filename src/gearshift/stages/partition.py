"""The best cut of a row of nodes into contiguous segments, exactly, and what "best" means for each kind of split.

All objectives here are sums over segments, so a dynamic programme over (segments used, nodes covered) finds the optimum
in O(k G^2). Segments hold at least floor(G / 2k) and at most ceil(3 G / 2k) of the G nodes unless said otherwise: means
of similarities alone are best where single nodes are peeled off (a segment of one node is perfectly similar to itself).

The objective for the optimal denoiser is this project's: the paper gives a rule for three stages only (`thresholds`).
The two about a middle node are the baselines of the paper's Table 4, after Go et al. 2023 (arXiv 2306.00354).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gearshift.runtime.errors import UsageError


def sizes(nodes: int, stages: int, least: float | None = None, most: float | None = None) -> tuple[int, int]:
    """Least and greatest number of nodes in a segment: from shares of the nodes, by default [1/2k, 3/2k].

    Raises:
        UsageError: no cut into `stages` segments has such sizes.
    """
    smallest = max(1, math.floor(nodes / (2 * stages)) if least is None else math.ceil(nodes * least - 1e-9))
    largest = min(nodes, math.ceil(3 * nodes / (2 * stages)) if most is None else math.floor(nodes * most + 1e-9))
    if not smallest * stages <= nodes <= largest * stages:
        raise UsageError(
            f"{nodes} nodes cannot be cut into stages={stages} of {smallest} to {largest} nodes each; take more nodes, "
            "a smaller min_share or a larger max_share"
        )
    return smallest, largest


def best_partition(value: Tensor, stages: int, smallest: int, largest: int) -> tuple[int, ...]:
    """First nodes of segments 1..stages-1 in the cut of the greatest total value.

    Args:
        value: float64 [G + 1, G + 1]; entry [a, b] is the value of the segment of nodes a..b-1.
        smallest, largest: nodes in a segment; `sizes` has checked that there is a cut.
    """
    nodes = len(value) - 1
    best = torch.full((nodes + 1,), -math.inf, dtype=torch.float64)
    best[0] = 0.0
    length = torch.arange(nodes + 1)[None, :] - torch.arange(nodes + 1)[:, None]
    allowed = torch.where((length >= smallest) & (length <= largest), value, -math.inf)
    came_from: list[Tensor] = []
    for _ in range(stages):
        best, origin = (best[:, None] + allowed).max(0)
        came_from.append(origin)
    cuts, end = [], nodes
    for origin in reversed(came_from[1:]):
        end = int(origin[end])
        cuts.append(end)
    return tuple(reversed(cuts))


def mean_similarity(similarity: Tensor) -> Tensor:
    """Values of segments: the sum over nodes of each node's mean similarity to its own segment, itself included.

    Every node counts once, so neither many small segments nor one large one is favoured. `similarity` [G, G].
    """
    total = torch.zeros(len(similarity) + 1, len(similarity) + 1, dtype=torch.float64)
    total[1:, 1:] = similarity.double().cumsum(0).cumsum(1)
    corner = total.diagonal()
    inside = corner[None, :] - total - total.T + corner[:, None]  # [a, b]: both nodes in a..b-1
    length = torch.arange(len(total))[None, :] - torch.arange(len(total))[:, None]
    return inside / length.clamp(min=1)


def to_middle(affinity: Tensor) -> Tensor:
    """Values of segments: the sum over nodes of the affinity to the segment's middle node. `affinity` [G, G].

    Of an even number the middle is the node before the half.
    """
    nodes = len(affinity)
    total = torch.zeros(nodes + 1, nodes, dtype=torch.float64)  # [b, m]: nodes 0..b-1 to node m
    total[1:] = affinity.double().cumsum(0)
    first, last = torch.arange(nodes + 1)[:, None], torch.arange(nodes + 1)[None, :]
    middle = ((first + last - 1) // 2).clamp(0, nodes - 1)
    return total.gather(1, middle.T).T - total.gather(1, middle)


def log_snr_affinity(log_snr: Tensor) -> Tensor:
    """Minus the distance of two nodes in 2 log-SNR, [G, G]: what the log-SNR baseline sums."""
    return -2.0 * (log_snr.double()[:, None] - log_snr.double()[None, :]).abs()
