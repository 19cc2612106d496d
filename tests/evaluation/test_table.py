"""Columns, best values and the four ways a table is written."""

import re

import pytest

from gearshift.evaluation.speed_table import classes_table, latency_table, scaling_table, spread_table, throughput_table
from gearshift.evaluation.table import (
    best_rows,
    columns_of,
    direction,
    format_bytes,
    format_count,
    format_number,
    format_table,
    results_table,
)
from gearshift.evaluation.tabular import Table, escape_latex, halves, html_table, latex, markdown, terminal


def row(name, macs, speed, fd, psnr=None, **more):
    return {
        "name": name, "policy": name, "solver": "ddim", "calls": 20, "macs_per_image": macs,
        "macs_saved": 1 - macs / 4e8, "images_per_s": speed, "speedup": speed / 100, "time_saved": 1 - 100 / speed,
        "psnr_to_full": psnr, "ssim_to_full": 1.0 if psnr is None else 0.8, "label_agreement": 0.97,
        "identical_to_full": float(psnr is None), "fd_classifier_digits": fd, "fd_random_conv_64[s0-s2]": None, **more,
    }  # fmt: skip


ROWS = [
    row("full", 4e8, 100.0, 1.25),
    row("exit <0.1> & co", 2.6e8, 150.0, 1.5, 27.3),
    row("skip", 2e8, 190.0, 2.0, 25.0),
]


def columns(rows=ROWS):
    return {column.key: column for column in columns_of(rows)}


@pytest.mark.parametrize(
    ("keys", "better"),
    [
        (("fid", "sfid", "kid", "fd_dino", "kd_classifier_digits", "lpips_alex_to_full"), -1),
        (("inception_score", "precision_vgg16", "recall_vgg16", "label_agreement", "density_x", "coverage_x"), +1),
        (("psnr_to_full", "psnr_to_full_per_image", "ssim_to_full"), +1),
        (("name", "calls", "macs_saved", "fidelity", "label_agreement_per_class", "kids", "identical_to_full"), 0),
    ],
)
def test_direction(keys, better):
    assert [direction(key) for key in keys] == [better] * len(keys)


def test_columns_stand_in_a_fixed_order_whatever_the_order_of_the_keys():
    measures = [
        "fid", "sfid", "inception_score", "kid", "fd_classifier_digits", "fd_dino", "fd_random_conv_64[s0-s2]",
        "kd_classifier_digits", "precision_vgg16", "recall_vgg16", "density_vgg16", "coverage_vgg16",
    ]  # fmt: skip
    one = {"name": "a", "images_per_s": 1.0, **dict.fromkeys(measures, 0.5), "psnr_to_full": 3.0, "solver": "ddim"}
    for keys in (list(one), list(reversed(one))):
        shown = [column.key for column in columns_of([{key: one[key] for key in keys}])]
        assert shown == ["name", "solver", *measures, "psnr_to_full", "images_per_s"]
    groups = [column.group for column in columns_of([one])]
    assert groups == sorted(groups, key=groups.index), "columns of a group stand together"


def test_columns_that_no_row_has_are_left_out():
    assert "fd_random_conv_64[s0-s2]" not in columns() and "lpips_alex_to_full" not in columns()
    assert "flops_per_image" in columns([{**ROWS[0], "flops_per_image": 8e8}])
    assert [
        column.key for column in columns_of([{"name": "a", "speed": {"x": 1}, "label_agreement_per_class": [1]}])
    ] == ["name"]


def test_reuse_has_columns_where_some_row_reuses():
    none = [{**own, "blocks_reused": 0.0, "kept_bytes_per_image": 0, "longest_skip": 0} for own in ROWS]
    assert list(columns(none)) == list(columns()), "nothing to show, and skips are for the file alone"
    some = [*none[:2], {**none[2], "blocks_reused": 0.6, "kept_bytes_per_image": 64512}]
    shown = columns(some)
    assert [column.cell(some[2]) for column in shown.values() if column.rare] == ["60.0 %", "63.0 KiB"]
    assert [column.cell(some[0]) for column in shown.values() if column.rare] == ["0.0 %", "0 B"]
    older = [ROWS[0], some[2]]
    assert columns(older)["blocks_reused"].cell(ROWS[0]) == "not measured"


def test_best_values():
    found = columns()
    assert best_rows(ROWS, found["fd_classifier_digits"]) == {0}
    assert best_rows(ROWS, found["images_per_s"]) == {2}
    # Full compute is as close to itself as can be, which is no merit.
    assert best_rows(ROWS, found["psnr_to_full"]) == {1}
    assert best_rows(ROWS[:2], found["ssim_to_full"]) == set()
    # All alike, or neither direction better: nothing to mark.
    for key in ("label_agreement", "calls", "name", "macs_per_image"):
        assert best_rows(ROWS, found[key]) == set()


def test_values_that_print_alike_share_the_mark():
    rows = [{"name": k, "fid": value} for k, value in (("a", 3.001), ("b", 3.004), ("c", 3.2))]
    assert best_rows(rows, columns(rows)["fid"]) == {0, 1}


def test_marks_keep_protocols_apart():
    rows = [{"name": k, "fid": v, "calls": 1} for k, v in (("a", 3.0), ("b", 2.0), ("c", 1.0), ("d", 1.5), ("e", None))]
    table = results_table(rows, {"fid": ["a", "a", "b", "b", "b"]})
    k = table.heads.index("FID ↓")
    assert [line[k] for line in table.body] == ["3.00 [a]", "2.00 [a]", "1.00 [b]", "1.50 [b]", "not measured"]
    assert table.best == {(1, k), (2, k)}
    assert results_table(rows[:4]).best == {(2, k)}


def test_what_is_missing_says_why():
    found = columns([*ROWS, {"name": "x", "lpips_alex_to_full": 0.1}])
    assert found["lpips_alex_to_full"].cell(ROWS[0]) == "not measured"
    assert found["psnr_to_full"].cell(ROWS[0]) == "identical"
    assert found["psnr_to_full"].cell({"name": "x"}) == "not measured"
    assert found["psnr_to_full"].cell({"psnr_to_full": None, "identical_to_full": 0.5}) == "not measured"
    assert found["images_per_s"].cell({"images_per_s": float("nan")}) == "not measured"
    realised = columns([{"name": "x", "saving_realised": 0.5}])["saving_realised"]
    assert realised.cell({"saving_realised": None, "time_saved": 0.0}) == "–"
    assert realised.cell({"name": "x"}) == "not measured"


@pytest.mark.parametrize(
    ("key", "value", "sd", "text"),
    [
        ("fid", 3.172, 0.018, "3.17 ± 0.02"),
        ("fid", 27.34, 0.004, "27.340 ± 0.004"),
        ("fid", 1234.5, 20.0, "1234 ± 20"),
        ("fid", 3.172, 0.0, "3.17 ± 0.00"),
        ("fid", 3.172, float("nan"), "3.17"),
        ("kid", 2.0e-5, 1.0e-5, "2.0e-05 ± 1.0e-05"),
        ("kid", -0.00021, 0.0003, "-0.000210 ± 0.000300"),
        ("label_agreement", 0.9712, 0.0031, "97.1 ± 0.3 %"),
        ("speedup", 1.811, 0.02, "1.81 ± 0.02×"),
        ("macs_per_image", 44.26e6, 0.31e6, "44.3 ± 0.3 M"),
    ],
)
def test_deviations_over_repeats(key, value, sd, text):
    one = {"name": "a", key: value, "sd": {key: sd}}
    assert columns([one])[key].cell(one) == text


def test_terminal_table_is_aligned():
    lines = format_table(ROWS).splitlines()
    assert lines[-1] == "* best value of its column"
    rule = next(line for line in lines if line.startswith("─"))
    starts = [match.start() for match in re.finditer("─+", rule)]
    for line in lines[lines.index(rule) + 1 : -1]:
        padded = line.ljust(len(rule))
        assert all(padded[start - 2 : start] == "  " for start in starts[1:])
    assert "1.25*" in lines[-4] and "400 M" in lines[-4] and "identical" in lines[-4]


def test_a_narrow_terminal_gets_blocks_with_all_columns():
    whole, narrow = format_table(ROWS), format_table(ROWS, width=60)
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, whole.splitlines()))
    blocks = narrow.removesuffix("\n* best value of its column").split("\n\n")
    assert len(blocks) > 1 and all("exit <0.1> & co" in block for block in blocks)
    cells = [cell for block in blocks for cell in block.splitlines()[-3].split("  ") if cell.strip()]
    assert [c for c in cells if c.strip() != "full"] == [
        c for c in whole.splitlines()[-4].split("  ") if c.strip() and c.strip() != "full"
    ]
    # A column wider than the terminal still comes out.
    assert "a" * 80 in format_table([{"name": "x", "solver": "a" * 80}], width=40)


def test_markdown_table():
    lines = format_table(ROWS, "markdown").splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "**1.25**" in lines[2] and "35.0 %" in lines[3] and "exit \\<0.1> & co" in lines[3]
    assert "a\\|b" in format_table([{"name": "a|b"}], "markdown")


def test_latex_table():
    text = format_table(ROWS, "latex")
    lines = text.splitlines()
    assert lines[0].startswith(r"\begin{tabular}{ll") and lines[-1] == r"\end{tabular}"
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    count = len(columns())
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == 3
    for line in body:
        assert line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == count - 1
    assert r"exit \textless{}0.1\textgreater{} \& co" in body[1] and r"\textbf{1.25}" in body[0]
    assert r"\multicolumn{3}{c}{cost}" in text and r"\cmidrule(lr){3-5}" in text
    assert re.sub(r"\\[%&_#${}]", "", text).count("{") == re.sub(r"\\[%&_#${}]", "", text).count("}")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("50 % & #1_a", r"50 \% \& \#1\_a"),
        (r"\input{x}$~^", r"\textbackslash{}input\{x\}\$\textasciitilde{}\textasciicircum{}"),
        ("-1.5 ± 0.2×", r"$-$1.5 $\pm$ 0.2$\times$"),
        ("a-1 ↑ [s0]", r"a-1 $\uparrow$ {[}s0{]}"),
    ],
)
def test_latex_escapes(text, escaped):
    assert escape_latex(text) == escaped


def test_html_table_escapes_and_marks():
    text = html_table(results_table(ROWS))
    assert "exit &lt;0.1&gt; &amp; co" in text and "<0.1>" not in text
    assert re.search(r'<td class="[^"]*best[^"]*">1.25</td>', text)
    assert "colspan=3>cost</th>" in text


@pytest.mark.parametrize("write", [terminal, markdown, latex, html_table])
def test_a_table_may_be_empty(write):
    assert "head" in write(Table(("head",), (True,), ()))


def test_lines_of_a_table_have_one_length():
    with pytest.raises(ValueError, match="one length"):
        Table(("a", "b"), (True, False), (("1",),))


@pytest.mark.parametrize(
    ("head", "parts"),
    [
        ("calls", ("", "calls")),
        ("images/s ↑", ("", "images/s ↑")),
        ("MACs saved ↑", ("MACs", "saved ↑")),
        ("fd_random_conv_64[s0-s2] ↓", ("fd_random_conv", "_64[s0-s2] ↓")),
        ("PSNR to full (global) ↑", ("PSNR to full", "(global) ↑")),
    ],
)
def test_headings_on_two_lines(head, parts):
    assert halves(head) == parts


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


def test_bytes():
    assert [format_bytes(n) for n in (12, 1536, 1.5 * 2**20, 3 * 2**30)] == ["12 B", "1.50 KiB", "1.50 MiB", "3.00 GiB"]


# Small tables --------------------------------------------------------------------------------------------------------


def timed(name, scale, peak=None):
    sweep = [
        {"batch": b, "images_per_s": scale * b, "speedup": scale / 10, "spread": b / 100, "peak_memory_bytes": peak}
        for b in (8, 1)
    ]
    latency = {"p50": 10 / scale, "p90": 11.0, "p95": 12.0, "p99": 13.0, "min": 9.0, "mean": 10.0, "repeats": 30}
    return {
        "name": name,
        "speed": {"first_pass_s": 2.5, "sweep": sweep, "latency_ms": latency, "peak_memory_bytes": peak},
    }


def test_throughput():
    table = throughput_table([timed("full", 10.0), timed("exit", 15.0), {"name": "new"}])
    assert table.heads == ("run", "batch 1", "batch 8", "largest spread")
    assert table.body == (
        ("full", "10.0 (1.00×)", "80.0 (1.00×)", "8.0 %"),
        ("exit", "15.0 (1.50×)", "120 (1.50×)", "8.0 %"),
        ("new", "not measured", "not measured", "not measured"),
    )
    assert table.best == {(1, 1), (1, 2)}


def test_latency_and_memory():
    table = latency_table([timed("full", 10.0), timed("exit", 20.0), {"name": "new"}])
    assert table.heads[-3:] == ("timed passes", "first pass [s]", "peak memory")
    assert table.body[1] == ("exit", "0.500", "11.0", "12.0", "13.0", "30", "2.50", "not measured")
    assert set(table.body[2][1:]) == {"not measured"}
    assert table.best == {(1, 1)}
    table = latency_table([timed("full", 10.0, 2**21), timed("exit", 20.0, 2**20)])
    assert table.heads[-2:] == ("peak memory at batch 8", "peak memory at batch 1")
    assert table.body[0][-2:] == ("2.00 MiB", "2.00 MiB") and {(1, 7), (1, 8)} <= table.best


def test_scaling_spread_and_classes():
    scaling = {"devices": 2, "nodes": None, "images_per_s_alone": 100.0, "efficiency": 0.9}
    assert scaling_table(scaling).body == (
        ("2", "not measured", "100", "not measured", "not measured", "not measured", "90.0 %"),
    )
    spread = {
        "macs_per_image": {"p5": 1e6, "p50": 2e6, "p95": 3e6},
        "psnr_to_full": {"p5": 20.0, "p50": 30.0, "p95": None},
    }
    table = spread_table([{"name": "a", "distribution": spread}, {"name": "b", "identical_to_full": 1.0}])
    assert table.body == (
        ("a", "1.00 M · 2.00 M · 3.00 M", "20.0 · 30.0 · not measured"),
        ("b", "not measured", "identical"),
    )
    few = classes_table([{"name": "a", "label_agreement_per_class": [1.0, None, 0.5]}, {"name": "b"}])
    assert few.body == (("a", "100.0 %", "not measured", "50.0 %"), ("b", *["not measured"] * 3))
    many = classes_table([{"name": "a", "label_agreement_per_class": [k / 100 for k in range(11)]}, {"name": "b"}])
    assert many.body[0] == ("a", "0.0 % (class 0)", "5.0 %", "10.0 % (class 10)")


def test_tables_nobody_has_numbers_for():
    bare = [{"name": "a", "speed": {"sweep": [], "latency_ms": None, "peak_memory_bytes": None}}, {"name": "b"}]
    for made in (throughput_table, latency_table, spread_table, classes_table):
        assert made(bare) is None
    assert scaling_table(None) is None and scaling_table({}) is None
