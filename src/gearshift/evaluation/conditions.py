"""The conditions of a measurement, and whether something else used the machine meanwhile."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from typing import Any

import torch


def conditions(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a time depends on, for reports: device, threads, versions, precision."""
    found: dict[str, Any] = {
        "device": _device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": False,
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32
        found["cudnn_benchmark"] = torch.backends.cudnn.benchmark
    else:
        found["cores"] = os.cpu_count()
        found["threads"] = torch.get_num_threads()
        found["note"] = "CPU times are indicative"
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return f"{models[0] if models else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Quiet:
    """Watches, between `start` and `others`, how much of the machine's CPU time went to other processes."""

    _total: float = 0.0
    _own: float = 0.0
    _wall: float = 0.0

    def start(self) -> Quiet:
        self._total, self._own, self._wall = _busy_seconds(), _own_seconds(), time.perf_counter()
        return self

    def others(self) -> float | None:
        """Share of the CPU time of all cores that other processes used since `start`; None where it is not known."""
        total = _busy_seconds()
        wall = time.perf_counter() - self._wall
        if total != total or wall <= 0:  # nan: no such counter here
            return None
        foreign = (total - self._total) - (_own_seconds() - self._own)
        return max(0.0, foreign / (wall * _usable_cores()))


def _usable_cores() -> int:
    """Cores this process may run on: a job with two of 64 is disturbed by what runs on its two at the latest."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _busy_seconds() -> float:
    """CPU seconds all processes have used, stolen time included; nan where the system does not tell."""
    try:
        with open("/proc/stat", encoding="utf-8") as file:
            user, nice, system, _idle, _wait, irq, soft, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return float("nan")
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
