"""Arrays of chunks on disk: what was saved comes back, in order, once, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gearshift.evaluation.shards import Column, Shards
from gearshift.runtime.errors import RunError


def fill(shards: Shards, chunk: int, numbers: range) -> None:
    for number in numbers:
        index = np.arange(number * chunk, (number + 1) * chunk)
        shards.save(number, {"index": index, "ledger/depth": np.stack([index, -index])[:, None]})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    shards = Shards(tmp_path, "abc")
    arrays = {
        "features/x/features": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
        "images": np.arange(5 * 4, dtype=np.uint8).reshape(5, 1, 2, 2),
        "ledger/called": np.ones((2, 1, 5), dtype=bool),
        "squared_error": np.zeros(5),
    }
    shards.save(3, arrays)
    assert set(shards.names(3)) == set(arrays)
    for name, value in shards.load(3, list(arrays)).items():
        assert value.dtype == arrays[name].dtype and np.array_equal(value, arrays[name])
    assert shards.has(3, arrays) and not shards.has(3, ["lpips"]) and not shards.has(4)
    shards.remove()
    assert not shards.has(3)
    shards.remove()


@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 64])
@pytest.mark.parametrize("bounds", [(0, 10), (3, 10), (5, 17), (8, 9), (0, 24)])
def test_every_index_is_there_once_whatever_the_chunks_are(tmp_path: Path, chunk: int, bounds: tuple[int, int]) -> None:
    """The last chunk reaches beyond the range; what it was padded with must not be counted."""
    shards = Shards(tmp_path, "abc")
    fill(shards, chunk, range(-(-24 // chunk)))
    column = Column(shards, chunk, *bounds)
    wanted = np.arange(*bounds)
    assert np.array_equal(column.read("index"), wanted)
    assert np.array_equal(column.read("ledger/depth", axis=2), np.stack([wanted, -wanted])[:, None])


def test_repeats_next_to_each_other_share_no_image(tmp_path: Path) -> None:
    shards = Shards(tmp_path, "abc")
    fill(shards, 4, range(6))
    parts = [Column(shards, 4, first, first + 7).read("index") for first in (0, 7, 14)]
    assert np.array_equal(np.concatenate(parts), np.arange(21))


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    shards = Shards(tmp_path, "abc")
    with pytest.raises(RunError, match="not a whole shard"):
        shards.load(0, ["index"])
    fill(shards, 4, range(2))
    with pytest.raises(RunError, match="not a whole shard"):
        shards.load(0, ["lpips"])
    whole = shards.path(0).read_bytes()
    shards.path(0).write_bytes(whole[: len(whole) // 2])
    assert not shards.has(0) and shards.has(1)
    with pytest.raises(RunError, match="remove it and run the same command again"):
        shards.load(0, ["index"])
    # A flipped bit is inside a file that looks whole; the check sum of the archive sees it.
    at = whole.index(np.int64(2).tobytes() + np.int64(3).tobytes())
    shards.path(0).write_bytes(whole[:at] + b"\x07" + whole[at + 1 :])
    assert shards.has(0)
    with pytest.raises(RunError, match="not a whole shard"):
        shards.load(0, ["index"])


def test_another_fingerprint_is_another_folder(tmp_path: Path) -> None:
    fill(Shards(tmp_path, "abc"), 4, range(1))
    assert not Shards(tmp_path, "abd").has(0)
