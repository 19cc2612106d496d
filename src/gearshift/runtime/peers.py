"""What several processes of one command say to each other: that they are there, that they are done, one small value.

Bulk goes through files in the run folder, which every process must see; only words go through here, over gloo, on the
host. Alone, a process meets nobody and every function returns at once.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from gearshift.runtime.errors import RunError
from gearshift.runtime.launch import is_main, rank, world_size

T = TypeVar("T")


def meet() -> None:
    """Waits until every process of the command is there. Collective; returns at once when all have met before.

    Met early, the processes notice when one of them ends: its connections close, and who waits for it is told.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if "MASTER_ADDR" not in os.environ:  # srun names the nodes, but not where to meet
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        os.environ["MASTER_ADDR"] = SLURMEnvironment.resolve_root_node_address(nodes)
        # Of its own for each step of a job, and the same in all of its processes.
        numbers = [os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
        job, step = (int(number[-4:]) if number[-4:].isdigit() else 0 for number in numbers)
        os.environ.setdefault("MASTER_PORT", str(15000 + (job + 101 * step) % 10000))
    with _told("the processes met"):
        # One process may be through with its part long before another.
        dist.init_process_group("gloo", rank=rank(), world_size=world_size(), timeout=datetime.timedelta(days=1))
    # Left to the end of the interpreter, its threads abort the process.
    atexit.register(dist.destroy_process_group)


def barrier(what: str) -> None:
    """Waits until every process is here; `what` says what had to be done by then. Raises RunError when one is gone."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    meet()
    with _told(what):
        dist.barrier()


def broadcast(value: T, what: str = "the main process had decided") -> T:
    """The main process's `value` in every process (anything that pickles). Raises RunError when one is gone."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    meet()
    box = [value]
    with _told(what):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T, what: str = "every process had answered") -> list[T] | None:
    """Every process's `value` in the order of ranks on the main process, None elsewhere. Raises RunError when one is
    gone."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    meet()
    everything: list[T | None] | None = [None] * world_size() if is_main() else None
    with _told(what):
        dist.gather_object(value, everything)
    return everything  # type: ignore[return-value]  # every entry is set now


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch's own kinds derive from RuntimeError
        raise RunError(
            f"another of the {world_size()} processes ended before {what}; "
            "what was finished is kept: run the same command again"
        ) from error
