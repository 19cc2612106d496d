"""The report: its files, what stands in them, and that nothing is taken for measured that was not."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from gearshift.evaluation.document import Pairs, Text, escape_markdown, plain, strict, to_html, to_markdown
from gearshift.evaluation.report import Pictures, baseline_lines, how_to_read, legend, write_report
from gearshift.evaluation.table import format_table
from gearshift.runtime.errors import RunError


def row(name, policy, macs, speed, fd, psnr=None):
    return {
        "name": name, "policy": policy, "solver": "ddim", "steps": 20, "calls": 20, "macs_per_image": macs,
        "flops_per_image": 2 * macs, "full_equivalents": 20 * macs / 4e8,
        "macs_saved": 1 - macs / 4e8, "images_per_s": speed, "speedup": speed / 100, "time_saved": 1 - 100 / speed,
        "psnr_to_full": psnr, "ssim_to_full": 1.0 if psnr is None else 0.8, "identical_to_full": float(psnr is None),
        "label_agreement": 0.97, "fd_classifier_digits": fd, "fd_random_conv_64[s0-s2]": None,
        "label_agreement_per_class": [0.9, 1.0], "distribution": {"mean_depth": {"p5": 2.0, "p50": 3.0, "p95": 4.0}},
        "sd": {"fd_classifier_digits": 0.01}, "repeats": 3,
        "speed": {"first_pass_s": 1.5, "sweep": [{"batch": 8, "images_per_s": speed, "speedup": speed / 100}],
                  "latency_ms": None, "peak_memory_bytes": None},
    }  # fmt: skip


ROWS = [
    row("full", "Full", 4e8, 100.0, 1.25),
    row("exit <0.1> & co", "uncertainty < 0.1", 2.6e8, 150.0, 1.5, 27.3),
    row("full, 9 steps", "Full", 1.8e8, 170.0, 1.75, 25.0),
]
NAMES = [item["name"] for item in ROWS]


def results(**more):
    return {
        "format": 2, "run": "runs/digits/abc", "name": "demo", "rows": ROWS,
        "protocol": {"fd_classifier_digits": "fd[a|n=500]", "noise": "keyed <seed 0>"},
        "conditions": {"device": "cpu", "tf32": None}, "command": "gearshift evaluate run=x '+a=<b>'",
        "versions": {"torch": "2.11"}, "timing_warnings": ["others were busy"],
        "unavailable": [{"name": "fid", "reason": "weights are not there", "fetch": "curl -L x"},
                        {"name": "kid", "reason": "too few images"}], **more,
    }  # fmt: skip


def pictures(**more):
    generator = np.random.default_rng(0)
    depths = generator.integers(0, 10, (20, 30))
    macs = {name: generator.uniform(1e8, 2e8, 20) for name in NAMES}
    psnr = {name: np.full(20, np.nan) if name == "full" else generator.uniform(20, 30, 20) for name in NAMES}
    made = {
        "samples": {name: generator.integers(0, 256, (14, 1, 8, 8), dtype=np.uint8) for name in NAMES},
        "depths": {"exit <0.1> & co": depths},
        "per_image": {
            n: {"macs_per_image": macs[n], "psnr_to_full": psnr[n], "mean_depth": macs[n] / 1e8} for n in NAMES
        },
        "full_of": dict.fromkeys(NAMES, "full"),
    }
    return Pictures(**{**made, **more})


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
    path = write_report(tmp_path / "deep" / "report", results(), pictures())
    assert path == tmp_path / "deep" / "report" / "report.html"
    assert {item.name for item in path.parent.iterdir()} == {
        "report.html", "report.md", "metrics.json", "table.tex", "table.md", "comparison.png", "differences.png",
        "quality_cost.png", "fidelity_cost.png", "exits.png", "distributions.png",
        "samples_00_full.png", "samples_01_exit-0-1-co.png", "samples_02_full-9-steps.png",
    }  # fmt: skip
    assert json.loads((path.parent / "metrics.json").read_text()) == results()
    assert (path.parent / "table.md").read_text() == format_table(ROWS, "markdown") + "\n"
    tex = (path.parent / "table.tex").read_text()
    assert tex.endswith(format_table(ROWS, "latex") + "\n")
    comments = tex.split("\\begin")[0].splitlines()
    assert all(line.startswith("%") for line in comments) and "% fd_classifier_digits: fd[a|n=500]" in comments


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path):
    """A later look at the folder, or a logger, would take them for this evaluation's."""
    write_report(tmp_path, results(), pictures())
    (tmp_path / "mine.png").write_bytes(b"")
    rows = [dict(row, name=f"other {row['name']}") for row in ROWS[:2]]
    names = [row["name"] for row in rows]
    fewer = Pictures(samples={new: pictures().samples[row["name"]] for new, row in zip(names, ROWS, strict=False)})
    write_report(tmp_path, results(rows=rows), fewer)
    assert {item.name for item in tmp_path.glob("*.png")} == {
        "mine.png", "quality_cost.png", "comparison.png", "samples_00_other-full.png",
        "samples_01_other-exit-0-1-co.png",
    }  # fmt: skip


def test_html_stands_alone_and_escapes(tmp_path):
    text = write_report(tmp_path, results(warnings=["few samples"]), pictures()).read_text()
    page = Page()
    page.feed(text)
    assert len(page.images) == 9 and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    assert "prefers-color-scheme:dark" in text
    assert "exit <0.1> & co" in page.text and "<0.1>" not in text
    for expected in ("few samples", "others were busy", "keyed <seed 0>", "weights are not there", "curl -L x",
                     "too few images", "fd[a|n=500]", "gearshift evaluate run=x '+a=<b>'", "2.11",
                     "How to read this"):  # fmt: skip
        assert any(expected in part for part in page.text), expected


def test_markdown_refers_to_files_that_are_there(tmp_path):
    write_report(tmp_path, results(), pictures())
    text = (tmp_path / "report.md").read_text()
    links = re.findall(r"!\[[^\n]*\]\(([^)]+)\)", text)
    assert len(links) == 9 and all((tmp_path / link).is_file() for link in links)
    for expected in ("fid: weights are not there", "```sh\ncurl -L x\n```", "- kid: too few images",
                     "- **fd_classifier_digits**: fd[a|n=500]", "gearshift evaluate run=x '+a=<b>'"):  # fmt: skip
        assert expected in text, expected
    outside = re.sub(r"```sh\n.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside), "an unescaped < may open a tag"


def test_both_forms_say_the_same(tmp_path):
    write_report(tmp_path, results(warnings=["few samples"]), pictures())
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    html_words = re.findall(r"\w+", " ".join(page.text).split("}", 1)[-1])
    text = (tmp_path / "report.md").read_text()
    for line in text.splitlines():
        if line.startswith("- ") or line.startswith("> "):
            words = re.findall(r"\w+", line)
            assert set(words) <= set(html_words), line


def test_what_was_not_measured_says_so(tmp_path):
    bare = {"run": "r", "rows": [{"name": "a", "policy": "full", "solver": "ddim", "calls": 3}, {"name": "b"}]}
    write_report(tmp_path, bare, Pictures())
    names = {item.name for item in tmp_path.iterdir()}
    assert names == {"report.html", "report.md", "metrics.json", "table.tex", "table.md"}
    text = (tmp_path / "report.md").read_text()
    assert text.count("not measured.") == 4 and "Times were not measured." in text
    assert "| b | not measured | not measured |" in text
    assert "PSNR" not in text and "Fréchet" not in text, "nothing is explained that is not there"
    write_report(tmp_path, results(), Pictures())
    text = (tmp_path / "report.md").read_text()
    assert "Scaling over devices and nodes: not measured." in text
    line = next(line for line in text.splitlines() if "full, 9 steps" in line and "1.50" in line)
    assert line.count("not measured") == 6, "no latency, no memory"


def test_speed_and_scaling_are_in_the_report(tmp_path):
    scaling = {"devices": 2, "nodes": 1, "images_per_s": 180.0, "efficiency": 0.9}
    write_report(tmp_path, results(scaling=scaling), Pictures())
    text = (tmp_path / "report.md").read_text()
    assert "150 (1.50×)" in text and "90.0 %" in text and "class 1" in text and "2.00 · 3.00 · 4.00" in text


def test_rows_that_cannot_be_drawn_are_named(tmp_path):
    text = write_report(tmp_path, results(), Pictures()).read_text()
    assert "are equal to full compute (no finite PSNR) or were not measured: full." in text


def test_json_is_strict_whatever_the_numbers_are(tmp_path):
    odd = {"a": float("nan"), "b": [np.float32(1.5), float("inf")], "c": np.int64(3)}
    rows = [{**ROWS[0], "fd_classifier_digits": float("nan"), "psnr_to_full": float("inf")}, *ROWS[1:]]
    write_report(tmp_path, results(odd=odd, rows=rows), Pictures())

    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert stored["odd"] == {"a": None, "b": [1.5, None], "c": 3}
    assert stored["rows"][0]["fd_classifier_digits"] is None and stored["rows"][0]["psnr_to_full"] is None


def test_names_must_fit(tmp_path):
    for where in ("samples", "depths", "per_image"):
        with pytest.raises(ValueError, match="nobody"):
            write_report(tmp_path, results(), Pictures(**{where: {"nobody": np.zeros((1, 1, 8, 8), np.uint8)}}))
    with pytest.raises(ValueError, match="nobody"):
        write_report(tmp_path, results(), Pictures(full_of={"full": "nobody"}))
    with pytest.raises(ValueError, match="unique"):
        write_report(tmp_path, {"run": "r", "rows": [ROWS[0], ROWS[0]]}, Pictures())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="another folder"):
        write_report(tmp_path / "file" / "x", results(), Pictures())


def test_the_explanation_fits_the_rows():
    assert any("cannot be held against published" in line for line in how_to_read(ROWS))
    assert not any("published" in line for line in how_to_read([{"name": "a", "label_agreement": 1.0}]))
    assert not any("time" in line for line in how_to_read([{"name": "a"}]))
    assert "over 3 repeats" in legend(ROWS) and "±" not in legend([{"name": "a"}])
    assert "FLOPs = 2 MACs" in legend(ROWS)


def test_values_on_one_line():
    assert plain({"a": [1, 2.5], "b": None}) == "a 1, 2.5, b not known"
    assert strict({1: (np.float64("nan"), True)}) == {"1": [None, True]}
    assert escape_markdown("u<0.1") == "u\\<0.1"
    blocks = [Text("a <b>"), Pairs({"<k>": "<v>"})]
    assert "<" not in to_markdown("a <t>", blocks).replace("\\<", "") and "<b>" not in to_html("t", "l", blocks)


def test_baselines_say_what_they_are_and_what_they_are_set_against(tmp_path):
    told = {
        "full, 9 steps": {"baseline": "fewer_steps"},
        "full, 9 steps, log_snr": {"baseline": "other_grid", "grid": "log_snr"},
        "HURRY, last 19 (map)": {"baseline": "hurry", "note": "saves less, though 19 of 20 calls reuse"},
        "deep features 1:3, branch 0": {"baseline": "deep_features"},
        "of an older file": {},
    }
    added = [{**ROWS[2], "name": name, "equal_macs_to": "exit", **more} for name, more in told.items()]
    assert baseline_lines(ROWS) == []
    lines = baseline_lines([*ROWS, *added])
    assert lines[0] == "full, 9 steps: full compute with fewer steps, against exit"
    assert "on another grid, against exit" in lines[1]
    assert lines[2].endswith("at the last calls, against exit (saves less, though 19 of 20 calls reuse)")
    assert lines[4] == "of an older file: full compute with fewer steps, against exit"
    write_report(tmp_path, results(rows=[*ROWS[:2], *added]), Pictures())
    text = (tmp_path / "report.md").read_text()
    assert "Added as baselines" in text and "Baselines are what the MACs of the best rows buy" in text
    write_report(tmp_path, results(), Pictures())
    text = (tmp_path / "report.md").read_text()
    assert "Added as baselines" not in text and "Baselines are" not in text


def test_reuse_is_in_the_figure_and_said_below_it(tmp_path):
    depths = {"exit <0.1> & co": np.full((4, 6), 5)}
    for reused, said in ((np.zeros((4, 6), int), False), (np.full((4, 6), 2), True)):
        write_report(tmp_path, results(), pictures(depths=depths, reused={"exit <0.1> & co": reused}))
        assert ("Hatched from below" in (tmp_path / "report.md").read_text()) == said
    kept = [{**row, "kept_bytes_per_image": 9216} for row in ROWS]
    assert any("Kept per image" in line for line in how_to_read(kept))
    assert not any("Kept per image" in line for line in how_to_read([{**ROWS[0], "kept_bytes_per_image": 0}]))
    for where in ("reused", "called"):
        with pytest.raises(ValueError, match="nobody"):
            write_report(tmp_path, results(), Pictures(**{where: {"nobody": depths["exit <0.1> & co"]}}))
