"""The verb, with a tiny autoencoder and a few pictures."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from gearshift.data.autoencoder import VARIABLE, Autoencoder
from gearshift.data.dataset import ImageDataset
from gearshift.data.latent_files import MANIFEST, SHARDS, read_manifest
from gearshift.data.latents import Latents, LatentsConfig
from gearshift.data.pixels import to_pm1
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.paths import conf_dir
from gearshift.runtime.run import RunFolder
from gearshift.verbs import encode as verb

COUNT = 11


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """11 train pictures of three classes and two test pictures."""
    root = tmp_path_factory.mktemp("pictures")
    for k in range(COUNT + 2):
        place = root / ("train" if k < COUNT else "test") / "abc"[k % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{k:02d}.png")
    return root


@pytest.fixture
def configured(pictures, autoencoder_folder, tmp_path):
    def make(**changes):
        cfg = OmegaConf.load(conf_dir() / "encode.yaml")
        for key in ("defaults", "hydra"):
            del cfg[key]
        cfg.data = OmegaConf.load(conf_dir() / "data" / "imagefolder.yaml")
        cfg.data.update(path=str(pictures), size=16)
        settings = {"autoencoder": str(autoencoder_folder), "out": str(tmp_path / "out"), "device": "cpu"}
        return OmegaConf.merge(cfg, {**settings, "shard": 4, "batch": 2, **changes})

    return make


def files(folder):
    """Everything that latents consist of, but where they came from."""
    return {path.name: path.read_bytes() for path in (Path(folder) / SHARDS).iterdir()}


def test_both_orientations_are_what_diffusers_makes_of_them(configured, autoencoder_folder):
    from diffusers import AutoencoderKL

    cfg = configured(dtype="fp32")
    answer = verb.run(cfg)
    theirs = AutoencoderKL.from_pretrained(autoencoder_folder, low_cpu_mem_usage=False).eval()
    data = Latents(LatentsConfig(path=answer["latents"]))
    split = data.load("train")
    pixels = data.pixels().load("train")
    assert torch.equal(split.labels, pixels.labels) and split.class_names == ("a", "b", "c")
    stored = torch.cat(split.moments)
    assert stored.shape == (COUNT, 2, 8, 8, 8)
    for side, images in enumerate([pixels.images_u8, pixels.images_u8.flip(-1)]):
        with torch.no_grad():
            posterior = theirs.encode(to_pm1(images)).latent_dist
        torch.testing.assert_close(stored[:, side], torch.cat([posterior.mean, posterior.logvar], 1))
    assert (stored[:, 0] - stored[:, 1]).abs().max() > 1e-3
    indices = [np.load(file) for file in sorted((Path(answer["latents"]) / SHARDS).glob("*.indices.npy"))]
    assert np.concatenate(indices).tolist() == list(range(COUNT)) and [len(i) for i in indices] == [4, 4, 3]


def test_the_answer_and_the_manifest(configured, autoencoder_folder, pictures, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    cfg = configured()
    cfg.data.path = pictures.name  # found from everywhere afterwards
    answer = verb.run(cfg)
    manifest = read_manifest(Path(cfg.out), "out")
    shards = (Path(cfg.out) / SHARDS).glob("*.npy")
    assert answer.pop("seconds") >= 0
    assert answer == {
        "latents": cfg.out,
        "count": COUNT,
        "shards": 3,
        "bytes": sum(file.stat().st_size for file in shards),
        "digest": manifest.digest,
    }
    made = Autoencoder.load(str(autoencoder_folder))
    assert manifest.autoencoder["encoder"] == made.encoder and manifest.scale == 0.18215
    assert (manifest.image_size, manifest.latent_size, manifest.channels, manifest.orientations) == (16, 8, 4, 2)
    assert manifest.source["path"] == str(pictures) and manifest.data["split"] == "train"
    assert manifest.data["name"] == pictures.name and manifest.dtype == "fp16"
    monkeypatch.chdir("/")
    data = Latents(LatentsConfig(path=cfg.out))
    assert len(data.pixels().load("train")) == COUNT and data.decoder().encoder == made.encoder


def test_only_one_orientation_and_another_scale_and_split(configured):
    answer = verb.run(configured(flips=False, scale=0.5, split="test"))
    manifest = read_manifest(Path(answer["latents"]), "out")
    assert (manifest.orientations, manifest.scale, manifest.count) == (1, 0.5, 2)
    assert len(Latents(LatentsConfig(path=answer["latents"], flip=False)).load("test")) == 2


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("dies_in", [1, 2])
def test_a_kill_in_the_middle_changes_nothing(configured, tmp_path, monkeypatch, dies_in):
    whole = verb.run(configured(out=str(tmp_path / "whole")))
    write, written = verb.write_shard, []

    def dying(folder, number, arrays):
        if len(written) == dies_in:
            # The moments are there already, and half of the labels beside them.
            (folder / SHARDS / f"{number:05d}.moments.npy").write_bytes(b"half")
            (folder / SHARDS / f".{number:05d}.labels.npy.1.partial").write_bytes(b"half")
            raise Killed
        written.append(number)
        return write(folder, number, arrays)

    monkeypatch.setattr(verb, "write_shard", dying)
    with pytest.raises(Killed):
        verb.run(configured())
    with pytest.raises(UsageError, match="not finished"):
        Latents(LatentsConfig(path=str(tmp_path / "out")))
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / SHARDS).glob(f"0000[0-{dies_in - 1}].*")}
    assert len(kept) == 4 * dies_in
    dies_in = -1
    answer = verb.run(configured())
    assert answer["digest"] == whole["digest"] and answer["shards"] == 3
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert written == [0, 1, 2]
    assert all(file.stat().st_mtime_ns == at for file, at in kept.items())
    # Once more: nothing is left to be done, and latents are no images.
    latents = {"_target_": "gearshift.data.latents.Latents", "path": str(tmp_path / "out")}
    with pytest.raises(UsageError, match="holds latents already"):
        verb.run(OmegaConf.merge(configured(), {"data": None}, {"data": latents}))
    assert verb.run(configured())["digest"] == whole["digest"] and written == [0, 1, 2]


def test_a_damaged_shard_is_made_again(configured, tmp_path):
    verb.run(configured())
    before = files(tmp_path / "out")
    file = tmp_path / "out" / SHARDS / "00001.moments.npy"
    file.write_bytes(before[file.name][:-1] + b"?")
    verb.run(configured())
    assert files(tmp_path / "out") == before


def test_a_folder_of_another_request_is_left_alone(configured, tmp_path):
    verb.run(configured())
    before = files(tmp_path / "out")
    with pytest.raises(UsageError, match="holds latents with batch=2, and this command has batch=4"):
        verb.run(configured(batch=4))
    with pytest.raises(UsageError, match="split=train, and this command has split=test"):
        verb.run(configured(split="test"))
    assert files(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"holds thesis\.tex and no latents"):
        verb.run(configured(out=str(tmp_path / "mine")))


def test_a_second_writer_is_locked_out(configured, tmp_path):
    (tmp_path / "out").mkdir()
    script = (
        "import sys; from gearshift.runtime.run import RunFolder\n"
        "with RunFolder(sys.argv[1]).lock(): print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match="is in use by pid"):
            verb.run(configured())
        assert not (tmp_path / "out" / MANIFEST).exists()
    finally:
        other.communicate("", timeout=60)
    with RunFolder(tmp_path / "out").lock():
        pass


def test_ranks_take_shards_of_their_own(configured, tmp_path, monkeypatch):
    """Each is written once, by one process, and together they are those of one process."""
    whole = verb.run(configured(out=str(tmp_path / "whole")))
    cfg = configured()
    source = verb.source_of(verb.config.build(cfg.data), "train")
    autoencoder = Autoencoder.load(cfg.autoencoder)
    request = verb.request_of(cfg, source, autoencoder)
    folder = tmp_path / "out"
    folder.mkdir()
    verb.check_request(folder, request)
    write, written = verb.write_shard, []
    monkeypatch.setattr(verb, "write_shard", lambda f, n, arrays: written.append((rank, n)) or write(f, n, arrays))
    monkeypatch.setattr(verb.launch, "world_size", lambda: 2)
    monkeypatch.setattr(verb.peers, "barrier", lambda what: None)
    monkeypatch.setattr(verb.peers, "broadcast", lambda value, what: [0, 1, 2])
    for rank in (0, 1):
        monkeypatch.setattr(verb.launch, "rank", lambda rank=rank: rank)
        verb.encode(folder, source, autoencoder, request)
    assert written == [(0, 0), (0, 2), (1, 1)]
    monkeypatch.undo()
    assert verb.finish(folder, request, source, autoencoder, {}).digest == whole["digest"]
    assert files(folder) == files(tmp_path / "whole")


PROGRAM = """
import json, sys
from omegaconf import OmegaConf
from gearshift.verbs.encode import run
print(json.dumps(run(OmegaConf.create(json.loads(sys.argv[1])))))
"""


@pytest.mark.slow
def test_two_processes_leave_the_bytes_of_one(configured, tmp_path):
    alone = verb.run(configured(out=str(tmp_path / "alone")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = json.dumps(OmegaConf.to_container(configured()))
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, text],
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert answers[1] is None and answers[0]["digest"] == alone["digest"]
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_threads_change_no_bit(configured, tmp_path):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            verb.run(configured(out=str(tmp_path / str(threads)), batch=1))
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_images_are_read_in_pieces(configured, monkeypatch):
    """Never the whole set, and never across a shard."""
    spans = []
    read = ImageDataset.read
    monkeypatch.setattr(ImageDataset, "read", lambda self, a, b: spans.append((a, b)) or read(self, a, b))
    monkeypatch.setattr(verb, "_BLOCK", 1)
    verb.run(configured())
    assert sorted(spans) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]


def test_shards_are_few_and_batches_are_full(configured, monkeypatch):
    """Not one image at a time, and not one file per image."""
    sizes = []
    moments = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, images: sizes.append(len(images)) or moments(self, images))
    answer = verb.run(configured(shard=8, batch=4))
    assert sizes.count(4) == 4 and sizes.count(3) == 2 and len(sizes) == 6
    assert len(files(answer["latents"])) == 4 * 2


def test_imagenet_is_streamed(configured, tmp_path):
    """Without a copy of its pixels in the cache."""
    for name in ("n01440764", "n01443537"):
        (tmp_path / "ilsvrc" / "train" / name).mkdir(parents=True)
        for k in range(3):
            pixels = np.random.default_rng(k).integers(0, 256, (40, 35, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "ilsvrc" / "train" / name / f"{k}.JPEG")
    cfg = configured(dtype="fp32")
    cfg.data = OmegaConf.load(conf_dir() / "data" / "imagenet.yaml")
    cfg.data.update(path=str(tmp_path / "ilsvrc"), size=16, classes=2)
    cache = Path(os.environ["GEARSHIFT_CACHE"]) / "data"
    before = set(cache.glob("*"))
    answer = verb.run(cfg)
    assert set(cache.glob("*")) == before
    data = Latents(LatentsConfig(path=answer["latents"]))
    split = data.load("train")
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1] and split.name == "latents of imagenet"
    expected = Autoencoder.load(cfg.autoencoder).encode(data.pixels().stream("train").read(4, 6))
    torch.testing.assert_close(torch.cat(split.moments)[4:, 0], expected)


def test_grey_images_are_encoded_and_odd_channels_refused(configured, new_autoencoder, tmp_path):
    cfg = configured()
    cfg.data.channels = 1
    assert verb.run(cfg)["count"] == COUNT
    two = new_autoencoder(tmp_path / "two", in_channels=2, out_channels=2)
    with pytest.raises(UsageError, match=r"images of 3 channels and autoencoder .* takes 2"):
        verb.run(configured(autoencoder=str(two), out=str(tmp_path / "other")))


def test_latents_that_do_not_fit_their_type_are_refused(configured, monkeypatch):
    moments = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, images: moments(self, images) * 1e7)
    with pytest.raises(RunError, match=r"latent of image 0 is not finite in fp16.*use dtype=fp32"):
        verb.run(configured())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": None}, "encode needs a data set"),
        ({"shard": 5}, "shard=5 must be a multiple of batch=2"),
        ({"batch": 0}, "shard=4 must be a multiple of batch=0"),
        ({"dtype": "int8"}, "dtype=int8 is not one of fp16, fp32"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"autoencoder": "/nowhere"}, "autoencoder=/nowhere is not a folder"),
        ({"split": "val"}, "no split 'val'"),
    ],
)
def test_bad_requests(configured, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        verb.run(configured(**changes))
    assert not (tmp_path / "out" / SHARDS).exists()
