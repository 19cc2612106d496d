import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gearshift.data.cifar10 import CLASSES, Cifar10, Cifar10Config
from gearshift.runtime.errors import RunError, UsageError

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cifar10-jpeg"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def pixels(n, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path, images, labels, column="img", struct=True):
    data = [png(image) for image in images]
    cells = [{"bytes": item, "path": None} for item in data] if struct else data
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: cells, "label": pa.array(labels, pa.int64())}), path)


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("place", [".", "plain_text"])
def test_parquet_in_several_files(tmp_path, struct, place):
    images = pixels(5, 0)
    write(tmp_path / place / "train-00000-of-00002.parquet", images[:3], [3, 1, 4], struct=struct)
    write(tmp_path / place / "train-00001-of-00002.parquet", images[3:], [1, 9], struct=struct)
    write(tmp_path / place / "test-00000-of-00001.parquet", pixels(2, 1), [0, 5], struct=struct)
    data = Cifar10(Cifar10Config(path=str(tmp_path), flip=False))
    train = data.load("train")
    assert np.array_equal(train.images_u8.numpy(), images.transpose(0, 3, 1, 2))
    assert train.labels.tolist() == [3, 1, 4, 1, 9]
    assert (train.name, train.split, train.class_names) == ("cifar10", "train", CLASSES)
    assert len(data.load("test")) == 2
    assert (data.image_size, data.channels, data.num_classes, data.flip) == (32, 3, 10, False)


def test_class_folders(tmp_path):
    for split in ("train", "test"):
        for k, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (k, k, k)).save(tmp_path / split / name / "0.png")
    train = Cifar10(Cifar10Config(path=str(tmp_path))).load("train")
    assert train.labels.tolist() == list(range(10)) and train.images_u8[:, 0, 0, 0].tolist() == list(range(10))
    assert train.class_names == CLASSES


def test_a_path_that_holds_something_else(tmp_path):
    with pytest.raises(UsageError, match=r"missing is not a folder; expected train-\*\.parquet"):
        Cifar10(Cifar10Config(path=str(tmp_path / "missing")))
    with pytest.raises(UsageError, match="has 0 class folders"):
        Cifar10(Cifar10Config(path=str(tmp_path)))
    write(tmp_path / "train-0.parquet", pixels(1, 0), [0])
    with pytest.raises(UsageError, match=r"holds train-0\.parquet; expected"):
        Cifar10(Cifar10Config(path=str(tmp_path)))
    write(tmp_path / "test-0.parquet", pixels(1, 0), [0], column="image")
    with pytest.raises(UsageError, match="columns image, label"):
        Cifar10(Cifar10Config(path=str(tmp_path))).load("test")


def test_broken_parquet_and_foreign_labels(tmp_path):
    write(tmp_path / "train-0.parquet", pixels(1, 0), [10])
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1 and then nothing")
    data = Cifar10(Cifar10Config(path=str(tmp_path)))
    with pytest.raises(RunError, match=r"labels 10\.\.10"):
        data.load("train")
    with pytest.raises(RunError, match=r"test-0\.parquet is not a parquet file"):
        data.load("test")


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong details")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(RunError, match=r"uoft-cs/cifar10 .*Couldn't reach the Hub\).*data\.path=FOLDER") as caught:
        Cifar10(Cifar10Config()).load("train")
    assert "\n" not in str(caught.value)


def test_hub_rows_are_decoded(monkeypatch):
    import datasets

    images = pixels(3, 2)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"img": [{"bytes": png(image), "path": None} for image in images], "label": [7, 0, 2]}
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = Cifar10(Cifar10Config())
    test = data.load("test")
    assert np.array_equal(test.images_u8.numpy(), images.transpose(0, 3, 1, 2)) and test.labels.tolist() == [7, 0, 2]
    data.load("test")
    assert asked == [("uoft-cs/cifar10", "test")]


@pytest.mark.skipif(not REAL.is_dir(), reason="the local copy of CIFAR-10 is not there")
def test_real_photographs():
    data = Cifar10(Cifar10Config(path=str(REAL)))
    test = data.load("test")
    assert test.images_u8.shape == (10000, 3, 32, 32)
    assert np.bincount(test.labels.numpy()).tolist() == [1000] * 10
    assert test.class_names == CLASSES
    # Photographs, not noise: neighbouring pixels agree far better than distant ones.
    x = test.images_u8[:500].float()
    near, far = (x[..., 1:] - x[..., :-1]).abs().mean(), (x[..., 16:] - x[..., :-16]).abs().mean()
    assert near < 0.4 * far
