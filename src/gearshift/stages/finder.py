"""Two similarity curves of the optimal denoiser, measured on a data set (arXiv 2312.09181, equations 5 to 7).

Near the data the optimal noise prediction is the noise itself, and near pure noise it follows from the mean of the data
alone. With x_0 and eps shared,

    S0(t) = E mean_i [|eps*_t(x_t) - eps|_i <= eta],      S1(t) = E mean_i [|eps*_t(x_t) - e_end|_i <= eta],

where the end point e_end is, in mode

* ``surrogate``, (z - mean(Y)) / sigma at the same x_t: the infinite-noise limit of the denoiser. The published
  boundaries were found with it, on images in [0, 1].
* ``literal``, eps* at t_max for x_1 made of the same x_0 and eps, as the paper's text has it. Twice the work.

Both differences are computed from posterior means, (x_0 - y*) / sigma and so on, so that nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.runtime.progress import Progress
from gearshift.stages.axis import Axis
from gearshift.stages.optimal import OptimalDenoiser
from gearshift.stages.parallel import over_processes

MODES = ("surrogate", "literal")
LEAST_QUERIES = 100


@dataclass(frozen=True)
class Search:
    """How boundaries are looked for.

    Attributes:
        eta: greatest difference of two noise predictions, per number, that counts as none (2/256 is published).
        alpha: similarity that the average over a stage keeps, in (0, 1). 0.9 was fitted to the published boundaries.
        queries: noisy images, stratified over the axis; at least 100.
        mode: "surrogate" or "literal".
        seed: of images and noise.

    Raises:
        UsageError: a value outside its range.
    """

    eta: float = 2 / 256
    alpha: float = 0.9
    queries: int = 8000
    mode: str = "surrogate"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise UsageError(f"eta={self.eta:g} must be above 0; the published boundaries take 2/256")
        if not 0 < self.alpha < 1:
            raise UsageError(f"alpha={self.alpha:g} is a mean similarity and must lie between 0 and 1, e.g. 0.9")
        if self.queries < LEAST_QUERIES:
            raise UsageError(
                f"queries={self.queries} are too few for a curve; take at least {LEAST_QUERIES} (8000 is published)"
            )
        if self.mode not in MODES:
            raise UsageError(f"mode={self.mode} is not one of {', '.join(MODES)}")


@dataclass(frozen=True)
class Curves:
    """One entry per query, by ascending noise; float64 on the host.

    Attributes:
        share: where the query lies on the axis, in (0, 1).
        near: S0 of this query, in [0, 1].
        far: S1 of this query, in [0, 1].
        max_weight, entropy: of the posterior of this query.
    """

    share: Tensor
    near: Tensor
    far: Tensor
    max_weight: Tensor
    entropy: Tensor

    def running_near(self) -> Tensor:
        """Mean of S0 over [0, share]."""
        return _running(self.near)

    def running_far(self) -> Tensor:
        """Mean of S1 over [share, 1]."""
        return _running(self.far.flip(0)).flip(0)


def stratified(count: int, seed: int) -> Tensor:
    """One share in each of `count` equal parts of [0, 1), ascending, float64."""
    drawn = keys.uniform(seed, "stages: share", torch.arange(count), 0)
    return (torch.arange(count, dtype=torch.float64) + drawn.double()) / count


def pairs(denoiser: OptimalDenoiser, index: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Image and noise of the host queries `index` (int64 [q]): float64 [q, d] each, on the device."""
    rows = denoiser.rows
    images = rows.take(keys.integers(seed, "stages: image", index, 0, rows.count))
    noise = keys.normal(seed, "stages: noise", index, 0, (rows.width,))
    return images.to(denoiser.device), noise.to(denoiser.device).double()


def measure(denoiser: OptimalDenoiser, axis: Axis, search: Search) -> Curves | None:
    """Both curves; the same numbers on any number of processes and threads.

    Collective: processes take every so-many-th chunk of queries, the main one gets the curves and the others None.
    """
    count, size = search.queries, denoiser.chunk_size
    share = stratified(count, search.seed)
    sigma = axis.sigma(share).to(denoiser.device)
    end = axis.sigma(torch.ones(1, dtype=torch.float64)).to(denoiser.device)

    def work(span: tuple[int, int]) -> Tensor:
        ratio = sigma[slice(*span)]
        images, noise = pairs(denoiser, torch.arange(*span), search.seed)
        found = denoiser.chunk(images + ratio[:, None] * noise, ratio)
        near = (images - found.mean) / ratio[:, None]
        if search.mode == "surrogate":
            far = (denoiser.mean.to(found.mean) - found.mean) / ratio[:, None]
        else:
            last = end.expand(len(images))
            far = near - (images - denoiser.chunk(images + end * noise, last).mean) / end
        alike = [(part.abs() <= search.eta).double().mean(1) for part in (near, far)]
        return torch.stack([*alike, found.max_weight, found.entropy]).cpu()

    spans = [(start, min(start + size, count)) for start in range(0, count, size)]
    with told(count, f"similarity over {denoiser.rows.count} images", "queries") as done:
        found = over_processes(work, spans, denoiser.device, lambda span: done(span[1] - span[0]))
    return None if found is None else Curves(share, *torch.cat(found, dim=1))


class told:
    """Progress of the main process as a function of what is done; with several processes, of its own share."""

    def __init__(self, total: int, label: str, unit: str) -> None:
        from gearshift.runtime.launch import world_size

        self._progress = Progress(-(-total // world_size()), label, unit=unit)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.__enter__()
        return self._progress.update

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)  # type: ignore[arg-type]


def _running(values: Tensor) -> Tensor:
    return values.cumsum(0) / torch.arange(1, len(values) + 1, dtype=torch.float64)
