"""What a training is: the schema of the `trainer` group."""

from __future__ import annotations

from dataclasses import dataclass

from gearshift.runtime.errors import UsageError
from gearshift.training.ema import HalfLife

_CHOICES = {
    "lr_schedule": ("constant", "cosine"),
    "precision": ("fp32", "bf16", "fp16"),
    "accelerator": ("auto", "cpu", "cuda"),
    "ema_clock": ("step", "stage"),
}


@dataclass(frozen=True)
class TrainerConfig:
    """Schema of the `trainer` group. The optimiser is AdamW; the defaults are those of U-ViT on CIFAR-10 (2209.12152).

    Attributes:
        seed: of the data order, times, noise and flips.
        max_steps: optimiser steps.
        batch_size: images per optimiser step, over all processes and accumulated micro-batches.
        accumulate: micro-batches per optimiser step.
        lr, betas, weight_decay: of AdamW; every parameter decays, as in the official code.
        warmup_steps: the rate rises linearly from zero over this many steps (a ramp of 10 M images at a batch of 512,
            as in EDM, is 19531).
        lr_schedule: what follows: constant, or cosine (down to zero at max_steps).
        clip_norm: largest norm of the gradient of all parameters together; None does not clip.
        ema_decay: of the averaged weights; with None, and no half-life either, there is no average.
        ema_warmup: the decay is min(ema_decay, (1 + n) / (10 + n)) at update n; off is the official U-ViT.
        ema_halflife_images: half-life of the averaged weights in images, in place of ema_decay (EDM: 500,000).
        ema_rampup_ratio: at the beginning the half-life is at most this share of the images seen (EDM: 0.05).
        ema_clock: step | stage: the average of a parameter moves in steps in which it got a gradient, and its memory is
            counted in these (for objectives that train some stages in a step and not others).
        precision: fp32, or mixed precision in bf16 or fp16 (with loss scaling; CUDA only).
        accelerator: auto (CUDA where there is one), cpu, cuda.
        devices, num_nodes: processes per node, one per device, and nodes.
        checkpoint_every_steps, checkpoint_every_minutes: when a checkpoint is due, besides at the end; None is never.
        log_every: steps per line of metrics.csv; each line averages the steps since the one before.
        freeze: parameters that do not learn, as patterns over their names (`t_embedder.*`). They get no gradient and
            stay the same bits; checkpoints and averages hold them.
        compile: compile the blocks of the network, one by one (`execution.compiling`).
        deterministic: refuse operations whose result differs from run to run (CUDA has some; the CPU needs no switch).
    """

    seed: int = 0
    max_steps: int = 500_000
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 2e-4
    betas: tuple[float, float] = (0.99, 0.999)
    weight_decay: float = 0.03
    warmup_steps: int = 2500
    lr_schedule: str = "constant"
    clip_norm: float | None = None
    ema_decay: float | None = 0.9999
    ema_warmup: bool = False
    ema_halflife_images: float | None = None
    ema_rampup_ratio: float | None = None
    ema_clock: str = "step"
    precision: str = "fp32"
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = 10.0
    log_every: int = 50
    deterministic: bool = False
    freeze: tuple[str, ...] = ()
    compile: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"trainer.{name}={getattr(self, name)!r} is not one of {list(allowed)}")
        for name in ("max_steps", "batch_size", "accumulate", "devices", "num_nodes", "log_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "lr", "weight_decay", "warmup_steps"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        positive = ("clip_norm", "checkpoint_every_steps", "checkpoint_every_minutes")
        for name in (*positive, "ema_halflife_images", "ema_rampup_ratio"):
            value = getattr(self, name)
            self._check(name, value is None or value > 0, "above 0, or null")
        self._check("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "in [0, 1), or null")
        self._check_average()
        self._check("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        processes = self.devices * self.num_nodes
        if self.batch_size % (self.accumulate * processes):
            raise UsageError(
                f"trainer.batch_size={self.batch_size} cannot be split into accumulate={self.accumulate} micro-batches "
                f"over {processes} processes; make it a multiple of {self.accumulate * processes}"
            )

    def _check_average(self) -> None:
        halflife = self.ema_halflife_images
        if halflife is not None and (self.ema_decay is not None or self.ema_warmup):
            was = f"ema_decay={self.ema_decay}" if self.ema_decay is not None else "ema_warmup=true"
            instead = "ema_decay=null" if self.ema_decay is not None else "ema_warmup=false and an ema_rampup_ratio"
            raise UsageError(
                f"trainer.ema_halflife_images={halflife:g} and trainer.{was} are two memories; set {instead}, or "
                "ema_halflife_images=null"
            )
        if self.ema_rampup_ratio is not None and halflife is None:
            raise UsageError(
                f"trainer.ema_rampup_ratio={self.ema_rampup_ratio:g} needs a half-life, and "
                f"trainer.ema_halflife_images=null; set it, or ema_warmup=true with ema_decay={self.ema_decay}"
            )
        if self.ema_clock != "step" and self.average is None:
            raise UsageError(
                f"trainer.ema_clock={self.ema_clock}, but there is no average (ema_decay=null and "
                "ema_halflife_images=null); set one of them, or ema_clock=step"
            )

    def _check(self, name: str, sound: bool, wanted: str) -> None:
        if not sound:
            raise UsageError(f"trainer.{name}={getattr(self, name)} must be {wanted}")

    @property
    def average(self) -> float | HalfLife | None:
        """The memory of the averaged weights: decay or half-life; None where no average is kept."""
        if self.ema_halflife_images is not None:
            return HalfLife(self.ema_halflife_images, self.batch_size, self.ema_rampup_ratio)
        return self.ema_decay

    @property
    def micro_batch_size(self) -> int:
        """Images per micro-batch over all processes."""
        return self.batch_size // self.accumulate

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes
