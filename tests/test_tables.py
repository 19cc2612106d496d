"""The papers' tables: one schema, what they launch exists, and `gearshift table` renders and fills them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from gearshift import cli
from gearshift.assembly import run_path
from gearshift.evaluation.papers import COSTS, load_table
from gearshift.evaluation.settings import METRICS
from gearshift.runtime.run import RunFolder
from gearshift.verbs import table as verb
from gearshift.verbs.paper_jobs import Where, compose, job_of

ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / "experiments").rglob("*.yaml"))
TINY = ["experiment=digits", "+debug=tiny", "trainer.accelerator=cpu", "trainer.batch_size=4"]
EVALUATE = [
    "evaluation=demo",
    "evaluation.num_images=12",
    "evaluation.chunk=6",
    "evaluation.timing_images=0",
    "++evaluation.equal_macs=false",
    "evaluation.metrics=[fd@random_conv,fid]",
    "evaluation.solvers.ddim.steps=2",
    "device=cpu",
]
FD = "fd_random_conv_64[s0-s2]"


@pytest.fixture(autouse=True)
def workplace(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Whether the weights are on this machine or not: they are not there.
    monkeypatch.setenv("GEARSHIFT_INCEPTION", "/nowhere/inception.pth")


def unknown():
    return {"value": None, "status": "unknown", "source": None}


def row(name, *overrides, **more):
    return {"name": name, "overrides": [*TINY, *overrides], "published": {FD: unknown()}, **more}


def write(rows, name="table", **more):
    """A made-up table."""
    content = {"paper": "made up", "table": "a table", "protocol": "none", "evaluate": EVALUATE, "rows": rows, **more}
    file = Path(f"{name}.yaml")
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(file)


def answer(capsys):
    return json.loads([line for line in capsys.readouterr().out.splitlines() if line.startswith("{")][-1])


class Program:
    """Stands for the processes: notes what is run and leaves what the program would."""

    def __init__(self, fails=(), meet=None):
        self.commands, self.fails, self.meet = [], fails, meet
        self.lock, self.running, self.most = threading.Lock(), 0, 0

    def __call__(self, arguments):
        with self.lock:
            self.commands.append(list(arguments))
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                verb_, *rest = [a for a in arguments if a != "-m" and not a.startswith("launcher=")]
                code = 3 if any(part in rest for part in self.fails) else getattr(self, verb_)(rest)
            finally:
                self.running -= self.meet is None
        if self.meet is not None:
            self.meet.wait(timeout=60)
            with self.lock:
                self.running -= 1
        return code

    def train(self, overrides):
        cfg = compose("train", overrides)
        RunFolder.create(run_path(cfg), cfg).finish({"steps": 2})
        return 0

    def evaluate(self, overrides):
        cfg = compose("evaluate", overrides)
        policies = ["full", *cfg.evaluation.policies]
        numbers = {"solver": "DDIM", "steps": 2, "calls": 4.0, "num_images": 12, "macs_per_image": 8e9}
        results = {
            "protocol": {"fd@random_conv": "the protocol", "images": "12, indices 0..11"},
            "rows": [{"name": name, **numbers, FD: 1.5 + k} for k, name in enumerate(policies)],
            "unavailable": [{"name": "fid", "reason": "no weights", "fetch": "curl"}],
            "command": shlex.join(["gearshift", "evaluate", *overrides]),
        }
        folder = Path(cfg.run) / "evaluations" / cfg.evaluation.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(results))
        return 0

    @property
    def verbs(self):
        return [command[0] for command in self.commands]


@pytest.fixture
def program(monkeypatch):
    made = Program()
    monkeypatch.setattr(verb, "run_command", made)
    return made


# The tables of the repository ----------------------------------------------------------------------------------------


def test_there_are_tables():
    assert len(TABLES) >= 2


@pytest.mark.parametrize("file", TABLES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_a_table_follows_the_schema_and_what_it_launches_exists(file):
    table = load_table(file)
    for row in table.rows:
        if row.measured:
            assert (file.parent / row.measured).is_file() or (ROOT / row.measured).is_file()
        if not row.overrides:
            continue
        job = job_of(table, row, Where("runs"))
        evaluation = job.asked["evaluation"]
        assert all(name in METRICS or re.sub("@.*", "@X", name) in METRICS for name in evaluation["metrics"])
        named = row.row.partition(" @ ")[0]
        fewer = evaluation["equal_macs"] and re.fullmatch(r"full, \d+ steps", named)
        assert fewer or named in ("full", *evaluation["policies"])
        # Every figure is a cost, or an evaluation as asked for would give it.
        for figure in row.published:
            always = figure.startswith(("psnr_to_full", "ssim_to_full"))
            asked = any(figure.startswith(m.partition("@")[0][:4]) for m in evaluation["metrics"])
            assert always or asked or figure in COSTS


def test_the_tables_render(capsys):
    assert cli.run(["table", *map(str, TABLES)]) == 0
    said = answer(capsys)
    assert [Path(table["path"]) for table in said["tables"]] == TABLES
    assert said["failed"] == []
    text = Path("runs/tables/uvit/fid.md").read_text()
    assert "| CIFAR-10 S/2 | 3.11 | – |" in text
    assert "CIFAR-10 S/2, fid: not trained; 44.3 M parameters; 12.2 GMACs per call" in text
    assert "500000 training steps of 128 images" in text
    assert "`curl -L" in text
    assert "CelebA 64 S/4, fid: there is no configuration for this row yet" in text
    # What is not known is not printed as if it were.
    data = json.loads(Path("runs/tables/deediff/cifar10.json").read_text())
    [deediff] = [row for row in data["rows"] if row["name"] == "DeeDiff"]
    assert deediff["figures"]["fid"]["published"] == unknown()
    assert "| DeeDiff | ? | – |" in Path("runs/tables/deediff/cifar10.md").read_text()


# Filling them --------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_run_once_and_rows_share_a_run(program, capsys):
    published = {FD: unknown(), "fid": {"value": 3, "status": "recalled", "source": None}}
    costs = {"gmacs_per_call": {"value": 2, "status": "summary", "source": "a blog"}, "params_m": unknown()}
    rows = [row("first", published=published), row("exit", row="depth 4", published=costs), row("other", "seed=1")]
    file = write(rows)
    assert cli.run(["table", file]) == 0
    before = answer(capsys)["tables"][0]
    # Parameters follow from the configuration, for every row that has one.
    assert (before["measured"], before["missing"]) == (3, 4)
    assert program.commands == []
    assert cli.run(["table", file, "run=missing"]) == 0
    assert program.verbs == ["train", "evaluate", "train", "evaluate"]
    said = answer(capsys)["tables"][0]
    text = Path(said["md"]).read_text()
    assert "| first | ? | 1.50 (n = 12) [a] | 3‡ | – |" in text
    assert "2† | 2.00 (n = 12) [b]" in text
    assert "- †: from somebody's summary, not read in the paper itself (exit, gmacs_per_call: a blog)" in text
    assert "- [a]: the protocol; DDIM, 2 steps; runs/digits/" in text
    assert "first, fid: evaluated without it; weights-inception" in text
    assert said["missing"] == 1
    data = json.loads(Path(said["json"]).read_text())["rows"][1]["figures"]
    assert data["params_m"]["measured"]["value"] > 0
    # The figure whose weights are absent does not make it go on.
    assert cli.run(["table", file, "run=missing"]) == 0
    assert len(program.commands) == 4
    assert "nothing is missing that a run would bring" in capsys.readouterr().err


def test_evaluating_again_waits_for_the_weights(program, capsys, monkeypatch):
    published = {"fid": {"value": 3, "status": "recalled", "source": None}}
    file = write([row("first", published=published)])
    assert cli.run(["table", file, "run=missing"]) == 0
    assert program.verbs == ["train", "evaluate"]
    from gearshift.verbs import paper_rows

    monkeypatch.setattr(paper_rows, "locate", lambda weights, name, path=None: Path("here"))
    assert cli.run(["table", file, "run=missing"]) == 0
    assert program.verbs == ["train", "evaluate", "evaluate"]
    # A metric that was never asked for is not waited for.
    capsys.readouterr()
    file = write([row("first", published={"kd_random_conv_64[s0-s2]": unknown()})])
    assert cli.run(["table", file, "run=missing"]) == 0
    assert len(program.commands) == 3
    assert "does not give it; its metrics are fd@random_conv, fid" in capsys.readouterr().err
    # Asked for from now on, it is.
    metrics = "evaluation.metrics=[fd@random_conv,kd@random_conv]"
    file = write([row("first", published={"kd_random_conv_64[s0-s2]": unknown()}, evaluate=[metrics])])
    assert cli.run(["table", file, "run=missing"]) == 0
    assert program.verbs[3:] == ["evaluate"]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("figure", ["fid", "lpips_vgg_to_full", "precision_vgg16", "fd_inception_2015_12_05"])
def test_weights_are_not_asked_for_where_the_evaluation_would_not_use_them(program, capsys, trained, figure):
    """Who fetched them and evaluated again would find the cell as empty as before."""
    metrics = "evaluation.metrics=[fd@random_conv,lpips,kd@random_conv]"
    if trained:
        assert cli.run(["table", write([row("first", evaluate=[metrics])]), "run=missing"]) == 0
        capsys.readouterr()
    file = write([row("first", published={figure: unknown()}, evaluate=[metrics])])
    before = len(program.commands)
    assert cli.run(["table", file, "run=missing"]) == 0
    said = capsys.readouterr().err
    assert "does not give it; its metrics are fd@random_conv, lpips, kd@random_conv: add it there" in said
    assert "curl" not in said and len(program.commands) == before


def test_a_failure_is_told_at_the_end_and_stops_no_other_row(program, capsys):
    program.fails = ("seed=1",)
    file = write([row("first"), row("broken", "seed=1"), row("last", "seed=2")])
    assert cli.run(["table", file, "run=missing"]) == 1
    said = capsys.readouterr()
    assert program.verbs == ["train", "evaluate", "train", "train", "evaluate"]
    found = json.loads(said.out.splitlines()[-1])
    [failure] = found["failed"]
    assert (failure["row"], failure["verb"]) == ("broken", "train")
    assert "seed=1" in failure["command"]
    assert found["tables"][0]["measured"] == 2
    [line] = [line for line in said.err.splitlines() if line.startswith("gearshift: ")]
    assert "1 of the jobs failed (broken: train left with exit code 3)" in line
    # A command that leaves nothing behind has not done its work, whatever it says.
    program.fails, program.train = (), lambda overrides: 0
    assert cli.run(["table", file, "run=missing"]) == 1
    assert "broken: train left no runs/digits/" in capsys.readouterr().err


def test_a_cluster_is_given_all_rows_at_once_and_a_machine_one_by_one(program, capsys):
    rows = [row(f"seed {seed}", f"seed={seed}") for seed in range(3)]
    # Nobody goes on before all three are there.
    program.meet = threading.Barrier(3)
    assert cli.run(["table", write(rows), "run=missing", "launcher=slurm"]) == 0
    assert program.most == 3
    assert all(command[1:3] == ["-m", "launcher=slurm"] for command in program.commands)
    assert sorted(program.verbs) == ["evaluate"] * 3 + ["train"] * 3
    shutil.rmtree("runs")
    program.__init__()
    assert cli.run(["table", write(rows), "run=missing", "launcher=local"]) == 0
    assert program.most == 1
    assert program.verbs == ["train", "evaluate"] * 3
    assert all(command[1:3] == ["-m", "launcher=local"] for command in program.commands)
    capsys.readouterr()


def test_both_commands_know_the_launchers():
    for verb_ in ("train", "evaluate"):
        compose(verb_, ["launcher=slurm", *(["run=RUN"] if verb_ == "evaluate" else [])])


def test_settings_of_this_machine_reach_the_commands(program):
    settings = ['train=["trainer.devices=2"]', 'evaluate=["devices=2"]', "runs_dir=some where"]
    assert cli.run(["table", write([row("first")]), "run=missing", *settings]) == 0
    train, evaluate = program.commands
    assert train[-2:] == ['runs_dir="some where"', "trainer.devices=2"]
    assert evaluate[-1] == "devices=2"
    assert Path("some where/tables").is_dir()


def test_what_does_not_fit_is_not_counted(program, capsys):
    file = write([row("first")])
    assert cli.run(["table", file, "run=missing"]) == 0
    capsys.readouterr()

    def missing(name=file):
        assert cli.run(["table", name]) == 0
        text = capsys.readouterr().err
        return [line for line in text.splitlines() if line.startswith("- first")]

    assert missing() == []
    # Another number of images, another guidance.
    [line] = missing(write([row("first", evaluate=["evaluation.num_images=24", "evaluation.guidance=1"])], "other"))
    assert "evaluation.num_images: 24 asked, 12 found; evaluation.guidance: 1 asked, 2.5 found" in line.replace(
        "1.0", "1"
    )
    [results] = Path("runs").rglob("metrics.json")
    run = results.parents[2]
    # Older than the end of the training.
    os.utime(results, ns=(0, 0))
    assert "evaluated before the training was done" in missing()[0]
    # Half trained.
    (run / "done.json").rename(run / "kept.json")
    assert "training was begun, with no checkpoint yet" in missing()[0]
    import torch

    torch.save({"gearshift": {"step": 1, "format": 1}}, run / "checkpoints" / "last.ckpt")
    [line] = missing()
    assert "first, " + FD + ": training is at step 1 of 2" in line
    assert "`gearshift train" in line and "`gearshift evaluate run=runs/digits/" in line
    # Trained, and only the evaluation is left.
    (run / "kept.json").rename(run / "done.json")
    results.unlink()
    [line] = missing()
    assert "trained (2 steps" in line and "not evaluated" in line and "gearshift train" not in line
    results.write_text("{}")
    assert "is not what `gearshift evaluate` writes" in missing()[0]


def test_measured_files_come_first(capsys):
    Path("mine.json").write_text(
        json.dumps({"rows": [{"name": "full", FD: 7.0, "sd": {FD: 0.5}, "num_images": 100, "repeats": 3}]})
    )
    file = write([row("first", measured="mine.json"), {**row("no configuration"), "overrides": []}])
    assert cli.run(["table", file, "run=missing"]) == 0
    text = Path(answer(capsys)["tables"][0]["md"]).read_text()
    assert "| first | ? | 7.00 ± 0.500 (n = 3 × 100) [a] |" in text
    assert "; mine.json" in text


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (["nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["good.yaml", "run=all"], ["run=all", "missing"]),
        (["typo.yaml"], ["typo.yaml", "row 'first'", "trainer.max_step'"]),
        (["row.yaml"], ["row.yaml", "row 'first'", "'fll'", "full"]),
        (["gone.yaml"], ["gone.yaml", "nowhere.json"]),
        (["clash.yaml"], ["'first'", "'second'", "evaluation.name"]),
        (["good.yaml", "sub/../good.yaml"], ["good.yaml", "out="]),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(program, capsys, arguments, quoted):
    Path("sub").mkdir()
    Path("mine.json").write_text(json.dumps({"rows": [{"name": "full"}]}))
    write([row("first")], "good")
    write([row("first", "trainer.max_step=3")], "typo")
    write([row("first", measured="mine.json", row="fll")], "row")
    write([row("first", measured="nowhere.json")], "gone")
    write([row("first"), row("second", evaluate=["evaluation.num_images=24"])], "clash")
    assert cli.run(["table", *arguments]) == 2
    said = capsys.readouterr()
    [line] = [line for line in said.err.splitlines() if line.startswith("gearshift: ")]
    for part in quoted:
        assert part in line
    assert program.commands == []


# For real ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_is_filled_for_real(capsys):
    """One row is there already, one is half trained, one is new; one figure cannot be had here."""
    published = {FD: unknown(), "fid": {"value": 3.11, "status": "verified", "source": "a paper"}, "gmacs": unknown()}
    rows = [row(f"seed {seed}", f"seed={seed}", "trainer.max_steps=4", published=published) for seed in range(3)]
    rows[2]["row"] = "depth 4"
    file = write(rows)
    table = load_table(file)
    jobs = [job_of(table, each, Where("runs")) for each in table.rows]
    program = [sys.executable, "-m", "gearshift.cli"]

    def gearshift(*arguments):
        return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=280)

    done = gearshift(*jobs[0].train)
    assert done.returncode == 0, done.stderr
    # Half trained: the last checkpoint is that of step 2, as after a kill.
    half = gearshift(*jobs[1].train, "trainer.checkpoint_every_steps=2")
    assert half.returncode == 0, half.stderr
    checkpoints = jobs[1].run / "checkpoints"
    (checkpoints / "previous.ckpt").rename(checkpoints / "last.ckpt")
    (jobs[1].run / "done.json").unlink()
    weights = [jobs[0].run / "checkpoints" / "last.ckpt", jobs[0].run / "done.json"]
    before = [path.stat().st_mtime_ns for path in weights]
    filled = gearshift("table", file, "run=missing")
    assert filled.returncode == 0, filled.stderr
    assert [path.stat().st_mtime_ns for path in weights] == before, "what is trained is left alone"
    assert f"resuming {jobs[1].run} after step 2 of 4" in filled.stderr, "the progress of its commands is seen"
    said = json.loads(filled.stdout)
    assert (said["tables"][0]["measured"], said["tables"][0]["missing"]) == (6, 3)
    text = Path(said["tables"][0]["md"]).read_text()
    assert "| 3.11 | – |" in text
    assert "seed 0, fid: evaluated without it; weights-inception" in text
    for job in jobs:
        assert job.finished
        results = json.loads(job.results.read_text())
        assert results["rows"][0]["num_images"] == 12
    again = gearshift("table", file, "run=missing")
    assert again.returncode == 0, again.stderr
    assert "nothing is missing that a run would bring" in again.stderr
    assert json.loads(again.stdout)["tables"] == said["tables"]
