"""A paper's table as data: what the schema refuses, what is read from an evaluation, how it is set."""

import json
import math

import pytest

from gearshift.evaluation.paper_text import Filled, Missing, as_json, as_latex, as_markdown, missing_lines
from gearshift.evaluation.papers import (
    COSTS,
    Measured,
    PaperRow,
    PaperTable,
    Published,
    differences,
    load_table,
    measured,
    read_results,
    row_of,
)
from gearshift.runtime.errors import RunError, UsageError

GOOD = """
paper: arXiv 0000.00000
table: Table 1
protocol: 50000 images
rows:
  - name: ours
    overrides: []
    published:
      fid: {value: 3.5, status: verified, source: Table 1}
      kid: {value: , status: unknown, source: }
    measured:
"""


def written(folder, text):
    file = folder / "table.yaml"
    file.write_text(text)
    return file


def test_a_table_is_read(tmp_path):
    table = load_table(written(tmp_path, GOOD))
    assert table.figures == ("fid", "kid")
    assert table.rows == [
        PaperRow("ours", [], {"fid": Published(3.5, "verified", "Table 1"), "kid": Published(None, "unknown", None)})
    ]
    assert table.rows[0].row == "full"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("verified", "sure", "status 'sure' is not one of verified, summary, recalled, unknown"),
        ("value: , status", "value: 4, status", "a figure of status unknown has the value 4"),
        ("value: 3.5, ", "", "a figure of status verified has the value None"),
        ("source: Table 1}", "source: }", "called verified and has no source"),
        ("value: 3.5", "value: good", "rows[0].published.fid.value"),
        ("    measured:", "    messured:", "messured"),
        ("paper: arXiv 0000.00000", "", "paper has no value"),
        ("name: ours", "title: ours", "title"),
        ("rows:", "lines:", "lines: unknown key"),
        (GOOD, "- 1", "holds no table"),
        (GOOD, "a: [", "not readable as YAML"),
        (GOOD, GOOD + GOOD[GOOD.index("  - name") :], "two rows are called 'ours'"),
    ],
)
def test_a_table_that_is_wrong_is_named(tmp_path, old, new, said):
    assert old in GOOD
    file = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(UsageError) as error:
        load_table(file)
    assert str(error.value).startswith(str(file))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# What an evaluation says ---------------------------------------------------------------------------------------------

RESULTS = {
    "protocol": {
        "images": "500, indices 0..499",
        "guidance": "w = 2",
        "fid": "inception",
        "precision_recall": "k nearest",
        "fd@random_conv": "random",
        "fd@random_vgg16": "another",
    },
    "rows": [{"name": "full"}],
}
ROW = {
    "name": "full",
    "solver": "DDIM",
    "steps": 20,
    "calls": 40.0,
    "macs_per_image": 8e9,
    "flops_per_image": 16e9,
    "fid": 2.5,
    "precision_vgg16": 0.75,
    "fd_random_conv_64[s0-s2]": 9.0,
    "psnr_to_full": None,
    "kid": math.nan,
    "sd": {"fid": 0.25},
    "repeats": 3,
}


@pytest.mark.parametrize(
    ("figure", "value", "protocol"),
    [
        ("fid", 2.5, "inception"),
        ("precision_vgg16", 0.75, "k nearest"),
        ("fd_random_conv_64[s0-s2]", 9.0, "random"),
        ("gmacs", 8.0, COSTS["gmacs"].what),
        ("gflops", 16.0, COSTS["gflops"].what),
        ("gmacs_per_call", 0.2, COSTS["gmacs_per_call"].what),
        ("gflops_per_call", 0.4, COSTS["gflops_per_call"].what),
    ],
)
def test_a_figure_is_read_with_its_protocol(figure, value, protocol):
    found = measured(figure, RESULTS, ROW, "there")
    assert found.value == pytest.approx(value)
    assert (found.count, found.repeats, found.source) == (500, 3, "there")
    assert found.protocol == f"{protocol}; DDIM, 20 steps; guidance w = 2"
    assert found.sd == (0.25 if figure == "fid" else None)


@pytest.mark.parametrize("figure", ["kid", "psnr_to_full", "sfid", "solver", "params_m", "gflops_conv_linear_per_call"])
def test_what_is_not_there_is_not_made_up(figure):
    assert measured(figure, RESULTS, ROW, "there") is None


def test_a_trial_is_called_one():
    warning = "evaluation.min_images=2 replaces the metrics' own least numbers: a trial, not a measurement"
    results = {**RESULTS, "warnings": ["fid is biased", warning]}
    assert "a trial, not a measurement" in measured("fid", results, ROW, "there").protocol
    assert "biased" not in measured("fid", results, ROW, "there").protocol


def test_foreign_files_and_rows_are_named(tmp_path):
    file = tmp_path / "metrics.json"
    for text in ("{", "[]", "{}", '{"rows": [1]}', '{"rows": []}'):
        file.write_text(text)
        with pytest.raises(RunError, match=r"metrics\.json"):
            read_results(file)
    file.write_text(json.dumps(RESULTS))
    assert row_of(read_results(file), "full", file) == {"name": "full"}
    with pytest.raises(UsageError, match=r"no row 'exit'; its rows are full"):
        row_of(RESULTS, "exit", file)


def test_only_what_decides_a_figure_makes_a_difference():
    evaluation = {
        "num_images": 10,
        "metrics": ["fid"],
        "timing_images": 4,
        "solvers": {"ddim": {"steps": 5}},
        "policies": {"a": {"depth": 1}, "b": {"depth": 2}},
    }
    asked = {"ema": True, "precision": "fp32", "device": "cpu", "evaluation": evaluation}

    def changed(**settings):
        return {**asked, "evaluation": {**evaluation, **settings}}

    assert differences(asked, asked, "a") == []
    same = changed(metrics=["kid"], timing_images=0, policies={"a": {"depth": 1}})
    assert differences(asked, {**same, "device": "cuda"}, "a @ ddim") == []
    assert differences(asked, changed(num_images=20), "full") == ["evaluation.num_images: 10 asked, 20 found"]
    assert differences(asked, {**asked, "precision": "bf16"}, "full") == ["precision: fp32 asked, bf16 found"]
    assert len(differences(asked, changed(solvers={"ddim": {"steps": 6}}), "full")) == 1
    assert len(differences(asked, changed(references={"inception": "other.npz"}), "full")) == 1
    assert len(differences(asked, changed(guidance_interval=[-1.0, 1.0]), "full")) == 1
    other = changed(policies={"a": {"depth": 3}, "b": {"depth": 2}})
    assert len(differences(asked, other, "a")) == 1
    assert differences(asked, other, "b") == []


# How it is set -------------------------------------------------------------------------------------------------------

TABLE = PaperTable(
    "arXiv 0000.00000",
    "Table 1 & more",
    "50_000 images",
    [
        PaperRow(
            "A < B", [], {"fid": Published(3.5, "verified", "Table 1"), "kid": Published(0.5, "summary", "a blog")}
        ),
        PaperRow("C", [], {"fid": Published(None, "unknown"), "kid": Published(0.25, "recalled")}),
    ],
)
ROWS = [
    Filled(
        TABLE.rows[0],
        {
            "fid": Measured(3.25, None, 500, 1, "inception", "a.json"),
            "kid": Measured(0.5, 0.125, 500, 3, "p", "b.json"),
        },
    ),
    Filled(
        TABLE.rows[1],
        {"kid": Measured(0.5, None, None, 1, "p", "b.json")},
        {"fid": Missing("not trained", ("44 M parameters",), ("gearshift train", "gearshift evaluate"))},
    ),
]


def test_markdown_marks_what_is_not_verified_and_what_is_not_known():
    text = as_markdown(TABLE, ROWS)
    assert "| A \\< B | 3.5 | 3.25 (n = 500) [a] | 0.5† | 0.500 ± 0.125 (n = 3 × 500) [b] |" in text
    assert "| C | ? | – | 0.25‡ | 0.500 [b] |" in text
    assert "- †: from somebody's summary, not read in the paper itself (A \\< B, kid: a blog)" in text
    assert "- ‡: recalled, not looked up (C, kid)" in text
    assert "- ?: not known here (C, fid)" in text
    assert "- [a]: inception; a.json" in text
    assert "- [b]: p; b.json" in text
    assert text.count("[b]:") == 1
    assert missing_lines(ROWS) == [
        "C, fid: not trained; 44 M parameters. run `gearshift train` && `gearshift evaluate`"
    ]
    assert f"- {missing_lines(ROWS)[0]}\n" in text
    assert "## Missing" not in as_markdown(TABLE, ROWS[:1])


def test_latex_is_escaped_and_balanced():
    text = as_latex(TABLE, ROWS)
    assert r"Table 1 \& more" in text and r"50\_000" in text
    assert r"A \textless{} B & 3.5 & 3.25 (n = 500) {[}a{]}" in text
    assert r"0.500 $\pm$ 0.125 (n = 3 $\times$ 500)" in text
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1
    assert "gearshift train" not in text


def test_json_keeps_everything_apart():
    data = json.loads(json.dumps(as_json(TABLE, ROWS), allow_nan=False))
    [first, second] = data["rows"]
    assert first["figures"]["fid"]["published"] == {"value": 3.5, "status": "verified", "source": "Table 1"}
    assert first["figures"]["fid"]["measured"]["value"] == 3.25
    assert first["figures"]["fid"]["missing"] is None
    assert second["figures"]["fid"]["published"]["value"] is None
    assert second["figures"]["fid"]["measured"] is None
    assert second["figures"]["fid"]["missing"]["commands"] == ["gearshift train", "gearshift evaluate"]


def test_notes_do_not_run_out_of_letters():
    rows = [PaperRow(str(n), [], {"fid": Published(None, "unknown")}) for n in range(30)]
    filled = [Filled(row, {"fid": Measured(1.0, None, 2, 1, row.name, "x")}) for row in rows]
    text = as_markdown(PaperTable("p", "t", "none", rows), filled)
    for mark in ("[a]", "[z]", "[aa]", "[ad]"):
        assert f"- {mark}: " in text
