"""What is recorded about a measurement: the device and its state, precision, versions."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gearshift.evaluation import conditions as module
from gearshift.evaluation.conditions import CARD, card, conditions, is_compiled, peak_memory, versions

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
EVERYWHERE = {
    "device",
    "processes",
    "torch",
    "python",
    "dtype",
    "compiled",
    "cuda_graphs",
    "threads",
    "omp_threads",
    "deterministic",
    "matmul_precision",
    "convolution_precision",
}


def test_conditions_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = conditions(CPU, torch.bfloat16)
    assert set(found) == EVERYWHERE | {"cores", "note"}
    assert (found["dtype"], found["processes"], found["omp_threads"]) == ("bfloat16", 1, "3")
    assert (found["compiled"], found["cuda_graphs"]) == (False, False)
    assert found["threads"] == torch.get_num_threads()
    assert found["note"] == "CPU times are indicative"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert conditions(CPU, torch.float32)["omp_threads"] is None


def test_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert conditions(CPU, torch.float32)["processes"] == 4


def test_conditions_on_cuda(monkeypatch: pytest.MonkeyPatch, nvml: SimpleNamespace) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    found = conditions(CUDA, torch.float16)
    own = {"cuda", "cudnn", *CARD, "cudnn_benchmark", "cudnn_deterministic"}
    assert set(found) == EVERYWHERE | own
    assert found["device"] == "NVIDIA Something"
    assert (found["driver"], found["power_limit_w"]) == ("570.1", 700.0)


# Precision -----------------------------------------------------------------------------------------------------------


def test_precision_is_read_after_the_new_switch_was_set(monkeypatch: pytest.MonkeyPatch, nvml: SimpleNamespace) -> None:
    """Where fp32_precision was set, torch raises at reading allow_tf32."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the flags only")
    before = (matmul.fp32_precision, conv.fp32_precision)
    try:
        for wanted in (("tf32", "ieee"), ("ieee", "tf32")):
            matmul.fp32_precision, conv.fp32_precision = wanted
            found = conditions(CUDA, torch.float32)
            assert (found["matmul_precision"], found["convolution_precision"]) == wanted
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


@pytest.mark.parametrize(
    ("backend", "operation", "said"),
    [
        (SimpleNamespace(conv=SimpleNamespace(fp32_precision="tf32"), allow_tf32=False), "conv", "tf32"),
        (SimpleNamespace(allow_tf32=True), "conv", "tf32"),  # the flags of torch before 2.9
        (SimpleNamespace(allow_tf32=False), None, "ieee"),
        (SimpleNamespace(), "matmul", None),
    ],
)
def test_precision_of_old_and_new_switches(backend: Any, operation: str | None, said: str | None) -> None:
    assert module._precision(backend, operation) == said


def test_compiled_parts_are_seen() -> None:
    plain, part = nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    assert not is_compiled(plain)
    part[0].compile(backend="eager")
    assert is_compiled(part)
    assert is_compiled(nn.Sequential(torch.compile(plain, backend="eager")))  # type: ignore[arg-type]
    assert conditions(CPU, torch.float32, part)["compiled"] is True
    assert conditions(CPU, torch.float32, plain)["compiled"] is False


# The card ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """NVML, played; `calls` says what it was asked."""

    class Error(Exception):
        pass

    calls: list[str] = []

    def by_uuid(uuid: str) -> str:
        calls.append(uuid)
        return "handle"

    found = SimpleNamespace(
        NVMLError=Error,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        calls=calls,
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlSystemGetDriverVersion=lambda: b"570.1",
        nvmlDeviceGetPowerManagementLimit=lambda handle: 700_000,
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1400, 2: 2600}[kind],
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: {1: 1980}[kind],
    )
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    return found


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """nvidia-smi, played, on a machine without NVML: `says` is its answer, or an error."""
    told: dict[str, Any] = {"says": "570.1, 700.00, 1400, 1980, 2600\n"}

    def run(command: list[str], **settings: Any) -> Any:
        told["command"], told["timeout"] = command, settings["timeout"]
        if isinstance(told["says"], Exception):
            raise told["says"]
        return SimpleNamespace(stdout=told["says"])

    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    return told


STATE = {
    "driver": "570.1",
    "power_limit_w": 700.0,
    "sm_clock_mhz": 1400,
    "sm_clock_max_mhz": 1980,
    "memory_clock_mhz": 2600,
}
UNKNOWN = dict.fromkeys(CARD)


def test_nvml_is_asked_about_the_very_card(nvml: SimpleNamespace) -> None:
    assert card(CUDA) == STATE
    assert nvml.calls == ["init", "GPU-12-34", "shutdown"]


def test_what_nvml_refuses_is_none(nvml: SimpleNamespace) -> None:
    def refuse(*_: Any) -> Any:
        raise nvml.NVMLError("not permitted")

    nvml.nvmlDeviceGetPowerManagementLimit = refuse
    nvml.nvmlSystemGetDriverVersion = lambda: "571.0"  # newer packages say text
    assert card(CUDA) == {**STATE, "driver": "571.0", "power_limit_w": None}


def test_without_nvml_the_program_is_asked(smi: dict[str, Any]) -> None:
    assert card(CUDA) == STATE
    assert smi["command"][:2] == ["nvidia-smi", "--id=GPU-12-34"]
    assert smi["timeout"] <= 10
    smi["says"] = "570.1, [N/A], [Not Supported], 1980, 2600\n"
    assert card(CUDA) == {**STATE, "power_limit_w": None, "sm_clock_mhz": None}


@pytest.mark.parametrize(
    "says",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 10),
        subprocess.CalledProcessError(6, "nvidia-smi"),
        "No devices were found\n",
    ],
)
def test_what_nobody_knows_is_none(smi: dict[str, Any], says: Any) -> None:
    smi["says"] = says
    assert card(CUDA) == UNKNOWN


def test_a_card_without_an_identifier(smi: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the answer might be about another card."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert card(CUDA) == UNKNOWN
    assert "command" not in smi


def test_peak_memory_is_not_made_up_on_the_cpu() -> None:
    assert peak_memory(CPU) is None


@pytest.mark.gpu
def test_a_real_card_has_a_name_and_no_surprises() -> None:
    found = conditions(torch.device("cuda", 0), torch.float32)
    assert found["device"] == torch.cuda.get_device_name(0)
    assert set(CARD) <= set(found)
    for key in CARD[1:]:
        assert found[key] is None or found[key] > 0


# Versions ------------------------------------------------------------------------------------------------------------


def test_versions_come_from_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert list(found) == [
        "gearshift",
        "torch",
        "torchvision",
        "lightning",
        "torchmetrics",
        "torch-fidelity",
        "diffusers",
        "numpy",
        "hydra-core",
    ]
    assert found["numpy"] == metadata.version("numpy")
    real = metadata.version

    def without_diffusers(name: str) -> str:
        if name == "diffusers":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(module.metadata, "version", without_diffusers)
    assert versions() == {**found, "diffusers": "not installed"}


def test_versions_import_nothing() -> None:
    heavy = ["torchvision", "lightning", "torchmetrics", "torch_fidelity", "diffusers"]
    code = (
        "import sys; from gearshift.evaluation.conditions import versions; versions(); "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
