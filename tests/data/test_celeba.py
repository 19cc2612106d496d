"""CelebA from folders, by its partition, from parquet files and from the hub, on made pictures of its size."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gearshift.data.celeba import CelebA, CelebAConfig
from gearshift.data.celeba_partition import part_of, read_partition
from gearshift.data.dataset import source_of
from gearshift.data.imagefolder import ImageFolder, ImageFolderConfig
from gearshift.runtime.errors import RunError, UsageError

# Of eight images: training, validation, test.
PARTS = [0, 0, 0, 0, 1, 1, 2, 2]
UVIT, DUODIFF = (25, 57, 153, 185), (0, 20, 178, 198)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def face(seed, width=178, height=218):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(seed, **size):
    held = io.BytesIO()
    Image.fromarray(face(seed, **size)).save(held, "PNG", compress_level=1)
    return held.getvalue()


def save(path, seed, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed, **size))


def save_faces(folder):
    for number in range(len(PARTS)):
        save(folder / f"{number + 1:06d}.png", number)
    return folder


def save_partition(file, ending=".jpg", gap=" ", heading=""):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{number:06d}{ending}{gap}{part}" for number, part in enumerate(PARTS, start=1)]
    file.write_text(heading + "\n".join(lines) + "\n")


def of(path=None, **options):
    return CelebA(CelebAConfig(**{"path": None if path is None else str(path), **options}))


def cut(seed, box, size=64):
    """By hand: the box, halved by means while it is at least twice the size, then bicubic."""
    image = Image.fromarray(face(seed)).crop(box)
    while image.width >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def shown(dataset, box=UVIT):
    """The seeds of the images of a split, each found by its pixels."""
    known = [cut(seed, box) for seed in range(len(PARTS))]
    return [next(s for s, one in enumerate(known) if np.array_equal(one, x)) for x in dataset.images_u8.numpy()]


# What is cut out -----------------------------------------------------------------------------------------------------


def test_the_crop_is_centred_at_row_121_and_column_89_and_halved(tmp_path):
    save(tmp_path / "train" / "a.png", 3)
    save(tmp_path / "test" / "b.png", 4)
    data = of(tmp_path)
    found = data.load("train")
    assert (found.images_u8.shape, found.labels, data.num_classes, data.flip) == ((1, 3, 64, 64), None, None, True)
    square = face(3)[121 - 64 : 121 + 64, 89 - 64 : 89 + 64].astype(float)
    means = square.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(found.images_u8[0].numpy() - means).max() <= 1  # it is rounded once in each direction
    assert of(tmp_path, size=32).load("train").image_size == 32
    assert of(tmp_path, channels=1).load("test").images_u8.shape == (1, 1, 64, 64)


@pytest.mark.parametrize("tree", [False, True])
def test_a_folder_without_a_partition_is_an_image_folder(tmp_path, tree):
    for number in range(10):
        save(tmp_path / (("train", "test")[number % 2] if tree else ".") / f"{number}.png", number)
    options = {"path": str(tmp_path), "size": 64, "test_fraction": 0.4, "crop": UVIT}
    plain, found = ImageFolder(ImageFolderConfig(**options)), of(tmp_path, test_fraction=0.4)
    for split in ("train", "test"):
        one, other = plain.load(split), found.load(split)
        assert torch.equal(one.images_u8, other.images_u8)
        facts = ("digest", "name", "provenance", "num_classes", "class_names")
        assert [getattr(one, fact) for fact in facts] == [getattr(other, fact) for fact in facts]


def test_duodiffs_variant_is_a_matter_of_options(tmp_path):
    save_faces(tmp_path / "img_align_celeba")
    save_partition(tmp_path / "list_eval_partition.txt")
    data = of(tmp_path, crop=DUODIFF, flip=False, all_splits=True)
    train = data.load("train")
    assert not data.flip and len(train) == 8 and shown(train, DUODIFF) == list(range(8))
    assert "box [0, 20, 178, 198]" in train.provenance and "all splits" in train.provenance
    assert shown(data.load("test"), DUODIFF) == [6, 7]


# The partition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "Eval", ".."])
@pytest.mark.parametrize("below", [".", "img_align_celeba/img_align_celeba"])
def test_the_partition_lies_in_the_folder_or_beside_it(tmp_path, place, below):
    root = tmp_path / "celeba"
    save_faces(root / below)
    save_partition((root / place).resolve() / "list_eval_partition.txt")
    data = of(root)
    assert data.num_classes is None
    train, test = data.load("train"), data.load("test")
    assert shown(train) == [0, 1, 2, 3] and shown(test) == [6, 7]
    assert "train 4 (list_eval_partition.txt)" in train.provenance and train.labels is None
    assert shown(of(root, all_splits=True).load("train")) == list(range(8))


def test_kaggles_partition_is_the_same(tmp_path):
    save_faces(tmp_path)
    save_partition(tmp_path / "list_eval_partition.csv", gap=",", heading="image_id,partition\n")
    assert shown(of(tmp_path).load("test")) == [6, 7]


def test_every_image_is_in_one_part_whatever_their_order(tmp_path):
    save_partition(tmp_path / "partition.txt")
    paths = [tmp_path / f"{number + 1:06d}.jpg" for number in np.random.default_rng(0).permutation(len(PARTS))]
    assert part_of(paths, tmp_path / "partition.txt") == [(path, PARTS[k]) for k, path in enumerate(sorted(paths))]


def test_folders_of_splits_come_before_a_partition(tmp_path):
    save(tmp_path / "celeba" / "train" / "000007.png", 6)
    save(tmp_path / "celeba" / "val" / "000001.png", 0)
    save(tmp_path / "celeba" / "test" / "000002.png", 1)
    save_partition(tmp_path / "list_eval_partition.txt")
    assert shown(of(tmp_path / "celeba").load("train")) == [6]
    assert sorted(shown(of(tmp_path / "celeba", all_splits=True).load("train"))) == [0, 1, 6]


def test_all_of_a_folder_that_names_split(tmp_path):
    save_faces(tmp_path)
    data = of(tmp_path, test_fraction=0.5, all_splits=True)
    assert shown(data.load("train")) == list(range(8)) and len(data.load("test")) < 8


def test_a_partition_of_other_images(tmp_path):
    save_faces(tmp_path)
    listing = tmp_path / "list_eval_partition.txt"
    save_partition(listing)
    save(tmp_path / "more" / "000001.png", 0)
    with pytest.raises(RunError, match=r"000001\.png and .*000001\.png are both 000001"):
        of(tmp_path).load("train")
    (tmp_path / "more" / "000001.png").rename(tmp_path / "000009.png")
    with pytest.raises(RunError, match=r"000009\.png is not in .*list_eval_partition\.txt, which has 8 images"):
        of(tmp_path).load("train")
    (tmp_path / "000009.png").unlink()
    (tmp_path / "000005.png").unlink()
    with pytest.raises(RunError, match=r"has 8 images and 7 of them are there, 000005 is not"):
        of(tmp_path).load("train")
    listing.write_text("000001.jpg 0\n000002.jpg 3\n")
    with pytest.raises(RunError, match=r"line 2: '000002\.jpg 3' is no image and 0, 1 or 2"):
        read_partition(listing)


# Parquet files and the hub -------------------------------------------------------------------------------------------


def save_parquet(path, seeds, column="image", struct=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(seed), "path": None} if struct else png(seed) for seed in seeds]
    pq.write_table(pa.table({column: cells, "celeb_id": list(seeds)}), path)


@pytest.mark.parametrize("place", [".", "img_align+identity+attr"])
def test_parquet_files(tmp_path, place):
    save_parquet(tmp_path / place / "train-00000-of-00002.parquet", [0, 1])
    save_parquet(tmp_path / place / "train-00001-of-00002.parquet", [2, 3], struct=False)
    save_parquet(tmp_path / place / "valid-00000-of-00001.parquet", [4, 5])
    data = of(tmp_path)
    train = data.load("train")
    assert shown(train) == [0, 1, 2, 3] and (train.name, train.num_classes, train.labels) == ("celeba", None, None)
    with pytest.raises(UsageError, match=r"has no test-\*\.parquet; expected img_align_celeba"):
        data.load("test")
    save_parquet(tmp_path / place / "test-00000-of-00001.parquet", [6, 7], column="picture")
    with pytest.raises(UsageError, match=r"has the columns picture, celeb_id; name the one .* by data\.image"):
        data.load("test")
    assert shown(of(tmp_path, image="picture").load("test")) == [6, 7]
    save_parquet(tmp_path / place / "test-00000-of-00001.parquet", [6, 7])
    assert shown(of(tmp_path, all_splits=True).load("train")) == list(range(8))
    (tmp_path / place / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="is not a parquet file"):
        data.load("test")


@pytest.fixture
def hub(monkeypatch):
    import datasets

    asked = []
    spans = {"train": range(4), "valid": range(4, 6), "test": range(6, 8), "train[6:]": range(6, 8)}

    def load(name, subset, split):
        asked.append((name, subset, split))
        seeds = [seed for part in split.split("+") for seed in spans[part]]
        features = datasets.Features({"image": datasets.Image(), "celeb_id": datasets.Value("int64")})
        rows = {"image": [{"bytes": png(seed), "path": None} for seed in seeds], "celeb_id": seeds}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_the_hub_is_asked_once_for_each_split(hub):
    data = of()
    assert shown(data.load("train")) == [0, 1, 2, 3] and shown(data.load("test")) == [6, 7]
    again = data.load("train")
    assert [split for _, _, split in hub] == ["train", "test"] and hub[0][:2] == ("flwrlabs/celeba", None)
    assert again.provenance.startswith("CelebA train 4, hub flwrlabs/celeba, train, box [25, 57, 153, 185]")
    assert torch.equal(source_of(data, "train").read(1, 3), again.images_u8[1:3])


def test_names_of_the_hub_are_configuration(hub):
    data = of(hub="who/faces", subset="aligned", test="train[6:]", all_splits=True)
    assert shown(data.load("train")) == list(range(8)) and shown(data.load("test")) == [6, 7]
    assert hub == [("who/faces", "aligned", "train+valid+train[6:]"), ("who/faces", "aligned", "train[6:]")]
    with pytest.raises(UsageError, match="who/faces has the columns image, celeb_id and no face; name the one"):
        of(hub="who/faces", image="face").load("train")


@pytest.mark.parametrize(
    "reason",
    ["Dataset 'who/faces' is a gated dataset on the Hub.", "Dataset 'who/faces' doesn't exist on the Hub", "timed out"],
)
def test_what_cannot_be_had_says_how_to_get_it(monkeypatch, reason):
    import datasets

    def load(*args, **kwargs):
        raise ConnectionError(f"{reason}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(RunError) as caught:
        of(hub="who/faces").load("train")
    said = str(caught.value)
    for part in (f"({reason})", "https://huggingface.co/datasets/who/faces", "hf auth login", "data.path=FOLDER"):
        assert part in said
    assert "\n" not in said


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_images_of_another_size_are_refused_wherever_they_are(tmp_path):
    said = r"is 64 x 80, and the aligned images of CelebA are 178 x 218; bring those .*data=imagefolder .*data\.size=64"
    save(tmp_path / "folder" / "train" / "a.png", 0, width=64, height=80)
    with pytest.raises(RunError, match=rf"a\.png {said}"):
        of(tmp_path / "folder").load("train")
    table = pa.table({"image": [png(0), png(1, width=64, height=80)]})
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet" / "train-0.parquet")
    with pytest.raises(RunError, match=rf"image 1 in .*train-0\.parquet {said}"):
        of(tmp_path / "parquet").load("train")
    # Nor does it help that another data set has decoded the same files.
    folder = ImageFolderConfig(path=str(tmp_path / "folder"), size=64, crop=(0, 0, 64, 64))
    assert len(ImageFolder(folder).load("train")) == 1
    with pytest.raises(RunError, match="64 x 80"):
        of(tmp_path / "folder", crop=(0, 0, 64, 64)).load("train")


def test_bad_input(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere is not a folder; expected img_align_celeba .*mmlab"):
        of(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"has no images in its train split; expected img_align_celeba"):
        of(tmp_path).load("train")
    with pytest.raises(UsageError, match="celeba has no split 'valid'"):
        of().load("valid")
    for crop in ((25, 57, 153, 219), (5, 1, 5, 9), (-1, 0, 8, 8)):
        with pytest.raises(UsageError, match="is not left, top, right, bottom within the 178 x 218"):
            of(crop=crop)
    with pytest.raises(UsageError, match="size=0 and channels=3"):
        of(size=0)
    with pytest.raises(UsageError, match="size=64 and channels=4"):
        of(channels=4)
