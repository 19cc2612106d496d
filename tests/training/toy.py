"""A network and a data set small enough to train in a moment, and a program that trains them.

python toy.py train FOLDER JSON             fields of TrainerConfig; exit codes as the command line's
python toy.py kill FOLDER JSON ROUNDS SEED  the same, killed with SIGKILL at random moments again and again
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.backbones.staging import StageRouter
from gearshift.data.dataset import ImageDataset
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, Process, VPSDEConfig
from gearshift.execution.stream import Rows, Stream
from gearshift.objectives.base import Batch, Draws
from gearshift.objectives.scheduled import Scheduled, ScheduledConfig
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.objectives.staged import Staged, StagedConfig
from gearshift.policies import ExitSchedule
from gearshift.runtime.errors import UserError
from gearshift.runtime.run import RunFolder
from gearshift.training.config import TrainerConfig

SIDE, CLASSES, WIDTH = 4, 3, 16


class ToyBlock(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None, slot: Any) -> Tensor:
        return hidden + self.dropout(torch.tanh(self.linear(hidden)))


class ToyBackbone(Backbone):
    """Two blocks over all pixels at once. `spare` is a layer that no loss reaches, like a head of another objective."""

    def __init__(self, spare: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyBlock(dropout), ToyBlock(dropout)])
        self.paths = ((0, 1),)
        self.in_channels = self.out_channels = 1
        self.image_size, self.cond_kind, self.num_classes = SIDE, "class", CLASSES
        self.pixels = nn.Linear(SIDE * SIDE + 1, WIDTH)
        self.labels = nn.Embedding(CLASSES + 1, WIDTH)
        self.out = nn.Linear(WIDTH, SIDE * SIDE)
        self.spare = nn.Linear(WIDTH, 1) if spare else None

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        hidden = self.pixels(torch.cat([x.flatten(1), time[:, None] / 999], 1)) + self.labels(cond)
        return Stream(hidden, time, Rows(len(x)))

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        return self.out(hidden).reshape(-1, 1, SIDE, SIDE)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor:
        return torch.full((num_rows,), CLASSES, device=device)


class ToyStages(ToyBackbone):
    """A block that all share, and one with a readout for each of three stages."""

    def __init__(self) -> None:
        super().__init__()
        self.router = StageRouter((0.3, 1.5))
        self.boundaries, self.paths = self.router.boundaries, ((0, 1), (0, 2), (0, 3))
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(4))
        self.out = nn.ModuleList(nn.Linear(WIDTH, SIDE * SIDE) for _ in range(3))

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        return self.out[path](hidden).reshape(-1, 1, SIDE, SIDE)

    def route(self, log_snr: Tensor) -> Tensor:
        return self.router.route(log_snr)


class PoisonedOnRank1(Simple):
    """A loss that is not a number from micro-batch 9 on, in one of the processes."""

    def loss(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        terms = super().loss(denoiser, batch, draws)
        bad = os.environ.get("RANK") == "1" and batch.micro_batch >= 9
        return {"loss": terms["loss"] * (float("nan") if bad else 1.0)}


class Halves(Scheduled):
    """A schedule under which the halves of a batch, which are the slices of two processes, need different depths.

    In even micro-batches the second half runs all four blocks, the first half two; in odd ones, and in the last two of
    every eight, both run two.
    """

    def __init__(self) -> None:
        super().__init__(ScheduledConfig(schedule=ExitSchedule(depths=[4, 2]), label_dropout=0.2))

    def times(self, process: Process, draws: Draws) -> Tensor:
        assert draws.batch.host_slot is not None
        number = draws.batch.micro_batch
        deep = (draws.batch.host_slot >= 6) & (number % 2 == 0) & (number % 8 < 6)
        uniform = draws.host_uniform("time") / 2
        return process.times_from_uniform(torch.where(deep, 0.5 + uniform, uniform))  # time is 1 - u


def toy_dataset(count: int = 50) -> ImageDataset:
    generator = torch.Generator().manual_seed(7)
    return ImageDataset(
        images_u8=torch.randint(0, 256, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, CLASSES, (count,), generator=generator),
        num_classes=CLASSES,
        class_names=("a", "b", "c"),
        name="toy",
        split="train",
        digest="0",
        provenance="drawn",
    )


def toy_denoiser(seed: int = 0, **backbone: Any) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(ToyBackbone(**backbone), VPSDE(VPSDEConfig()))


def toy_stages(seed: int = 0) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(ToyStages(), VPSDE(VPSDEConfig()))


def toy_staged(**settings: Any) -> Staged:
    """Stages 0 and 1, for the halves of a micro-batch of twelve each its own; stage 2 is never trained."""
    shares = dict(choice="custom", shares=[0.6, 0.4, 0.0])
    return Staged(StagedConfig(**(dict(batching="per_group", group_size=6) | shares | settings)))


def toy_dit(seed: int = 0) -> Denoiser:
    """A DiT of four blocks with a learned variance, whose blocks do something from the start."""
    sizes = dict(image_size=SIDE, in_channels=1, patch_size=2, embed_dim=8, depth=4, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DiT(DiTConfig(**sizes, num_classes=CLASSES, null_class=True))  # type: ignore[arg-type]
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return Denoiser(network, VPSDE(VPSDEConfig()))


def toy_config(**changes: Any) -> TrainerConfig:
    """A few quick steps with everything switched on that a resume has to carry over."""
    fields: dict[str, Any] = dict(
        max_steps=10,
        batch_size=12,
        accumulate=2,
        lr=1e-2,
        warmup_steps=3,
        lr_schedule="cosine",
        clip_norm=1.0,
        ema_decay=0.9,
        ema_warmup=True,
        accelerator="cpu",
        checkpoint_every_minutes=None,
        log_every=4,
    )
    return TrainerConfig(**(fields | changes))


def toy_train(folder: str | Path, config: TrainerConfig, **changes: Any) -> dict[str, Any]:
    """Trains in `folder`; the same call again resumes."""
    from gearshift.training.train import train

    text = json.dumps({"lr": config.lr, "seed": config.seed})
    arguments: dict[str, Any] = dict(
        denoiser=toy_denoiser(),
        objective=Simple(SimpleConfig(label_dropout=0.2)),
        dataset=toy_dataset(),
        run=RunFolder.create(folder, {"trainer": {"lr": config.lr}}),
        config_text=text,
        flip=True,
    )
    return train(config, **(arguments | changes))


def _kill(folder: Path, config: TrainerConfig, rounds: int, seed: int) -> None:
    """Forks a training and kills it, `rounds` times: every other time soon after it has saved something new."""
    chance = random.Random(seed)
    last = folder / "checkpoints" / "last.ckpt"
    for number in range(rounds):
        before = last.stat().st_mtime_ns if last.exists() else 0
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                toy_train(folder, config)
            os._exit(0)
        while number % 2 == 0 and not (last.exists() and last.stat().st_mtime_ns != before):
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                raise SystemExit("the training ended before it was killed")
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        print(json.dumps({"killed_at": step}), flush=True)


def main(verb: str, folder: str, fields: str, *rest: str) -> int:
    config = toy_config(**json.loads(fields))
    if verb == "kill":
        _kill(Path(folder), config, int(rest[0]), int(rest[1]))
        return 0
    try:
        objective = (PoisonedOnRank1 if "poison" in rest else Simple)(SimpleConfig(label_dropout=0.2))
        objective.may_leave_unused = "spare" in rest
        parts: dict[str, Any] = dict(denoiser=toy_denoiser(spare="spare" in rest), objective=objective)
        if "scheduled" in rest:
            parts = dict(denoiser=toy_dit(), objective=Halves())
        if "staged" in rest:
            parts = dict(denoiser=toy_stages(), objective=toy_staged())
        if "dropout" in rest:
            parts = dict(denoiser=toy_denoiser(dropout=0.3))
        answer = toy_train(folder, config, **parts)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
