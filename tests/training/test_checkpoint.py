"""Checkpoint files."""

from __future__ import annotations

import errno
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.runtime.errors import RunError
from gearshift.runtime.run import RunFolder
from gearshift.training import checkpoint
from gearshift.training.checkpoint import CheckpointFiles, check_config, check_state, latest, load_weights, read


def content(step: int) -> dict[str, Any]:
    weight = torch.full((100,), float(step))
    return {
        "state_dict": {"denoiser.network.weight": weight},
        "gearshift": {"format": 1, "config": "lr: 1", "step": step, "ema": {"weights": {"weight": weight + 0.5}}},
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"seed": 0})


def steps(run: RunFolder) -> dict[str, int]:
    return {path.name: read(path)["gearshift"]["step"] for path in run.checkpoints.glob("*.ckpt")}


def save(run: RunFolder, step: int) -> None:
    CheckpointFiles().save_checkpoint(content(step), run.checkpoints / "last.ckpt")


def test_the_newest_and_the_one_before_it_are_kept(run: RunFolder) -> None:
    assert latest(run) is None
    save(run, 1)
    assert steps(run) == {"last.ckpt": 1}
    save(run, 2)
    save(run, 3)
    assert steps(run) == {"last.ckpt": 3, "previous.ckpt": 2}
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_file_system_without_links(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        save(run, step)
    assert steps(run) == {"last.ckpt": 3, "previous.ckpt": 2}


@pytest.mark.parametrize("stage", ["link", "save", "replace"])
def test_whatever_moment_it_ends_at_two_generations_stay(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    save(run, 1)
    save(run, 2)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    target = {"link": (os, "link"), "save": (checkpoint.torch, "save"), "replace": (checkpoint.os, "replace")}[stage]
    with monkeypatch.context() as patch:
        patch.setattr(*target, die)
        with pytest.raises(KeyboardInterrupt):
            save(run, 3)
    found = steps(run)
    assert found["last.ckpt"] == 2 and found["previous.ckpt"] == 1
    save(run, 3)
    assert steps(run) == {"last.ckpt": 3, "previous.ckpt": 2}


def test_a_full_disk_is_said_in_one_line_and_leaves_both(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    save(run, 2)

    def full(value: Any, handle: Any) -> None:
        handle.write(b"x" * 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(RunError, match=r"last\.ckpt \(No space left on device\).*previous file is intact"):
        save(run, 3)
    monkeypatch.undo()
    assert steps(run) == {"last.ckpt": 2, "previous.ckpt": 1}
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_file_that_may_not_grow(run: RunFolder) -> None:
    """The system's own refusal in the middle of a file, which torch turns into an error of its own."""
    save(run, 1)
    save(run, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(RunError, match=r"last\.ckpt \(File too large\).*previous file is intact"):
            save(run, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(run) == {"last.ckpt": 2, "previous.ckpt": 1}


def test_damage_is_found_wherever_it_is(run: RunFolder) -> None:
    save(run, 1)
    path = run.checkpoints / "last.ckpt"
    sound = path.read_bytes()
    weights = content(1)["state_dict"]["denoiser.network.weight"].numpy().tobytes()
    for place in (sound.index(weights) + 8, sound.index(b"state_dict")):
        data = bytearray(sound)
        data[place] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(RunError, match=r"last\.ckpt is damaged .*move it away"):
            read(path)
    for length in (0, 10, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(RunError, match=r"last\.ckpt is damaged"):
            read(path)
    path.write_bytes(sound)
    assert read(path)["gearshift"]["step"] == 1


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"model": torch.zeros(2), "opt": 1}, path)
    with pytest.raises(RunError, match=r"holds the keys \['model', 'opt'\] and no 'gearshift' entry"):
        read(path)
    torch.save(torch.zeros(2), path)
    with pytest.raises(RunError, match="holds Tensor and no 'gearshift' entry"):
        read(path)
    torch.save(content(1) | {"gearshift": {"format": 99}}, path)
    with pytest.raises(RunError, match="of format 99, this program reads format 1"):
        read(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save(content(1) | {"bomb": Bomb()}, tmp_path / "last.ckpt")
    with pytest.raises(RunError, match="is damaged"):
        CheckpointFiles().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RunError, match="is damaged"):
        read(tmp_path / "plain.ckpt")
    assert not (tmp_path / "ran").exists()


def test_weights_for_sampling(run: RunFolder) -> None:
    with pytest.raises(RunError, match=r"there is no checkpoint .*train"):
        load_weights(run)
    save(run, 4)
    assert load_weights(run).keys() == {"weight"}
    assert load_weights(run)["weight"][0] == 4.5 and load_weights(run, ema=False)["weight"][0] == 4.0


def test_a_missing_last_checkpoint_is_not_taken_for_a_new_run(run: RunFolder) -> None:
    save(run, 1)
    save(run, 2)
    (run.checkpoints / "last.ckpt").unlink()
    with pytest.raises(RunError, match=r"`mv .*previous\.ckpt .*last\.ckpt`"):
        latest(run)


def test_configurations_are_compared_by_their_values() -> None:
    def check(was: str, now: str) -> None:
        check_config({"gearshift": {"config": was}}, now, Path("last.ckpt"))

    check("a: 1\nb: {c: 2}", "a: 1\nb: {c: 2}")
    check("a: 1\nb: {c: 2}", '{"b": {"c": 2}, "a": 1}')
    with pytest.raises(RunError, match=r"\(b\.c: 2 there, 3 here\)"):
        check("a: 1\nb: {c: 2}", "a: 1\nb: {c: 3}")
    with pytest.raises(RunError, match=r"\(b\.d: absent there, 3 here\)"):
        check("a: 1\nb: {c: 2}", "a: 1\nb: {c: 2, d: 3}")
    with pytest.raises(RunError, match=r"w: 1 there, absent here, .* and 1 more"):
        check("{w: 1, x: 1, y: 1, z: 1}", "{}")


def test_states_are_compared_by_names_and_shapes() -> None:
    a, b = {"w": torch.zeros(2)}, {"w": torch.zeros(3)}
    check_state(a, {"w": torch.ones(2)}, "it")
    with pytest.raises(RunError, match=r"it holds w of shape \(2,\), the network has \(3,\)"):
        check_state(a, b, "it")
    with pytest.raises(RunError, match=r"it holds v of shape absent, the network has \(2,\)"):
        check_state(a, a | {"v": torch.zeros(2)}, "it")
