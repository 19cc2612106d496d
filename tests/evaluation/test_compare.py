"""Joined evaluations: labels, what may be held against what, refusals, and the files that are left."""

import copy
import json
import re

import pytest
import torch
from omegaconf import OmegaConf

from gearshift.evaluation import protocols
from gearshift.evaluation.compare import compare, default_folder, drawn_key, write_comparison
from gearshift.evaluation.conditions import conditions
from gearshift.evaluation.protocols import difference, letter, marks_of, protocol_of, protocols_of
from gearshift.evaluation.stored import Evaluated, find, load, read
from gearshift.runtime.errors import RunError, UsageError
from gearshift.verbs import compare as verb

CONDITIONS = {"device": "H", "dtype": "float32", "batch": 64, "torch": "2.11", "other_processes": "1 %", "note": "x"}


def results(run="runs/digits/a", n=500, fid=3.0, **conditions):
    def row(name, policy, share, fid):
        return {
            "name": name, "policy": policy, "solver": "ddim", "steps": 20, "calls": 20, "macs_per_image": 4e8 * share,
            "macs_saved": 1 - share, "images_per_s": 100 / share, "speedup": 1 / share, "fid": fid,
            "precision_vgg16": 0.5 + fid / 100, "psnr_to_full": None if share == 1 else 30.0,
            "identical_to_full": float(share == 1),
        }  # fmt: skip

    return {
        "format": 2, "run": run, "name": "demo", "command": "gearshift evaluate run=x",
        "rows": [row("full", "Full", 1.0, fid), row("exit", "uncertainty < 0.1", 0.5, fid + 1)],
        "protocol": {
            "images": f"{n}, indices 0..{n - 1}", "seed": 0, "labels": "balanced", "guidance": "w = 1",
            "data": "digits", "rounding": "uint8", "psnr": "global", "fid": f"fid[inception|n={n}|ref=train]",
            "precision_recall": f"precision_vgg16,recall_vgg16[vgg16|k=3|n={n}]",
        },
        "conditions": {**CONDITIONS, **conditions}, "warnings": [], "timing_warnings": [],
    }  # fmt: skip


def store(folder, *, run="a", name="demo", content=None):
    path = folder / "runs" / "digits" / run / "evaluations" / name / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content if content is not None else results(run=f"runs/digits/{run}")))
    return path


def joined(*contents):
    return compare([Evaluated(None, "ABC"[k], content) for k, content in enumerate(contents)])


# Which numbers belong together ---------------------------------------------------------------------------------------


def test_one_protocol_is_one_column():
    comparison = joined(results(), results(run="runs/digits/b", fid=2.0))
    assert comparison.marks == {} and comparison.warnings == ()
    assert [row["name"] for row in comparison.rows] == ["A: full", "A: exit", "B: full", "B: exit"]
    table = comparison.table
    fid, macs = table.heads.index("FID ↓"), table.heads.index("MACs saved ↑")
    assert {k for k in table.best if k[1] == fid} == {(2, fid)}, "the best of all rows"
    assert {(1, macs), (3, macs)} <= table.best
    assert not any("[" in cell for line in table.body for cell in line)


def test_another_number_of_images_is_another_protocol():
    comparison = joined(results(), results(n=2000, fid=2.0))
    assert comparison.marks["fid"] == ["a", "a", "b", "b"]
    assert comparison.marks["precision_vgg16"] == ["a", "a", "b", "b"]
    assert comparison.marks["psnr_to_full"] == ["a", "a", "b", "b"]
    assert not {"images_per_s", "macs_per_image", "calls"} & set(comparison.marks)
    table = comparison.table
    fid = table.heads.index("FID ↓")
    assert [line[fid] for line in table.body] == ["3.00 [a]", "4.00 [a]", "2.00 [b]", "3.00 [b]"]
    assert {k for k in table.best if k[1] == fid} == {(0, fid), (2, fid)}, "best within each protocol"
    (line,) = [line for line in comparison.warnings if line.startswith("fid, precision_vgg16:")]
    assert "A [a]: n=500 / B [b]: n=2000" in line and "inception" not in line, "only what differs"
    assert any(
        line.startswith("settings differ: images 500, indices 0..499 (A) / 2000") for line in comparison.warnings
    )


def test_the_name_of_the_run_is_no_difference():
    one, two = results(run="runs/digits/a"), results(run="runs/digits/b")
    for item in (one, two):
        item["protocol"]["fid"] = f"fid[weights of {item['run']}|n=500]"
    assert joined(one, two).marks == {}
    two["protocol"]["fid"] = "fid[weights of elsewhere|n=500]"
    assert list(joined(one, two).marks) == ["fid"]


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "C"},
        {"dtype": "bfloat16"},
        {"batch": 8},
        {"torch": "2.13"},
        {"matmul_precision": "tf32"},
        {"convolution_precision": "tf32"},
        {"power_limit_w": 300},
    ],
)
def test_times_of_other_conditions_are_marked(changed):
    comparison = joined(results(), results(fid=2.0, **changed))
    assert set(comparison.marks) == {"images_per_s", "speedup"}
    (line,) = comparison.warnings
    ((key, value),) = changed.items()
    assert line.startswith("images_per_s, speedup: times taken under different conditions") and f"{key} {value}" in line


def test_conditions_are_compared_under_the_names_they_are_recorded_by():
    recorded = set(conditions(torch.device("cpu"), torch.float32))
    of_evaluate = {"batch", "batch_policy"}
    of_cuda = {"cuda", "cudnn", "cudnn_benchmark", "power_limit_w"}
    assert set(protocols.CONDITIONS) <= recorded | of_evaluate | of_cuda
    assert {"matmul_precision", "convolution_precision", "threads", "deterministic"} <= set(protocols.CONDITIONS)


@pytest.mark.parametrize("changed", [{"other_processes": "9 %"}, {"note": "y"}])
def test_remarks_are_no_conditions(changed):
    assert joined(results(), results(**changed)).warnings == ()


def test_three_evaluations_get_as_many_marks_as_protocols():
    comparison = joined(results(), results(n=2000), results())
    assert comparison.marks["fid"] == ["a", "a", "b", "b", "a", "a"]
    assert any("A and C [a]: n=500 / B [b]: n=2000" in line for line in comparison.warnings)


def test_what_has_no_protocol_is_comparable_with_nothing_else():
    one, two = results(), results(fid=2.0)
    del one["protocol"]["fid"], two["protocol"]["fid"], two["conditions"]
    comparison = joined(one, two)
    assert comparison.marks["fid"] == ["a", "a", "b", "b"] and "images_per_s" in comparison.marks
    assert any(line.startswith("fid:") and "not given by evaluation 2" in line for line in comparison.warnings)
    # Only where it has values: a metric of one evaluation needs no mark.
    for row in two["rows"]:
        del row["fid"]
    assert "fid" not in joined(one, two).marks


def test_protocol_of_a_key():
    content = results()
    assert protocol_of(content, "recall_vgg16") == (
        ("", "precision_vgg16,recall_vgg16[vgg16"), ("", "k=3"), ("", "n=500"), ("labels", "balanced"),
        ("rounding", "uint8"),
    )  # fmt: skip
    assert protocol_of(content, "recall_vgg") == (), "the beginning of another key"
    assert ("psnr", "global") in protocol_of(content, "psnr_to_full_per_image")
    assert ("guidance", "w = 1") in protocol_of(content, "psnr_to_full")
    assert protocol_of(content, "macs_per_image") is None and protocol_of(content, "calls") is None
    content["protocol"]["fd@random_conv"] = "fd_random_conv_64[s0-s2][conv|n=500]"
    assert protocol_of(content, "fd_random_conv_64[s0-s2]")[0] == ("", "fd_random_conv_64[s0-s2][conv")
    content["protocol"]["lpips_alex_to_full"] = "alex"
    assert protocol_of(content, "lpips_alex_to_full")[0] == ("", "alex")
    assert protocols_of([content], "lpips_alex_to_full") == [None], "no values"
    assert marks_of([content]) == {}


def test_differences_and_letters():
    assert difference((("a", "1"), ("", "x")), (("", "x"),), ("A", "B")) == "A: a 1 / B: nothing more"
    assert [letter(k) for k in (0, 25, 26, 51, 52)] == ["a", "z", "aa", "az", "ba"]


def test_the_drawn_measure_is_one_that_can_be_compared():
    one, two = results(), results(n=2000)
    two["protocol"]["precision_recall"] = one["protocol"]["precision_recall"]
    assert drawn_key(joined(one, two)) == "precision_vgg16"
    assert drawn_key(joined(results(), results())) == "fid"
    assert drawn_key(joined(results(), results(n=2000))) == "fid", "else the first there is"
    bare = {"rows": [{"name": "a"}]}
    assert drawn_key(joined(bare, copy.deepcopy(bare))) is None


# Files ---------------------------------------------------------------------------------------------------------------


def test_every_way_to_name_an_evaluation(tmp_path):
    first, second = store(tmp_path, name="demo"), store(tmp_path, name="fid")
    run = first.parents[2]
    assert find(run) == [first, second] and find(first.parent) == [first] and find(first) == [first]
    assert [item.label for item in load([run])] == ["demo", "fid"]
    assert [item.results["run"] for item in load([first, second.parent])] == ["runs/digits/a"] * 2


def test_labels_are_as_short_as_they_may_be(tmp_path):
    one, two = store(tmp_path, run="a"), store(tmp_path, run="b")
    assert [item.label for item in load([one, two])] == ["a/demo", "b/demo"]
    three = store(tmp_path / "other", run="a")
    assert [item.label for item in load([one, three])] == [
        f"{tmp_path.name}/runs/digits/a/demo",
        "other/runs/digits/a/demo",
    ]
    assert [item.label for item in load([one, two], ["old", "new"])] == ["old", "new"]
    store(tmp_path, run="b", name="fid")
    labels = [item.label for item in load([one, two.parents[2]], ["old", "new"])]
    assert labels == ["old", "new demo", "new fid"]


def test_refusals_of_what_was_asked_for(tmp_path):
    one, two = store(tmp_path, run="a"), store(tmp_path, run="b")
    for paths, names, text in (
        ([one], None, "two evaluations or more"),
        ([], None, "two evaluations or more, and none"),
        ([one, one.parent], None, "is named twice"),
        ([one, two], ["x"], r"1 names \(x\) for 2 paths"),
        ([one, two], ["x", "x"], "must tell evaluations apart"),
        ([one, tmp_path / "nothing"], None, "nothing is no evaluation: no such file or folder"),
        ([one, tmp_path], None, r"no metrics\.json and no evaluations"),
    ):
        with pytest.raises(UsageError, match=text):
            load(paths, names)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", r"`rows` should be a list of entries with a name, and is NoneType"),
        (b'{"format": 3, "rows": [{"name": "a"}]}', "has format 3, and this version reads format 2"),
        (b'{"format": "comparison 1", "rows": [{"name": "a"}]}', "has format 'comparison 1'"),
        (b'{"format": 2, "rows": []}', "is a list of 0"),
        (b'{"rows": [{"name": "a"}, {"policy": "b"}]}', "is a list of 2"),
        (b'{"rows": [{"name": "a"}, {"name": "a"}]}', "several rows named 'a'"),
        (b'{"rows": [{"name": "a"}], "protocol": ["x"]}', "protocol of type list"),
    ],
)
def test_files_that_are_refused(tmp_path, content, text):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=text) as caught:
        read(path)
    assert str(path) in str(caught.value) and "evaluate again" in str(caught.value) and "\n" not in str(caught.value)


def test_the_first_files_had_no_format(tmp_path):
    path = store(tmp_path, content={"run": "r", "rows": [{"name": "full", "fid": 3.0}]})
    assert read(path)["rows"][0]["fid"] == 3.0


def test_what_is_left(tmp_path):
    one, two = store(tmp_path, run="a"), store(tmp_path, run="b", content=results(n=2000, batch=8))
    content = json.loads(two.read_text())
    content["rows"][1]["name"] = "exit <0.1> & 50%"
    content["warnings"] = ["fid: biased <upwards>"]
    two.write_text(json.dumps(content))
    comparison = compare(load([one, two]))
    page = write_comparison(tmp_path / "deep" / "out", comparison)
    folder = page.parent
    assert {file.name for file in folder.iterdir()} == {
        f"comparison.{end}" for end in ("json", "md", "tex", "html", "png")
    }
    stored = json.loads((folder / "comparison.json").read_text())
    assert [row["evaluation"] for row in stored["rows"]] == ["a/demo"] * 2 + ["b/demo"] * 2
    assert stored["rows"][0]["marks"]["fid"] == "a" and "psnr_to_full" not in stored["rows"][0]["marks"]
    assert stored["protocols"]["fid"]["b"][1] == ["", "n=2000"] and stored["warnings"] == list(comparison.warnings)
    text = page.read_text()
    assert "exit &lt;0.1&gt; &amp; 50%" in text and "<0.1>" not in text and "<upwards>" not in text
    assert not re.search(r"https?://|<script|<link", text) and "a front of its own" in text
    assert r"b/demo: exit \textless{}0.1\textgreater{} \& 50\%" in (folder / "comparison.tex").read_text()
    markdown = (folder / "comparison.md").read_text()
    assert "(comparison.png)" in markdown and "b/demo: fid: biased \\<upwards>" in markdown
    assert "3.00 [b]" in markdown and "fid[inception|n=2000|ref=train]" in markdown
    with pytest.raises(RunError, match="name another one by out="):
        write_comparison(one / "x", comparison)


def test_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, two = store(tmp_path, run="a"), store(tmp_path, run="b", content=results(n=2000))
    cfg = OmegaConf.create({"paths": [str(one), str(two)], "name": None, "out": None})
    answer = verb.run(cfg)
    assert answer["rows"] == 4 and answer["evaluations"] == ["a/demo", "b/demo"]
    page = tmp_path / answer["comparison"]
    assert (
        page.is_file()
        and page.parent.parent == tmp_path / "comparisons"
        and page.parent.name.startswith("a-demo-b-demo-")
    )
    said = capsys.readouterr()
    assert said.out == "" and all(f"note: {line}" in said.err for line in answer["warnings"]) and answer["warnings"]
    assert verb.run(cfg) == answer, "the same folder again"
    cfg.name, cfg.out = ["x", "y"], "here"
    assert verb.run(cfg)["comparison"] == "here/comparison.html"
    with pytest.raises(UsageError, match="needs evaluations"):
        verb.run(OmegaConf.create({"paths": [], "name": None, "out": None}))


def test_the_folder_says_what_was_compared(tmp_path):
    one, two = store(tmp_path, run="a"), store(tmp_path, run="b")
    folder = default_folder(load([one, two]))
    assert folder == default_folder(load([one, two]))
    assert folder != default_folder(load([two, one])) and folder != default_folder(load([one, two], ["x", "y"]))
    long = default_folder(load([one, two], ["模型" * 50, "x" * 300]))
    assert len(long.name) <= 70 and long.name.isascii()
