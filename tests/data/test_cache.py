import json

import numpy as np
import pytest

from gearshift.data.cache import Encoded, cache_root, decode_once
from gearshift.runtime.errors import RunError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Source:
    """Six images whose pixels are their number; counts how often it is decoded."""

    def __init__(self, labelled=True, count=6):
        self.labelled, self.count, self.decoded = labelled, count, 0

    def __call__(self):
        self.decoded += 1
        return Encoded(6, (1, 2, 2), self.labelled, self.items)

    def items(self):
        for number in range(self.count):
            yield np.full((1, 2, 2), number, dtype=np.uint8), number % 3


def entry(cache):
    (folder,) = (cache / "data").iterdir()
    return folder


def test_decodes_once_and_reads_back_the_same():
    source = Source()
    first, second = decode_once({"a": 1}, source), decode_once({"a": 1}, source)
    assert source.decoded == 1
    assert first.images[:, 0, 0, 0].tolist() == second.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert second.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert first.digest == second.digest


def test_another_key_is_another_entry():
    source = Source()
    decode_once({"a": 1}, source)
    decode_once({"a": 2}, source)
    assert source.decoded == 2


def test_without_labels():
    assert decode_once({}, Source(labelled=False)).labels is None


def test_writing_to_the_array_does_not_reach_the_file(cache):
    decode_once({}, Source()).images[0] = 99
    assert decode_once({}, Source()).images[0, 0, 0, 0] == 0


@pytest.mark.parametrize("file_name", ["images.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_a_broken_entry_is_decoded_again(cache, file_name, damage):
    source = Source()
    good = decode_once({}, source).digest
    path = entry(cache) / file_name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        path.unlink()
    elif file_name == "meta.json":
        path.write_text(json.dumps({**json.loads(content), "digest": "0" * 64}))
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    again = decode_once({}, source)
    assert source.decoded == 2
    assert again.digest == good
    assert decode_once({}, source).digest == good and source.decoded == 2


def test_a_source_that_ends_early_leaves_nothing_behind(cache):
    with pytest.raises(RunError, match="expected 6 images, read 4"):
        decode_once({}, Source(count=4))
    assert list((cache / "data").iterdir()) == []


def test_an_unwritable_cache_says_which_variable_helps(cache):
    cache.mkdir()
    (cache / "data").write_text("in the way")
    with pytest.raises(RunError, match="GEARSHIFT_CACHE"):
        decode_once({}, Source())


def test_the_root_follows_the_environment(cache, monkeypatch, tmp_path):
    assert cache_root() == cache
    monkeypatch.delenv("GEARSHIFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "gearshift"
