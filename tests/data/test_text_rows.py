"""Features of captions beside latents: which one a sample draws, and what is stored."""

import hashlib
import json

import numpy as np
import pytest
import torch

from gearshift.data.latent_files import FORMAT, MANIFEST, Manifest, read_manifest, write_manifest, write_shard
from gearshift.data.latents import LatentDataset, Latents, LatentsConfig
from gearshift.data.text_files import open_text, read_captions, read_null, text_arrays, write_null
from gearshift.data.text_rows import TextRows
from gearshift.runtime import keys
from gearshift.runtime.errors import RunError
from gearshift.sampling.prompts import Prompts
from gearshift.training.feed import Feed, Order

CPU = torch.device("cpu")
COUNTS = [2, 1, 5, 3, 1, 4, 2]
STARTS = [0, 2, 3, 8, 11, 12, 16, 18]


def rows(cuts=(18,)):
    """Seven images with 18 captions; feature [r, 0, 0] of row r is r."""
    values = torch.arange(18.0)[:, None, None].expand(18, 2, 3).half().contiguous()
    return TextRows(tuple(values.split(list(cuts))), torch.tensor(STARTS))


def dataset(text, count=7):
    moments = torch.zeros(count, 1, 4, 3, 3)
    return LatentDataset((moments,), None, None, (), "toy", "train", "d", "made", 1.0, "mean", text)


def caption_of(cond):
    return cond[:, 0, 0].long().tolist()


def test_a_draw_picks_every_caption_of_the_image_and_no_other():
    text = rows()
    for image, count in enumerate(COUNTS):
        draw = torch.tensor([0.0, 1 / count - 1e-6, 0.5, 1 - 2**-24])
        found = caption_of(text.take(torch.full((4,), image), draw))
        assert found[0] == found[1] == STARTS[image] and found[3] == STARTS[image + 1] - 1
        assert found[2] == STARTS[image] + count // 2
    assert caption_of(text.take(torch.tensor([6, 0, 3]))) == [16, 0, 8]
    assert text.shape == (2, 3) and len(text) == 7 and text.nbytes == 18 * 6 * 2
    assert text.take(torch.tensor([1])).dtype == torch.float16


@pytest.mark.parametrize("cuts", [(18,), (3, 15), (2, 1, 5, 10), (7, 4, 7)])
def test_where_the_rows_are_cut_does_not_matter(cuts):
    index = torch.tensor([5, 2, 0, 6, 2, 3])
    draw = keys.uniform(0, "caption", torch.arange(6), 0)
    assert torch.equal(rows(cuts).take(index, draw), rows().take(index, draw))


def feed(data, start=0, stop=6, **more):
    return Feed(data, seed=3, size=6, start=start, stop=stop, device=CPU, captioned=True, **more)


def test_the_draw_is_keyed_by_micro_batch_and_slot_for_any_number_of_processes():
    data = dataset(rows((3, 15)))
    whole = feed(data)
    order, drawn = Order(3, 7, 6), set()
    for number in (0, 1, 5, 40):
        one = whole.batch(number)
        assert one.cond is not None and one.cond.dtype == torch.float32 and one.cond.shape == (6, 2, 3)
        parts = [feed(data, *span).batch(number).cond for span in ((0, 2), (2, 6))]
        assert torch.equal(torch.cat(parts), one.cond)
        assert torch.equal(feed(data).batch(number).cond, one.cond), "nothing is remembered between micro-batches"
        index = order.indices(number, 0, 6)
        uniform = keys.uniform(3, "caption", torch.arange(6), number)
        counts = torch.tensor(COUNTS)[index]
        expected = torch.tensor(STARTS)[index] + (uniform.double() * counts).long()
        assert caption_of(one.cond) == expected.tolist()
    for number in range(200):
        drawn.update(caption_of(whole.batch(number).cond))
    assert drawn == set(range(18)), "every caption is drawn in time"


def test_text_that_is_not_resident_is_gathered_ahead_alike():
    data = dataset(rows((3, 15)))
    ahead = feed(data, resident=False)
    for number in (0, 1, 2):
        assert torch.equal(ahead.batch(number).cond, feed(data).batch(number).cond)
    ahead.close()
    assert Feed(data, seed=3, size=6, start=0, stop=6, device=CPU).batch(0).cond is None
    assert data.nbytes == 7 * 4 * 9 * 4 + 18 * 6 * 2 and data.take(torch.tensor([1])).text is None


def test_an_image_gets_the_prompt_of_its_index():
    prompts = Prompts([f"t{k}" for k in range(7)], "0123456789abcdef", "somewhere", rows((3, 15)))
    assert caption_of(prompts.cond(torch.tensor([0, 6, 7, 13, 700]))) == [0, 16, 0, 16, 0]
    assert [prompts.text(k) for k in (0, 6, 7)] == ["t0", "t6", "t0"]
    assert repr(prompts) == "Prompts(7, 0123456789abcdef)" and "number i mod 7 of somewhere" in prompts.describe()
    features = torch.randn(2, 2, 3)
    one, two = (Prompts.of(texts, [features], "x", "f") for texts in (["a", "b"], ["a", "c"]))
    assert one.digest != two.digest != Prompts.of(["a", "c"], [features], "x", "g").digest


# Files ---------------------------------------------------------------------------------------------------------------


def save(folder, **changes):
    folder.mkdir(exist_ok=True)
    texts = [[f"image {k} caption {j}" for j in range(count)] for k, count in enumerate(COUNTS)]
    values = rows().pieces[0].numpy()
    shards = []
    for number, (first, last) in enumerate([(0, 3), (3, 6), (6, 7)]):
        arrays = {"moments": np.zeros((last - first, 1, 4, 3, 3), np.float16), "indices": np.arange(first, last)}
        arrays |= text_arrays(values[STARTS[first] : STARTS[last]], texts[first:last])
        shards.append(write_shard(folder, number, arrays))
    null = write_null(folder, np.full((2, 3), 0.5, np.float16))
    fields = dict(
        **dict(count=7, shard=3, orientations=1, dtype="fp16", channels=2, latent_size=3, image_size=6, scale=1.0),
        **dict(num_classes=None, class_names=(), shards=tuple(shards), source={}),
        data={"name": "toy", "split": "train", "provenance": "made up", "digest": "d"},
        autoencoder={"name": "somewhere", "encoder": "e", "decoder": "d"},
        text={"encoder": "clip", "fingerprint": "f", "length": 2, "width": 3, "captions": 18, "null": null},
    )
    made = Manifest(**{**fields, **changes})
    write_manifest(folder, made)
    return made, texts


def test_what_is_stored_is_found_again(tmp_path):
    made, texts = save(tmp_path)
    found = read_manifest(tmp_path, "x")
    assert found == made and read_captions(tmp_path, found) == [tuple(of_image) for of_image in texts]
    text = open_text(tmp_path, found)
    assert torch.equal(text.starts, torch.tensor(STARTS)) and [len(piece) for piece in text.pieces] == [8, 8, 2]
    assert torch.equal(torch.cat(text.pieces), rows().pieces[0])
    assert torch.equal(read_null(tmp_path, found), torch.full((2, 3), 0.5))
    data = Latents(LatentsConfig(path=str(tmp_path), flip=False))
    assert data.text_shape == (2, 3) and len(data.load("train").text) == 7


def test_sets_without_captions_are_what_they_were(tmp_path):
    """Their manifest and digest know nothing of captions."""
    made, _ = save(tmp_path, text=None)
    stored = json.loads((tmp_path / MANIFEST).read_text())
    assert "text" not in stored
    content = [[shard.count, sorted(digest for _, digest in shard.files.values())] for shard in made.shards]
    seen = [FORMAT, "fp16", 1, 2, 3, 1.0, None]
    assert stored["digest"] == hashlib.sha256(json.dumps([seen, content]).encode()).hexdigest()
    data = Latents(LatentsConfig(path=str(tmp_path), flip=False))
    assert data.text_shape is None and data.load("train").text is None


def test_the_digest_is_of_the_empty_string_too(tmp_path):
    made, _ = save(tmp_path)
    other = {**made.text, "null": "another"}
    assert save(tmp_path, text=other)[0].digest != made.digest
    assert save(tmp_path, text={**made.text, "encoder": "moved"})[0].digest == made.digest


def test_files_of_another_shape_are_refused(tmp_path):
    made, _ = save(tmp_path)
    wider = {**made.text, "width": 4}
    with pytest.raises(
        RunError, match=r"holds float16 \(8, 2, 3\) for 3 images and the manifest says fp16 \(8, 2, 4\)"
    ):
        open_text(tmp_path, save(tmp_path, text=wider)[0])
    (tmp_path / "null_text.npy").unlink()
    with pytest.raises(RunError, match=r"null_text\.npy is not readable"):
        read_null(tmp_path, made)
    (tmp_path / "shards" / "00001.starts.npy").unlink()
    with pytest.raises(RunError, match=r"00001\.text\.npy and \.starts\.npy are not readable"):
        open_text(tmp_path, made)
    with pytest.raises(RunError, match=r"00001\.starts\.npy is not there"):
        Latents(LatentsConfig(path=str(tmp_path), flip=False)).load("train")
