"""Samples as files: what is written comes back, and nothing half-written has a name."""

import errno
import os
import zipfile

import numpy as np
import pytest
import torch

from gearshift.evaluation.sample_files import AdmWriter, PngFolder
from gearshift.runtime.errors import RunError
from gearshift.runtime.files import remove_partial


def drawn(count, channels, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size + 1), generator=generator, dtype=torch.uint8)


def test_it_refuses_what_it_was_not_told(tmp_path):
    with pytest.raises(ValueError, match=r"one image is \(C, H, W\)"):
        AdmWriter(tmp_path / "a.npz", 4, (8, 8))
    for wrong, message in (
        (drawn(5, 1, 4), "5 images of shape"),
        (drawn(2, 3, 4), r"of shape \(3, 4, 5\)"),
        (drawn(2, 1, 4).float(), "must be uint8"),
    ):
        with pytest.raises(ValueError, match=message), AdmWriter(tmp_path / "a.npz", 4, (1, 4, 5)) as writer:
            writer.write(wrong)
    with pytest.raises(ValueError, match="arr_1 has 3 entries for 4"), AdmWriter(tmp_path / "a.npz", 4, (1, 4, 5)) as w:
        w.labels([1, 2, 3])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cuts", [[7], [1, 1, 5], [3, 4], [0, 7]])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_holds_the_images_however_they_were_cut(tmp_path, cuts, channels):
    images = drawn(7, channels, 5)
    file = tmp_path / "samples.npz"
    with AdmWriter(file, 7, (channels, 5, 6)) as writer:
        for piece in images.split(cuts):
            assert not file.exists()
            writer.write(piece)
        writer.labels(torch.arange(7) % 3)
        writer.array("index", np.arange(10, 17))
    with np.load(file, allow_pickle=False) as data:
        assert set(data) == {"arr_0", "arr_1", "index"}
        assert data["arr_0"].dtype == np.uint8
        assert data["arr_0"].shape == (7, 5, 6, channels)
        np.testing.assert_array_equal(data["arr_0"], images.permute(0, 2, 3, 1).numpy())
        assert data["arr_1"].dtype == np.int64
        assert data["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert data["index"].tolist() == list(range(10, 17))
    assert zipfile.ZipFile(file).testzip() is None
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_numpy_arrays_are_taken_as_well(tmp_path):
    images = drawn(2, 3, 4)
    for name, given in (("tensor", images), ("array", images.numpy())):
        with AdmWriter(tmp_path / f"{name}.npz", 2, (3, 4, 5)) as writer:
            writer.write(given)
    assert (tmp_path / "tensor.npz").read_bytes()[-500:] == (tmp_path / "array.npz").read_bytes()[-500:]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    import tracemalloc

    piece = drawn(16, 3, 32)
    tracemalloc.start()
    with AdmWriter(tmp_path / "many.npz", 16 * 200, (3, 32, 33)) as writer:
        for _ in range(200):
            writer.write(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "many.npz").stat().st_size
    assert size > 200 * piece.nbytes
    assert peak < size / 20


@pytest.mark.parametrize("failure", ["error inside", "too few", "disk full"])
def test_a_failure_leaves_the_previous_file(tmp_path, failure, monkeypatch):
    file = tmp_path / "samples.npz"
    file.write_bytes(b"before")
    expected = {"error inside": KeyError, "too few": ValueError, "disk full": RunError}[failure]
    if failure == "disk full":

        def refuse(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", refuse)

    def fill():
        with AdmWriter(file, 4, (1, 4, 5)) as writer:
            writer.write(drawn(3 if failure == "too few" else 4, 1, 4))
            if failure == "error inside":
                raise KeyError

    with pytest.raises(expected):
        fill()
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_a_writer_that_was_killed_leaves_what_the_owner_clears(tmp_path):
    writer = AdmWriter(tmp_path / "samples.npz", 4, (1, 4, 5)).__enter__()
    writer.write(drawn(2, 1, 4))
    assert not (tmp_path / "samples.npz").exists()
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []
    writer.__exit__(KeyError, KeyError(), None)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(RunError, match=r"could not write .*nowhere/a\.npz"),
        AdmWriter(tmp_path / "nowhere" / "a.npz", 1, (1, 2, 2)),
    ):
        pass
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunError, match="could not make the folder"):
        PngFolder(tmp_path / "taken")


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_folder_holds_the_images_by_index(tmp_path, channels, mode):
    from PIL import Image

    images = drawn(5, channels, 6)
    # Two writers, as two processes, in any order.
    PngFolder(tmp_path / "png").write(images[3:], start=12)
    PngFolder(tmp_path / "png").write(images[:3], start=9)
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == [f"{index:06d}.png" for index in range(9, 14)]
    for name, image in zip(names, images, strict=True):
        with Image.open(tmp_path / "png" / name) as picture:
            assert picture.mode == mode
            found = np.asarray(picture)
        np.testing.assert_array_equal(found.reshape(6, 7, channels), image.permute(1, 2, 0).numpy())


def test_a_png_that_fails_leaves_those_before_it(tmp_path, monkeypatch):
    from gearshift.evaluation import sample_files

    real = sample_files.atomic_write

    def full(path, content):
        if path.name == "000002.png":
            raise RunError("full")
        real(path, content)

    monkeypatch.setattr(sample_files, "atomic_write", full)
    folder = PngFolder(tmp_path)
    with pytest.raises(RunError, match="full"):
        folder.write(drawn(4, 1, 4), start=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000001.png"]
    with pytest.raises(ValueError, match="2 channels"):
        folder.write(drawn(1, 2, 4), start=0)
