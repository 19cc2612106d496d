"""The ledger: hand counts, saving and loading, merging."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.execution.plan import StepPlan
from gearshift.runtime.errors import RunError
from gearshift.sampling.ledger import Ledger, LedgerData

from ..contract import EAGER, build, cost_table


def recorded() -> LedgerData:
    """Two samples in two branches, three calls: per-row depths, everything skipped, half skipped."""
    network = build("isotropic")
    table = cost_table(network)
    denoiser = Denoiser(network, Discrete(DiscreteConfig()))
    calls = DDIM(DDIMConfig(steps=3)).calls(denoiser.process)
    ledger = Ledger(table, [table.full(network).macs] * 3, branches=2, batch=2)
    x, labels = torch.randn(2, 2, 8, 8), torch.tensor([0, 1])
    held = None
    plans = [
        StepPlan(depth=torch.tensor([1, 2, 3, 4])),
        StepPlan(call=False),
        StepPlan(call=torch.tensor([True, False, False, True]), depth=2),
    ]
    for call, plan in zip(calls, plans, strict=True):
        prediction = denoiser.predict(x, call.time, labels, plan=plan, guidance=2.0, held=held, packing=EAGER)
        held = prediction.held
        ledger.record(call, prediction)
    return ledger.close()


def test_hand_count() -> None:
    data = recorded()
    table = cost_table(build("isotropic"))
    cost = {0: 0, **{d: table.path_cost(0, d, blocks=(0, 1, 2, 3)).macs for d in (1, 2, 3, 4)}}
    depth = [[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[2, 0], [0, 2]]]
    assert data.depth.tolist() == depth
    assert data.macs.tolist() == [[[cost[d] for d in branch] for branch in call] for call in depth]
    assert data.called.tolist() == [[[d > 0 for d in branch] for branch in call] for call in depth]
    assert data.num_samples == 2
    assert data.macs_per_image == (cost[1] + cost[2] + cost[3] + cost[4] + 2 * cost[2]) / 2
    assert data.full_macs_per_image == 6 * cost[4]
    assert data.macs_saved == pytest.approx(1 - data.macs_per_image / (6 * cost[4]))
    assert data.calls_per_image == 3
    assert data.time.tolist() == sorted(data.time, reverse=True)


def same(a: LedgerData, b: LedgerData) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(LedgerData)) and all(
        getattr(a, f.name).dtype == getattr(b, f.name).dtype for f in fields(LedgerData)
    )


def test_save_and_load(tmp_path: Path) -> None:
    data = recorded()
    data.save(tmp_path / "ledger.npz")
    assert same(LedgerData.load(tmp_path / "ledger.npz"), data)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.npz"]


def test_merging_the_parts_gives_the_whole() -> None:
    data = recorded()
    assert same(LedgerData.merge([data.take(slice(0, 1)), data.take(slice(1, 2))]), data)
    assert data.take(slice(1, None)).num_samples == 1


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut off"])
def test_what_is_no_ledger(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(RunError, match=r"bad.npz is not a ledger"):
        LedgerData.load(tmp_path / "bad.npz")


def test_other_arrays_are_no_ledger(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("other.npz", "array.npy", "absent.npz"):
        with pytest.raises(RunError, match="is not a ledger"):
            LedgerData.load(tmp_path / name)
