"""Every experiment is composed, built at full size on the meta device, and run two steps under debug=tiny."""

import io
import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from gearshift import cli
from gearshift.assembly import build_augment, build_data, build_denoiser, build_objective, give_null_context
from gearshift.data.latent_files import Manifest, write_manifest, write_shard
from gearshift.data.text_files import text_arrays, write_null
from gearshift.execution.cost import CostTable
from gearshift.runtime import config
from gearshift.runtime.paths import conf_dir

FOLDER = conf_dir() / "experiment"
EXPERIMENTS = sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in FOLDER.rglob("*.yaml"))


def composed(verb, *overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(verb, overrides=list(overrides))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder like CIFAR-10's parquet copy, with a few made images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("cifar10")
    draw = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        encoded = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"img": encoded, "label": [i % 10 for i in range(count)]})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A folder like that of ImageNet's latents at 256 pixels, with a few made ones."""
    folder = tmp_path_factory.mktemp("latents")
    draw = np.random.default_rng(0)
    arrays = {
        "moments": draw.normal(size=(8, 2, 8, 32, 32)).astype(np.float16),
        "labels": np.arange(8) * 100,
        "indices": np.arange(8),
    }
    shard = write_shard(folder, 0, arrays)
    made = Manifest(
        count=8,
        shard=8,
        orientations=2,
        dtype="fp16",
        channels=4,
        latent_size=32,
        image_size=256,
        scale=0.18215,
        num_classes=1000,
        class_names=tuple(map(str, range(1000))),
        data={"name": "imagenet", "split": "train", "provenance": "made", "digest": "d"},
        source={"_target_": "gearshift.data.imagenet.ImageNet"},
        autoencoder={"name": "vae", "encoder": "e", "decoder": "d"},
        shards=(shard,),
    )
    write_manifest(folder, made)
    return folder


@pytest.fixture(scope="module")
def vq_latents(tmp_path_factory):
    """A folder like that of CelebA-HQ's latents of a VQ first stage, with a few made ones."""
    folder = tmp_path_factory.mktemp("vq")
    draw = np.random.default_rng(0)
    arrays = {"latents": draw.normal(size=(4, 1, 3, 64, 64)).astype(np.float16), "indices": np.arange(4)}
    shard = write_shard(folder, 0, arrays)
    made = Manifest(
        count=4,
        shard=4,
        orientations=1,
        dtype="fp16",
        channels=3,
        latent_size=64,
        image_size=256,
        scale=1.0,
        num_classes=None,
        class_names=(),
        data={"name": "faces", "split": "train", "provenance": "made", "digest": "d"},
        source={"_target_": "gearshift.data.imagefolder.ImageFolder"},
        autoencoder={"name": "vq", "encoder": "e", "decoder": "d"},
        shards=(shard,),
        gaussian=False,
    )
    write_manifest(folder, made)
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A folder like that of MS-COCO's latents with text features of CLIP ViT-L/14, with a few made ones."""
    folder = tmp_path_factory.mktemp("captioned")
    draw = np.random.default_rng(0)
    texts = [["one"], ["two", "another two"], ["three"], ["four"]]
    features = draw.normal(size=(5, 77, 768)).astype(np.float16)
    arrays = {"moments": draw.normal(size=(4, 1, 8, 32, 32)).astype(np.float16), "indices": np.arange(4)}
    shard = write_shard(folder, 0, {**arrays, **text_arrays(features, texts)})
    null = write_null(folder, features[0] / 2)
    made = Manifest(
        count=4,
        shard=4,
        orientations=1,
        dtype="fp16",
        channels=4,
        latent_size=32,
        image_size=256,
        scale=0.2301,
        num_classes=None,
        class_names=(),
        data={"name": "coco2014", "split": "train", "provenance": "made", "digest": "d"},
        source={"_target_": "gearshift.data.coco.Coco"},
        autoencoder={"name": "vae", "encoder": "e", "decoder": "d"},
        shards=(shard,),
        text={"encoder": "clip", "fingerprint": "f", "length": 77, "width": 768, "captions": 5, "null": null},
    )
    write_manifest(folder, made)
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A folder like CelebA's aligned images."""
    folder = tmp_path_factory.mktemp("faces")
    draw = np.random.default_rng(0)
    for number in range(12):
        picture = draw.integers(0, 256, (218, 178, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number:06d}.png")
    return folder


@pytest.fixture
def data_of(photographs, latents, vq_latents, captioned, faces):
    """The override that says where the data of an experiment are; none for data that come along."""
    places = {"Cifar10": photographs, "Latents": latents, "ImageFolder": faces, "CelebA": faces}

    def override(name):
        cfg = composed("train", f"experiment={name}")
        if cfg.backbone.get("context_dim"):
            return [f"data.path={captioned}"]
        if "Ldm" in cfg.backbone._target_:
            return [f"data.path={vq_latents}"]
        target = cfg.data._target_.rpartition(".")[2]
        return [f"data.path={places[target]}"] if target in places else []

    return override


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_builds_at_full_size(name, data_of):
    cfg = composed("train", f"experiment={name}", *data_of(name))
    config.validate(cfg)
    with torch.device("meta"):
        denoiser = build_denoiser(cfg)
    data = build_data(cfg, denoiser.network)
    give_null_context(denoiser.network, data)
    build_objective(cfg, denoiser.network)
    build_augment(cfg, denoiser.network, data)
    assert CostTable.measure(denoiser.network).full(denoiser.network).macs > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_two_steps(name, data_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path / "cache"))
    small = ["+debug=tiny", "trainer.accelerator=cpu", "trainer.batch_size=4", "trainer.accumulate=1"]
    assert cli.run(["train", f"experiment={name}", *small, *data_of(name)]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["steps"] == 2
    assert np.isfinite(answer["loss"])
    full = composed("train", f"experiment={name}")
    with torch.device("meta"):
        depth = build_denoiser(full).network.num_blocks()
        tiny = build_denoiser(composed("train", f"experiment={name}", "+debug=tiny")).network
    assert tiny.num_blocks() == depth, "debug=tiny shrinks widths, never depth"


@pytest.fixture
def plan_file(tmp_path):
    """The least there can be of what `policy=planned` reads."""
    file = tmp_path / "plan.yaml"
    fields = "log_snr: [0.0]\ncall: [1]\ndepth: [0]\nreuse: [{}]\n"
    file.write_text(f"_target_: gearshift.policies.Planned\nnetwork: UViT\nblocks: 7\n{fields}")
    return file


def test_every_group_file_is_valid(plan_file):
    """Each file of a group that names a class fits that class's schema."""
    from omegaconf import OmegaConf

    checked = 0
    for file in sorted(conf_dir().rglob("*.yaml")):
        if file.parent == conf_dir() or file.parent.name in ("trainer", "experiment", "launcher", "debug"):
            continue
        node = OmegaConf.load(file)
        if node.get("_target_") and "defaults" not in node:  # files that start from others are part of experiments
            for key in OmegaConf.missing_keys(node):  # what everyone has to set, such as the place of a data set
                OmegaConf.update(node, key, str(plan_file) if key == "file" else "given")
            config.validate(OmegaConf.create({file.parent.name: node}))
            checked += 1
    assert checked > 25


@pytest.mark.parametrize("group", ["policy", "evaluation", "solver"])
def test_every_file_of_a_sampling_group_builds(group, plan_file):
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        # Through Hydra, as a user names it: files may start from others of their group.
        verb, needed = ("evaluate", ["run=x"]) if group == "evaluation" else ("sample", ["run=x"])
        if file.stem in ("planned", "from_file"):
            needed = [*needed, f"policy.file={plan_file}"]
        if file.stem in ("duodiff", "small_network"):
            needed = [*needed, "policy.other=x"]
        config.build(composed(verb, *needed, f"{group}={file.stem}")[group])
