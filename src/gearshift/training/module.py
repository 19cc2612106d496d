"""The Lightning module: a denoiser, an objective and a data set, with every draw a function of the micro-batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gearshift.data.augment import AugmentPipe
from gearshift.data.dataset import ImageDataset
from gearshift.diffusion.denoiser import Denoiser
from gearshift.objectives.base import Draws, Objective
from gearshift.runtime.errors import RunError
from gearshift.training import dropout
from gearshift.training.checkpoint import FORMAT, KEY, PREFIX, check_state
from gearshift.training.config import TrainerConfig
from gearshift.training.ema import Ema
from gearshift.training.feed import Feed
from gearshift.training.meter import Meter
from gearshift.training.optim import freeze, learning_rate, make_optimizer


class DiffusionTraining(pl.LightningModule):
    """What happens in a step. When to log, save and stop is the business of `Boundary`.

    Batches are made on the device; the data loader only counts. The counter is the module's own and is saved, so a
    resumed training goes on with the very next micro-batch.

    Args:
        config: of the trainer.
        denoiser: its network is trained, but for what the configuration freezes.
        objective: gives the loss.
        dataset: the train split.
        config_text: what decides the weights, to be kept in checkpoints.
        flip: mirror images with probability one half.
        augment: transforms images, and tells the network how.
    """

    def __init__(
        self,
        config: TrainerConfig,
        denoiser: Denoiser,
        objective: Objective,
        dataset: ImageDataset,
        *,
        config_text: str,
        flip: bool = False,
        augment: AugmentPipe | None = None,
    ) -> None:
        super().__init__()
        self.config, self.denoiser, self.objective = config, denoiser, objective
        self.config_text, self.flip, self.augment = config_text, flip, augment
        self.micro_batch = 0
        self.seconds = 0.0  # spent in training, over all the times it was resumed
        self.saved_step: int | None = None
        self.ema: Ema | None = None
        self.grad_norm: Tensor | None = None
        self.meter = Meter(config.log_every * config.accumulate)
        self._dataset = dataset
        self._feed: Feed | None = None
        self._restored: dict[str, Any] | None = None
        self._at_once = False
        self._slots = torch.empty(0, dtype=torch.int64)
        self._drops = dropout.drops(denoiser.network)
        freeze(denoiser.network, config.freeze)

    def configure_optimizers(self) -> AdamW:
        return make_optimizer(self.config, self.denoiser.parameters())

    def on_train_start(self) -> None:
        # Everything has reached its device, and with several processes their weights are the same by now.
        device, network = self.device, self.denoiser.network
        share = self.config.micro_batch_size // self.trainer.world_size
        start = share * self.trainer.global_rank
        self._slots = torch.arange(start, start + share)
        self._feed = Feed(
            self._dataset,
            seed=self.config.seed,
            size=self.config.micro_batch_size,
            start=start,
            stop=start + share,
            device=device,
            flip=self.flip,
            augment=self.augment,
            labelled=network.cond_kind == "class",
            captioned=network.cond_kind == "text",
        )
        average = self.config.average
        if average is not None:
            own_clocks = self.config.ema_clock == "stage"
            self.ema = Ema(network, average, warmup=self.config.ema_warmup, own_clocks=own_clocks)
        if self._restored is not None:
            own, self._restored = self._restored, None
            if self.ema is not None:
                self.ema.load(own["ema"]["weights"], own["ema"]["updates"], own["ema"].get("clocks"))
            self.meter.load(**own["meter"], device=device)
        # On the host a look at the loss costs nothing. Elsewhere it would wait for the device, and several processes
        # have to stop together: then `Boundary` looks.
        self._at_once = device.type == "cpu" and self.trainer.world_size == 1

    def training_step(self, number: int, batch_idx: int) -> Tensor:
        """The loss of this process's slice of a micro-batch."""
        assert self._feed is not None and number == self.micro_batch
        batch = replace(self._feed.batch(number), host_slot=self._slots)
        with self._drawn(number):
            terms = self.objective.loss(self.denoiser, batch, Draws(self.config.seed, batch))
        self.meter.add(number, terms)
        if self._at_once and self.meter.last_not_finite():
            self.check_finite()
        self.micro_batch += 1
        return terms["loss"]

    def _drawn(self, micro_batch: int) -> AbstractContextManager[None]:
        """Within it dropout draws what belongs to this process's slice of a micro-batch."""
        if not self._drops:
            return nullcontext()
        return dropout.keyed(self.config.seed, micro_batch, self.trainer.global_rank, self.device)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.trainer.global_step)
        optimizer.step(closure=optimizer_closure)
        if self.ema is not None:
            self.ema.update()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.config.clip_norm is not None:
            # Kept as a tensor: it is looked at in a logged step only.
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.clip_norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raw weights under Lightning's names, whatever the network holds just now, and the rest under our own."""
        average: dict[str, Any] | None = None
        if self.ema is not None:
            checkpoint["state_dict"] = {PREFIX + name: value for name, value in self.ema.weights().items()}
            average = {"weights": self.ema.average(), "updates": self.ema.updates}
            clocks = self.ema.clocks()
            if clocks is not None:
                average["clocks"] = clocks
        checkpoint[KEY] = {
            "format": FORMAT,
            "config": self.config_text,
            "step": self.trainer.global_step,
            "micro_batch": self.micro_batch,
            "seconds": self.seconds,
            "ema": average,
            "meter": self.meter.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint[KEY]
        network = self.denoiser.network.state_dict()
        check_state(
            {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()},
            network,
            "the checkpoint",
        )
        if self.config.average is not None:
            check_state(own["ema"]["weights"], network, "the average in the checkpoint")
        self.micro_batch, self.seconds, self.saved_step = own["micro_batch"], own["seconds"], own["step"]
        self._restored = own

    def check_finite(self) -> None:
        """Raises RunError when a loss since the last logged step was not finite. Waits for the device."""
        found = self.meter.not_finite()
        if found is None:
            return
        number, terms = found
        values = ", ".join(f"{name}={value:.6g}" for name, value in terms.items())
        raise self.failure(f"the loss is not finite in step {number // self.config.accumulate + 1} ({values})")

    def check_weights(self) -> None:
        """Raises RunError when a weight or an averaged weight is not finite, so that such a thing is never saved."""
        tensors = [p.detach() for p in self.denoiser.network.parameters()]
        tensors += self.ema.tensors() if self.ema is not None else []
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(tensors, ord=float("inf"))])
        if not bool(largest.isfinite().all()):
            raise self.failure(f"the weights are not finite after step {self.trainer.global_step}")

    def failure(self, what: str) -> RunError:
        """An error that says where the training can be taken up again."""
        good = "there is no checkpoint yet"
        if self.saved_step is not None:
            folder = f"{self.trainer.default_root_dir}/checkpoints"
            good = f"the last good checkpoint is that of step {self.saved_step} in {folder}"
        return RunError(f"{what}; {good}. Try a smaller trainer.lr, trainer.clip_norm=1 or trainer.precision=fp32")

    def close(self) -> None:
        if self._feed is not None:
            self._feed.close()
