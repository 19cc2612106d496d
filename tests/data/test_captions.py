"""Images with captions: folders, COCO as it is unpacked, and the hub."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from gearshift.data.captions import Captions, CaptionsConfig
from gearshift.data.coco import Coco, CocoConfig
from gearshift.data.crops import read_image
from gearshift.data.dataset import source_of
from gearshift.runtime.errors import RunError, UsageError

from ..captioned import save_squares, texts_of


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def squares(tmp_path):
    return save_squares(tmp_path / "squares")


def of(folder, **options):
    return Captions(CaptionsConfig(path=str(folder), **{"size": 8, **options}))


def picture(seed, width=12, height=9):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def save_coco(root, year="2014"):
    """Three images whose ids and captions are not in order."""
    annotations = root / "annotations"
    annotations.mkdir(parents=True)
    for part, ids in (("train", [30, 10, 20]), ("val", [7])):
        place = root / f"{part}{year}"
        place.mkdir()
        images = [{"id": number, "file_name": f"COCO_{number:03d}.png", "height": 9} for number in ids]
        for image in images:
            (place / image["file_name"]).write_bytes(picture(image["id"]))
        captions = [(number, f"{word} of {number} ") for word in ("first", "second") for number in ids]
        listed = [{"image_id": number, "id": k, "caption": text} for k, (number, text) in enumerate(captions)]
        written = {"info": {}, "images": images, "annotations": listed}
        (annotations / f"captions_{part}{year}.json").write_text(json.dumps(written))
    return root


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_listing_for_each_split(squares):
    data = of(squares)
    stream = source_of(data, "train")
    assert len(stream) == 11 and stream.captions(0, 11) == [tuple(texts_of(k)) for k in range(11)]
    assert len(data.stream("test")) == 3 and data.num_classes is None and not data.flip
    expected = np.stack([read_image(squares / "train" / f"{k:02d}.png", 8, 3) for k in (2, 3)])
    assert np.array_equal(stream.read(2, 4).numpy(), expected)
    loaded = data.load("train")
    assert torch.equal(loaded.images_u8, stream.read(0, 11)) and loaded.labels is None and loaded.text is None
    assert "11 with 21 captions" in loaded.provenance


def test_other_names_and_several_lines_for_an_image(squares, tmp_path):
    (squares / "train" / "captions.jsonl").rename(squares / "train" / "metadata.jsonl")
    (squares / "test").rename(squares / "val")
    assert len(of(squares).stream("train")) == 11 and len(of(squares).stream("test")) == 3
    lines = [{"file_name": "01.png", "said": "b"}, {"file_name": "00.png", "said": "a"}]
    lines += [{"file_name": "01.png", "said": ["c", "d"]}]
    (squares / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert of(squares, caption="said").stream("train").captions(0, 2) == [("a",), ("b", "c", "d")]
    assert of(squares, caption="said", captions=2).stream("train").captions(1, 2) == [("b", "c")]


def test_one_listing_at_the_top_is_split_by_names(tmp_path):
    root = save_squares(tmp_path / "all", counts=(40, 1)) / "train"
    both = [of(root, test_fraction=0.3).stream(split) for split in ("train", "test")]
    texts = [text for stream in both for of_image in stream.captions(0, len(stream)) for text in of_image]
    assert sum(map(len, both)) == 40 and 4 < len(both[1]) < 20
    assert sorted(texts) == sorted(text for k in range(40) for text in texts_of(k))
    # Which split an image is in does not depend on the others.
    listing = (root / "captions.jsonl").read_text().splitlines()
    (root / "captions.jsonl").write_text("\n".join(listing[:20]))
    fewer = of(root, test_fraction=0.3).stream("test")
    assert set(fewer.captions(0, len(fewer))) <= set(both[1].captions(0, len(both[1])))


def test_the_digest_is_of_images_captions_and_size(squares):
    digest = of(squares).stream("train").digest
    assert of(squares).stream("train").digest == digest
    assert of(squares, size=4).stream("train").digest != digest
    assert of(squares, captions=1).stream("train").digest != digest
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(squares / "train" / "00.png")
    assert of(squares).stream("train").digest != digest


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("{", RunError, "line 1, is no JSON object"),
        ('["00.png"]', RunError, "line 1, is no JSON object"),
        ('{"file_name": "00.png", "said": "a"}', UsageError, "has the keys file_name, said and no text"),
        ('{"text": "a"}', UsageError, "has the keys text and no file_name"),
        ('{"file_name": "00.png", "text": " "}', RunError, "has the caption ' '; needed is a text"),
        ('{"file_name": "00.png", "text": []}', RunError, r"has the caption '\[\]'"),
        ('{"file_name": "00.png", "text": [3]}', RunError, r"has the caption '\[3\]'"),
        ('{"file_name": "gone.png", "text": "a"}', RunError, r"gone\.png has a caption and is not there"),
    ],
)
def test_broken_listings(squares, line, error, said):
    (squares / "train" / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(error, match=said):
        of(squares).stream("train")


def test_bad_requests(squares, tmp_path):
    with pytest.raises(UsageError, match=r"data.path=/nowhere is not a folder. Expected is data.path=FOLDER"):
        of("/nowhere")
    with pytest.raises(UsageError, match=r"data.path=None and data.hub=None: give one of them"):
        Captions(CaptionsConfig())
    with pytest.raises(UsageError, match="no captions in its train split"):
        of(tmp_path).stream("train")
    with pytest.raises(UsageError, match="no split 'val'"):
        of(squares).stream("val")
    with pytest.raises(UsageError, match="size=0 and captions=None"):
        of(squares, size=0)
    with pytest.raises(UsageError, match=r"test_fraction=1\.5"):
        of(squares, test_fraction=1.5)
    (squares / "train" / "01.png").write_bytes(b"no")
    with pytest.raises(RunError, match=r"01\.png is not an image"):
        of(squares).stream("train").read(0, 2)


# COCO ----------------------------------------------------------------------------------------------------------------


def test_coco_as_it_is_unpacked(tmp_path):
    data = Coco(CocoConfig(path=str(save_coco(tmp_path)), size=8))
    stream = data.stream("train")
    assert stream.captions(0, 3) == [(f"first of {k}", f"second of {k}") for k in (10, 20, 30)]
    assert np.array_equal(stream.read(1, 2)[0].numpy(), read_image(io.BytesIO(picture(20)), 8, 3))
    assert stream.name == "coco2014" and len(data.stream("test")) == 1 and not data.flip
    assert len(data.load("test")) == 1
    shutil.move(tmp_path / "train2014", tmp_path / "images" / "train2014")
    assert data.stream("train").captions(0, 3) == stream.captions(0, 3)


def test_coco_that_is_not_there_is_said_how_to_get(tmp_path):
    get = r"unpack train2014\.zip and val2014\.zip from images\.cocodataset\.org/zips"
    with pytest.raises(UsageError, match=rf"data\.path=null names no folder\. .*{get}"):
        Coco(CocoConfig()).stream("train")
    with pytest.raises(UsageError, match=rf"has no annotations/captions_train2014\.json\. .*{get}"):
        Coco(CocoConfig(path=str(tmp_path))).stream("train")
    save_coco(tmp_path)
    with pytest.raises(UsageError, match=r"has no annotations/captions_train2017\.json\. COCO 2017"):
        Coco(CocoConfig(path=str(tmp_path), year="2017")).stream("train")
    shutil.rmtree(tmp_path / "val2014")
    with pytest.raises(UsageError, match="has no folder val2014 with images"):
        Coco(CocoConfig(path=str(tmp_path))).stream("test")
    (tmp_path / "annotations" / "captions_train2014.json").write_text('{"images": []}')
    with pytest.raises(RunError, match="not readable as captions of COCO"):
        Coco(CocoConfig(path=str(tmp_path))).stream("train")


# The hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    import datasets

    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        features = datasets.Features({"picture": datasets.Image(), "said": datasets.List(datasets.Value("string"))})
        cells = [{"bytes": picture(k), "path": None} for k in range(4)]
        said = [[f"{k} a", f"{k} b"][: 1 + k % 2] for k in range(4)]
        return datasets.Dataset.from_dict({"picture": cells, "said": said}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_columns_of_the_hub_are_configuration(hub):
    data = Captions(CaptionsConfig(hub="who/what", subset="part", image="picture", caption="said", test="val", size=8))
    stream = data.stream("test")
    assert hub == [("who/what", "part", "val")] and stream.name == "what"
    assert stream.captions(0, 4) == [("0 a",), ("1 a", "1 b"), ("2 a",), ("3 a", "3 b")]
    expected = np.stack([read_image(io.BytesIO(picture(k)), 8, 3) for k in (1, 2)])
    assert np.array_equal(stream.read(1, 3).numpy(), expected)
    with pytest.raises(UsageError, match=r"who/what has the columns picture, said and no image"):
        Captions(CaptionsConfig(hub="who/what")).stream("train")


def test_a_hub_that_refuses(monkeypatch):
    import datasets

    def load(name, subset, split):
        raise ConnectionError("gated\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        RunError, match=r"\(gated\); if it is gated, ask for access on https.*datasets/who/what and log"
    ):
        Captions(CaptionsConfig(hub="who/what")).stream("train")
