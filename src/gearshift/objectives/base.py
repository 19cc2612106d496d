"""The contract of an objective, and the draws it is given.

Every draw is a function of (seed, purpose, micro-batch, global slot), so a resumed run repeats nothing, accumulation
does not reuse noise, and several processes draw what one would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.execution.stream import to_device
from gearshift.runtime import keys


@dataclass(frozen=True, slots=True)
class Batch:
    """Training images and conditioning of one process.

    Attributes:
        images: [B, C, H, W] fp32 in [-1, 1].
        cond: labels [B], text [B, L, D], or None.
        slot: position of each sample in the global micro-batch, int64 [B], on the images' device.
        micro_batch: number of the micro-batch since the start of training.
        host_slot: `slot` on the host, where it is known there; objectives that decide on the host wait for the device
            once per micro-batch without it.
        augment: labels [B, 9] of the augmentation pipe (`data.augment`), None without one.
    """

    images: Tensor
    cond: Tensor | None
    slot: Tensor
    micro_batch: int
    host_slot: Tensor | None = None
    augment: Tensor | None = None

    def take(self, order: Tensor) -> Batch:
        """The samples at `order` (host int64, any order); their draws go with them."""
        on_device = to_device(order, self.images.device)
        return Batch(
            self.images.index_select(0, on_device),
            None if self.cond is None else self.cond.index_select(0, on_device),
            self.slot.index_select(0, on_device),
            self.micro_batch,
            None if self.host_slot is None else self.host_slot[order],
            None if self.augment is None else self.augment.index_select(0, on_device),
        )


@dataclass(frozen=True, slots=True)
class Draws:
    """Keyed random numbers of one micro-batch; the same for every process layout."""

    seed: int
    batch: Batch

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[B, *shape] in [0, 1), fp32."""
        return keys.uniform(self.seed, purpose, self.batch.slot, self.batch.micro_batch, shape)

    def host_uniform(self, purpose: str) -> Tensor:
        """`uniform(purpose)` on the host, [B]: the same bits."""
        slot = self.batch.slot.cpu() if self.batch.host_slot is None else self.batch.host_slot
        return keys.uniform(self.seed, purpose, slot, self.batch.micro_batch)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape] standard normal, fp32."""
        return keys.normal(self.seed, purpose, self.batch.slot, self.batch.micro_batch, shape)


class Objective(Protocol):
    """`loss` gives named scalar terms; "loss" is the one that is minimised.

    Attributes:
        may_leave_unused: some parameters may get no gradient in a step (DDP has to look for them).
    """

    may_leave_unused: bool

    def check(self, network: Backbone) -> None:
        """Raises UsageError where the network lacks what the objective needs."""
        ...

    def loss(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]: ...


def drop_condition(network: Backbone, cond: Tensor | None, draws: Draws, probability: float) -> Tensor | None:
    """Replace the conditioning by the null condition with this probability (classifier-free guidance, 2207.12598)."""
    if cond is None or probability == 0:
        return cond
    null = network.null_cond(len(cond), cond.device)
    assert null is not None
    dropped = draws.uniform("label_dropout") < probability
    return torch.where(dropped.reshape(-1, *[1] * (cond.ndim - 1)), null.to(cond.dtype), cond)


def noised(denoiser: Denoiser, batch: Batch, draws: Draws, time: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Times [B], noise and noisy images [B, C, H, W] of a micro-batch; `time` where it was drawn already."""
    if time is None:
        time = denoiser.process.times_from_uniform(draws.uniform("time"))
    noise = draws.normal("noise", tuple(batch.images.shape[1:]))
    return time, noise, denoiser.process.add_noise(batch.images, noise, time)
