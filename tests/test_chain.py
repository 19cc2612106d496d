"""A training that starts from another: weights of a run folder, and `pretrain=EXPERIMENT` from the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gearshift import assembly, cli
from gearshift.assembly import build_denoiser, irrelevant_to_weights, pretraining, run_path
from gearshift.runtime import config, run
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir
from gearshift.runtime.run import RunFolder, weights_hash
from gearshift.training.checkpoint import load_weights
from gearshift.training.module import DiffusionTraining
from gearshift.verbs import train as verb

FIRST = ["experiment=digits", "+debug=tiny", "trainer.accelerator=cpu"]
# Another objective and network (no heads) than those of the pretraining.
SECOND = [*FIRST, "exits=none", "objective=simple", "trainer.batch_size=4", "name=tuned"]
CHAIN = [*SECOND, "pretrain=digits", 'pretrain_overrides=["trainer.max_steps=3"]']


@pytest.fixture(autouse=True)
def workplace(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def answers(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def train(capsys, *overrides):
    """The one answer of a command, and what it said besides."""
    assert cli.run(["train", *overrides]) == 0
    said = capsys.readouterr()
    [answer] = answers(said.out)
    return answer, said.err


def refused(capsys, *overrides):
    assert cli.run(["train", *overrides]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    [line] = [line for line in said.err.splitlines() if line.startswith("gearshift: ")]
    assert not Path("runs").exists(), "nothing was started"
    return line.removeprefix("gearshift: ")


def composed(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def weights(run, ema=True):
    return load_weights(RunFolder(run), ema=ema)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# init=RUN ------------------------------------------------------------------------------------------------------------


def test_a_run_folder_gives_its_averaged_weights(capsys):
    first, _ = train(capsys, *FIRST, "trainer.max_steps=5", "trainer.ema_decay=0.5", "trainer.ema_warmup=false")
    averaged, last = weights(first["run"]), weights(first["run"], ema=False)
    assert any(not torch.equal(averaged[name], last[name]) for name in averaged)
    network = build_denoiser(composed(*SECOND)).network
    verb._begin_from(network, Path(first["run"]))
    inside = {n.removeprefix("backbone."): value for n, value in averaged.items() if n.startswith("backbone.")}
    assert 0 < len(inside) < len(averaged), "heads that this network has no place for are left out"
    assert_equal(network.state_dict(), inside)
    # From the command line, where two further steps begin from them.
    tuned, said = train(capsys, *SECOND, f"init={first['run']}", "trainer.lr=1e-9")
    assert "not finished" not in said
    for name, value in weights(tuned["run"]).items():
        torch.testing.assert_close(value, inside[name], rtol=0, atol=1e-6)


def test_an_imported_run_has_no_average_and_gives_its_weights(capsys, workplace):
    torch.manual_seed(3)
    network = build_denoiser(composed(*SECOND)).network
    torch.save(network.state_dict(), "official.pth")
    narrow = ["backbone=uvit_digits", f"backbone.embed_dim={network.config.embed_dim}"]
    assert cli.run(["import", "weights=official.pth", *narrow]) == 0
    imported = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours = build_denoiser(composed(*SECOND)).network
    verb._begin_from(ours, Path(imported["run"]))
    assert_equal(ours.state_dict(), network.state_dict())


def test_a_run_that_is_not_finished_is_said_to_be(capsys):
    first, _ = train(capsys, *FIRST)
    Path(first["run"], "done.json").unlink()
    _, said = train(capsys, *SECOND, f"init={first['run']}")
    assert f"{first['run']} is not finished; its newest checkpoint is taken" in said


def test_a_run_of_another_shape_is_refused(capsys):
    first, _ = train(capsys, *FIRST)
    assert cli.run(["train", *SECOND, f"init={first['run']}", "backbone.depth=4"]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gearshift: ")]
    assert f"{first['run']} does not fit UViT" in line


# pretrain=EXPERIMENT -------------------------------------------------------------------------------------------------


def test_one_command_is_the_two_commands(capsys):
    chained, said = train(capsys, *CHAIN)
    assert "pretraining first: runs/digits/" in said
    assert (chained["steps"], chained["images"]) == (2, 8)
    # The pretraining is the run that its own command makes, and answers it.
    alone, _ = train(capsys, *FIRST, "trainer.max_steps=3")
    assert chained["pretrained"] == alone["run"]
    assert (alone["steps"], "pretrained" in alone) == (3, False)
    by_hand, _ = train(capsys, *SECOND, f"init={alone['run']}")
    assert by_hand["run"] != chained["run"]
    assert by_hand["loss"] == chained["loss"]
    for ema in (True, False):
        assert_equal(weights(by_hand["run"], ema), weights(chained["run"], ema))
    # The run says what it began from, and the same command answers at once.
    stored = OmegaConf.load(Path(chained["run"], "config.yaml"))
    assert (stored.pretrained, stored.pretrain) == (alone["run"], "digits")
    again, said = train(capsys, *CHAIN)
    assert again == chained
    assert said == ""


def test_a_pretraining_that_is_there_is_taken(capsys):
    """As after a kill between the two."""
    alone, _ = train(capsys, *FIRST, "trainer.max_steps=3")
    file = Path(alone["checkpoint"])
    before = file.stat().st_mtime_ns
    chained, said = train(capsys, *CHAIN)
    assert chained["pretrained"] == alone["run"]
    assert "pretraining first" not in said
    assert file.stat().st_mtime_ns == before


def test_an_interrupted_fine_tuning_needs_its_pretraining_no_more(capsys, monkeypatch):
    whole, _ = train(capsys, *CHAIN, "runs_dir=whole", "trainer.max_steps=4")
    command = [*CHAIN, "trainer.max_steps=4"]
    step = DiffusionTraining.training_step

    def stops(self, number, batch_idx):
        if number == 2 and self.config.max_steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTraining, "training_step", stops)
        assert cli.run(["train", *command]) == 143
    said = capsys.readouterr()
    assert answers(said.out) == []
    assert "stopped by SIGTERM after step 3 of 4" in said.err
    shutil.rmtree("runs/digits")
    rest, said = train(capsys, *command)
    assert "after step 3 of 4" in said
    assert not Path("runs/digits").exists()
    assert rest["loss"] == whole["loss"]
    assert_equal(weights(rest["run"]), weights(whole["run"]))


def test_what_changes_the_pretraining_changes_the_run():
    cfg = composed(*CHAIN)
    path = run_path(cfg)
    same = ['pretrain_overrides=["trainer.max_steps=3","trainer.log_every=1","name=other"]', "logger=wandb"]
    assert run_path(composed(*CHAIN, *same)) == path
    other = 'pretrain_overrides=["trainer.max_steps=3","trainer.lr=1e-5"]'
    assert run_path(composed(*CHAIN, other)) != path
    assert run_path(composed(*CHAIN, "seed=1")) != path
    # However it is said, what comes before is one training.
    said = 'pretrain_overrides=["trainer.max_steps=3","trainer.lr=3e-3"]'
    assert run_path(composed(*CHAIN, said)) == path
    # Runs without one are what they were before there were any.
    plain = composed(*SECOND)
    older = {key: value for key, value in config.plain(plain).items() if not key.startswith("pretrain")}
    assert run_path(plain).name == weights_hash(older, irrelevant_to_weights(plain)) != path.name


def test_what_is_carried_over_and_what_is_not():
    machine = ["trainer.accelerator=cuda", "trainer.devices=4", "trainer.num_nodes=2", "runs_dir=elsewhere", "seed=7"]
    own = ["trainer.lr=1e-6", "trainer.batch_size=8", "data.path=photographs", "logger=wandb", "init=null"]
    cfg = composed("experiment=cifar10_tiny", "pretrain=cifar10_tiny", *machine, *own)
    before = pretraining(cfg)
    assert before is not None
    trainer = before.trainer
    assert (trainer.accelerator, trainer.devices, trainer.num_nodes) == ("cuda", 4, 2)
    assert (before.runs_dir, before.seed, trainer.seed, before.data.path) == ("elsewhere", 7, 7, "photographs")
    usual = composed("experiment=cifar10_tiny")
    for key in ("lr", "batch_size", "max_steps", "precision"):
        assert trainer[key] == usual.trainer[key]
    assert before.logger == usual.logger != cfg.logger
    assert (before.name, before.pretrain, before.shrink) == ("cifar10_tiny", None, False)
    # Overrides have the last word, also over what is carried.
    cfg.pretrain_overrides = ["trainer.devices=1", "seed=8", "data.path=others", "trainer.lr=1"]
    before = pretraining(cfg)
    assert (before.trainer.devices, before.trainer.num_nodes, before.seed, before.trainer.lr) == (1, 2, 8, 1)
    assert before.data.path == "others"
    # A path belongs to a kind of data, and a shrunk run is not begun by one at full size.
    before = pretraining(composed("experiment=cifar10_tiny", "pretrain=digits", "+debug=tiny", *own))
    assert "path" not in before.data
    assert (before.shrink, before.trainer.max_steps) == (True, 2)


def test_dry_run_shows_both_and_starts_nothing(capsys):
    said, shown = train(capsys, *CHAIN, "--dry-run")
    assert not Path("runs").exists()
    assert said["pretrained"] == said["pretraining"]["run"] == str(run_path(pretraining(composed(*CHAIN))))
    assert said["run"] == str(run_path(composed(*CHAIN)))
    assert said["pretraining"]["params"] > said["params"], "with heads"
    assert shown.count("_target_: gearshift.backbones.uvit.UViT") == 2
    assert shown.index("max_steps: 3") < shown.index("max_steps: 2")


def test_three_in_a_row(capsys):
    middle = '["pretrain=digits","exits=none","objective=simple","trainer.lr=1e-4"]'
    last, said = train(capsys, *SECOND, "pretrain=digits", f"pretrain_overrides={middle}")
    assert said.count("pretraining first") == 2
    runs = sorted(Path("runs/digits").iterdir())
    assert len(runs) == 2
    stored = OmegaConf.load(Path(last["pretrained"], "config.yaml"))
    [begin] = [run for run in runs if str(run) != last["pretrained"]]
    assert stored.pretrained == str(begin)


def test_what_cannot_be_is_refused_before_anything_is_trained(capsys):
    assert "two beginnings" in refused(capsys, *CHAIN, "init=weights.pth")
    assert "there is no pretrain" in refused(capsys, *SECOND, 'pretrain_overrides=["seed=1"]')
    assert "Could not find 'experiment/nothing'" in refused(capsys, *SECOND, "pretrain=nothing")
    assert "trainer.lrr" in refused(capsys, *CHAIN, 'pretrain_overrides=["trainer.lrr=1"]')
    assert "trainer.lr" in refused(capsys, *CHAIN, 'pretrain_overrides=["trainer.lr=fast"]')
    assert "does not fit UViT" in refused(capsys, *CHAIN, "backbone.depth=4")
    # A mistake in what comes second.
    assert "needs uncertainty heads" in refused(capsys, *CHAIN, "objective=deediff")
    assert "trainer.batch_size=5" in refused(capsys, *CHAIN, "trainer.batch_size=5", "trainer.accumulate=2")


def test_a_circle_is_refused(monkeypatch):
    cfg = composed(*SECOND, "pretrain=digits")
    monkeypatch.setattr(assembly, "_composed", lambda overrides: composed("experiment=digits", "pretrain=digits"))
    with pytest.raises(UsageError, match="round in circles: digits, then digits"):
        run_path(cfg)


def test_jobs_of_a_sweep_share_a_pretraining(capsys):
    assert cli.run(["train", *CHAIN, "-m", "trainer.lr=1e-3,1e-4"]) == 0
    said = capsys.readouterr()
    both = answers(said.out)
    assert both[0]["run"] != both[1]["run"]
    assert both[0]["pretrained"] == both[1]["pretrained"]
    assert said.err.count("pretraining first") == 1
    # With a seed of its own a job has a pretraining of its own.
    assert cli.run(["train", *CHAIN, "-m", "seed=1,2"]) == 0
    both = answers(capsys.readouterr().out)
    assert both[0]["pretrained"] != both[1]["pretrained"]
    assert len(list(Path("runs/digits").iterdir())) == 3


def test_a_pretraining_in_use_is_waited_for(capsys, monkeypatch):
    """And taken over from whoever did not finish it."""
    before = pretraining(composed(*CHAIN))
    folder = RunFolder.create(run_path(before), before)
    holding = folder.lock()
    holding.__enter__()
    wait = verb._wait
    waited = []

    def release(found):
        waited.append(found.path)
        holding.__exit__(None, None, None)
        wait(found)

    monkeypatch.setattr(verb, "_wait", release)
    answer, said = train(capsys, *CHAIN)
    assert waited == [folder.path]
    assert f"run folder {folder.path} is in use by pid {os.getpid()}" in said
    assert "waiting for it" in said
    assert answer["pretrained"] == str(folder.path)
    assert folder.result["steps"] == 3


def test_waiting_ends_when_the_folder_is_free(workplace, monkeypatch):
    folder = RunFolder.create(workplace / "run", {"seed": 0})
    holding = folder.lock()
    holding.__enter__()
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            holding.__exit__(None, None, None)

    monkeypatch.setattr(verb.time, "sleep", sleep)
    monkeypatch.setattr(run._take, "__defaults__", (0.0,))
    verb._wait(folder)
    assert len(slept) == 3


# As processes --------------------------------------------------------------------------------------------------------

LONG = [
    *SECOND,
    "trainer.max_steps=120",
    "trainer.checkpoint_every_steps=3",
    "pretrain=digits",
    'pretrain_overrides=["trainer.max_steps=100","trainer.batch_size=8","trainer.checkpoint_every_steps=3"]',
]


def start(*arguments):
    command = [sys.executable, "-m", "gearshift.cli", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    [answer] = answers(out)
    return answer


def kill_when(process, happened):
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_in_each_part_it_ends_with_the_same_bits(workplace):
    whole = finish(start(*LONG, "runs_dir=whole"))
    command = [*LONG, "runs_dir=parts"]
    parts = workplace / "parts"

    def found(pattern):
        return bool(list(parts.glob(pattern)))

    kill_when(start(*command), lambda: found("digits/*/checkpoints/last.ckpt"))  # in the pretraining
    assert not found("digits/*/done.json")
    assert not found("tuned")
    kill_when(start(*command), lambda: found("digits/*/done.json"))  # between the two
    assert not found("tuned/*/done.json")
    kill_when(start(*command), lambda: found("tuned/*/checkpoints/last.ckpt"))  # in the fine-tuning
    assert not found("tuned/*/done.json")
    rest = finish(start(*command))
    assert rest["loss"] == whole["loss"]
    for key in ("run", "pretrained"):
        assert Path(rest[key]).name == Path(whole[key]).name
        for ema in (True, False):
            assert_equal(weights(rest[key], ema), weights(whole[key], ema))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_devices_carry_out_both_parts():
    one = finish(start(*CHAIN, "runs_dir=one", "trainer.max_steps=8"))
    two = finish(start(*CHAIN, "runs_dir=two", "trainer.max_steps=8", "trainer.devices=2"))
    for key in ("run", "pretrained"):
        assert Path(two[key]).name == Path(one[key]).name
        for name, value in weights(one[key]).items():
            torch.testing.assert_close(weights(two[key])[name], value, rtol=0, atol=1e-6, msg=name)
    # The first part done by two, the second by one.
    Path(two["run"], "done.json").unlink()
    for file in Path(two["run"], "checkpoints").iterdir():
        file.unlink()
    rest = finish(start(*CHAIN, "runs_dir=two", "trainer.max_steps=8"))
    assert rest["loss"] == pytest.approx(one["loss"], abs=1e-6)


@pytest.mark.slow
def test_jobs_in_processes_of_their_own_share_a_pretraining(workplace):
    sweep = start(*LONG, "-m", "launcher=local", "trainer.lr=1e-3,1e-4")
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out + err
    [pretrained] = (workplace / "runs" / "digits").iterdir()
    assert RunFolder(pretrained).result["steps"] == 100
    tuned = list((workplace / "runs" / "tuned").iterdir())
    assert [RunFolder(run).result["steps"] for run in tuned] == [120, 120]
