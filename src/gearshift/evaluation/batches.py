"""Images through a network in batches of one size, in exact float32, with the same bits on any number of threads.

On the CPU a matrix product is cut into as many parts as there are threads and sums them in another order for each
number, so every batch is computed by a single thread and the threads share out the batches. Which images stand in a
batch, and therefore every bit of the result, is left to `batch` alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_batches(
    function: Callable[..., T], tensors: Sequence[Tensor], batch: int, device: torch.device | str
) -> list[T]:
    """`function` of each run of `batch` entries of the tensors (all [N, ...], moved to `device`), in order.

    Runs without TensorFloat-32, autocast and gradients, whatever holds outside. On the CPU the batches are spread over
    `torch.get_num_threads()` Python threads with one intra-op thread each, so `function` must not write to anything
    shared. The number of threads is afterwards what it was, also where `function` raises.
    """
    device = torch.device(device)
    parts = list(zip(*(tensor.split(batch) for tensor in tensors), strict=True)) if len(tensors[0]) else []

    def work(part: tuple[Tensor, ...]) -> T:
        with _exact_here(device):
            return function(*(tensor.to(device) for tensor in part))

    with exact_fp32(device):
        return _threaded(work, parts) if device.type == "cpu" else [work(part) for part in parts]


def _threaded(work: Callable[[Any], T], parts: Sequence[Any]) -> list[T]:
    threads = torch.get_num_threads()
    if not parts:
        return []
    try:
        # The number of threads belongs to each thread, but setting it also changes what later threads start with.
        with ThreadPoolExecutor(min(threads, len(parts)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """No TensorFloat-32 (on the CPU: no bfloat16 in its place), no autocast and no gradients inside, whatever holds
    outside: features must not depend on the training's settings.

    The former belong to the process and the latter two to the thread, so threads started inside need their own.
    """
    switches = _switches()
    before = [getattr(holder, attribute) for holder, attribute, _ in switches]
    try:
        for holder, attribute, strict in switches:
            setattr(holder, attribute, strict)
        with _exact_here(device):
            yield
    finally:
        for (holder, attribute, _), value in zip(switches, before, strict=True):
            setattr(holder, attribute, value)


@contextmanager
def _exact_here(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _switches() -> list[tuple[Any, str, Any]]:
    """(holder, attribute, strict value). torch 2.9 replaced the flags by precisions and forbids reading the one after
    setting the other."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return [(backends.cudnn, "allow_tf32", False), (backends.cuda.matmul, "allow_tf32", False)]
    places = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    return [(place, "fp32_precision", "ieee") for place in places]


@contextmanager
def all_cores() -> Iterator[None]:
    """Every core for torch inside: sums round differently on another number of threads, and launchers set it by the
    number of processes."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)
