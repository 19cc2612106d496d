"""What happens between two optimiser steps: a logged line, a checkpoint, a stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import distributed as dist

from gearshift.runtime.loggers import MetricLogger
from gearshift.runtime.progress import Progress, note
from gearshift.training.checkpoint import LAST
from gearshift.training.config import TrainerConfig
from gearshift.training.metrics import MetricsFile
from gearshift.training.module import DiffusionTraining
from gearshift.training.optim import learning_rate
from gearshift.training.signals import StopRequest

# Several processes have to save and stop after the same step. Asking each other waits for the device: not every step.
_AGREE_EVERY = 10
_SHOW_EVERY_SECONDS = 0.2


class Boundary(pl.Callback):
    """Looks after the steps. `metrics` and `logger` are those of the main process, None elsewhere.

    A line is written before the checkpoint of its step, so a resumed run finds every line it does not write again.
    """

    def __init__(
        self,
        config: TrainerConfig,
        checkpoints: Path,
        *,
        stop: StopRequest,
        progress: Progress,
        metrics: MetricsFile | None,
        logger: MetricLogger | None,
    ) -> None:
        self.config, self.checkpoints = config, checkpoints
        self.stop, self.progress, self.metrics, self.logger = stop, progress, metrics, logger
        self.stopped_by = 0
        self._unshown = 0
        self._images = 0
        self._shown_at = self._logged_at = self._saved_at = self._timed_at = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown_at = self._logged_at = self._saved_at = self._timed_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionTraining)
        module = pl_module
        if module.micro_batch % self.config.accumulate:
            return
        step = trainer.global_step
        final = step >= self.config.max_steps
        now = time.monotonic()
        self._unshown += 1
        self._images += self.config.batch_size
        if final or step % self.config.log_every == 0:
            self._log(trainer, module, step)
        elif now - self._shown_at >= _SHOW_EVERY_SECONDS:
            self._show(now)
        asked, late = self._agreed(trainer, step, now)
        every = self.config.checkpoint_every_steps
        if final or asked or late or (every is not None and step % every == 0):
            self._save(trainer, module, step)
        if asked and not final:
            self.stopped_by = asked
            trainer.should_stop = True

    def _agreed(self, trainer: pl.Trainer, step: int, now: float) -> tuple[int, bool]:
        """(signal that asks to stop or 0, whether a checkpoint is due by the clock), the same in all processes."""
        minutes = self.config.checkpoint_every_minutes
        late = minutes is not None and now - self._saved_at >= 60 * minutes
        if trainer.world_size == 1:
            return self.stop.number, late
        if step % _AGREE_EVERY:
            return 0, False
        said = torch.tensor([self.stop.number, int(late)], device=trainer.strategy.root_device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        number, due = said.tolist()
        return number, bool(due)

    def _log(self, trainer: pl.Trainer, module: DiffusionTraining, step: int) -> None:
        module.meter.reduce()
        module.check_finite()
        terms = module.meter.take()
        now = time.monotonic()  # after the values were read, which waits for the device
        self._tick(module, now)
        row: dict[str, float | int] = {"step": step, "images": step * self.config.batch_size, **terms}
        row["lr"] = learning_rate(self.config, step - 1)
        if module.grad_norm is not None:
            row["grad_norm"] = float(module.grad_norm)
        row["images_per_s"] = round(self._images / max(now - self._logged_at, 1e-9), 1)
        row["seconds"] = round(module.seconds, 2)
        self._images, self._logged_at = 0, now
        if self.metrics is not None:
            self.metrics.write(row)
        if self.logger is not None:
            self.logger.log(step, {name: value for name, value in row.items() if name != "step"})
        self._show(now, loss=terms["loss"])

    def _save(self, trainer: pl.Trainer, module: DiffusionTraining, step: int) -> None:
        module.meter.reduce()
        module.check_finite()
        module.check_weights()
        if self.metrics is not None:
            self.metrics.sync()
        self._tick(module, time.monotonic())
        trainer.save_checkpoint(self.checkpoints / LAST)
        module.saved_step = step
        self._saved_at = time.monotonic()

    def _tick(self, module: DiffusionTraining, now: float) -> None:
        module.seconds += now - self._timed_at
        self._timed_at = now

    def _show(self, now: float, **values: float) -> None:
        self.progress.update(self._unshown, **values)
        self._unshown, self._shown_at = 0, now


def say_stopped(number: int, step: int, total: int) -> str:
    """The line for a training that was asked to stop."""
    import signal

    message = f"stopped by {signal.Signals(number).name} after step {step} of {total}, which is saved"
    note(message)
    return f"{message}; run the same command again to go on"
