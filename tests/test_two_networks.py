"""Two runs in one sampling: the verbs under a policy that takes another run's network, and baselines made of one."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from gearshift import api, cli
from gearshift.policies import Compose, NetworkSwitch, UncertaintyExit
from gearshift.runtime.errors import RunError, UsageError

from .commands import workplace  # noqa: F401  # workplace acts by being here

TINY = ["experiment=digits", "+debug=tiny", "trainer.accelerator=cpu", "trainer.batch_size=4"]
SHALLOW = ["backbone.depth=2", "exits=none", "objective=simple"]
STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders: deep, shallow, the shallow one of another seed ("again"), and one of another process ("foreign")."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {
        "deep": ["backbone.depth=4"],
        "shallow": SHALLOW,
        "again": [*SHALLOW, "seed=1"],
        "foreign": [*SHALLOW, "process=vp_sde"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for name, overrides in kinds.items():
            assert cli.run(["train", *TINY, *overrides, f"name={name}", f"runs_dir={folder}"]) == 0
    return {name: next((folder / name).iterdir()) for name in kinds}


def answer(capsys):
    return json.loads([line for line in capsys.readouterr().out.splitlines() if line.startswith("{")][-1])


def sampled(capsys, run, *overrides):
    """Images uint8, and the answer."""
    command = ["sample", f"run={run}", "num_images=3", "chunk=3", f"solver.steps={STEPS}", "device=cpu", "out=out"]
    assert cli.run([*command, *overrides]) == 0
    said = answer(capsys)
    with np.load(said["images"], allow_pickle=False) as data:
        return data["arr_0"], said


def test_sampling_goes_from_one_network_to_the_other(runs, capsys):
    deep, plain = sampled(capsys, runs["deep"], "guidance=2")
    shallow, small = sampled(capsys, runs["shallow"], "guidance=2")
    assert not np.array_equal(deep, shallow)
    duo = ["policy=duodiff", f"policy.other={runs['shallow']}", "guidance=2"]
    for calls, images, cost in ((0, deep, plain), (STEPS, shallow, small)):
        found, said = sampled(capsys, runs["deep"], *duo, f"policy.calls={calls}")
        assert np.array_equal(found, images)
        assert (said["calls"], said["macs_per_image"]) == (2 * STEPS, cost["macs_per_image"])
        assert said["policy"] == f"DuoDiff, first {calls} calls"
    found, said = sampled(capsys, runs["deep"], "policy=small_network", f"policy.other={runs['shallow']}", "guidance=2")
    assert np.array_equal(found, shallow) and said["policy"] == "other network"
    found, said = sampled(capsys, runs["deep"], *duo, "policy.calls=null", "policy.share=0.25")
    assert said["policy"] == "DuoDiff, first 1 calls" and not np.array_equal(found, deep)
    with np.load("out/ledger.npz") as ledger:
        assert ledger["depth"].tolist() == [[[3] * 3] * 2] + [[[5] * 3] * 2] * 3
        assert ledger["macs"].sum() == 3 * said["macs_per_image"]
    mixed = (small["macs_per_image"] + 3 * plain["macs_per_image"]) / 4
    assert said["macs_per_image"] == pytest.approx(mixed)


def test_the_other_run_is_loaded_once_and_as_this_one_is(runs, monkeypatch):
    loaded = api.load_run(runs["deep"], ema=False, device="cpu")
    asked = []
    load_run = api.load_run
    monkeypatch.setattr(api, "load_run", lambda run, **how: asked.append((Path(run), how)) or load_run(run, **how))
    named = str(runs["shallow"])
    policies = [NetworkSwitch(named, 1), NetworkSwitch(f"{named}/", 2), NetworkSwitch(str(runs["again"]), 1)]
    policies.append(Compose([UncertaintyExit(0.5), NetworkSwitch(named)]))
    made = [loaded.sampler(policy) for policy in policies]
    assert asked == [(runs[name], {"ema": False, "device": "cpu", "compile": False}) for name in ("shallow", "again")]
    assert made[0].denoiser is made[1].denoiser is made[3].denoiser is not made[2].denoiser
    assert loaded.sampler("full").denoiser is loaded.denoiser
    own = loaded.sampler(NetworkSwitch(str(runs["deep"]), 1)).denoiser
    assert len(asked) == 2 and len(list(own.parameters())) == len(list(loaded.denoiser.parameters()))


def test_costs_and_times_are_those_of_both_networks(runs, capsys):
    duo = ["policy=duodiff", f"policy.other={runs['shallow']}", "policy.calls=3", f"solver.steps={STEPS}"]
    assert cli.run(["profile", f"run={runs['deep']}", *duo]) == 0
    profile = answer(capsys)
    under = profile["policy"]
    deep, shallow = (_gmacs(capsys, runs[name]) for name in ("deep", "shallow"))
    assert under["gmacs_per_image"] == pytest.approx(3 * shallow + deep)
    assert under["macs_saved"] == pytest.approx(1 - (3 * shallow + deep) / (4 * deep))
    assert len(profile["exits"]) == 5, "the run's own network is what is described"
    assert cli.run(["profile", "backbone=uvit_digits", "process=cosine", *duo]) == 0
    assert answer(capsys)["policy"]["macs_saved"] > under["macs_saved"], "beside a network that is not narrowed"
    timing = [
        "device=cpu",
        "batch=2",
        "warmup=1",
        "repeats=1",
        "rounds=1",
        "batches=[]",
        "latency_repeats=0",
        "strata=4",
    ]
    for kind in ("sampling=true", "sampling=false"):
        assert cli.run(["bench", f"run={runs['deep']}", *duo, *timing, kind]) == 0
        row = answer(capsys)["rows"][-1]
        assert row["policy"] == "DuoDiff, first 3 calls"
        assert row["macs_saved"] == pytest.approx(under["macs_saved"])


def _gmacs(capsys, run):
    assert cli.run(["profile", f"run={run}"]) == 0
    return answer(capsys)["gmacs"]


def test_baselines_of_a_smaller_network(runs, capsys, monkeypatch):
    """And where it was trained again, what was sampled with the old one is not taken for the new one's."""
    shutil.copytree(runs["shallow"], "small")
    settings = [
        "evaluation=base",
        "evaluation.num_images=3",
        "evaluation.chunk=3",
        "evaluation.metrics=[fd@random_conv]",
    ]
    settings += ["evaluation.timing_images=2", "evaluation.timing_rounds=1", f"evaluation.solvers.ddim.steps={STEPS}"]
    settings += ["evaluation.baselines=[fixed_depth,duodiff,small_network]", "evaluation.shallow=small"]
    exits = "{_target_: gearshift.policies.ExitSchedule, depths: [5, 4, 4, 3]}"
    asked = "{_target_: gearshift.policies.NetworkSwitch, other: small, calls: 3}"
    settings += [f"+evaluation.policies.exits={exits}", f"+evaluation.policies.asked={asked}"]
    command = ["evaluate", f"run={runs['deep']}", "device=cpu", "out=report", *settings, "evaluation.tolerance=100"]
    assert cli.run(command) == 0
    rows = {row["name"]: row for row in answer(capsys)["rows"]}
    full, small = rows["full"]["macs_per_image"], rows["small network"]["macs_per_image"]
    assert rows["asked"]["macs_per_image"] == pytest.approx((3 * small + full) / 4)
    assert {row.get("baseline") for row in rows.values()} >= {"fixed_depth", "small_network"}
    assert rows["full"]["macs_saved"] == 0 and all(row["images_per_s"] > 0 for row in rows.values())
    results = json.loads(Path("report/metrics.json").read_text())
    assert list(results["protocol"]["other_networks"]) == ["small"] and "stages" not in results
    text = Path("report/report.md").read_text()
    assert "Whether what they are set against beats them:" in text
    assert re.search(r"(beats|does not beat) small network at \d", text)
    assert "a smaller network trained from scratch at every call, at its own MACs" in text
    capsys.readouterr()
    command.append("evaluation.timing_images=0")
    monkeypatch.setattr("gearshift.evaluation.report.write_report", lambda folder, *rest: folder)
    assert cli.run(command) == 0
    captured = capsys.readouterr()
    assert "small network: 1 of 1 chunks are there already" in captured.err
    shutil.rmtree("small")
    shutil.copytree(runs["again"], "small")
    assert cli.run(command) == 0
    captured = capsys.readouterr()
    assert "small network: 1 of 1 chunks" not in captured.err and "asked: 1 of 1 chunks" not in captured.err
    assert "full: 1 of 1 chunks are there already" in captured.err
    again = {row["name"]: row for row in json.loads(captured.out.splitlines()[-1])["rows"]}
    assert again["small network"]["psnr_to_full"] != rows["small network"]["psnr_to_full"]
    assert again["exits"]["psnr_to_full"] == rows["exits"]["psnr_to_full"]


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ("nowhere", "the other network that the policy names: run=nowhere: there is no such folder"),
        ("foreign", "do not go together: the processes are DiscreteConfig("),
        ("pipeline", "the other network that the policy names: the run is the pipeline x/y of diffusers"),
    ],
)
def test_what_cannot_be_is_one_line(runs, capsys, other, line):
    folder = runs.get(other, Path(other))
    if other == "pipeline":
        folder.mkdir()
        (folder / "config.yaml").write_text("# gearshift run, format 1\npipeline: x/y\n")
    policy = ["policy=duodiff", f"policy.other={folder}", "policy.calls=1"]
    commands = [
        ["sample", "num_images=1"],
        ["evaluate", "evaluation=base", f"evaluation.shallow={folder}"],
        ["profile"],
    ]
    for verb, *more in commands:
        settings = more if verb == "evaluate" else [*more, *policy]
        assert cli.run([verb, f"run={runs['deep']}", *settings]) == 2
        [said] = [text for text in capsys.readouterr().err.splitlines() if text.strip()]
        assert line in said and str(folder) in said


def test_calls_and_checkpoints_that_there_are_not(runs, tmp_path):
    loaded = api.load_run(runs["deep"], device="cpu")
    with pytest.raises(UsageError, match=r"first 300 calls, and this run has 50; set calls to 0..50, or share"):
        loaded.sampler(NetworkSwitch(str(runs["shallow"]), 300))
    shutil.copytree(runs["shallow"], "bare", ignore=shutil.ignore_patterns("*.ckpt"))
    with pytest.raises(RunError, match=r"there is no checkpoint .*bare"):
        loaded.sampler(NetworkSwitch("bare", 1))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["sampling=true"], "takes a second network (of x), which is set beside that of a run; name it by run=RUN"),
        (["steps=true", "run=y"], "and steps=true times one; leave out the policy, or take sampling=true"),
    ],
)
def test_benchmarks_of_one_network_say_so(capsys, settings, line):
    assert cli.run(["bench", *settings, "policy=small_network", "policy.other=x", "device=cpu"]) == 2
    assert line in capsys.readouterr().err
