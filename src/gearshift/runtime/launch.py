"""Several devices: who this process is among its peers, and how the peers are started.

With more than one device the program starts itself again, once per device, under torch's own launcher; started by
torchrun or srun it finds its place from the environment. A sweep job never starts processes of its own: launchers that
re-execute the command line would enter the sweep again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence

from gearshift.runtime.errors import UsageError


def rank() -> int:
    """The number of this process among its peers on all nodes; 0 when it is alone."""
    return _place(os.environ)[0]


def world_size() -> int:
    """The number of processes that work together on all nodes; 1 when this one is alone."""
    return _place(os.environ)[1]


def local_rank() -> int:
    """The number of this process among those on its node: which device is its own."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID") if launched_externally() else ():
        if name in os.environ:
            return int(os.environ[name])
    return 0


def is_main() -> bool:
    """Whether this is the process that speaks and writes shared files."""
    return rank() == 0


def launched_externally(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun or srun started this process as one of a set (of one, possibly, for torchrun)."""
    environment = os.environ if environment is None else environment
    return _by_torchrun(environment) or _by_srun(environment)


def ensure_processes(
    devices: int, arguments: Sequence[str], *, multirun: bool = False, name: str = "trainer.devices"
) -> None:
    """Makes sure that one process per device is at work; `arguments` is the command line after the program's
    name, `name` the setting that says how many.

    Returns in a process that should do the work: the only one, or one that a launcher started. Otherwise it starts
    `devices` processes with the same command line, waits, and leaves through SystemExit with the exit code of the first
    that failed (128 + signal for one that was killed).

    Raises UsageError for fewer than one device, for several within a sweep, and where a launcher started another number
    of processes per node than `devices` says.
    """
    if devices < 1:
        raise UsageError(f"{name}={devices} must be at least 1")
    if launched_externally():
        _check_count(devices, os.environ, name)
        return
    if devices == 1:
        return
    if multirun:
        raise UsageError(
            f"{name}={devices} within a sweep (-m): a sweep job works on one device, or its processes are "
            f"started by srun or torchrun; set {name}=1, or use launcher=slurm with one task per device, "
            "or run the jobs one by one"
        )
    raise SystemExit(_run(launcher_arguments(devices, arguments)))


def launcher_arguments(devices: int, arguments: Sequence[str]) -> list[str]:
    """The arguments for `python -m torch.distributed.run` that start this command line on every device of this node."""
    return ["--standalone", "--nproc-per-node", str(devices), "-m", "gearshift.cli", *arguments]


def _run(arguments: list[str]) -> int:
    # Called rather than executed: the launcher's own exit code is 1 whatever happened, and it prints a traceback.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # The workers tell their own errors in one line; the launcher would stand around it with pages of its own.
    for name in ("torch.distributed.run", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    devices = int(arguments[arguments.index("--nproc-per-node") + 1])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode >= 0:  # it has said what was wrong
            return failure.exitcode
        print(
            f"gearshift: process {number} of {devices} was killed by {failure.signal_name()}, and the others were "
            "stopped; what was finished is kept: run the same command again",
            file=sys.stderr,
        )
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _place(environment: Mapping[str, str]) -> tuple[int, int]:
    if _by_torchrun(environment):
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if _by_srun(environment):
        return int(environment["SLURM_PROCID"]), _tasks(environment)
    return 0, 1


def _by_torchrun(environment: Mapping[str, str]) -> bool:
    return all(key in environment for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def _by_srun(environment: Mapping[str, str]) -> bool:
    # A shell of the batch script or of an interactive job has the job's variables but is not one of its tasks.
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return (
        all(key in environment for key in ("SLURM_STEP_ID", "SLURM_PROCID"))
        and not interactive
        and _tasks(environment) > 1
    )


def _tasks(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))


def _check_count(devices: int, environment: Mapping[str, str], name: str) -> None:
    local = environment.get("LOCAL_WORLD_SIZE")
    if local is not None and int(local) != devices:
        raise UsageError(
            f"{name}={devices}, but the launcher started {local} processes on this node; make the two equal"
        )
