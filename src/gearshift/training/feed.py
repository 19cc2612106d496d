"""From the number of a micro-batch to images on the device: order, slices of processes, flips, noise, augmentations.

Sample j of micro-batch m is number g = m * M + j of an endless sequence in which every stretch of N is a permutation
of the data set keyed by (seed, epoch). Nothing is remembered between micro-batches: any can be made at any time.

The data (uint8 images, moments of latents) move to the device once where they fit. Where they do not, the next
micro-batches are gathered ahead by a thread into pinned memory, mirrored where a flip was drawn. What a latent draws
around its mean is made on the device, anew for every sample of every micro-batch; there images are augmented, too.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gearshift.data.augment import AugmentPipe
from gearshift.data.dataset import TrainingData
from gearshift.execution.stream import to_device
from gearshift.objectives.base import Batch
from gearshift.runtime import keys

HOST = torch.device("cpu")
D = TypeVar("D", bound=TrainingData)
_AHEAD = 3
# The rest of the device's memory is for weights, optimiser and activations, which are not there yet.
_SHARE_OF_FREE = 0.25


class Order:
    """Which images a micro-batch consists of.

    Args:
        seed: keys the permutation of each epoch.
        count: N, images of the data set.
        size: M, images of a micro-batch over all processes.
        device: where the indices are wanted.
    """

    def __init__(self, seed: int, count: int, size: int, device: torch.device = HOST) -> None:
        self.seed, self.count, self.size, self.device = seed, count, size, device
        self._epochs: dict[int, Tensor] = {}

    def indices(self, micro_batch: int, start: int, stop: int) -> Tensor:
        """Indices of samples start..stop-1 of a micro-batch: int64 [stop - start]."""
        first, last = micro_batch * self.size + start, micro_batch * self.size + stop
        epochs = range(first // self.count, (last - 1) // self.count + 1)
        pieces = [
            self._epoch(e)[max(first - e * self.count, 0) : min(last - e * self.count, self.count)] for e in epochs
        ]
        # The permutations before the last one are not needed again.
        self._epochs = {e: p for e, p in self._epochs.items() if e >= epochs[-1]}
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs[epoch] = to_device(keys.permutation(self.seed, "order", epoch, self.count), self.device)
        return self._epochs[epoch]


@dataclass(frozen=True)
class _Rows(Generic[D]):
    """Rows that were taken, and the text features [B, L, D] drawn for them."""

    data: D
    text: Tensor | None

    def apply(self, function: Callable[[Tensor], Tensor]) -> _Rows[D]:
        return _Rows(self.data.apply(function), None if self.text is None else function(self.text))


class Feed(Generic[D]):
    """Makes the slice of this process of any micro-batch.

    Args:
        dataset: the train split.
        seed: of order, flips, augmentations and the noise of latents.
        size: images of a micro-batch over all processes.
        start, stop: the slice of this process.
        device: where the batch is wanted.
        flip: mirror each image with probability one half.
        labelled: hand the labels out as the condition.
        captioned: hand features of a caption out as the condition, one of each image's own drawn for every sample.
        resident: keep the whole data set on the device; None decides by its size.
        augment: transforms images, and says what it did in `Batch.augment` (see `data.augment.check_augment`).
    """

    def __init__(
        self,
        dataset: D,
        *,
        seed: int,
        size: int,
        start: int,
        stop: int,
        device: torch.device,
        flip: bool = False,
        labelled: bool = False,
        captioned: bool = False,
        resident: bool | None = None,
        augment: AugmentPipe | None = None,
    ) -> None:
        self.seed, self.start, self.stop, self.device = seed, start, stop, device
        self.flip, self.labelled, self.augment = flip, labelled, augment
        self.resident = _fits(dataset, device) if resident is None else resident
        self._dataset = dataset.to(device) if self.resident else dataset
        place = device if self.resident else HOST
        self._order = Order(seed, len(dataset), size, place)
        self._slot_on_host = torch.arange(start, stop)
        self._slot = self._slot_on_host.to(device)
        self._slot_at_data = torch.arange(start, stop, device=place)
        self._worker = None if self.resident else ThreadPoolExecutor(1, thread_name_prefix="gearshift-feed")
        self._coming: dict[int, Future[_Rows[D]]] = {}
        self._text = self._dataset.text if captioned else None

    def batch(self, micro_batch: int) -> Batch:
        """This process's slice of a micro-batch, images float32 [stop - start, C, H, W] in [-1, 1]."""
        taken = self._rows(micro_batch) if self._worker is None else self._next(micro_batch, self._worker)
        rows, text = taken.data, taken.text
        noise = None
        if rows.noise_shape is not None:
            noise = keys.normal(self.seed, "latent", self._slot, micro_batch, rows.noise_shape)
        images, done = rows.floats(noise), None
        if self.augment is not None:
            images, done = self.augment(images, self.seed, self._slot_on_host, micro_batch)
        cond = rows.labels if self.labelled else None if text is None else text.float()
        return Batch(images, cond, self._slot, micro_batch, augment=done)

    def close(self) -> None:
        """Lets go of the thread and of what it has gathered."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._coming.clear()

    def _rows(self, micro_batch: int) -> _Rows[D]:
        flip = None
        if self.flip:
            flip = keys.uniform(self.seed, "flip", self._slot_at_data, micro_batch) < 0.5
        index, text = self._order.indices(micro_batch, self.start, self.stop), None
        if self._text is not None:
            text = self._text.take(index, keys.uniform(self.seed, "caption", self._slot_at_data, micro_batch))
        return _Rows(self._dataset.take(index, flip), text)

    def _next(self, micro_batch: int, worker: ThreadPoolExecutor) -> _Rows[D]:
        for wanted in range(micro_batch, micro_batch + _AHEAD + 1):
            if wanted not in self._coming:
                self._coming[wanted] = worker.submit(self._gather, wanted)
        gathered = self._coming.pop(micro_batch).result()
        return gathered.apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _gather(self, micro_batch: int) -> _Rows[D]:
        rows = self._rows(micro_batch)
        return rows.apply(Tensor.pin_memory) if self.device.type == "cuda" else rows


def _fits(dataset: TrainingData, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return dataset.nbytes <= _SHARE_OF_FREE * free
