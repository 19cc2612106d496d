import numpy as np
import pytest
from PIL import Image

from gearshift.data.crops import read_image
from gearshift.data.imagefolder import ImageFolder, ImageFolderConfig
from gearshift.runtime.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def save(path, level=0, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level if mode == "L" else (level, level, level)).save(path)


def folder(path, **options):
    return ImageFolder(ImageFolderConfig(**{"path": str(path), "size": 8, **options}))


def test_train_and_test_folders_with_classes(tmp_path):
    for k, name in enumerate(("cat", "dog")):
        save(tmp_path / "train" / name / "a.png", 10 + k)
        save(tmp_path / "train" / name / "deep" / "b.jpg", 10 + k)
    save(tmp_path / "test" / "dog" / "c.png", 77)
    data = folder(tmp_path)
    assert (data.num_classes, data.image_size, data.channels) == (2, 8, 3)
    train, test = data.load("train"), data.load("test")
    assert train.labels.tolist() == [0, 0, 1, 1] and train.class_names == ("cat", "dog")
    assert test.labels.tolist() == [1] and int(test.images_u8.unique()) == 77
    assert train.digest != test.digest


def test_val_serves_as_test(tmp_path):
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / "val" / "a" / "2.png", 5)
    assert int(folder(tmp_path).load("test").images_u8.max()) == 5


def test_a_class_that_training_has_not(tmp_path):
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / "test" / "b" / "2.png")
    with pytest.raises(UsageError, match="'b'"):
        folder(tmp_path).load("test")


def test_flat_folder_is_split_by_the_names(tmp_path):
    for k in range(60):
        save(tmp_path / f"{k}.png", k)
    data = folder(tmp_path, test_fraction=0.3)
    assert data.num_classes is None
    train, test = data.load("train"), data.load("test")
    assert train.labels is None and len(train) + len(test) == 60 and 6 <= len(test) <= 30
    before = set(test.images_u8[:, 0, 0, 0].tolist())
    assert not before & set(train.images_u8[:, 0, 0, 0].tolist())
    # More images move none of the old ones.
    for k in range(60, 90):
        save(tmp_path / f"{k}.png", k)
    after = set(folder(tmp_path, test_fraction=0.3).load("test").images_u8[:, 0, 0, 0].tolist())
    assert {level for level in after if level < 60} == before


def test_a_replaced_image_is_seen(tmp_path):
    for k in range(4):
        save(tmp_path / "train" / f"{k}.png", 1)
        save(tmp_path / "test" / f"{k}.png", 2)
    first = folder(tmp_path).load("train")
    assert folder(tmp_path).load("train").digest == first.digest
    save(tmp_path / "train" / "0.png", 200, size=(9, 9))
    assert folder(tmp_path).load("train").digest != first.digest


def test_reading_leaves_an_image_of_the_size_alone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 8, 3), pixels.transpose(2, 0, 1))


def test_halving_by_box_is_the_mean_of_four(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 64, (16, 16), dtype=np.uint8) * 4
    Image.fromarray(pixels).save(tmp_path / "a.png")
    means = pixels.reshape(8, 2, 8, 2).astype(float).mean(axis=(1, 3))
    assert np.abs(read_image(tmp_path / "a.png", 8, 1)[0] - means).max() <= 0.5


def test_the_centre_of_a_wide_image_is_kept(tmp_path):
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 8, 1) == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_comes_out_in_the_channels_asked_for(tmp_path, mode, channels):
    Image.new("RGB", (11, 9), (200, 200, 200)).convert(mode).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 8, channels).shape == (channels, 8, 8)


def test_a_box_is_cut_out_of_every_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        Image.fromarray(pixels).save(tmp_path / part / "a.png")
    whole = folder(tmp_path).load("train")
    cut = folder(tmp_path, crop=(2, 1, 10, 9)).load("train")
    assert np.array_equal(cut.images_u8[0].numpy(), pixels[1:9, 2:10].transpose(2, 0, 1))
    assert not np.array_equal(cut.images_u8, whole.images_u8)
    assert "box [2, 1, 10, 9]" in cut.provenance and "box [" not in whole.provenance
    with pytest.raises(UsageError, match=r"crop=\[5, 1, 5, 9\]"):
        folder(tmp_path, crop=(5, 1, 5, 9))


def test_bad_input(tmp_path):
    with pytest.raises(UsageError, match="nowhere is not a folder; expected"):
        folder(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no images"):
        folder(tmp_path).load("train")
    with pytest.raises(UsageError, match="channels=2"):
        folder(tmp_path, channels=2)
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "x.png").write_bytes(b"not an image")
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(RunError, match=r"x\.png is not an image"):
        folder(tmp_path).load("train")
