"""Training on a CUDA device."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.runtime.errors import RunError
from gearshift.training.feed import Feed
from gearshift.training.signals import Stopped

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PLAIN = SimpleConfig(label_dropout=0.2)


class StopAfter(Simple):
    def __init__(self, micro_batch: int) -> None:
        super().__init__(PLAIN)
        self.when = micro_batch

    def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, torch.Tensor]:
        if batch.micro_batch == self.when:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(denoiser, batch, draws)


def saved(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    found["gearshift"].pop("seconds")
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_on_the_device(
    toy: ModuleType, tmp_path: Path, assert_equal: Callable[[Any, Any], None], precision: str
) -> None:
    """Sums of this size are deterministic there; with fp16 the loss scale is carried over."""
    config = toy.toy_config(accelerator="cuda", precision=precision, deterministic=True)
    toy.toy_train(tmp_path / "whole", config)
    with pytest.raises(Stopped):
        toy.toy_train(tmp_path / "parts", config, objective=StopAfter(10))
    assert ("MixedPrecision" in saved(tmp_path / "parts")) == (precision == "fp16")
    toy.toy_train(tmp_path / "parts", config)
    assert_equal(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_device_agrees_with_the_host(toy: ModuleType, tmp_path: Path) -> None:
    for accelerator in ("cpu", "cuda"):
        toy.toy_train(tmp_path / accelerator, toy.toy_config(accelerator=accelerator, lr=1e-3))
    a, b = saved(tmp_path / "cpu")["state_dict"], saved(tmp_path / "cuda")["state_dict"]
    for name in a:
        torch.testing.assert_close(b[name].cpu(), a[name], rtol=0, atol=1e-4)


def test_a_loss_that_is_not_finite(toy: ModuleType, tmp_path: Path) -> None:
    class Poisoned(Simple):
        def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, torch.Tensor]:
            factor = float("nan") if batch.micro_batch >= 9 else 1.0
            return {"loss": super().loss(denoiser, batch, draws)["loss"] * factor}

    config = toy.toy_config(accelerator="cuda", checkpoint_every_steps=3, log_every=100)
    with pytest.raises(RunError, match="not finite in step 5"):
        toy.toy_train(tmp_path / "run", config, objective=Poisoned(PLAIN))
    assert saved(tmp_path / "run")["global_step"] == 3


def test_no_wait_for_the_device_between_logged_steps(toy: ModuleType, tmp_path: Path) -> None:
    class Watched(Simple):
        def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, torch.Tensor]:
            # From here to the boundary of step 9, where the mode ends before the line of step 10.
            mode = {4: "error", 18: "default"}.get(batch.micro_batch)
            if mode is not None:
                torch.cuda.set_sync_debug_mode(mode)
            return super().loss(denoiser, batch, draws)

    try:
        config = toy.toy_config(accelerator="cuda", log_every=100, clip_norm=1.0)
        toy.toy_train(tmp_path / "run", config, objective=Watched(PLAIN))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_wait_for_the_device_where_depths_are_decided(toy: ModuleType, tmp_path: Path) -> None:
    """Times, depths, order and weights of the samples are settled on the host; the draws are those of the device."""
    from gearshift.objectives.scheduled import Scheduled, ScheduledConfig
    from gearshift.policies import ExitSchedule

    class Watched(Scheduled):
        def loss(self, denoiser: Any, batch: Any, draws: Any) -> dict[str, torch.Tensor]:
            if batch.micro_batch == 2:
                assert torch.equal(draws.host_uniform("time"), draws.uniform("time").cpu())
            mode = {4: "error", 18: "default"}.get(batch.micro_batch)
            if mode is not None:
                torch.cuda.set_sync_debug_mode(mode)
            return super().loss(denoiser, batch, draws)

    settings = ScheduledConfig(schedule=ExitSchedule(depths=[4, 3, 2, 1]), weighting="inverse_depth", label_dropout=0.2)
    try:
        config = toy.toy_config(accelerator="cuda", log_every=100, clip_norm=1.0, freeze=("t_embedder.*",))
        toy.toy_train(tmp_path / "run", config, denoiser=toy.toy_dit(), objective=Watched(settings))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("resident", [True, False])
def test_the_feed_on_the_device(toy: ModuleType, resident: bool) -> None:
    fields: dict[str, Any] = dict(seed=1, size=12, start=0, stop=12, labelled=True, flip=True)
    device = Feed(toy.toy_dataset(), device=torch.device("cuda"), resident=resident, **fields)
    host = Feed(toy.toy_dataset(), device=torch.device("cpu"), **fields)
    try:
        for number in range(8):
            a, b = device.batch(number), host.batch(number)
            assert a.images.is_cuda and torch.equal(a.images.cpu(), b.images) and torch.equal(a.cond.cpu(), b.cond)
    finally:
        device.close()
