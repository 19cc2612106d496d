"""First stages with a codebook: encoded without a Gaussian, stored without moments, quantised when decoded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from gearshift.data.autoencoder import CONFIG, VARIABLE, WEIGHTS, Autoencoder, decode
from gearshift.data.latent_files import MANIFEST, SHARDS, read_manifest
from gearshift.data.latents import Latents, LatentsConfig
from gearshift.data.pixels import to_pm1, to_u8
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir
from gearshift.training.feed import Feed
from gearshift.verbs import encode as verb

ENTRIES = 16


def save_vq(folder, seed=0, **changes):
    """Three latent channels at half the size, and entries as far apart as latents are."""
    from diffusers import VQModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = dict(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=3,
            num_vq_embeddings=ENTRIES,
        )
        made = VQModel(**{**settings, **changes})
        torch.nn.init.normal_(made.quantize.embedding.weight)
        made.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_found_by_itself(monkeypatch, tmp_path_factory):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vq(tmp_path_factory.mktemp("vq"))


@pytest.fixture(scope="module")
def theirs(folder):
    from diffusers import VQModel

    return VQModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def latents():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_latents_are_what_diffusers_encodes_before_it_quantises(folder, theirs, images):
    ours = Autoencoder.load(str(folder))
    with torch.no_grad():
        expected = theirs.encode(to_pm1(images)).latents
    found = ours.encode(images)
    torch.testing.assert_close(found, expected)
    assert found.shape == (5, 3, 8, 8)
    assert torch.equal(ours.encode(images), found)
    assert (ours.gaussian, ours.stored_channels, ours.latent_channels, ours.factor) == (False, 3, 3, 2)


def test_decoding_begins_with_the_nearest_entries(folder, theirs, latents):
    ours = Autoencoder.load(str(folder))
    with torch.no_grad():
        expected = theirs.decode(latents).sample
        unquantised = theirs.decode(latents, force_not_quantize=True).sample
    torch.testing.assert_close(ours.decode(latents), expected, atol=1e-5, rtol=1e-5)
    assert (expected - unquantised).abs().max() > 1e-3
    # Only the nearest entry matters.
    codes = theirs.quantize(latents)[0]
    torch.testing.assert_close(ours.decode(codes + 1e-4), ours.decode(latents))
    assert torch.equal(ours.decode(2 * latents), Autoencoder.load(str(folder), scale=2.0).decode(4 * latents))


def test_latents_are_not_scaled_unless_asked(folder, theirs):
    """diffusers writes 0.18215 where nobody set a factor."""
    assert theirs.config.scaling_factor == 0.18215
    assert Autoencoder.load(str(folder)).scale == 1.0
    assert Autoencoder.load(str(folder), scale=0.5).scale == 0.5


def test_decoding_in_chunks_is_decoding_each_chunk(folder, latents):
    ours = Autoencoder.load(str(folder))
    found = decode(latents, ours, chunk=2)
    pieces = [to_u8(ours.decode(latents[at : at + 2])) for at in (0, 2, 4)]
    assert torch.equal(found, torch.cat(pieces)) and found.shape == (5, 3, 16, 16)
    assert torch.equal(decode(latents[2:4], ours, chunk=2), found[2:4])


def test_half_precision_chooses_the_same_entries(folder, latents):
    full, half = Autoencoder.load(str(folder)), Autoencoder.load(str(folder), dtype=torch.bfloat16)
    assert (half.encoder, half.decoder) == (full.encoder, full.decoder)
    assert half.decode(latents).dtype == torch.float32
    torch.testing.assert_close(half.decode(latents), full.decode(latents), atol=0.1, rtol=0.1)


def test_macs_of_decoding_count_the_codebook(folder, theirs, latents):
    macs = 0

    def count(layer, inputs, output):
        nonlocal macs
        macs += output.numel() * layer.weight[0].numel()

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [layer.register_forward_hook(count) for layer in theirs.modules() if isinstance(layer, kinds)]
    with torch.no_grad():
        theirs.decode(latents[:1])
    for hook in hooks:
        hook.remove()
    attention = 2 * 64 * 64 * 8
    assert Autoencoder.load(str(folder)).decode_macs(8) == macs + attention + 64 * ENTRIES * 3


def test_the_codebook_belongs_to_the_decoder(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / WEIGHTS)
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"] + 1
    save_file(state, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    first, other = Autoencoder.load(str(folder)), Autoencoder.load(str(tmp_path))
    assert first.encoder == other.encoder and first.decoder != other.decoder


def test_indices_are_refused(tmp_path):
    with pytest.raises(UsageError, match="decodes indices"):
        Autoencoder.load(str(save_vq(tmp_path, lookup_from_codebook=True)))


# Encoding a data set and training on it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for k in range(7):
        place = root / "train" / "ab"[k % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{k:02d}.png")
    return root


@pytest.fixture
def encode(pictures, folder, tmp_path):
    def run(**settings):
        cfg = OmegaConf.load(conf_dir() / "encode.yaml")
        for key in ("defaults", "hydra"):
            del cfg[key]
        cfg.data = OmegaConf.load(conf_dir() / "data" / "imagefolder.yaml")
        cfg.data.update(path=str(pictures), size=16)
        cfg.update(autoencoder=str(folder), out=str(tmp_path / "out"), device="cpu", shard=4, batch=2, dtype="fp32")
        return verb.run(OmegaConf.merge(cfg, settings))["latents"]

    return run


@pytest.fixture
def encoded(encode):
    return encode()


def test_one_latent_is_stored_per_orientation(encoded, theirs):
    data = Latents(LatentsConfig(path=encoded))
    split, pixels = data.load("train"), data.pixels().load("train")
    stored = torch.cat(split.moments)
    assert stored.shape == (7, 2, 3, 8, 8)
    for side, images in enumerate([pixels.images_u8, pixels.images_u8.flip(-1)]):
        with torch.no_grad():
            torch.testing.assert_close(stored[:, side], theirs.encode(to_pm1(images)).latents)
    files = sorted(path.name for path in (Path(encoded) / SHARDS).glob("00000.*"))
    assert files == ["00000.indices.npy", "00000.json", "00000.labels.npy", "00000.latents.npy"]
    manifest = read_manifest(Path(encoded), "out")
    assert (manifest.gaussian, manifest.channels, manifest.scale, data.channels) == (False, 3, 1.0, 3)
    assert json.loads((Path(encoded) / MANIFEST).read_text())["gaussian"] is False


@pytest.mark.parametrize("mode", ["sample", "mean"])
def test_a_training_sees_them_without_noise(encoded, mode):
    split = Latents(LatentsConfig(path=encoded, mode=mode)).load("train")
    assert split.noise_shape is None
    feed = Feed(split, seed=1, size=4, start=0, stop=4, device=torch.device("cpu"), flip=True, labelled=True)
    seen = {index: [] for index in range(7)}
    for number in range(20):
        batch = feed.batch(number)
        index = feed._order.indices(number, 0, 4).tolist()
        for row, latent in zip(index, batch.images, strict=True):
            seen[row].append(latent)
    stored = torch.cat(split.moments)
    for row, found in seen.items():
        sides = [next(s for s in (0, 1) if torch.equal(latent, stored[row, s])) for latent in found]
        assert set(sides) <= {0, 1} and len(sides) > 3
    assert {len(latents) for latents in seen.values()} <= {11, 12}


def test_they_are_decoded_by_the_autoencoder_that_made_them(encoded, folder):
    data = Latents(LatentsConfig(path=encoded))
    split = data.load("train")
    taken = split.take(torch.tensor([2, 5])).floats()
    decoder = data.decoder()
    assert decoder.scale == 1.0
    assert torch.equal(decode(taken, decoder), decode(taken, Autoencoder.load(str(folder))))


def test_scales_are_kept(encode, encoded, tmp_path):
    out = encode(out=str(tmp_path / "scaled"), scale=0.25, flips=False)
    scaled, plain = Latents(LatentsConfig(path=out, flip=False)), Latents(LatentsConfig(path=encoded))
    index = torch.arange(7)
    torch.testing.assert_close(
        scaled.load("train").take(index).floats(), 0.25 * plain.load("train").take(index).floats()
    )
    assert scaled.decoder().scale == 0.25 and scaled.manifest.digest != plain.manifest.digest
