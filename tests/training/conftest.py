"""The toy training, as a fixture and as a program."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

_FILE = Path(__file__).with_name("toy.py")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gearshift_test_toy", _FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def program() -> Callable[..., subprocess.Popen[str]]:
    """Starts `python [LAUNCHER...] toy.py ARGUMENTS...` on one thread."""

    def start(*arguments: str, launcher: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *launcher, str(_FILE), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            # A shell that runs the tests in the background has them ignore Ctrl-C, and what is ignored is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


@pytest.fixture(scope="session")
def assert_equal() -> Callable[[Any, Any], None]:
    """Two nested structures are the same, tensors bit for bit."""

    def check(a: Any, b: Any, path: str = "") -> None:
        assert type(a) is type(b), path
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), path
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), path
            for key in a:
                check(a[key], b[key], f"{path}.{key}")
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), path
            for number, (x, y) in enumerate(zip(a, b, strict=True)):
                check(x, y, f"{path}.{number}")
        else:
            assert a == b, path

    return check
