"""Work in fixed parts: over threads and processes, in exact float32, with the same bits however many there are.

On the CPU a matrix product is cut into as many pieces as there are threads and sums them in another order for each
number, so every part is computed by a single thread and the threads share out the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from gearshift.runtime import launch, peers

P = TypeVar("P")
R = TypeVar("R")
# Each thread has buffers of its own.
_MOST_THREADS = 12


def in_parts(
    work: Callable[[P], R], parts: Sequence[P], device: torch.device, done: Callable[[P], None] | None = None
) -> list[R]:
    """`work` of every part, in order. `done` is called in the calling thread as parts come in, in order.

    On the CPU the parts are spread over `torch.get_num_threads()` Python threads with one intra-op thread each, so
    `work` must not write to anything shared. Runs without TensorFloat-32, autocast and gradients, whatever holds
    outside; all of it, and the number of threads, is afterwards what it was.
    """

    def one(part: P) -> R:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return work(part)

    results: list[R] = []
    with exact_products():
        if device.type != "cpu":
            _collect(map(one, parts), parts, results, done)
            return results
        threads = torch.get_num_threads()
        try:
            # The number of threads belongs to each thread, but setting it also changes what later threads start with.
            with ThreadPoolExecutor(
                max(1, min(threads, len(parts), _MOST_THREADS)), initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                _collect(pool.map(one, parts), parts, results, done)
        finally:
            torch.set_num_threads(threads)
    return results


def over_processes(
    work: Callable[[P], R], parts: Sequence[P], device: torch.device, done: Callable[[P], None] | None = None
) -> list[R] | None:
    """`in_parts`, each process taking every so-many-th part; the main process gets the results of all parts in order,
    the others None. Collective. Raises RunError when another process is gone."""
    size = launch.world_size()
    own = in_parts(work, parts[launch.rank() :: size], device, done)
    everybodys = peers.gather(own, "every process had done its queries")
    if everybodys is None:
        return None
    return [everybodys[number % size][number // size] for number in range(len(parts))]


@contextmanager
def exact_products() -> Iterator[None]:
    """No TensorFloat-32 (on the CPU: no bfloat16 in its place) in matrix products inside, whatever holds outside."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later; the old flag must not be mixed with it
        switches: list[tuple[Any, str, Any]] = [
            (place, "fp32_precision", "ieee") for place in (backends.cuda.matmul, backends.mkldnn.matmul)
        ]
    else:
        switches = [(backends.cuda.matmul, "allow_tf32", False)]
    before = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, strict in switches:
            setattr(place, name, strict)
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _collect(coming: Iterator[R], parts: Sequence[P], results: list[R], done: Callable[[P], None] | None) -> None:
    for part, result in zip(parts, coming, strict=True):
        results.append(result)
        if done is not None:
            done(part)
