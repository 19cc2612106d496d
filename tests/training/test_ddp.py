"""Two processes on the CPU (gloo) against one."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gearshift.objectives.stage_order import point

Program = Callable[..., "subprocess.Popen[str]"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def finish(process: subprocess.Popen[str]) -> str:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def losses(folder: Path) -> list[tuple[int, float]]:
    with (folder / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.mark.parametrize("unused", [(), ("spare",)])
def test_two_processes_are_one(program: Program, tmp_path: Path, unused: tuple[str, ...]) -> None:
    """The same global batch, accumulated; with a layer that gets no gradient, too."""
    fields = {"max_steps": 12, "lr": 1e-3, "log_every": 5}
    finish(program("train", str(tmp_path / "one"), json.dumps(fields), *unused))
    both = json.dumps(fields | {"devices": 2})
    err = finish(program("train", str(tmp_path / "two"), both, *unused, launcher=TWO))
    assert err.count("train: 0/12 steps") == 1  # only the main process speaks
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=1e-6)
    for name, value in one["gearshift"]["ema"]["weights"].items():
        torch.testing.assert_close(two["gearshift"]["ema"]["weights"][name], value, rtol=0, atol=1e-6)
    assert [step for step, _ in losses(tmp_path / "two")] == [5, 10, 12]
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    # Not because nothing was learned.
    initial = state(tmp_path / "one")["gearshift"]["ema"]["weights"]["out.weight"]
    assert (initial - one["state_dict"]["denoiser.network.out.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_that_run_different_depths_are_one(
    program: Program, toy: ModuleType, tmp_path: Path, accumulate: int
) -> None:
    """One process never runs the last blocks, which the other one needs; now and then nobody does.

    Accumulated, they are needed in the micro-batch whose gradients are not exchanged and not in the one that exchanges
    them. The gradients, and so the weights, are those of one process; frozen weights stay the same bits.
    """
    fields = {"max_steps": 12, "lr": 1e-3, "log_every": 5, "accumulate": accumulate, "freeze": ["t_embedder.*"]}
    fields |= {"batch_size": 12 * accumulate}
    finish(program("train", str(tmp_path / "one"), json.dumps(fields), "scheduled"))
    finish(program("train", str(tmp_path / "two"), json.dumps(fields | {"devices": 2}), "scheduled", launcher=TWO))
    one, two = (state(tmp_path / name)["state_dict"] for name in ("one", "two"))
    for name, value in one.items():
        if name.endswith("attn.qkv.bias"):
            # No loss depends on the bias of the keys: its gradient is rounding, which Adam scales up.
            one[name], two[name] = (torch.cat([w[name].chunk(3)[0], w[name].chunk(3)[2]]) for w in (one, two))
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)
        if ".t_embedder." in name:
            assert torch.equal(two[name], value)
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    before = toy.toy_dit().network.state_dict()["blocks.3.mlp.fc1.weight"]
    assert (before - one["denoiser.network.blocks.3.mlp.fc1.weight"]).abs().max() > 1e-3  # the last block has learned


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_that_train_different_stages_are_one(
    program: Program, toy: ModuleType, tmp_path: Path, accumulate: int
) -> None:
    """Two processes train stages of their own, now and then the same one, and no process the last one.

    Weights, averages on their own clocks, and the optimiser's state are those of one process, which has both stages in
    its micro-batch: a gradient is the mean over all samples. What nobody uses stays as it was, and gets no state.
    """
    fields = {"max_steps": 14, "lr": 1e-3, "log_every": 5, "accumulate": accumulate, "batch_size": 12 * accumulate}
    fields |= {"ema_clock": "stage", "weight_decay": 0.5, "warmup_steps": 0}
    shares = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
    points = torch.tensor([[point(0, number, group, 3) for group in (0, 1)] for number in range(14 * accumulate)])
    stages = torch.bucketize(points, shares.cumsum(0)[:-1].float(), right=True)  # of the micro-batches, by process
    differ = stages[:, 0] != stages[:, 1]
    assert 0 < int(differ.sum()) < len(stages)
    trained = [int((stages == k).reshape(14, -1).any(1).sum()) for k in range(3)]  # steps that train a stage
    finish(program("train", str(tmp_path / "one"), json.dumps(fields), "staged"))
    finish(program("train", str(tmp_path / "two"), json.dumps(fields | {"devices": 2}), "staged", launcher=TWO))
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    initial = toy.toy_stages().network.state_dict()
    for saved in (lambda x: x["state_dict"], lambda x: x["gearshift"]["ema"]["weights"]):
        for name, value in saved(one).items():
            torch.testing.assert_close(saved(two)[name], value, rtol=0, atol=1e-6)
            own = name.removeprefix("denoiser.network.")
            unused = own.startswith(("blocks.3.", "out.2."))
            assert torch.equal(value, initial[own]) is unused and torch.equal(saved(two)[name], initial[own]) is unused
    assert one["gearshift"]["ema"]["clocks"] == two["gearshift"]["ema"]["clocks"]
    clocks = one["gearshift"]["ema"]["clocks"]
    assert [clocks[f"blocks.{k}.linear.weight"] for k in range(4)] == [14, *trained] and trained[2] == 0
    states = [sorted(x["optimizer_states"][0]["state"]) for x in (one, two)]
    assert states[0] == states[1] and len(states[0]) == len(initial) - 4
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_processes_drop_out_each_for_itself_and_alike_when_resumed(
    program: Program, tmp_path: Path, assert_equal: Callable[[Any, Any], None]
) -> None:
    fields = {"max_steps": 8, "lr": 1e-2, "log_every": 4, "devices": 2}
    finish(program("train", str(tmp_path / "whole"), json.dumps(fields), "dropout", launcher=TWO))
    finish(program("train", str(tmp_path / "parts"), json.dumps(fields | {"max_steps": 4}), "dropout", launcher=TWO))
    (tmp_path / "parts" / "done.json").unlink()
    finish(program("train", str(tmp_path / "parts"), json.dumps(fields), "dropout", launcher=TWO))
    for name in ("state_dict", "optimizer_states"):
        assert_equal(state(tmp_path / "parts")[name], state(tmp_path / "whole")[name])


def test_asked_to_stop_both_save_one_checkpoint_and_the_run_goes_on(program: Program, tmp_path: Path) -> None:
    fields = json.dumps({"max_steps": 100_000, "log_every": 5, "devices": 2})
    process = program("train", str(tmp_path / "run"), fields, launcher=TWO)
    metrics = tmp_path / "run" / "metrics.csv"
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # the launcher passes it on to both
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "stopped by SIGTERM after step" in err
    step = state(tmp_path / "run")["global_step"]
    assert step % 10 == 0 and step > 0
    again = json.dumps({"max_steps": step + 10, "log_every": 5, "devices": 2})
    finish(program("train", str(tmp_path / "run"), again, launcher=TWO))
    assert state(tmp_path / "run")["global_step"] == step + 10
    assert [s for s, _ in losses(tmp_path / "run")] == list(range(5, step + 11, 5))


def test_a_loss_that_is_not_finite_in_one_process_stops_both(program: Program, tmp_path: Path) -> None:
    fields = json.dumps({"max_steps": 100, "log_every": 50, "checkpoint_every_steps": 3, "devices": 2})
    process = program("train", str(tmp_path / "run"), fields, "poison", launcher=TWO)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.count("the loss is not finite in step 5 (loss=nan); the last good checkpoint is that of step 3") == 2
    assert state(tmp_path / "run")["global_step"] == 3
