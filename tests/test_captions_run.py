"""From images with captions to latents with text features, a training on them, samples of prompts and an evaluation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gearshift
from gearshift import cli
from gearshift.backbones.null_context import NullContext
from gearshift.data.latent_files import SHARDS
from gearshift.data.latents import Latents, LatentsConfig
from gearshift.data.text_encoder import VARIABLE, TextEncoder
from gearshift.runtime.errors import RunError
from gearshift.runtime.run import RunFolder
from gearshift.training.checkpoint import load_weights

from .captioned import LENGTH, WIDTH, save_autoencoder, save_squares, save_text_encoder, texts_of

TRAIN = [
    *("train", "data=caption_latents", "data.path=latents", "objective=simple", "exits=none", "process=scaled_linear"),
    *("backbone=uvit_mscoco", "backbone.image_size=4", f"backbone.context_dim={WIDTH}"),
    *(f"backbone.context_tokens={LENGTH}", "backbone.depth=4", "objective.label_dropout=0.5", "+debug=tiny"),
    *("trainer.accelerator=cpu", "trainer.batch_size=8", "trainer.log_every=1"),
]
SMALL = ["solver.steps=2", "solver.clip_x0=false", "device=cpu", "chunk=2"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    """Everything that is read stands in the folder of the test, which may change it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(made / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in ("latents", "heldout", "run"):
        shutil.copytree(made / name, tmp_path / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares, both encoders, latents of both splits, and a run of two steps on those of one."""
    place = tmp_path_factory.mktemp("made")
    save_squares(place / "squares")
    save_autoencoder(place / "autoencoder")
    save_text_encoder(place / "clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARSHIFT_CACHE", str(place / "cache"))
        assert cli.run(["encode", *encoding(place), f"out={place / 'latents'}"]) == 0
        assert cli.run(["encode", *encoding(place), f"out={place / 'heldout'}", "split=test"]) == 0
        patch.chdir(place)
        assert cli.run(TRAIN) == 0
    [done] = place.glob("runs/*/*/done.json")
    done.parent.rename(place / "run")
    return place


def encoding(place: Path) -> list[str]:
    return [
        *("data=captions", f"data.path={place / 'squares'}", "data.size=8", "flips=false", "shard=4", "batch=2"),
        *(f"autoencoder={place / 'autoencoder'}", f"text_encoder={place / 'clip'}", "device=cpu"),
    ]


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def refusal(capsys: pytest.CaptureFixture[str], *command: str, code: int = 2) -> str:
    capsys.readouterr()
    assert cli.run(list(command)) == code
    said = capsys.readouterr()
    [line] = [line for line in said.err.splitlines() if line.startswith("gearshift: ")]
    assert said.out == "" and "Traceback" not in said.err
    return line


def images(capsys: pytest.CaptureFixture[str], *command: str) -> np.ndarray:
    capsys.readouterr()
    assert cli.run(["sample", *command, *SMALL]) == 0
    with np.load(answer(capsys)["images"]) as stored:
        return np.array(stored["arr_0"])


# Encoding ------------------------------------------------------------------------------------------------------------


def test_features_of_every_caption_are_stored(made: Path) -> None:
    data = Latents(LatentsConfig(path="latents", flip=False))
    encoder = TextEncoder.load(str(made / "clip"))
    text = data.load("train").text
    assert text is not None and len(text) == 11 and text.shape == data.text_shape == (LENGTH, WIDTH)
    assert data.captions() == [tuple(texts_of(number)) for number in range(11)]
    assert data.manifest.text is not None and data.manifest.text["captions"] == sum(len(texts_of(n)) for n in range(11))
    assert data.manifest.text["fingerprint"] == encoder.fingerprint
    for image in range(11):
        of_image = encoder.features(encoder.tokens(texts_of(image)))
        for number, expected in enumerate(of_image):
            draw = torch.tensor([(number + 0.5) / len(of_image)])
            found = text.take(torch.tensor([image]), draw)[0]
            assert found.dtype == torch.float16
            torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(data.null_text(), encoder.features(encoder.tokens([""]))[0], rtol=2e-3, atol=2e-3)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


def test_a_shard_that_is_gone_is_made_again_alike(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = content(Path("latents"))
    digest = Latents(LatentsConfig(path="latents", flip=False)).manifest.digest
    (Path("latents") / SHARDS / "00001.text.npy").write_bytes(b"half")
    (Path("latents") / "null_text.npy").unlink()
    assert cli.run(["encode", *encoding(made), "out=latents"]) == 0
    assert answer(capsys)["digest"] == digest and content(Path("latents")) == whole
    # Another text encoder makes other latents.
    other = save_text_encoder(Path("other"), seed=5)
    said = refusal(capsys, "encode", *encoding(made), "out=latents", f"text_encoder={other.resolve()}")
    assert "holds latents with text_encoder=" in said


@pytest.mark.slow
def test_two_processes_encode_the_same_bytes(made: Path) -> None:
    command = [sys.executable, "-m", "gearshift.cli", "encode", *encoding(made), "out=two", "devices=2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert content(Path("two")) == content(Path("latents"))


def test_text_that_changed_on_disk_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    null = Path("latents/null_text.npy")
    kept = null.read_bytes()
    null.write_bytes(kept[:-2] + b"\x00\x01")
    assert "null_text.npy is not what it was" in refusal(capsys, *TRAIN, code=1)
    null.write_bytes(kept)
    features = Path("latents") / SHARDS / "00000.text.npy"
    features.write_bytes(features.read_bytes()[:-2])
    assert "00000.text.npy has" in refusal(capsys, *TRAIN, code=1)


# Training ------------------------------------------------------------------------------------------------------------


def test_it_trains_resumes_and_keeps_the_empty_string(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    null = NullContext.load(Path("run"))
    assert null is not None and null.encoder == str((made / "clip").resolve())
    assert torch.equal(null.features, Latents(LatentsConfig(path="latents", flip=False)).null_text())
    loaded = gearshift.load("run", device="cpu")
    found = loaded.denoiser.network.null_cond(1, torch.device("cpu"))
    assert found is not None and torch.equal(found[0], null.features)
    # Stopped after the first step and taken up again, the weights are the same bits.
    from gearshift.training.module import DiffusionTraining

    step = DiffusionTraining.training_step

    def dying(self: Any, number: int, batch_idx: int) -> Any:
        if number == 1:
            raise RunError("killed")
        return step(self, number, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionTraining, "training_step", dying)
        assert cli.run([*TRAIN, "trainer.checkpoint_every_steps=1"]) != 0
    capsys.readouterr()
    assert cli.run(TRAIN) == 0
    said = capsys.readouterr()
    assert "after step 1 of 2" in said.err
    resumed = json.loads(said.out.splitlines()[-1])["run"]
    one, two = (load_weights(RunFolder(path)) for path in ("run", resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_processes_train_as_one_does() -> None:
    command = [sys.executable, "-m", "gearshift.cli", *TRAIN, "trainer.devices=2", "runs_dir=two"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    [run] = Path("two").glob("*/*/done.json")
    null = NullContext.load(run.parent)
    assert null is not None
    one, two = (load_weights(RunFolder(path)) for path in ("run", run.parent))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], made: Path
) -> None:
    said = refusal(capsys, *TRAIN, "backbone.context_dim=16")
    assert f"text features of {LENGTH} x 16, and the data has features of {LENGTH} x {WIDTH}" in said
    assert refusal(capsys, *TRAIN, "backbone.context_dim=16", "dry_run=true") == said
    # The same images without their captions.
    plain = ["out=plain", *(part.replace("data=captions", "data=imagefolder") for part in encoding(made))]
    assert "the images have no captions" in refusal(capsys, "encode", *plain)
    assert cli.run(["encode", *(part for part in plain if "text_encoder" not in part)]) == 0
    assert "the data has no captions with features" in refusal(capsys, *TRAIN, "data.path=plain")


# Sampling ------------------------------------------------------------------------------------------------------------


def test_an_image_follows_its_prompt_and_its_index(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    Path("prompts.txt").write_text("a red square\n\n  a blue square\n", encoding="utf-8")
    command = ["run=run", "num_images=5", "prompts=prompts.txt", "guidance=2"]
    capsys.readouterr()
    assert cli.run(["sample", *command, *SMALL]) == 0
    said = answer(capsys)
    asked = (Path(said["images"]).parent / "prompts.txt").read_text().splitlines()
    assert asked == ["a red square", "a blue square", "a red square", "a blue square", "a red square"]
    first = images(capsys, *command)
    # The same prompt with other noise is another image, and another prompt with the same noise is, too.
    assert not np.array_equal(first[0], first[2])
    loaded = gearshift.load("run", device="cpu")
    solver = {"_target_": "gearshift.diffusion.solvers.ddim.DDIM", "steps": 2, "clip_x0": False}
    settings: dict[str, Any] = {"solver": solver, "chunk": 2, "guidance": 2.0}
    ours = loaded.sample(5, prompts=["a red square", "a blue square"], **settings)
    assert np.array_equal(ours.images.permute(0, 2, 3, 1).numpy(), first) and ours.labels is None
    blue = loaded.sample(2, prompts=["a blue square"], **settings)
    assert torch.equal(blue.images[1], ours.images[1])
    # Untrained networks hear little of a prompt; before rounding it can be told.
    red, other = (loaded.sampler(prompts=loaded.prompts([text]), **settings) for text in ("red", "blue"))
    index = torch.arange(2)
    assert not torch.equal(red.cond(index), other.cond(index))


def test_captions_of_the_data_and_of_held_out_data_are_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = gearshift.load("run", device="cpu")
    own, held_out = loaded.prompts("data"), loaded.prompts("heldout")
    assert own.texts == [texts_of(n)[0] for n in range(11)] and held_out.texts == [texts_of(n)[0] for n in range(3)]
    assert own.digest != held_out.digest and "test" in held_out.describe()
    data = Latents(LatentsConfig(path="heldout", flip=False)).load("test").text
    assert data is not None
    torch.testing.assert_close(held_out.cond(torch.tensor([4])), data.take(torch.tensor([1])).float(), rtol=0, atol=0)
    capsys.readouterr()
    assert cli.run(["sample", "run=run", "num_images=2", "prompts=heldout", *SMALL]) == 0


def test_prompts_that_cannot_be(
    capsys: pytest.CaptureFixture[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = ["sample", "run=run", *SMALL]
    assert "is conditioned on text; give prompts=FILE" in refusal(capsys, *sample)
    assert "prompts=nothing is no file with a prompt per line" in refusal(capsys, *sample, "prompts=nothing")
    Path("empty.txt").write_text("\n \n")
    assert "empty.txt holds no prompt" in refusal(capsys, *sample, "prompts=empty.txt")
    Path("red.txt").write_text("red\n")
    monkeypatch.setenv(VARIABLE, str(save_text_encoder(Path("other"), seed=5).resolve()))
    said = refusal(capsys, *sample, "prompts=red.txt", code=1)
    assert "has fingerprint" in said and VARIABLE in said
    monkeypatch.setenv(VARIABLE, str(save_text_encoder(Path("longer"), length=LENGTH + 1).resolve()))
    assert f"features of {LENGTH + 1} x {WIDTH}" in refusal(capsys, *sample, "prompts=red.txt")


def test_guidance_is_against_the_empty_string(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    loaded = gearshift.load("run", device="cpu")
    network = loaded.denoiser.network
    prompts = loaded.prompts(["a red square"])
    encoder = TextEncoder.load(str(made / "clip"))
    empty = encoder.features(encoder.tokens([""])).half().float()
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    cond = prompts.cond(torch.tensor([0]))
    with torch.no_grad():
        guided = loaded.denoiser.predict(x, 500, cond, guidance=3.0).eps
        with_text, without = (loaded.denoiser.predict(x, 500, c).eps for c in (cond, empty))
        torch.testing.assert_close(guided, without + 3 * (with_text - without))
        network.set_null_context(torch.zeros(LENGTH, WIDTH))
        assert not torch.allclose(loaded.denoiser.predict(x, 500, cond, guidance=3.0).eps, guided)


# Elsewhere -----------------------------------------------------------------------------------------------------------


def test_an_exported_file_takes_the_empty_string_along(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", "run=run", "out=model.safetensors"]) == 0
    width = gearshift.load("run", device="cpu").denoiser.network.config.embed_dim  # type: ignore[attr-defined]
    network = [part for part in TRAIN if part.startswith(("backbone", "process"))]
    command = ["import", "weights=model.safetensors", *network, f"backbone.embed_dim={width}"]
    capsys.readouterr()
    assert cli.run(command) == 0
    imported = answer(capsys)["run"]
    ours, theirs = (gearshift.load(path, device="cpu") for path in ("run", imported))
    settings: dict[str, Any] = {
        "solver": {"_target_": "gearshift.diffusion.solvers.ddim.DDIM", "steps": 2, "clip_x0": False},
        "guidance": 2.0,
        "prompts": ["red"],
    }
    null, other = NullContext.load(Path("run")), NullContext.load(Path(imported))
    assert null is not None and other is not None
    assert (null.encoder, null.fingerprint) == (other.encoder, other.fingerprint)
    assert torch.equal(null.features, other.features)
    from gearshift.sampling.loop import sample

    [one], [two] = (list(sample(each.sampler(**settings), 2)) for each in (ours, theirs))
    assert torch.equal(one.images, two.images)
    # Begin another training from the file; it has what the data says of the empty string.
    assert cli.run([*TRAIN, "init=model.safetensors"]) == 0
    begun = NullContext.load(Path(answer(capsys)["run"]))
    assert begun is not None and torch.equal(begun.features, null.features)


def test_official_weights_come_without_the_empty_string(
    capsys: pytest.CaptureFixture[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = gearshift.load("run", device="cpu")
    torch.save(loaded.denoiser.network.state_dict(), "official.pth")
    width = loaded.denoiser.network.config.embed_dim  # type: ignore[attr-defined]
    network = [part for part in TRAIN if part.startswith(("backbone", "process"))]
    command = ["import", "weights=official.pth", *network, f"backbone.embed_dim={width}"]
    capsys.readouterr()
    assert cli.run(command) == 0
    bare = answer(capsys)["run"]
    assert NullContext.load(Path(bare)) is None
    monkeypatch.setenv(VARIABLE, str(made / "clip"))
    Path("red.txt").write_text("red\n")
    sampler = gearshift.load(bare, device="cpu").sampler(prompts="red.txt", guidance=2.0)
    null = NullContext.load(Path("run"))
    assert null is not None
    found = sampler.denoiser.network.null_cond(1, torch.device("cpu"))
    assert found is not None
    torch.testing.assert_close(found[0], null.features, rtol=2e-3, atol=2e-3)
    said = refusal(capsys, "sample", f"run={bare}", "prompts=red.txt", "guidance=2", *SMALL)
    assert "samples 4 channels, which are no image" in said
    assert cli.run([*command, "data=caption_latents", "data.path=latents"]) == 0
    assert NullContext.load(Path(answer(capsys)["run"])) is not None


def test_an_evaluation_asks_for_the_captions_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "num_images=4",
        "chunk=2",
        "timing_images=2",
        "timing_rounds=1",
        "metrics=[fd@random_conv,label_agreement]",
    ]
    more = [
        "metrics=[fd@random_conv,label_agreement]",
        "guidance=2",
        "solvers.ddim.steps=2",
        "+policies.d2={_target_: gearshift.policies.FixedDepth, depth: 2}",
    ]
    command = ["evaluate", "run=run", "evaluation=base", "device=cpu"]
    for part in [*small, *more]:
        plus, name = ("+", part[1:]) if part.startswith("+") else ("", part)
        command.append(f"{plus}evaluation.{name}")
    assert cli.run(command) == 0
    told = json.loads((Path("run") / "evaluations" / "base" / "metrics.json").read_text())
    assert "number i mod 11 of the first captions of squares train" in told["protocol"]["labels"]
    assert [row["name"] for row in told["rows"]][:2] == ["full", "d2"]
    assert told["rows"][1]["psnr_to_full"] is None or told["rows"][1]["psnr_to_full"] > 10, "one caption and one noise"
    assert any(missing["name"] == "label_agreement" for missing in told["unavailable"])
    assert cli.run([*command, "prompts=heldout", "out=held"]) == 0
    told = json.loads(Path("held/metrics.json").read_text())
    assert "number i mod 3 of the first captions of squares test" in told["protocol"]["labels"]
