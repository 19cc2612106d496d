"""Training as a whole, in this process: resume, averages, errors, what is left on the disk."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.objectives.deediff import DeeDiff, DeeDiffConfig
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.run import RunFolder
from gearshift.training import checkpoint
from gearshift.training.signals import Stopped

Equal = Callable[[Any, Any], None]
PLAIN = SimpleConfig(label_dropout=0.2)


class StopAfter(Simple):
    """Sends a signal to this process while it works on a given micro-batch."""

    def __init__(self, micro_batch: int, number: int = signal.SIGTERM) -> None:
        super().__init__(PLAIN)
        self.when, self.number = micro_batch, number

    def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, Tensor]:
        if batch.micro_batch == self.when:
            os.kill(os.getpid(), self.number)
        return super().loss(denoiser, batch, draws)


class Poisoned(Simple):
    """A loss that is not a number from one micro-batch on."""

    def __init__(self, micro_batch: int) -> None:
        super().__init__(PLAIN)
        self.when = micro_batch

    def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, Tensor]:
        loss = super().loss(denoiser, batch, draws)["loss"]
        return {"loss": loss * float("nan") if batch.micro_batch >= self.when else loss, "simple": loss.detach()}


def saved(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / name, weights_only=True)
    found["gearshift"].pop("seconds")
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that a clock decides."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in csv.DictReader(file)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop", [5, 6, 7])
def test_six_steps_and_then_four_are_ten_bit_for_bit(
    toy: ModuleType, tmp_path: Path, assert_equal: Equal, stop: int, precision: str
) -> None:
    config = toy.toy_config(precision=precision)
    whole = toy.toy_train(tmp_path / "whole", config)
    # 2 micro-batches per step; steps 5 and 7 lie within a line of metrics.csv, and the request comes within a step.
    with pytest.raises(Stopped, match=f"SIGTERM after step {stop} of 10") as caught:
        toy.toy_train(tmp_path / "parts", config, objective=StopAfter(2 * stop - 2))
    assert caught.value.exit_code == 143
    assert saved(tmp_path / "parts")["global_step"] == stop
    parts = toy.toy_train(tmp_path / "parts", config)
    assert parts["loss"] == whole["loss"] and parts["steps"] == 10
    assert_equal(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole")] == ["4", "8", "10"]


def test_sigusr1_is_saved_too_and_the_handlers_are_put_back(toy: ModuleType, tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(Stopped, match="SIGUSR1 after step 1 of 10") as caught:
        toy.toy_train(tmp_path / "run", toy.toy_config(), objective=StopAfter(0, signal.SIGUSR1))
    assert caught.value.exit_code == 128 + signal.SIGUSR1
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_a_handler_of_somebody_else_is_left_alone(toy: ModuleType, tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        toy.toy_train(tmp_path / "run", toy.toy_config(), objective=StopAfter(0, signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def test_a_finished_run_answers_at_once(toy: ModuleType, tmp_path: Path) -> None:
    first = toy.toy_train(tmp_path / "run", toy.toy_config())
    written = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    # Were it to train, this objective would stop it.
    assert toy.toy_train(tmp_path / "run", toy.toy_config(), objective=Poisoned(0)) == first
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == written
    assert first == {
        "run": str(tmp_path / "run"),
        "steps": 10,
        "images": 120,
        "loss": first["loss"],
        "params": sum(p.numel() for p in toy.toy_denoiser().parameters()),
        "seconds": first["seconds"],
        "checkpoint": str(tmp_path / "run" / "checkpoints" / "last.ckpt"),
    }


def test_a_run_killed_after_its_last_checkpoint_finishes(toy: ModuleType, tmp_path: Path) -> None:
    first = toy.toy_train(tmp_path / "run", toy.toy_config())
    (tmp_path / "run" / "done.json").unlink()
    again = toy.toy_train(tmp_path / "run", toy.toy_config(), objective=Poisoned(0))
    assert again == first


def test_accumulated_micro_batches_see_other_images_and_noise(toy: ModuleType, tmp_path: Path) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []

    class Watching(Simple):
        def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, Tensor]:
            seen.append((batch.micro_batch, batch.images.clone(), draws.normal("noise", (1, 4, 4))))
            return super().loss(denoiser, batch, draws)

    toy.toy_train(tmp_path / "run", toy.toy_config(max_steps=2), objective=Watching(PLAIN))
    assert [number for number, _, _ in seen] == [0, 1, 2, 3]
    assert all(images.shape == (6, 1, 4, 4) for _, images, _ in seen)
    drawn = torch.cat([noise for _, _, noise in seen]).flatten(1)
    assert len(drawn.unique(dim=0)) == 24
    images = torch.cat([images for _, images, _ in seen]).flatten(1)
    assert len(images.unique(dim=0)) == 24  # 24 of 50 images, none twice


def test_one_step_is_adamw_on_the_mean_of_the_micro_batches(toy: ModuleType, tmp_path: Path) -> None:
    """Written out by hand: two micro-batches, mean gradient, clipping, AdamW, average."""
    from gearshift.objectives.base import Draws
    from gearshift.training.feed import Feed

    config = toy.toy_config(max_steps=1, warmup_steps=0, ema_warmup=False, clip_norm=0.05)
    toy.toy_train(tmp_path / "run", config)
    expected = toy.toy_denoiser()
    initial = {k: v.clone() for k, v in expected.network.state_dict().items()}
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, betas=(0.99, 0.999), weight_decay=0.03)
    feed = Feed(
        toy.toy_dataset(), seed=0, size=6, start=0, stop=6, device=torch.device("cpu"), flip=True, labelled=True
    )
    for number in (0, 1):
        batch = feed.batch(number)
        (Simple(PLAIN).loss(expected, batch, Draws(0, batch))["loss"] / 2).backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
    optimizer.step()
    run = RunFolder.open(tmp_path / "run")
    for name, value in checkpoint.load_weights(run, ema=False).items():
        torch.testing.assert_close(value, expected.network.state_dict()[name], rtol=1e-6, atol=1e-7)
        average = initial[name] + 0.1 * (value - initial[name])
        torch.testing.assert_close(checkpoint.load_weights(run)[name], average, rtol=1e-6, atol=1e-7)


def test_it_learns(toy: ModuleType, tmp_path: Path) -> None:
    config = toy.toy_config(max_steps=160, accumulate=1, batch_size=32, log_every=40)
    toy.toy_train(tmp_path / "run", config)
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]


def test_deediff_on_a_network_with_exits(toy: ModuleType, tmp_path: Path) -> None:
    from gearshift.backbones.exits import EarlyExit, ExitsConfig
    from gearshift.backbones.uvit import UViT, UViTConfig
    from gearshift.diffusion.denoiser import Denoiser
    from gearshift.diffusion.process import VPSDE, VPSDEConfig

    backbone = UViT(UViTConfig(image_size=4, in_channels=1, patch_size=2, embed_dim=16, depth=2, num_heads=2))
    denoiser = Denoiser(EarlyExit(ExitsConfig(), backbone), VPSDE(VPSDEConfig()))
    toy.toy_train(tmp_path / "run", toy.toy_config(), denoiser=denoiser, objective=DeeDiff(DeeDiffConfig()))
    last = rows(tmp_path / "run")[-1]
    assert {"loss", "simple", "uncertainty", "layers", "lr", "grad_norm"} <= set(last)
    total = sum(float(last[name]) for name in ("simple", "uncertainty", "layers"))
    assert float(last["loss"]) == pytest.approx(total, rel=1e-5)
    denoiser.network.load_state_dict(checkpoint.load_weights(RunFolder.open(tmp_path / "run")))


def test_without_an_average_the_weights_are_the_networks(toy: ModuleType, tmp_path: Path, assert_equal: Equal) -> None:
    with pytest.raises(Stopped):
        toy.toy_train(tmp_path / "run", toy.toy_config(ema_decay=None), objective=StopAfter(8))
    toy.toy_train(tmp_path / "run", toy.toy_config(ema_decay=None))
    run = RunFolder.open(tmp_path / "run")
    assert_equal(checkpoint.load_weights(run), checkpoint.load_weights(run, ema=False))


def test_a_loss_that_is_not_finite_ends_the_run_and_overwrites_nothing(toy: ModuleType, tmp_path: Path) -> None:
    config = toy.toy_config(checkpoint_every_steps=3, log_every=100)
    with pytest.raises(RunError, match=r"not finite in step 8 \(loss=nan, simple=0\.\d+\).* step 6 in .*checkpoints"):
        toy.toy_train(tmp_path / "run", config, objective=Poisoned(15))
    assert saved(tmp_path / "run")["global_step"] == 6
    assert saved(tmp_path / "run", "previous.ckpt")["global_step"] == 3
    assert toy.toy_train(tmp_path / "run", config, objective=Poisoned(100))["steps"] == 10


def test_a_loss_that_is_not_finite_is_found_without_looking_at_every_step(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device: found when a line is due, or before a checkpoint is written, whichever comes first."""
    from gearshift.training.module import DiffusionTraining

    def blind(self: Any) -> None:
        original(self)
        self._at_once = False

    original = DiffusionTraining.on_train_start
    monkeypatch.setattr(DiffusionTraining, "on_train_start", blind)
    config = toy.toy_config(checkpoint_every_steps=3, log_every=100)
    with pytest.raises(RunError, match=r"not finite in step 5 \(loss=nan"):
        toy.toy_train(tmp_path / "run", config, objective=Poisoned(9))
    assert saved(tmp_path / "run")["global_step"] == 3


def test_weights_that_are_not_finite_are_never_saved(toy: ModuleType, tmp_path: Path) -> None:
    class Sneaky(Simple):
        def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, Tensor]:
            terms = super().loss(denoiser, batch, draws)
            if batch.micro_batch == 11:  # the second of step 6: no later loss will show it before the checkpoint
                denoiser.network.out.bias.register_hook(lambda gradient: gradient * float("inf"))
            return terms

    config = toy.toy_config(checkpoint_every_steps=3, clip_norm=None)
    with pytest.raises(RunError, match=r"weights are not finite after step 6; .* step 3 in"):
        toy.toy_train(tmp_path / "run", config, objective=Sneaky(PLAIN))
    assert saved(tmp_path / "run")["global_step"] == 3


def test_a_full_disk_leaves_the_last_good_checkpoint(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gearshift.runtime import files

    config = toy.toy_config(checkpoint_every_steps=3)
    room = [4]

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if ".last.ckpt." in name:
            room[0] -= 1
            if room[0] < 2:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(RunError, match=r"last\.ckpt \(No space left on device\).*previous file is intact") as caught:
        toy.toy_train(tmp_path / "run", config)
    assert caught.value.exit_code == 1
    assert saved(tmp_path / "run")["global_step"] == 6
    assert saved(tmp_path / "run", "previous.ckpt")["global_step"] == 3
    assert not list((tmp_path / "run").rglob("*.partial"))
    monkeypatch.undo()
    toy.toy_train(tmp_path / "run", config)
    toy.toy_train(tmp_path / "whole", config)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_another_configuration_is_refused_by_quoting_both(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        toy.toy_train(tmp_path / "run", toy.toy_config(), objective=StopAfter(0))
    with pytest.raises(RunError, match=r"another configuration \(lr: 0\.01 there, 0\.02 here\)"):
        toy.toy_train(tmp_path / "run", toy.toy_config(lr=0.02))


def test_a_damaged_checkpoint_stops_the_run_and_the_one_before_it_serves(toy: ModuleType, tmp_path: Path) -> None:
    config = toy.toy_config(checkpoint_every_steps=3)
    with pytest.raises(Stopped):
        toy.toy_train(tmp_path / "run", config, objective=StopAfter(14))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    data = bytearray(last.read_bytes())
    weight = saved(tmp_path / "run")["state_dict"]["denoiser.network.out.weight"].numpy().tobytes()
    data[data.index(weight) + 100] ^= 0x01  # torch itself would load this
    last.write_bytes(data)
    with pytest.raises(RunError, match=r"last\.ckpt is damaged .*mv .*previous\.ckpt .*last\.ckpt"):
        toy.toy_train(tmp_path / "run", config)
    os.replace(last.with_name("previous.ckpt"), last)
    toy.toy_train(tmp_path / "run", config)
    toy.toy_train(tmp_path / "whole", config)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_run_folder_in_use_is_refused(toy: ModuleType, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"trainer": {"lr": 0.01}})
    with run.lock(), pytest.raises(RunError, match=f"in use by pid {os.getpid()}"):
        toy.toy_train(tmp_path / "run", toy.toy_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": {"image_size": 8}}, r"has 1x4x4 images and ToyBackbone takes 1x8x8"),
        ({"denoiser": {"num_classes": 2}}, r"has 3 classes and ToyBackbone knows 2; set backbone.num_classes=3"),
        ({"denoiser": {"cond_kind": "text"}}, r"is conditioned on text"),
        ({"objective": DeeDiff(DeeDiffConfig())}, r"needs uncertainty heads"),
        ({"config": {"devices": 2}}, r"need 2 processes, and 1 are running"),
        ({"config": {"precision": "fp16"}}, r"precision=fp16 works on CUDA"),
    ],
)
def test_what_does_not_go_together(toy: ModuleType, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = toy.toy_config(**changes.pop("config", {}))
    denoiser = toy.toy_denoiser()
    for name, value in changes.pop("denoiser", {}).items():
        setattr(denoiser.network, name, value)
    with pytest.raises(UsageError, match=message):
        toy.toy_train(tmp_path / "run", config, denoiser=denoiser, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 0},
        {"precision": "fp8"},
        {"lr_schedule": "linear"},
        {"ema_decay": 1.0},
        {"batch_size": 10, "accumulate": 4},
        {"batch_size": 10, "devices": 4},
        {"clip_norm": 0.0},
    ],
)
def test_settings_that_cannot_be(toy: ModuleType, changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    with pytest.raises(UsageError, match=f"trainer.{name}={changes[name]!r}"):
        toy.toy_config(**({"accumulate": 1} | changes))


def test_training_says_nothing_on_standard_output(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.toy_train(tmp_path / "run", toy.toy_config())
    said = capsys.readouterr()
    assert said.out == ""
    assert "train: 0/10 steps" in said.err and "train: 10/10 steps (100%)" in said.err and "loss=" in said.err
    assert all(line.startswith("train: ") for line in said.err.splitlines())


def test_the_config_text_is_in_the_checkpoint(toy: ModuleType, tmp_path: Path) -> None:
    toy.toy_train(tmp_path / "run", toy.toy_config())
    assert json.loads(saved(tmp_path / "run")["gearshift"]["config"]) == {"lr": 0.01, "seed": 0}
