"""How alike the optimal denoisers of two noise levels are, for every two of a grid of levels."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.stages.axis import Axis
from gearshift.stages.finder import Search, pairs, told
from gearshift.stages.optimal import OptimalDenoiser
from gearshift.stages.parallel import over_processes
from gearshift.stages.partition import best_partition, mean_similarity, sizes
from gearshift.stages.thresholds import Found

_LEAST_PAIRS = 4


def centres(nodes: int) -> Tensor:
    """Shares of the nodes: the middles of equal parts of the axis, float64 [G]. Cuts lie on the edges of parts."""
    return (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes


def similarities(denoiser: OptimalDenoiser, axis: Axis, search: Search, nodes: int) -> Tensor | None:
    """mean_i [|eps*_a(x_a) - eps*_b(x_b)|_i <= eta] of every two nodes, for every pair of image and noise: float32
    [P, G, G].

    P = queries // nodes, so that the work is that of as many queries. Collective: None but on the main process.

    Raises:
        UsageError: fewer than 4 pairs, or fewer than 2 nodes.
    """
    count = search.queries // max(nodes, 1)
    if nodes < 2 or count < _LEAST_PAIRS:
        raise UsageError(
            f"queries={search.queries} over nodes={nodes} noise levels leave {count} pairs of image and noise, and "
            f"{_LEAST_PAIRS} are needed (and 2 nodes); take more queries"
        )
    sigma = axis.sigma(centres(nodes)).to(denoiser.device)
    size = max(1, denoiser.chunk_size // nodes)

    def work(span: tuple[int, int]) -> Tensor:
        images, noise = pairs(denoiser, torch.arange(*span), search.seed)
        noisy = images[:, None] + sigma[:, None] * noise[:, None]
        mean = denoiser.chunk(noisy.flatten(0, 1), sigma.repeat(len(images))).mean.reshape(noisy.shape)
        apart = ((images[:, None] - mean) / sigma[:, None]).to(torch.float32)  # eps*, less the noise they share
        alike = [((apart[:, [a]] - apart).abs() <= search.eta).float().mean(2) for a in range(nodes)]
        return torch.stack(alike, dim=1).cpu()

    spans = [(start, min(start + size, count)) for start in range(0, count, size)]
    with told(count, f"similarity of {nodes} levels over {denoiser.rows.count} images", "pairs") as done:
        found = over_processes(work, spans, denoiser.device, lambda span: done(span[1] - span[0]))
    return None if found is None else torch.cat(found)


def any_stages(
    similarity: Tensor,
    stages: int,
    seed: int,
    replicates: int = 200,
    shares: tuple[float | None, float | None] = (None, None),
) -> Found:
    """The cut of `partition.mean_similarity` of the mean of `similarity` [P, G, G], and of replicates that draw the
    pairs again. `shares`: least and greatest share of the nodes in a stage. No finer than the grid.

    Raises:
        UsageError: the sizes do not go with the number of stages.
    """
    count, nodes = similarity.shape[:2]
    smallest, largest = sizes(nodes, stages, *shares)

    def cut(mean: Tensor) -> list[float]:
        return [first / nodes for first in best_partition(mean_similarity(mean), stages, smallest, largest)]

    flat = similarity.flatten(1)
    again = []
    for number in range(replicates):
        drawn = keys.integers(seed, "stages: replicate", torch.arange(count), number, count)
        weight = torch.bincount(drawn, minlength=count).float() / count
        again.append(cut((weight @ flat).reshape(nodes, nodes)))
    found = torch.tensor(again, dtype=torch.float64).reshape(-1, stages - 1)
    return Found(tuple(cut(similarity.double().mean(0))), found, 0)
