import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gearshift.evaluation import plots
from gearshift.evaluation.report import write_report
from gearshift.evaluation.table import best_rows, columns_of, format_count, format_number, format_table
from gearshift.runtime.errors import RunError


def row(name, policy, macs, speed, fd, psnr=None):
    return {
        "name": name, "policy": policy, "solver": "ddim", "calls": 20, "macs_per_image": macs,
        "macs_saved": 1 - macs / 4e8, "images_per_s": speed, "speedup": speed / 100, "time_saved": 1 - 100 / speed,
        "psnr_to_full": psnr, "ssim_to_full": 1.0 if psnr is None else 0.8, "label_agreement": 0.97,
        "fd_classifier_digits": fd, "fd_random_conv_64[s0-s2]": None,
    }  # fmt: skip


ROWS = [row("full", "full", 4e8, 100.0, 1.25), row("exit <0.1> & co", "uncertainty_exit(0.1)", 2.6e8, 150.0, 1.5, 27.3)]


def results(**more):
    return {
        "run": "runs/digits/abc", "protocol": {"n": 500, "noise": "keyed <seed 0>"}, "conditions": {"device": "cpu"},
        "rows": ROWS, "unavailable": [{"name": "fid", "reason": "weights are not there", "fetch": "curl -L x"}], **more,
    }  # fmt: skip


def samples():
    generator = np.random.default_rng(0)
    return {item["name"]: generator.integers(0, 256, (14, 1, 8, 8), dtype=np.uint8) for item in ROWS}


def depths():
    return {"exit <0.1> & co": np.random.default_rng(0).integers(0, 10, (20, 30))}


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.images, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href", "action", "srcset", "data")]
        self.images += [dict(attrs)["src"] for _ in [0] if tag == "img"]

    def handle_data(self, data):
        self.text.append(data)


def test_files_of_a_report(tmp_path):
    path = write_report(tmp_path / "deep" / "report", results(), samples(), depths())
    assert path == tmp_path / "deep" / "report" / "report.html"
    names = {item.name for item in path.parent.iterdir()}
    assert names == {
        "report.html", "report.md", "metrics.json", "comparison.png", "quality_cost.png", "exits.png",
        "samples_00_full.png", "samples_01_exit-0-1-co.png",
    }  # fmt: skip
    assert json.loads((path.parent / "metrics.json").read_text()) == results()


def test_html_stands_alone_and_escapes(tmp_path):
    text = write_report(tmp_path, results(warnings=["few samples"]), samples(), depths()).read_text()
    page = Page()
    page.feed(text)
    assert len(page.images) == 5 and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    assert "exit <0.1> & co" in page.text and "<0.1>" not in text
    for expected in ("few samples", "keyed <seed 0>", "weights are not there", "curl -L x", "How to read this"):
        assert any(expected in part for part in page.text), expected


def test_markdown_refers_to_files_that_are_there(tmp_path):
    write_report(tmp_path, results(), samples(), depths())
    text = (tmp_path / "report.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) == 5 and all((tmp_path / link).is_file() for link in links)
    assert "weights are not there" in text and "- **n**: 500" in text


def test_without_pictures_there_is_still_a_report(tmp_path):
    bare = {"run": "r", "rows": [{"name": "a", "policy": "full", "solver": "ddim", "calls": 3}]}
    write_report(tmp_path, bare, {}, {})
    assert {item.name for item in tmp_path.iterdir()} == {"report.html", "report.md", "metrics.json"}


def test_json_is_strict_whatever_the_numbers_are(tmp_path):
    odd = {"a": float("nan"), "b": [np.float32(1.5), float("inf")], "c": np.int64(3)}
    write_report(tmp_path, results(odd=odd), {}, {})

    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert stored["odd"] == {"a": None, "b": [1.5, None], "c": 3}


def test_names_must_fit(tmp_path):
    with pytest.raises(ValueError, match="nobody"):
        write_report(tmp_path, results(), {"nobody": np.zeros((1, 1, 8, 8), np.uint8)}, {})
    with pytest.raises(ValueError, match="unique"):
        write_report(tmp_path, {"run": "r", "rows": [ROWS[0], ROWS[0]]}, {}, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="another folder"):
        write_report(tmp_path / "file" / "x", results(), {}, {})


def test_sample_grid_shows_every_pixel():
    images = samples()["full"]
    picture = np.asarray(Image.open(io.BytesIO(plots.sample_grid(images, columns=5))))
    assert picture.shape == (3 * 67 + 3, 5 * 67 + 3, 3)
    for k, image in enumerate(images):
        top, left = 3 + (k // 5) * 67, 3 + (k % 5) * 67
        tile = picture[top : top + 64, left : left + 64]
        assert np.array_equal(tile[4::8, 4::8, 0], image[0]) and np.array_equal(tile[..., 0], tile[..., 2])


def test_figures_are_pictures_and_do_not_touch_pyplot():
    import sys

    loaded = "matplotlib.pyplot" in sys.modules
    for content in (
        plots.comparison_grid(samples(), ROWS),
        plots.quality_against_cost(ROWS, "fd_classifier_digits"),
        plots.quality_against_cost([{**ROWS[0], "images_per_s": None}], "label_agreement"),
        plots.exits_over_time({f"run {k}": np.full((1 + k, 4), k) for k in range(5)}),
    ):
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        assert min(picture.shape) > 200 and picture.std() > 5
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_the_drawn_measure_prefers_the_comparable_one():
    assert plots.quality_key(ROWS) == "fd_classifier_digits"
    assert plots.quality_key([{"name": "a", "fd_random": 1.0, "fid": 2.0}]) == "fid"
    assert plots.quality_key([{"name": "a", "label_agreement": 1.0, "psnr_to_full": 2.0}]) == "label_agreement"
    assert plots.quality_key([{"name": "a", "fid": None}]) is None


def test_columns_and_best_values():
    columns = {column.key: column for column in columns_of(ROWS)}
    assert "fd_random_conv_64[s0-s2]" not in columns and "lpips_alex_to_full" not in columns
    assert best_rows(ROWS, columns["fd_classifier_digits"]) == {0}
    assert best_rows(ROWS, columns["images_per_s"]) == {1}
    # All alike, one value only, or neither direction better: nothing to mark.
    for key in ("label_agreement", "psnr_to_full", "calls", "name"):
        assert best_rows(ROWS, columns[key]) == set()


def test_terminal_table_is_aligned():
    lines = format_table(ROWS).splitlines()
    assert lines[-1] == "* best value of its column"
    rule = next(line for line in lines if line.startswith("─"))
    starts = [match.start() for match in re.finditer("─+", rule)]
    for line in lines[lines.index(rule) + 1 : -1]:
        padded = line.ljust(len(rule))
        assert all(padded[start - 2 : start] == "  " for start in starts[1:])
    assert "1.25*" in lines[-3] and "400 M" in lines[-3] and "–" in lines[-3]


def test_markdown_table():
    lines = format_table(ROWS, "markdown").splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "**1.25**" in lines[2] and "35.0 %" in lines[3]
    assert "a\\|b" in format_table([{"name": "a|b"}], "markdown")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (44255328, "44.3 M"), (1.22e10, "12.2 G"), (1500, "1.50 k"), (3e12, "3.00 T")],
)
def test_counts(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (27.345, "27.3"), (-0.0123, "-0.0123"), (1234.5, "1234"), (3e-7, "3.0e-07")]
)
def test_numbers(value, text):
    assert format_number(value) == text
