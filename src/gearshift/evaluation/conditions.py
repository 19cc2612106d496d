"""The conditions of a measurement, and whether something else used the machine meanwhile."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from gearshift.runtime.launch import world_size

PACKAGES = (
    "gearshift",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "torch-fidelity",
    "diffusers",
    "numpy",
    "hydra-core",
)
"""Distributions whose versions may change a number."""
CARD = ("driver", "power_limit_w", "sm_clock_mhz", "sm_clock_max_mhz", "memory_clock_mhz")
"""What is asked about a CUDA device beyond its name, in this order."""


def conditions(device: torch.device, dtype: torch.dtype, network: nn.Module | None = None) -> dict[str, Any]:
    """What a time depends on, for reports: device, driver, threads, processes, versions, precision.

    `network` is looked at for compiled parts. On CUDA: driver, power limit (watts) and clocks (MHz, at the moment of
    asking) are None where neither NVML nor nvidia-smi tells them.
    """
    found: dict[str, Any] = {
        "device": _device_name(device),
        "processes": world_size(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": network is not None and is_compiled(network),
        "cuda_graphs": False,  # nothing here captures any
        "threads": torch.get_num_threads(),
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found.update(card(device))
        found["matmul_precision"] = _precision(torch.backends.cuda.matmul)
        found["convolution_precision"] = _precision(torch.backends.cudnn, "conv")
        found["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        found["cudnn_deterministic"] = torch.backends.cudnn.deterministic
    else:
        found["cores"] = os.cpu_count()
        found["matmul_precision"] = _precision(torch.backends.mkldnn, "matmul")
        found["convolution_precision"] = _precision(torch.backends.mkldnn, "conv")
        found["note"] = "CPU times are indicative"
    return found


def versions() -> dict[str, str]:
    """Versions of the installed packages that may change a number, read from their metadata: nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def is_compiled(network: nn.Module) -> bool:
    """Whether any part of the network went through torch.compile."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in network.modules()
    )


def _precision(backend: Any, operation: str | None = None) -> str | None:
    """How a backend takes float32 products: "ieee", "tf32", "bf16", or "none" where it follows torch's default.

    torch 2.9 replaced the flags by a precision, and refuses to read the one once the other was set.
    """
    holder = backend if operation is None else getattr(backend, operation, backend)
    precision = getattr(holder, "fp32_precision", None)
    if precision is not None:
        return str(precision)
    allowed = getattr(holder, "allow_tf32", None)
    return None if allowed is None else "tf32" if allowed else "ieee"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return f"{models[0] if models else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


# The device ----------------------------------------------------------------------------------------------------------


def card(device: torch.device) -> dict[str, Any]:
    """The entries of `CARD` for a CUDA device, each None where it is not known."""
    found: dict[str, Any] = dict.fromkeys(CARD)
    # The number of a device is this process's own (CUDA_VISIBLE_DEVICES); the identifier is the same for everybody.
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    if uuid:
        uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        found.update(_from_nvml(uuid) or _from_smi(uuid) or {})
    return found


def _from_nvml(uuid: str) -> dict[str, Any] | None:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older of two packages of this name recommends the newer one
            import pynvml
    except ImportError:
        return None

    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except pynvml.NVMLError:
            return None

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = ask(pynvml.nvmlDeviceGetHandleByUUID, uuid)
        if handle is None:
            return None
        driver, limit = ask(pynvml.nvmlSystemGetDriverVersion), ask(pynvml.nvmlDeviceGetPowerManagementLimit, handle)
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "power_limit_w": None if limit is None else limit / 1000,
            "sm_clock_mhz": ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        }
    finally:
        ask(pynvml.nvmlShutdown)


def _from_smi(uuid: str) -> dict[str, Any] | None:
    import subprocess

    query = "driver_version,power.limit,clocks.current.sm,clocks.max.sm,clocks.current.memory"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    fields = [field.strip() for field in said.strip().split(",")]
    if len(fields) != len(CARD):
        return None
    return {"driver": fields[0], **{key: _number(field) for key, field in zip(CARD[1:], fields[1:], strict=True)}}


def _number(text: str) -> float | None:
    """None for "[N/A]" and its relatives."""
    try:
        return float(text)
    except ValueError:
        return None


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes of device memory that tensors held at once since `forget_peak`, weights included.

    None (not measured) on the CPU, where the system's figures mix in libraries, caches and what was freed long ago.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# Other processes -----------------------------------------------------------------------------------------------------


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
