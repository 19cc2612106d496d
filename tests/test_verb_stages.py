"""`gearshift stages` on toy data, as a call in this process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image

from gearshift.backbones.staging import StageRouter
from gearshift.runtime.boundaries import load_boundaries
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.output import jsonable
from gearshift.runtime.paths import conf_dir
from gearshift.verbs import stages


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path / "cache"))


def run(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return stages.run(compose("stages", overrides=list(overrides)))


def png(path):
    with Image.open(path) as image:
        image.load()
        return image.format, image.size


TOY = ("data=digits", "process=vp_sde", "queries=400", "replicates=10")


def test_boundaries_of_digits(capsys):
    answer = run(*TOY, "queries=1000", "replicates=50")
    json.dumps(jsonable(answer), allow_nan=False)
    # One image explains a query much longer where there are few in few dimensions; the order of stages is the same.
    assert answer["t"] == pytest.approx([0.101, 0.438], abs=0.02)
    ratio = np.sqrt(np.expm1(9.95 * np.square(answer["t"]) + 0.1 * np.array(answer["t"])))
    assert answer["sigma"] == pytest.approx(ratio.tolist()) and answer["log_snr"] == pytest.approx(-2 * np.log(ratio))
    assert {key: answer[key] for key in ("eta", "alpha", "mode", "queries", "images", "range", "axis", "data")} == {
        "eta": 2 / 256,
        "alpha": 0.9,
        "mode": "surrogate",
        "queries": 1000,
        "images": 1500,
        "range": "unit",
        "axis": "time",
        "data": "digits",
    }
    spread = answer["uncertainty"]
    assert all(0 < s < 0.02 for s in spread["t"]) and len(spread["sigma"]) == len(spread["log_snr"]) == 2
    assert (spread["replicates"], spread["failed"]) == (50, 0) and answer["seconds"] > 0
    file = Path(answer["file"])
    assert file.parent == Path("runs/stages") and file.name.startswith("digits-vp-sde-surrogate-")
    assert load_boundaries(file) == tuple(answer["sigma"])
    assert StageRouter(load_boundaries(file)).num_stages == 3
    written = yaml.safe_load(file.read_text())
    assert written["t"] == answer["t"] and written["settings"]["eta"] == "2/256" and written["digest"]
    assert file.read_text().startswith(
        "# Stage boundaries by gearshift stages, method optimal_denoiser: uniform in time"
    )
    assert png(answer["plot"])[0] == "PNG" and Path(answer["plot"]) == file.with_suffix(".png")
    said = capsys.readouterr()
    assert "1000/1000 queries" in said.err and str(file) in said.err and said.out == ""


def test_the_same_again_and_another_seed():
    first = run(*TOY)
    again = run(*TOY)
    assert again["file"] == first["file"] and again["t"] == first["t"]
    other = run(*TOY, "seed=1")
    assert other["file"] != first["file"] and other["t"] != first["t"]
    assert other["t"] == pytest.approx(first["t"], abs=0.03)


def test_settings_reach_the_search():
    literal = run(*TOY, "mode=literal")
    assert literal["t"][0] == run(*TOY)["t"][0] and literal["t"][1] == pytest.approx(0.794, abs=0.02)
    assert "-literal-" in literal["file"]
    wide = run(*TOY, "range=symmetric", "eta=0.015625", "precision=fp64", "output=here/it.yaml")
    assert wide["file"] == "here/it.yaml" and wide["range"] == "symmetric" and wide["eta"] == 4 / 256
    # Twice the numbers take twice the noise.
    assert wide["t"][0] > literal["t"][0] and run(*TOY, "alpha=0.8")["t"][0] > literal["t"][0]


def test_edm_boundaries_are_those_of_vp_by_sigma():
    vp, edm = run(*TOY), run(*TOY, "process=edm")
    assert edm["axis"] == "vp_time" and edm["sigma"] == pytest.approx(vp["sigma"]) and edm["t"] == edm["sigma"]


def test_four_stages():
    answer = run(*TOY, "stages=4", "nodes=20", "min_share=0.1", "max_share=0.5")
    assert len(answer["t"]) == 3 and sorted(answer["t"]) == answer["t"]
    share = (np.array([0.001, *answer["t"], 1.0]) - 0.001) / 0.999
    assert (np.diff(share) >= 0.1 - 1e-9).all() and (np.diff(share) <= 0.5 + 1e-9).all()
    assert np.allclose(share * 20, np.round(share * 20))
    assert answer["mode"] is None and answer["alpha"] is None and len(answer["uncertainty"]["t"]) == 3
    assert StageRouter(load_boundaries(answer["file"])).num_stages == 4 and png(answer["plot"])


def test_splits_without_data():
    by_time = run("process=vp", "method=uniform_time")
    assert by_time["t"] == pytest.approx([1 / 3, 2 / 3], abs=1e-4) and by_time["images"] is None
    by_level = run("process=vp", "method=log_snr")
    assert by_level["t"] == pytest.approx([0.348, 0.709], abs=1e-4) and by_level["uncertainty"] is None
    assert png(by_level["plot"]) and load_boundaries(by_level["file"]) == tuple(by_level["sigma"])
    assert len(run("process=edm", "method=log_snr", "stages=5")["t"]) == 4


def test_gradient_affinity_of_a_run(capsys):
    from gearshift.verbs import settings, train

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        overrides = ["experiment=digits", "+debug=tiny", "trainer.accelerator=cpu", "trainer.max_steps=2"]
        trained = train.run(settings.check("train", compose("train", overrides=overrides)))
    answer = run("method=gradient_affinity", f"run={trained['run']}", "nodes=12", "batch=8", "rounds=2")
    assert answer["data"] == "digits" and answer["process"] == "cosine" and answer["eta"] is None
    share = np.array([0, *answer["t"], 999]) / 999 * 12
    assert len(share) == 4 and np.allclose(share, np.round(share))
    assert (np.diff(share) >= 2 - 1e-9).all() and (np.diff(share) <= 6 + 1e-9).all()
    assert png(answer["plot"]) and load_boundaries(answer["file"]) == tuple(answer["sigma"])
    assert "24/24 gradients" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"leave process away"):
        run("method=gradient_affinity", f"run={trained['run']}", "process=vp")


def test_a_folder_of_pictures():
    for number in range(7):
        folder = Path("pictures/train" if number < 6 else "pictures/test")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    images = ("data=imagefolder", "data.path=pictures", "data.size=8", "process=linear")
    answer = run(*images, "queries=300", "eta=0.02")
    assert answer["images"] == 6 and 0 < answer["t"][0] < answer["t"][1] < 999


def test_nothing_to_be_found_is_said():
    with pytest.raises(RunError, match=r"alpha=0\.9: the running mean of S0 .* never falls below alpha"):
        run(*TOY, "queries=200", "eta=10")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("process=vp",), "needs a data set; add e.g. data=cifar10"),
        (("data=digits",), "stages needs a process"),
        ((*TOY, "method=best"), "method=best is not one of optimal_denoiser, uniform_time"),
        ((*TOY, "stages=1"), "stages=1 leave nothing to divide"),
        ((*TOY, "eta=0"), "eta=0 must be above 0"),
        ((*TOY, "eta=two"), "eta=two is no number"),
        ((*TOY, "eta=1/0"), "eta=1/0 is no number"),
        ((*TOY, "alpha=1.5"), "alpha=1.5 is a mean similarity"),
        ((*TOY, "queries=50"), "queries=50 are too few"),
        ((*TOY, "mode=exact"), "mode=exact is not one of surrogate, literal"),
        ((*TOY, "range=255"), "range=255 is not one of unit, symmetric"),
        ((*TOY, "axis=steps"), "axis=steps is not one of"),
        ((*TOY, "sustain=1"), "sustain=1 is a share"),
        ((*TOY, "split=validation"), "no split 'validation'"),
        ((*TOY, "precision=bf16"), "precision=bf16 of the products is not one of fp32, fp64"),
        ((*TOY, "stages=4", "nodes=3"), "3 nodes cannot be cut into stages=4"),
        ((*TOY, "stages=4", "nodes=1"), "nodes=1 must be at least 2"),
        ((*TOY, "output=here.txt"), "output=here.txt is not the name of a YAML file"),
        ((*TOY, "run=runs/digits/abc"), "serves method=gradient_affinity only"),
        (("method=gradient_affinity",), r"add run=FOLDER"),
        (("method=gradient_affinity", "run=nowhere"), "nowhere"),
    ],
)
def test_bad_requests(overrides, said):
    with pytest.raises(UsageError, match=said):
        run(*overrides)
    assert not Path("runs").exists()


def test_latents_are_taken_by_their_means(monkeypatch, capsys):
    """They have no grey levels, so there is no range."""
    from gearshift.data.latents import LatentDataset, Latents

    class Stand(Latents):
        def __init__(self, config=None):
            self.image_size, self.channels, self.num_classes = 2, 2, None

        def load(self, split):
            moments = torch.linspace(-3, 3, 50 * 16).reshape(50, 1, 4, 2, 2)
            return LatentDataset((moments,), None, None, (), "latents of toy", split, "digest", "made", 0.5)

    real = stages.config.build
    monkeypatch.setattr(
        stages.config, "build", lambda node: Stand() if node.get("_target_") == "latents" else real(node)
    )
    answer = run("+data={_target_: latents, path: here}", "process=vp", "queries=400", "eta=0.1")
    assert answer["range"] == "values" and answer["images"] == 50
    assert "here holds latents: their means are taken as they are" in capsys.readouterr().err


PROGRAM = """
import json, sys
from hydra import compose, initialize_config_dir
from gearshift.runtime.paths import conf_dir
from gearshift.verbs import stages
with initialize_config_dir(str(conf_dir()), version_base="1.3"):
    print(json.dumps(stages.run(compose("stages", overrides=sys.argv[1:]))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("stages=4", "nodes=20"), ("method=log_snr",)])
def test_two_processes_write_what_one_does(extra):
    process = ("process=vp_sde",) if extra == ("method=log_snr",) else (*TOY, "queries=1500")
    alone = run(*process, *extra, "output=alone.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *process, *extra, "output=both.yaml"],
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    answers = [json.loads(one.communicate(timeout=120)[0].splitlines()[-1]) for one in both]
    assert answers[1] is None and answers[0]["t"] == alone["t"]
    assert Path("both.yaml").read_bytes() == Path("alone.yaml").read_bytes()
    assert Path("both.png").is_file()
