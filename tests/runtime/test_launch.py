"""Who a process is among its peers, and how the peers are started."""

import subprocess
import sys

import pytest

from gearshift.runtime import launch
from gearshift.runtime.errors import UsageError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NAME": "train"}
KEYS = {*TORCHRUN, *SRUN, "SLURM_NTASKS"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(variables):
        for key in KEYS:
            monkeypatch.delenv(key, raising=False)
        for key, value in variables.items():
            monkeypatch.setenv(key, value)

    set_to({})
    return set_to


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, False)),
        (TORCHRUN, (3, 4, True)),
        (SRUN, (1, 2, True)),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, (0, 1, False)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, False)),
        # The batch script of a job of two tasks: not a task itself.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}, (0, 1, False)),
        ({**SRUN, **TORCHRUN}, (3, 4, True)),
    ],
)
def test_the_place_is_read_from_the_environment(environment, variables, place):
    environment(variables)
    assert (launch.rank(), launch.world_size(), launch.launched_externally()) == place
    assert launch.is_main() == (place[0] == 0)


def test_the_launcher_gets_the_whole_command_line():
    from torch.distributed.run import parse_args

    arguments = launch.launcher_arguments(2, ["train", "experiment=digits", "+a.b=[1,2]", "--cfg", "job"])
    parsed = parse_args(arguments)
    assert parsed.standalone
    assert parsed.module
    assert parsed.nproc_per_node == "2"
    assert parsed.training_script == "gearshift.cli"
    assert parsed.training_script_args == ["train", "experiment=digits", "+a.b=[1,2]", "--cfg", "job"]


def test_one_device_and_launched_processes_go_on(environment, monkeypatch):
    monkeypatch.setattr(launch, "_run", lambda arguments: pytest.fail("started processes"))
    launch.ensure_processes(1, ["train"])
    launch.ensure_processes(1, ["train"], multirun=True)
    environment(TORCHRUN)
    launch.ensure_processes(2, ["train"])
    launch.ensure_processes(2, ["train"], multirun=True)
    environment(SRUN)
    launch.ensure_processes(2, ["train"], multirun=True)


def test_several_devices_start_processes_and_leave_with_their_exit_code(environment, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "_run", lambda arguments: started.append(arguments) or 7)
    with pytest.raises(SystemExit) as caught:
        launch.ensure_processes(2, ["train", "seed=1"])
    assert caught.value.code == 7
    assert started == [launch.launcher_arguments(2, ["train", "seed=1"])]


@pytest.mark.parametrize("devices", [0, -3])
def test_fewer_than_one_device_is_a_usage_error(environment, devices):
    with pytest.raises(UsageError, match=rf"devices={devices} must be at least 1"):
        launch.ensure_processes(devices, ["evaluate"], name="devices")


def test_a_sweep_starts_no_processes(environment, monkeypatch):
    monkeypatch.setattr(launch, "_run", lambda arguments: pytest.fail("started processes"))
    with pytest.raises(
        UsageError, match=r"trainer\.devices=2 within a sweep .*srun or torchrun; set trainer\.devices=1"
    ):
        launch.ensure_processes(2, ["train", "-m"], multirun=True)


def test_a_launcher_with_another_number_of_processes_is_a_usage_error(environment):
    environment(TORCHRUN)
    with pytest.raises(UsageError, match=r"trainer\.devices=4, but the launcher started 2 processes"):
        launch.ensure_processes(4, ["train"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("if rank() == 1: sys.exit(7)\ntime.sleep(60)", 7),
        ("if rank() == 0: os.kill(os.getpid(), 9)\ntime.sleep(60)", 137),
    ],
)
def test_real_processes_know_their_place_and_their_exit_code_comes_back(environment, tmp_path, ending, code):
    (tmp_path / "peer.py").write_text(
        "import os, sys, time\nfrom gearshift.runtime.launch import rank, world_size\n"
        "print('peer', rank(), 'of', world_size(), sys.argv[1:], flush=True)\n" + ending
    )
    start = (
        "import sys; from gearshift.runtime import launch\n"
        "launch.launcher_arguments = lambda n, a: ['--standalone', '--nproc-per-node', str(n), '-m', 'peer', *a]\n"
        "launch.ensure_processes(2, ['train', 'x=1'])"
    )
    done = subprocess.run([sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", *(f"peer {rank} of 2 ['train', 'x=1']" for rank in (0, 1))]
    assert "Traceback" not in done.stderr
