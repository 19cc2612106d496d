"""The program as processes: several that work as one, and one that is killed, stopped, or finds the disk full."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import gearshift
from gearshift import cli
from gearshift.assembly import named
from gearshift.policies import UncertaintyExit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAM = ("-m", "gearshift.cli")
TRAIN = ["train", "experiment=digits", "+debug=tiny", "trainer.accelerator=cpu", "trainer.batch_size=8"]
# Long enough to be hit in the middle, with checkpoints and lines in every stretch. How often neither changes the run.
LONG = [*TRAIN, "trainer.max_steps=400", "trainer.warmup_steps=10", "trainer.log_every=5"]
OFTEN = "trainer.checkpoint_every_steps=3"


@pytest.fixture(autouse=True)
def one_thread(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(*arguments, launcher=PROGRAM, environment=None, **settings):
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
        **settings,
    )


def finish(process):
    """The answer of a process that does well: the one line of its standard output."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    [line] = out.splitlines()
    return json.loads(line)


def torchrun(count):
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *PROGRAM)


def complaint(err):
    [line] = [line for line in err.splitlines() if line.startswith("gearshift: ")]
    assert "Traceback" not in err
    return line.removeprefix("gearshift: ")


def only_run(folder):
    [run] = (folder / "digits").iterdir()
    return run


def last(run):
    return run / "checkpoints" / "last.ckpt"


def state(run):
    found = torch.load(last(run), weights_only=True)
    found["gearshift"].pop("seconds")
    return found


def assert_equal(a, b, path=""):
    """Two nested structures are the same, tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}.{number}")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps, of which it is not equally certain everywhere."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert cli.run([*TRAIN, "trainer.max_steps=100", "trainer.warmup_steps=10", f"runs_dir={folder}"]) == 0
    return only_run(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The long run, not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    cache = {"GEARSHIFT_CACHE": str(tmp_path_factory.getbasetemp() / "cache"), "OMP_NUM_THREADS": "1"}
    finish(start(*LONG, f"runs_dir={folder}", environment=cache))
    return only_run(folder)


# Several that work as one --------------------------------------------------------------------------------------------


def test_two_devices_train_what_one_does(tmp_path):
    command = [*TRAIN, "trainer.max_steps=12", "trainer.accumulate=2"]
    one = finish(start(*command, "runs_dir=one"))
    two = finish(start(*command, "runs_dir=two", "trainer.devices=2"))
    assert two["steps"] == one["steps"] == 12
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    a, b = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    assert a.name == b.name, "devices do not change the weights, so they do not change the folder's hash"
    for one_weights, two_weights in (
        (state(a)["state_dict"], state(b)["state_dict"]),
        (state(a)["gearshift"]["ema"]["weights"], state(b)["gearshift"]["ema"]["weights"]),
    ):
        assert one_weights.keys() == two_weights.keys()
        for name, value in one_weights.items():
            torch.testing.assert_close(two_weights[name], value, rtol=0, atol=1e-6, msg=name)
    # On one device again, the finished run answers.
    assert finish(start(*command, "runs_dir=two")) == two


def test_a_mistake_is_told_once_by_two_processes(tmp_path):
    process = start(*TRAIN, "trainer.devices=2", "exits=none")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert out == ""
    assert "needs uncertainty heads" in complaint(err)


SAMPLE = ["num_images=21", "start=3", "chunk=4", "solver.steps=6", "device=cpu", "guidance=1.5"]


@pytest.fixture(scope="module")
def threshold(trained):
    """Of the uncertainty at which the images of this run leave at several depths, found by halving."""
    run = gearshift.load(trained, device="cpu")
    solver = {**named("solver", "ddim"), "steps": 6}
    low, high = 0.0, 1.0
    for _ in range(25):
        middle = (low + high) / 2
        depth = run.sample(12, policy=UncertaintyExit(middle), solver=solver, guidance=1.5).ledger.depth
        if len(np.unique(depth)) > 2:
            return middle
        low, high = (middle, high) if depth.mean() > 4 else (low, middle)
    pytest.fail(f"all leave at one depth below and above {low}")


@pytest.mark.parametrize(("policy", "counts"), [("full", [2]), ("uncertainty_exit", [2, 3])])
def test_any_number_of_processes_samples_the_same_bits(trained, threshold, policy, counts):
    adaptive = policy == "uncertainty_exit"
    own = [f"policy.threshold={threshold}"] if adaptive else ["solver=ddpm"]  # which draws noise in every step
    command = ["sample", f"run={trained}", *SAMPLE, f"policy={policy}", *own]
    one = finish(start(*command, "out=one"))
    for count in counts:
        many = finish(start(*command, "out=many", launcher=torchrun(count)))
        files = ("images", "grid", "ledger")
        assert {k: v for k, v in many.items() if k not in files} == {k: v for k, v in one.items() if k not in files}
        for file in ("images.npz", "ledger.npz"):
            with np.load(f"one/{file}") as a, np.load(f"many/{file}") as b:
                assert sorted(a) == sorted(b)
                for name in a:
                    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    with np.load("one/images.npz") as images, np.load("one/ledger.npz") as ledger:
        assert images["index"].tolist() == list(range(3, 24))
        assert len(np.unique(images["arr_0"].reshape(21, -1), axis=0)) == 21
        assert (len(np.unique(ledger["depth"])) > 1) == adaptive, "the exits have to differ to prove anything"


def test_processes_without_work_leave_quietly(trained):
    command = ["sample", f"run={trained}", "num_images=2", "chunk=4", "solver.steps=2", "device=cpu", "out=few"]
    process = start(*command, launcher=torchrun(3))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [json.loads(line)["num_images"] for line in out.splitlines()] == [2]
    assert "terminate" not in err


def test_tasks_of_a_slurm_step_find_each_other(trained):
    command = ["sample", f"run={trained}", *SAMPLE, "policy=full"]
    finish(start(*command, "out=one"))
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "sample"}
    step["SLURM_JOB_ID"] = str(random.randrange(10_000))  # the port follows from it
    tasks = [start(*command, "out=two", environment={**step, "SLURM_PROCID": str(number)}) for number in range(2)]
    assert finish(tasks[0])["num_images"] == 21
    assert tasks[1].communicate(timeout=300)[0] == ""
    assert tasks[1].returncode == 0
    with np.load("one/images.npz") as a, np.load("two/images.npz") as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])


EVALUATE = [
    "evaluation.num_images=21",
    "evaluation.start=3",
    "evaluation.chunk=4",
    "evaluation.repeats=2",
    "evaluation.guidance=1.5",
    "evaluation.solvers.ddim.steps=6",
    "evaluation.timing_images=4",
    "evaluation.timing_rounds=1",
    "evaluation.baselines=[fewer_steps]",
    "evaluation.metrics=[label_agreement,fd@classifier,kd@classifier,fd@random_conv,precision_recall@random_conv]",
    "device=cpu",
]


def timeless(folder):
    """The results of an evaluation without what a clock or the command line says."""
    from gearshift.evaluation.results import TIMING, TIMING_ROWS

    found = json.loads((folder / "metrics.json").read_text())
    assert all(key in found for key in TIMING if key != "scaling") and len(found["rows"]) >= 4
    assert all("images_per_s" in row for row in found["rows"])
    rows = [{key: value for key, value in row.items() if key not in TIMING_ROWS} for row in found.pop("rows")]
    return {key: value for key, value in found.items() if key not in TIMING} | {"rows": rows}


@pytest.fixture(scope="module")
def evaluated(trained, threshold, tmp_path_factory):
    """The command of an evaluation, and the folder where one process with every core has run it."""
    folder = tmp_path_factory.mktemp("evaluated")
    command = [
        "evaluate",
        f"run={trained}",
        *EVALUATE,
        f"+evaluation.policies.exits={{_target_: gearshift.policies.UncertaintyExit, threshold: {threshold}}}",
    ]
    cache = {"GEARSHIFT_CACHE": str(tmp_path_factory.getbasetemp() / "cache"), "OMP_NUM_THREADS": "2"}
    answer = finish(start(*command, f"out={folder}", "devices=1", environment=cache))
    assert answer["report"] == str(folder / "report.html")
    return command, folder


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_evaluates_to_the_same_numbers(evaluated, tmp_path, count):
    command, one = evaluated
    answer = finish(start(*command, f"out={tmp_path}/many", f"devices={count}"))
    assert {row["name"] for row in answer["rows"]} >= {"full", "exits", "skip every 3"}
    many = timeless(tmp_path / "many")
    assert many == timeless(one)
    [first, *_] = many["rows"]
    assert first["sd"]["fd_random_conv_64[s0-s2]"] > 0 and len(first["label_agreement_per_class"]) == 10
    scaling = json.loads((tmp_path / "many" / "metrics.json").read_text())["scaling"]
    assert scaling["devices"] == count and scaling["images_per_s"] > 0


def test_between_chunk_sizes_an_evaluation_differs_by_rounding(evaluated, tmp_path):
    command, one = evaluated
    finish(start(*command, "evaluation.chunk=7", f"out={tmp_path}/seven"))
    for row, other in zip(timeless(one)["rows"], timeless(tmp_path / "seven")["rows"], strict=True):
        assert row["name"] == other["name"]
        for key in ("fd_classifier_digits", "fd_random_conv_64[s0-s2]", "label_agreement", "ssim_to_full"):
            assert row[key] == pytest.approx(other[key], rel=1e-5), (row["name"], key)


def test_a_process_that_dies_ends_the_evaluation_and_its_work_is_used_again(evaluated, tmp_path):
    command, one = evaluated
    command = [*command, f"out={tmp_path}/run", "devices=2"]
    process = start(*command)
    shards = tmp_path / "run" / "shards"
    # Some chunks of each process, and then the second one is gone.
    while len(list(shards.rglob("[0-9]*.npz"))) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    second = [pid for pid in children(process.pid) if b"\0RANK=1\0" in b"\0" + environment_of(pid)]
    os.kill(second[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and out == ""
    assert "run the same command again" in err and "Traceback" not in err
    kept = {path: path.stat().st_mtime_ns for path in shards.rglob("[0-9]*.npz")}
    assert len(kept) >= 6
    process = start(*command)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "are there already" in err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished work was done again"
    assert timeless(tmp_path / "run") == timeless(one)


def children(pid):
    """Processes below a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def environment_of(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


# One that does not get to its end -----------------------------------------------------------------------------------


def begin(*arguments, **settings):
    """Starts a training and returns when its first step is about to be made."""
    process = start(*arguments, **settings)
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("train: "):
            return process
    pytest.fail("".join(said))


def test_killed_at_random_moments_it_ends_with_the_same_bits(whole, tmp_path):
    command = [*LONG, OFTEN, f"runs_dir={tmp_path}"]
    chance = random.Random()
    reached = []
    for attempt in range(4):
        process = begin(*command)
        run = only_run(tmp_path)
        before = last(run).stat().st_mtime_ns if last(run).exists() else 0
        # Every other time not before something new was saved, so that the run gets on.
        while attempt % 2 and not (last(run).exists() and last(run).stat().st_mtime_ns != before):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 1))
        assert process.poll() is None, "it was through before it could be killed"
        process.kill()
        process.communicate()
        reached.append(state(run)["global_step"] if last(run).exists() else 0)
    assert reached == sorted(reached)
    assert 0 < reached[-1] < 400
    assert finish(start(*command))["steps"] == 400
    assert run.name == whole.name
    assert_equal(state(run), state(whole))
    steps = [int(line.split(",")[0]) for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == list(range(5, 401, 5))


def test_stopped_and_then_out_of_room_it_keeps_what_it_has_and_goes_on(whole, tmp_path):
    command = [*LONG, f"runs_dir={tmp_path}"]
    process = begin(*command)
    run = only_run(tmp_path)
    while not (run / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert out == ""
    saved = state(run)["global_step"]
    assert 0 < saved < 400
    line = complaint(err)
    assert line == (
        f"stopped by SIGTERM after step {saved} of 400, which is saved; run the same command again to go on"
    )
    # No file may grow to the size of a checkpoint from now on.
    kept = last(run).read_bytes()
    room = len(kept) // 2
    process = start(*command, OFTEN, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert out == ""
    line = complaint(err)
    assert f"could not write {last(run)} (File too large)" in line
    assert "the previous file is intact" in line
    assert last(run).read_bytes() == kept
    assert not list(run.rglob("*.partial"))
    # The last good checkpoint gives images, and the run goes on from it to the very end it would have come to.
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert finish(start("sample", f"run={copy}", "num_images=2", "solver.steps=2", "device=cpu"))["num_images"] == 2
    process = start(*command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"resuming {run} after step {saved} of 400" in err
    assert json.loads(out)["steps"] == 400
    assert_equal(state(run), state(whole))
