import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gearshift.data.crops import read_image
from gearshift.data.dataset import source_of
from gearshift.data.digits import Digits, DigitsConfig
from gearshift.data.imagenet import ImageNet, ImageNetConfig
from gearshift.runtime.errors import RunError, UsageError

WNIDS = ("n01440764", "n01443537", "n02051845")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(seed, size=(21, 17)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(seed, **options):
    stream = io.BytesIO()
    picture(seed, **options).save(stream, format="PNG")
    return stream.getvalue()


def source(path=None, **options):
    return ImageNet(ImageNetConfig(**{"path": str(path), "size": 8, "classes": 3, **options}))


def save_tree(root, per_class=3):
    """Class folders made in another order than that of their names."""
    for part, shift in (("train", 0), ("val", 100)):
        for label, name in reversed(list(enumerate(WNIDS))):
            (root / part / name).mkdir(parents=True)
            for k in range(per_class):
                picture(shift + 10 * label + k).save(root / part / name / f"{name}_{k}.JPEG", quality=95)
    return root


def save_parquet(root, rows=11, files=2, group=3):
    labels = [k % 3 for k in range(rows)]
    cells = [{"bytes": encoded(k), "path": f"img_{k}.png"} for k in range(rows)]
    root.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation"):
        for number, span in enumerate(np.array_split(np.arange(rows), files)):
            table = pa.table({"image": [cells[i] for i in span], "label": [labels[i] for i in span]})
            features = {"info": {"features": {"label": {"names": ["tench", "goldfish", "albatross"]}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
            pq.write_table(table, root / f"{part}-{number:05d}-of-{files:05d}.parquet", row_group_size=group)
    return labels


@pytest.mark.parametrize("below", [".", "ILSVRC/Data/CLS-LOC"])
def test_class_folders_are_numbered_in_order_of_their_ids(tmp_path, below):
    save_tree(tmp_path / below)
    data = source(tmp_path)
    train, test = data.stream("train"), data.stream("test")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and train.class_names == WNIDS
    assert (data.num_classes, train.image_size, train.channels, len(train)) == (3, 8, 3, 9)
    assert train.digest != test.digest
    images = train.read(2, 7)
    assert images.dtype == torch.uint8 and images.shape == (5, 3, 8, 8)
    for row, (name, k) in zip(images, [(0, 2), (1, 0), (1, 1), (1, 2), (2, 0)], strict=True):
        path = tmp_path / below / "train" / WNIDS[name] / f"{WNIDS[name]}_{k}.JPEG"
        assert np.array_equal(row.numpy(), read_image(path, 8, 3))


@pytest.mark.parametrize("below", [".", "data"])
def test_parquet_is_read_by_ranges_across_groups_and_files(tmp_path, below):
    labels = save_parquet(tmp_path / below)
    stream = source(tmp_path).stream("train")
    assert stream.labels.tolist() == labels and stream.class_names == ("tench", "goldfish", "albatross")
    whole = np.stack([read_image(io.BytesIO(encoded(k)), 8, 3) for k in range(11)])
    for start, stop in [(0, 11), (2, 5), (5, 7), (10, 11), (4, 9)]:
        assert np.array_equal(stream.read(start, stop).numpy(), whole[start:stop])
    assert len(source(tmp_path).stream("test")) == 11


def test_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["tench", "goldfish", "albatross"])}
        )
        cells = {"image": [{"bytes": encoded(k), "path": None} for k in range(4)], "label": [2, 0, 1, 1]}
        return datasets.Dataset.from_dict(cells, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    stream = ImageNet(ImageNetConfig(size=8, classes=3)).stream("test")
    assert asked == [("ILSVRC/imagenet-1k", "validation")]
    assert stream.labels.tolist() == [2, 0, 1, 1] and stream.class_names[0] == "tench"
    expected = np.stack([read_image(io.BytesIO(encoded(k)), 8, 3) for k in (1, 2)])
    assert np.array_equal(stream.read(1, 3).numpy(), expected)


def test_no_hub(monkeypatch):
    import datasets

    def load(name, split):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(RunError, match=r"cannot load ILSVRC/imagenet-1k from the hub \(no network\)"):
        ImageNet(ImageNetConfig()).stream("train")


def test_loading_is_reading_everything(tmp_path):
    save_tree(tmp_path)
    data = source(tmp_path)
    stream, loaded = data.stream("train"), data.load("train")
    assert torch.equal(loaded.images_u8, stream.read(0, 9)) and torch.equal(loaded.labels, stream.labels)
    assert source(tmp_path, size=4).load("train").image_size == 4


def test_loaded_data_are_a_source_too():
    data = Digits(DigitsConfig())
    digits = source_of(data, "test")
    assert torch.equal(digits.read(3, 8), data.load("test").images_u8[3:8])


def test_the_crop_is_that_of_adm(tmp_path):
    """Boxes by hand: 68 x 33 is halved to 34 x 16, and the middle 16 columns of 34 begin at 9."""
    pixels = np.random.default_rng(0).integers(0, 256, (33, 68, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    halved = np.asarray(Image.fromarray(pixels).resize((34, 16), Image.Resampling.BOX))
    assert np.array_equal(read_image(tmp_path / "a.png", 16, 3), halved[:, 9:25].transpose(2, 0, 1))
    # Less than twice the size is not halved but brought to it bicubically: 24 x 31 to 16 x round(20.67).
    small = Image.fromarray(pixels[:31, :24])
    small.save(tmp_path / "b.png")
    resized = np.asarray(small.resize((16, 21), Image.Resampling.BICUBIC))
    assert np.array_equal(read_image(tmp_path / "b.png", 16, 3), resized[2:18].transpose(2, 0, 1))


def test_a_box_is_cut_out_first(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", 8, 3, box=(3, 5, 11, 13))
    assert np.array_equal(found, pixels[5:13, 3:11].transpose(2, 0, 1))
    with pytest.raises(RunError, match=r"a\.png is 20 x 20, too small"):
        read_image(tmp_path / "a.png", 8, 3, box=(3, 5, 30, 13))


def test_a_broken_image_is_named(tmp_path):
    save_tree(tmp_path / "tree")
    broken = tmp_path / "tree" / "train" / WNIDS[1] / f"{WNIDS[1]}_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:150])
    stream = source(tmp_path / "tree").stream("train")
    assert len(stream.read(0, 4)) == 4
    with pytest.raises(RunError, match=r"^[^\n]*n01443537_1\.JPEG is not an image that can be read[^\n]*$"):
        stream.read(3, 6)
    (tmp_path / "parquet").mkdir()
    table = pa.table({"image": [{"bytes": b"x", "path": "bad.png"}], "label": [0]})
    pq.write_table(table, tmp_path / "parquet" / "train-0.parquet")
    with pytest.raises(RunError, match=r"image 0 of the train .*train-0\.parquet \(bad\.png\) is not an image"):
        source(tmp_path / "parquet").stream("train").read(0, 1)


def test_a_replaced_image_is_seen_and_a_moved_tree_is_not(tmp_path):
    save_tree(tmp_path / "a")
    first = source(tmp_path / "a").stream("train").digest
    (tmp_path / "a").rename(tmp_path / "b")
    assert source(tmp_path / "b").stream("train").digest == first
    assert source(tmp_path / "b", size=4).stream("train").digest != first
    picture(5, size=(40, 40)).save(tmp_path / "b" / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG")
    assert source(tmp_path / "b").stream("train").digest != first


def test_bad_input(tmp_path):
    with pytest.raises(UsageError, match="nowhere is not a folder; expected"):
        source(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no ImageNet; expected"):
        source(tmp_path)
    save_tree(tmp_path)
    with pytest.raises(UsageError, match=r"3 class folders, and data\.classes=1000"):
        source(tmp_path, classes=1000).stream("train")
    with pytest.raises(UsageError, match="no split 'validation'"):
        source(tmp_path).stream("validation")
    (tmp_path / "train" / "7").mkdir()
    with pytest.raises(UsageError, match="folder '7', which is no WordNet id"):
        source(tmp_path).stream("train")
    only = tmp_path / "only"
    save_parquet(only, files=1)
    (only / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(UsageError, match="has no test split"):
        source(only).stream("test")
    with pytest.raises(RunError, match=r"labels 0\.\.2, and data\.classes=2"):
        source(only, classes=2).stream("train")
    (only / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="not a parquet file"):
        source(only).stream("train")
