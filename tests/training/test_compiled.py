"""Training with compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from gearshift.objectives.scheduled import Scheduled, ScheduledConfig
from gearshift.policies import ExitSchedule

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_compiled_blocks_learn_what_plain_ones_do(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_equal: Callable[[Any, Any], None]
) -> None:
    """Graphs that torch itself runs: the same bits, names and resumable checkpoints. A plain run takes them up."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    compiling: Callable[..., None] = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode=None: compiling(module, backend="eager"))

    def train(name: str, **changes: Any) -> dict[str, Any]:
        objective = Scheduled(ScheduledConfig(schedule=ExitSchedule(depths=[4, 3, 2, 1]), label_dropout=0.2))
        config = toy.toy_config(lr_schedule="constant", **changes)
        toy.toy_train(tmp_path / name, config, denoiser=toy.toy_dit(), objective=objective)
        found: dict[str, Any] = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        found["gearshift"].pop("seconds")
        return found

    plain = train("plain")
    assert counters["stats"]["unique_graphs"] == 0
    compiled = train("compiled", compile=True)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert_equal(compiled, plain)
    train("parts", compile=True, max_steps=6)
    (tmp_path / "parts" / "done.json").unlink()  # finished after six steps; now it goes on
    assert_equal(train("parts"), plain)
    dynamo.reset()
