"""A file of boundaries, and what is none."""

import pytest

from gearshift.runtime.boundaries import load_boundaries, save_boundaries
from gearshift.runtime.errors import UsageError


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "here.yaml"
    save_boundaries(file, [2.51027, 7.405123456789012], ["how it was made", "and why"], {"t": [0.1, 0.2], "alpha": 0.9})
    assert load_boundaries(file) == (2.51027, 7.405123456789012)
    text = file.read_text()
    assert text.startswith("# how it was made\n# and why\nboundaries:\n- 2.51027\n") and "alpha: 0.9" in text


def test_a_file_by_hand(tmp_path):
    file = tmp_path / "mine.yml"
    file.write_text("boundaries: [1, 2.5, 7.6577]")
    assert load_boundaries(str(file)) == (1.0, 2.5, 7.6577)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sigma: [1, 2]", r"has no list 'boundaries' \(its keys are sigma\)"),
        ("- 1\n- 2", "it holds no mapping"),
        ("", "it holds no mapping"),
        ("boundaries: []", "has no list 'boundaries'"),
        ("boundaries: 2.5", "has no list 'boundaries'"),
        ("boundaries: [2, 1]", r"boundaries=\[2, 1\], and 2 stands before 1"),
        ("boundaries: [1, 1]", "1 stands before 1"),
        ("boundaries: [0, 1]", "0 is no noise-to-signal ratio"),
        ("boundaries: [1, .inf]", "inf is no noise-to-signal ratio"),
        ("boundaries: [1, two]", "'two' is no noise-to-signal ratio"),
        ("boundaries: [true, 2]", "True is no noise-to-signal ratio"),
        ("boundaries: [1, 2", "is not YAML"),
    ],
)
def test_what_is_none(tmp_path, text, said):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        load_boundaries(file)


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read \(No such file"):
        load_boundaries(tmp_path / "none.yaml")
