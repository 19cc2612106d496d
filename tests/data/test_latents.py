import json
import shutil

import numpy as np
import pytest
import torch

from gearshift.data.autoencoder import Autoencoder
from gearshift.data.digits import Digits
from gearshift.data.latent_files import (
    MANIFEST,
    REQUEST,
    SHARDS,
    Manifest,
    open_shards,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)
from gearshift.data.latents import LatentDataset, Latents, LatentsConfig, pixels_behind
from gearshift.runtime import keys
from gearshift.runtime.errors import RunError, UsageError
from gearshift.training.feed import Feed, Order

CPU = torch.device("cpu")
COUNT, SHARD, SCALE = 11, 4, 0.18215


def numbers(dtype=np.float32, orientations=2):
    """Moments [11, 2, 4, 3, 3] of two channels: means about 0, log-variances about -1."""
    generator = np.random.default_rng(0)
    moments = generator.normal(size=(COUNT, orientations, 4, 3, 3))
    moments[:, :, 2:] -= 1
    return moments.astype(dtype)


def save(folder, moments=None, labels=True, dtype="fp32", **changes):
    folder.mkdir(exist_ok=True)
    moments = numbers() if moments is None else moments
    shards = []
    for number, start in enumerate(range(0, COUNT, SHARD)):
        span = np.arange(start, min(start + SHARD, COUNT))
        arrays = {"moments": moments[span], "indices": span}
        if labels:
            arrays["labels"] = span % 3
        shards.append(write_shard(folder, number, arrays))
    fields = dict(
        count=COUNT,
        shard=SHARD,
        orientations=moments.shape[1],
        dtype=dtype,
        channels=2,
        latent_size=3,
        image_size=6,
        scale=SCALE,
        num_classes=3 if labels else None,
        class_names=("a", "b", "c") if labels else (),
        data={"name": "toy", "split": "train", "provenance": "made up", "digest": "d"},
        source={"_target_": "gearshift.data.digits.Digits"},
        autoencoder={"name": "somewhere", "encoder": "e" * 16, "decoder": "d" * 16},
        shards=tuple(shards),
    )
    manifest = Manifest(**{**fields, **changes})
    write_manifest(folder, manifest)
    return manifest


def latents(folder, **options):
    return Latents(LatentsConfig(path=str(folder), **options))


def feed(dataset, **changes):
    fields = dict(seed=1, size=6, start=0, stop=6, device=CPU, labelled=True, flip=True)
    return Feed(dataset, **{**fields, **changes})


# What is drawn -------------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_a_backbone_has_to_take(tmp_path):
    save(tmp_path)
    data = latents(tmp_path)
    assert (data.image_size, data.channels, data.num_classes, data.flip) == (3, 2, 3, True)
    split = data.load("train")
    assert (len(split), split.image_size, split.channels, split.num_classes) == (11, 3, 2, 3)
    assert split.labels.tolist() == [k % 3 for k in range(11)]
    assert split.noise_shape == (2, 3, 3) and split.digest == data.manifest.digest


def test_rows_come_from_their_shards_in_the_orientation_that_was_drawn(tmp_path):
    save(tmp_path)
    split = latents(tmp_path).load("train")
    assert len(split.moments) == 3
    index = torch.tensor([9, 0, 3, 4, 10, 4, 7])
    flip = torch.tensor([True, False, True, False, True, True, False])
    rows = split.take(index, flip)
    assert torch.equal(rows.moments[0][:, 0], torch.from_numpy(numbers())[index, flip.long()])
    assert torch.equal(rows.labels, index % 3)
    plain = split.take(index)
    assert torch.equal(plain.moments[0][:, 0], torch.from_numpy(numbers())[index, 0])
    # In one piece, as on a device, it is the same.
    whole = LatentDataset(**{**vars(split), "moments": (torch.cat(split.moments),)})
    assert torch.equal(whole.take(index, flip).moments[0], rows.moments[0])


def test_a_latent_is_mean_plus_std_times_noise_scaled(tmp_path):
    save(tmp_path)
    rows = latents(tmp_path).load("train").take(torch.arange(3))
    noise = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    mean, logvar = torch.from_numpy(numbers())[:3, 0].chunk(2, 1)
    torch.testing.assert_close(rows.floats(noise), SCALE * (mean + logvar.exp().sqrt() * noise))
    assert torch.equal(rows.floats(), SCALE * mean)


def test_half_precision_moments_are_drawn_from_in_full(tmp_path):
    save(tmp_path, numbers(np.float16), dtype="fp16")
    rows = latents(tmp_path).load("train").take(torch.arange(2))
    assert rows.moments[0].dtype == torch.float16
    noise = torch.full((2, 2, 3, 3), 0.3)
    mean, logvar = torch.from_numpy(numbers(np.float16))[:2, 0].double().chunk(2, 1)
    found = rows.floats(noise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), SCALE * (mean + (logvar / 2).exp() * 0.3), rtol=1e-6, atol=1e-7)


def test_what_training_sees_follows_the_moments(tmp_path):
    """Over many micro-batches, every image's latent has the mean and the variance that were stored, in both
    orientations."""
    save(tmp_path)
    rounds = 300
    made, order = feed(latents(tmp_path).load("train"), size=COUNT, stop=COUNT), Order(1, COUNT, COUNT)
    drawn = torch.cat([made.batch(m).images for m in range(rounds)]).double() / SCALE
    image = torch.cat([order.indices(m, 0, COUNT) for m in range(rounds)])
    flip = torch.cat([keys.uniform(1, "flip", torch.arange(COUNT), m) < 0.5 for m in range(rounds)])
    for k in range(COUNT):
        for side in (0, 1):
            found = drawn[(image == k) & (flip == bool(side))]
            mean, logvar = torch.from_numpy(numbers())[k, side].double().chunk(2)
            std, count = (logvar / 2).exp(), len(found)
            assert abs(count - rounds / 2) < 5 * (rounds / 4) ** 0.5
            assert ((found.mean(0) - mean).abs() < 5 * std / count**0.5).all()
            assert ((found.var(0) / std**2 - 1).abs() < 5 * (2 / count) ** 0.5).all()


def test_a_micro_batch_is_the_same_again_and_the_next_draws_anew(tmp_path):
    save(tmp_path, np.zeros((COUNT, 2, 4, 3, 3), np.float32))  # nothing but noise
    split = latents(tmp_path).load("train")
    first = feed(split)
    batches = [first.batch(m).images for m in range(4)]
    again = feed(split)
    for m in (3, 1, 0, 2):
        assert torch.equal(again.batch(m).images, batches[m])
    noise = torch.cat(batches)
    assert len(noise.flatten(1).unique(dim=0)) == len(noise)  # nor do samples share any
    assert not torch.equal(feed(split, seed=2).batch(0).images, batches[0])
    part = feed(split, start=4, stop=6).batch(2)  # of another process
    assert torch.equal(part.images, batches[2][4:])


def test_neither_orientation_nor_sample_is_frozen(tmp_path):
    """In several epochs an image is met mirrored and not, and never twice as the same latent."""
    save(tmp_path)
    made, order = feed(latents(tmp_path).load("train"), size=COUNT, stop=COUNT), Order(1, COUNT, COUNT)
    met = [made.batch(m).images[(order.indices(m, 0, COUNT) == 5).nonzero()[0, 0]] for m in range(8)]
    assert len(torch.stack(met).flatten(1).unique(dim=0)) == 8
    mean = feed(latents(tmp_path, mode="mean").load("train"), size=COUNT, stop=COUNT)
    met = [mean.batch(m).images[(order.indices(m, 0, COUNT) == 5).nonzero()[0, 0]] for m in range(8)]
    assert len(torch.stack(met).flatten(1).unique(dim=0)) == 2


def test_the_mean_draws_no_noise(tmp_path):
    save(tmp_path)
    split = latents(tmp_path, mode="mean").load("train")
    batch = feed(split, flip=False).batch(2)
    index = Order(1, COUNT, 6).indices(2, 0, 6)
    assert torch.equal(batch.images, torch.from_numpy(numbers())[index, 0, :2] * SCALE)
    assert torch.equal(batch.cond, index % 3)


@pytest.mark.parametrize("flip", [False, True])
def test_gathering_ahead_gives_the_same_batches(tmp_path, flip):
    save(tmp_path)
    split = latents(tmp_path).load("train")
    direct, ahead = feed(split, flip=flip), feed(split, flip=flip, resident=False)
    try:
        for m in (5, 6, 7, 2):
            a, b = direct.batch(m), ahead.batch(m)
            assert torch.equal(a.images, b.images) and torch.equal(a.cond, b.cond)
    finally:
        ahead.close()


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [False, True])
def test_the_device_draws_what_the_host_draws(tmp_path, resident):
    save(tmp_path)
    split = latents(tmp_path).load("train")
    device = feed(split, device=torch.device("cuda"), resident=resident)
    try:
        for m in (0, 3):
            a, b = feed(split).batch(m), device.batch(m)
            assert b.images.is_cuda and torch.equal(a.cond, b.cond.cpu())
            torch.testing.assert_close(a.images, b.images.cpu())
    finally:
        device.close()


# What is refused -----------------------------------------------------------------------------------------------------


def test_without_mirrored_images_there_is_no_flip(tmp_path):
    save(tmp_path, numbers(orientations=1))
    with pytest.raises(UsageError, match=r"no mirrored images; set data\.flip=false"):
        latents(tmp_path)
    split = latents(tmp_path, flip=False).load("train")
    assert feed(split, flip=False).batch(0).images.shape == (6, 2, 3, 3)
    with pytest.raises(UsageError, match="without mirrored images"):
        feed(split, flip=True).batch(0)


def test_without_classes(tmp_path):
    save(tmp_path, labels=False)
    split = latents(tmp_path).load("train")
    assert split.labels is None and split.num_classes is None
    assert feed(split, labelled=False).batch(0).cond is None


def test_another_split_or_mode_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(UsageError, match="holds the train split and not test"):
        latents(tmp_path).load("test")
    with pytest.raises(UsageError, match="no split 'val'"):
        latents(tmp_path).load("val")
    with pytest.raises(UsageError, match=r"data\.mode=median is not one of sample, mean"):
        latents(tmp_path, mode="median")


def test_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(UsageError, match="holds no latents"):
        latents(tmp_path)
    (tmp_path / REQUEST).write_text("{}")
    with pytest.raises(UsageError, match="not finished"):
        latents(tmp_path)


def edit(folder, change):
    stored = json.loads((folder / MANIFEST).read_text())
    change(stored)
    (folder / MANIFEST).write_text(json.dumps(stored))


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.update(scale=1.0),
        lambda stored: stored["shards"].pop(),
        lambda stored: stored.update(num_classes=4),
        lambda stored: stored["shards"].reverse(),
    ],
)
def test_a_changed_manifest(tmp_path, change):
    save(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(RunError, match="was changed: it says digest"):
        latents(tmp_path)


def test_a_damaged_manifest(tmp_path):
    save(tmp_path)
    edit(tmp_path, lambda stored: stored.update(format=2))
    with pytest.raises(RunError, match="format 2 and this program reads 1"):
        latents(tmp_path)
    edit(tmp_path, lambda stored: stored.pop("format"))
    with pytest.raises(RunError, match="not readable as a manifest"):
        latents(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(RunError, match="not readable as a manifest"):
        latents(tmp_path)


def test_missing_and_changed_shards(tmp_path):
    save(tmp_path)
    data, file = latents(tmp_path), tmp_path / SHARDS / "00001.moments.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match=r"00001\.moments\.npy is not what it was.*encode` again"):
        data.load("train")
    file.write_bytes(content[:-4])
    with pytest.raises(RunError, match=rf"00001\.moments\.npy has {len(content) - 4} bytes and had {len(content)}"):
        data.load("train")
    file.unlink()
    with pytest.raises(RunError, match=r"00001\.moments\.npy is not there"):
        data.load("train")
    file.write_bytes(content)
    data.load("train")


def test_a_large_set_is_not_read_through(tmp_path, monkeypatch):
    monkeypatch.setattr("gearshift.data.latent_files.VERIFY_BYTES", 100)
    manifest = save(tmp_path)
    monkeypatch.setattr("gearshift.data.latent_files._sha256", lambda path: pytest.fail("it was read"))
    moments, labels = open_shards(tmp_path, read_manifest(tmp_path, "x"))
    assert all(isinstance(piece, np.memmap) for piece in moments) and len(labels) == manifest.count


def test_shards_of_another_kind_than_the_manifest_says(tmp_path):
    save(tmp_path, dtype="fp16")
    with pytest.raises(RunError, match=r"holds float32 .* and the manifest says fp16"):
        latents(tmp_path).load("train")


def test_training_does_not_write_to_the_files(tmp_path):
    save(tmp_path)
    split = latents(tmp_path).load("train")
    split.moments[0].zero_()
    split.moments[0].flatten()[0] = 5
    assert latents(tmp_path).load("train").moments[0].abs().sum() > 0


def test_the_digest_is_of_what_training_sees(tmp_path):
    first = save(tmp_path / "a")
    moved = save(tmp_path / "b", data={**first.data, "provenance": "elsewhere"}, source={})
    assert moved.digest == first.digest
    changed = numbers()
    changed[7, 1, 0, 0, 0] += 1e-3
    others = [save(tmp_path / "c", changed), save(tmp_path / "d", labels=False), save(tmp_path / "e", scale=0.23)]
    assert len({first.digest, *(other.digest for other in others)}) == 4


def test_an_unfinished_shard_is_made_again(tmp_path):
    save(tmp_path)
    assert read_shard(tmp_path, 1).count == 4
    (tmp_path / SHARDS / "00001.json").unlink()
    assert read_shard(tmp_path, 1) is None
    (tmp_path / SHARDS / "00002.labels.npy").write_bytes(b"")
    assert read_shard(tmp_path, 2) is None and read_shard(tmp_path, 0) is not None


# Back to images ------------------------------------------------------------------------------------------------------


def with_autoencoder(tmp_path, folder, **changes):
    made = Autoencoder.load(str(folder))
    about = {"name": made.name, "encoder": made.encoder, "decoder": made.decoder}
    save(tmp_path, np.zeros((COUNT, 2, 8, 3, 3), np.float32), **{"channels": 4, "autoencoder": about, **changes})


def test_the_autoencoder_of_a_run_is_the_one_that_encoded(tmp_path, autoencoder_folder):
    with_autoencoder(tmp_path, autoencoder_folder, scale=0.5)
    found = latents(tmp_path).decoder()
    assert found.scale == 0.5  # as the latents were scaled
    straight = Autoencoder.load(str(autoencoder_folder))
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.decode(z * 0.5), straight.decode(z * straight.scale))


def test_an_autoencoder_that_was_replaced_is_refused_unless_it_is_named(tmp_path, new_autoencoder, capsys):
    place = new_autoencoder(tmp_path / "autoencoder")
    with_autoencoder(tmp_path / "latents", place)
    shutil.rmtree(place)
    with pytest.raises(UsageError, match="is not a folder"):
        latents(tmp_path / "latents").decoder()
    new_autoencoder(place, seed=7)
    with pytest.raises(RunError, match="is not the one that made"):
        latents(tmp_path / "latents").decoder()
    assert latents(tmp_path / "latents", autoencoder=str(place)).decoder().name == str(place)
    assert "may mean different things" in capsys.readouterr().err


def test_an_autoencoder_of_another_shape_is_refused(tmp_path, autoencoder_folder, new_autoencoder):
    with_autoencoder(tmp_path / "latents", autoencoder_folder)
    other = new_autoencoder(tmp_path / "other", latent_channels=2)
    with pytest.raises(UsageError, match=r"latents of 2 channels at 1/2 .* holds 4 channels at 1/2"):
        latents(tmp_path / "latents", autoencoder=str(other)).decoder()


def test_the_pixels_behind_latents(tmp_path):
    save(tmp_path)
    data = latents(tmp_path)
    digits = pixels_behind(data)
    assert isinstance(digits, Digits) and pixels_behind(digits) is digits
