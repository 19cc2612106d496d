"""`gearshift train` on what `gearshift encode` left, and back to images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import gearshift
from gearshift import cli
from gearshift.data.autoencoder import decode
from gearshift.runtime import config
from gearshift.runtime.paths import conf_dir
from gearshift.sampling.loop import sample
from gearshift.verbs import encode

WAYS = {"down": "DownEncoder", "up": "UpDecoder"}
SETTINGS = [
    *("data=imagenet_latents", "backbone.image_size=4", "backbone.in_channels=4", "backbone.patch_size=2"),
    *("+debug=tiny", "trainer.accelerator=cpu", "trainer.batch_size=4", "trainer.log_every=1"),
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path / "cache"))


def save_autoencoder(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks: Any = {f"{way}_block_types": (f"{name}Block2D",) * 2 for way, name in WAYS.items()}
        made = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
        made.save_pretrained(folder)
    return folder


def latents(out: str, autoencoder: Path, **changes: Any) -> dict[str, Any]:
    cfg = OmegaConf.load(conf_dir() / "encode.yaml")
    cfg.data = OmegaConf.load(conf_dir() / "data" / "digits.yaml")
    cfg.update({"out": out, "autoencoder": str(autoencoder), "device": "cpu", "split": "test", "shard": 128, **changes})
    answer = encode.run(cfg)
    assert answer is not None
    # The test half of the digits is enough of a train split.
    manifest = Path(out) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"split": "test"', '"split": "train"'))
    return answer


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_it_trains_and_its_samples_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save_autoencoder(tmp_path / "autoencoder")
    assert latents("one", place)["count"] == 297
    train = ["train", *SETTINGS, "data.path=one"]
    assert cli.run(train) == 0
    first = answer(capsys)
    assert first["steps"] == 2 and first["loss"] > 0
    assert cli.run([*train, "data.mode=mean"]) == 0
    assert answer(capsys)["run"] != first["run"], "the mean is another training than draws"
    loaded = gearshift.load(first["run"], device="cpu")
    ddim = {"_target_": "gearshift.diffusion.solvers.ddim.DDIM", "steps": 2}
    [chunk] = sample(loaded.sampler(solver=ddim), 3)
    data = config.build(loaded.config.data)
    images = decode(chunk.images, data.decoder())
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8
    # The verbs decode alike, and say what that takes apart from the network.
    run = [f"run={first['run']}", "device=cpu"]
    assert cli.run(["sample", *run, "num_images=3", "solver.steps=2", "solver.clip_x0=false"]) == 0
    said = answer(capsys)
    with np.load(said["images"]) as stored:
        assert stored["arr_0"].shape == (3, 8, 8, 3)
    autoencoder = data.decoder()
    assert said["decode_macs_per_image"] == autoencoder.decode_macs(4) > 0
    small = ["num_images=4", "chunk=4", "timing_images=0", "metrics=[fd@random_conv]", "solvers.ddim.steps=2"]
    assert cli.run(["evaluate", *run, "evaluation=base", *(f"evaluation.{setting}" for setting in small)]) == 0
    told = json.loads((Path(first["run"]) / "evaluations" / "base" / "metrics.json").read_text())
    assert autoencoder.describe() in told["protocol"]["decoding"]
    assert told["rows"][0]["macs_per_image"] == chunk.ledger.macs_per_image, "decoding is not the network's"


def test_latents_that_changed_under_a_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save_autoencoder(tmp_path / "autoencoder")
    latents("one", place)
    train = ["train", *SETTINGS, "data.path=one"]
    assert cli.run(train) == 0
    run = Path(answer(capsys)["run"])
    (run / "done.json").unlink()  # as after a kill before the last file was written
    assert cli.run(train) == 0
    capsys.readouterr()
    (run / "done.json").unlink()
    (tmp_path / "one").rename(tmp_path / "old")
    latents("one", place, scale=0.5)
    assert cli.run(train) == 1
    assert "data_digest" in capsys.readouterr().err


def test_without_latents_it_is_said_how_to_make_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", *SETTINGS, f"data.path={tmp_path}"]) == 2
    assert "make them with `gearshift encode`" in capsys.readouterr().err
