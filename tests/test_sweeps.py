"""Sweeps: one command line, several runs, by Hydra's own launcher and by submitit's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from gearshift import cli
from gearshift.runtime.paths import conf_dir

TINY = ["train", "experiment=digits", "+debug=tiny", "trainer.accelerator=cpu", "trainer.batch_size=4"]
TASK = [sys.executable, "-m", "gearshift.cli", *TINY]


@pytest.fixture(autouse=True)
def workplace(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def answers(out):
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def complaints(err):
    return [line for line in err.splitlines() if line.startswith("gearshift: ")]


def runs(workplace):
    """Finished runs by their seed and depth."""
    from omegaconf import OmegaConf

    found = {}
    for file in (workplace / "runs" / "digits").glob("*/config.yaml"):
        cfg = OmegaConf.load(file)
        if (file.parent / "done.json").exists():
            found[cfg.seed, cfg.backbone.depth] = file.parent
    return found


def test_every_job_has_its_folder_and_its_answer(workplace, capsys):
    assert cli.run([*TINY, "-m", "seed=1,2"]) == 0
    said = answers(capsys.readouterr().out)
    assert [answer["steps"] for answer in said] == [2, 2]
    assert said[0]["loss"] != said[1]["loss"]
    made = runs(workplace)
    assert [answer["run"] for answer in said] == [str(made[seed, 6].relative_to(workplace)) for seed in (1, 2)]
    # A job of a sweep is the run that the plain command makes, and answers again at once.
    assert cli.run([*TINY, "seed=2"]) == 0
    assert answers(capsys.readouterr().out) == said[1:]
    assert runs(workplace) == made


def test_jobs_of_a_sweep_do_not_overwrite_each_others_evaluation(workplace, capsys):
    assert cli.run([*TINY, "seed=1"]) == 0
    [answer] = answers(capsys.readouterr().out)
    settings = ["num_images=4", "chunk=4", "min_images=2", "timing_images=0", "equal_macs=false", "metrics=[]"]
    command = ["evaluate", f"run={answer['run']}", *(f"evaluation.{setting}" for setting in settings)]
    command += ["evaluation.solvers.ddim.steps=2", "-m", "evaluation.guidance=1,2"]
    assert cli.run(command) == 2
    out, err = capsys.readouterr()
    assert len(answers(out)) == 1
    [line] = complaints(err)
    assert "job 1 (" in line and "evaluation.guidance=2" in line
    assert "an earlier job of this sweep has its report in" in line
    assert cli.run([*command, "evaluation.name='w${evaluation.guidance}'"]) == 0
    assert [Path(answer["report"]).parent.name for answer in answers(capsys.readouterr().out)] == ["w1", "w2"]


def test_a_failing_job_is_named_and_does_not_stop_the_others(workplace, capsys):
    assert cli.run([*TINY, "--multirun", "backbone.depth=4,5,6"]) == 2
    said = capsys.readouterr()
    assert len(answers(said.out)) == 2
    [line] = complaints(said.err)
    assert line.startswith("gearshift: job 1 (backbone.depth=5): ")
    assert "must be even" in line
    assert runs(workplace).keys() == {(0, 4), (0, 6)}


def test_several_devices_are_refused_once_and_nothing_starts(workplace, capsys):
    assert cli.run([*TINY, "-m", "trainer.devices=2", "seed=1,2"]) == 2
    said = capsys.readouterr()
    assert answers(said.out) == []
    [line] = complaints(said.err)
    assert "trainer.devices=2 within a sweep" in line
    assert "trainer.devices=1" in line
    assert not (workplace / "runs").exists()


def test_a_sweep_cannot_be_printed(capsys):
    assert cli.run([*TINY, "-m", "seed=1,2", "--cfg", "job"]) == 2
    [line] = complaints(capsys.readouterr().err)
    assert "--multirun" in line
    assert "--cfg" in line


@pytest.mark.parametrize(("name", "launcher"), [("slurm", "SlurmLauncher"), ("local", "LocalLauncher")])
def test_the_launchers_compose(name, launcher):
    """Hydra checks the settings against the launcher's own schema."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=[f"launcher={name}", "experiment=digits"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.endswith(launcher)
    # One device per job: a sweep job starts no processes of its own.
    assert cfg.hydra.launcher.tasks_per_node == cfg.trainer.devices == 1


def test_an_absent_launcher_says_what_to_install(capsys, monkeypatch):
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # registers the launchers that are there
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "submitit_slurm.yaml")
    assert cli.run([*TINY, "-m", "launcher=slurm", "seed=1,2"]) == 2
    [line] = complaints(capsys.readouterr().err)
    assert "pip install 'gearshift[slurm]'" in line


@pytest.mark.slow
def test_submitit_runs_the_jobs_in_processes_of_their_own(workplace):
    command = [*TASK, "-m", "launcher=local", "backbone.depth=5,4", "seed=1,2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    [line] = complaints(done.stderr)
    assert "depth=5 must be even" in line
    assert "Traceback" not in done.stderr
    # What failed came first and stopped nothing.
    assert runs(workplace).keys() == {(1, 4), (2, 4)}
    logs = [file.read_text() for file in workplace.glob("multirun/*/.submitit/*/*_log.out")]
    assert len(logs) == 4
    said = {answer["run"] for log in logs for answer in answers(log)}
    assert said == {str(run.relative_to(workplace)) for run in runs(workplace).values()}
    # Each in its own process.
    locks = [(run / "lock").read_text().split()[0] for run in runs(workplace).values()]
    assert len(set(locks)) == 2
    again = subprocess.run([*TASK, "-m", "launcher=local", "backbone.depth=4"], capture_output=True, timeout=240)
    assert again.returncode == 0


@pytest.mark.slow
def test_a_signal_ends_the_whole_sweep(workplace):
    command = [*TASK, "-m", "seed=1,2", "trainer.max_steps=100000", "trainer.log_every=5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sweep:
        assert sweep.stderr is not None
        for line in sweep.stderr:
            if line.startswith("train: 0/"):
                break
        os.kill(sweep.pid, signal.SIGTERM)
        out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 143, err
    [line] = complaints(err)
    assert "job 0 (seed=1): stopped by SIGTERM after step" in line
    assert answers(out) == []
    [run] = (workplace / "runs" / "digits").iterdir()
    assert (run / "checkpoints" / "last.ckpt").exists()
