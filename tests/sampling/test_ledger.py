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
from gearshift.execution.memory import Memory
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


def hand_made(log_snr: list[float], called: list[list[bool]], **fields: object) -> LedgerData:
    """A ledger of one branch whose samples run 4 blocks when they are called; `called` is over calls, then samples."""
    flags = np.array(called)[:, None]
    calls = len(called)
    return LedgerData(
        depth=(flags * 4).astype(np.int16),
        called=flags,
        macs=(flags * 100).astype(np.int64),
        reused=fields.pop("reused", np.zeros(flags.shape, dtype=np.int16)),  # type: ignore[arg-type]
        full_macs=np.full(calls, 100, dtype=np.int64),
        time=np.arange(calls, 0, -1, dtype=np.float64),
        log_snr=np.array(log_snr),
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("called", "calls", "span"),
    [
        ([[1, 1], [1, 1], [1, 1], [1, 1], [1, 1]], 0, 0.0),
        ([[1, 1], [0, 1], [1, 1], [1, 1], [1, 1]], 1, 2.0),  # from -4 to -2
        ([[1, 1], [1, 1], [0, 1], [0, 1], [1, 1]], 2, 3.0),  # from -2 to 1
        ([[1, 1], [1, 0], [0, 1], [1, 0], [0, 0]], 2, 6.0),  # the second sample from 0 to 6
        ([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0]], 1, 5.0),
        ([[1, 1], [0, 1], [0, 1], [0, 1], [1, 1]], 3, 5.0),
    ],
)
def test_the_longest_skip(called: list[list[int]], calls: int, span: float) -> None:
    data = hand_made([-4, -2, 0, 1, 6], [[bool(c) for c in row] for row in called])
    assert data.longest_skip() == (calls, pytest.approx(span))


def test_a_sample_that_one_branch_was_evaluated_for_is_not_skipped() -> None:
    assert recorded().longest_skip()[0] == 1  # of three calls the second alone does without the network
    data = recorded()
    level = data.log_snr
    assert data.longest_skip()[1] == pytest.approx(level[1] - level[0])


def test_blocks_reused_is_a_share_of_the_blocks_on_the_way() -> None:
    called = [[True, True], [True, False], [True, True]]
    assert hand_made([0, 1, 2], called).blocks_reused == 0
    reused = np.array([[[0, 0]], [[3, 0]], [[4, 1]]], dtype=np.int16)
    assert hand_made([0, 1, 2], called, reused=reused).blocks_reused == pytest.approx(8 / 20)
    assert hand_made([0], [[False, False]]).blocks_reused == 0
    many = np.full((5, 1, 2), 4, dtype=np.int16).repeat(9000, axis=2)  # more blocks than an int16 counts
    assert hand_made([0] * 5, [[True] * 18000] * 5, reused=many).blocks_reused == 1


def test_kept_is_per_sample_and_the_most_at_one_time() -> None:
    network = build("isotropic")
    denoiser = Denoiser(network, Discrete(DiscreteConfig()))
    calls = DDIM(DDIMConfig(steps=3)).calls(denoiser.process)
    ledger = Ledger(cost_table(network), [1] * 3, branches=1, batch=2)
    for call, held in zip(calls, (0, 640, 128), strict=True):
        ledger.record(call, denoiser.predict(torch.zeros(2, 2, 8, 8), call.time, torch.tensor([0, 1])), held)
    data = ledger.close()
    assert data.kept.tolist() == [0, 320, 64] and data.kept.dtype == np.int64
    assert data.kept_bytes == 320
    assert data.take(slice(0, 1)).kept.tolist() == [0, 320, 64]
    other = hand_made([0, 1, 2], [[True]] * 3, kept=np.array([7, 8, 100]))
    assert LedgerData.merge([other, hand_made([0, 1, 2], [[True]] * 3)]).kept.tolist() == [7, 8, 100]
    assert hand_made([0, 1], [[True]] * 2).kept.tolist() == [0, 0]
    assert recorded().kept_bytes == 0


def test_blocks_taken_from_memory_are_counted_by_row() -> None:
    """Two blocks taken, and a third that therefore does not run; the skipped sample takes nothing."""
    network = build("isotropic")
    denoiser = Denoiser(network, Discrete(DiscreteConfig()))
    calls = DDIM(DDIMConfig(steps=2)).calls(denoiser.process)
    memory = Memory(2, {(1, "block"), (2, "output")})
    ledger = Ledger(cost_table(network), [1] * 2, branches=1, batch=2)
    plans = [StepPlan(), StepPlan(call=torch.tensor([False, True]), reuse=memory.keys)]
    held, x, labels = None, torch.zeros(2, 2, 8, 8), torch.tensor([0, 1])
    for call, plan in zip(calls, plans, strict=True):
        memory.begin_call()
        prediction = denoiser.predict(x, call.time, labels, plan=plan, memory=memory, held=held)
        held = prediction.held
        ledger.record(call, prediction, memory.num_bytes)
    data = ledger.close()
    assert data.reused.tolist() == [[[0, 0]], [[0, 3]]]
    assert data.blocks_reused == pytest.approx(3 / 12)
    assert data.kept.tolist() == [4 * (16 * 16 + 16 * 16)] * 2  # 16 tokens of width 16, twice, in fp32


@pytest.mark.parametrize("without", [("kept",), ("kept", "branches")])
def test_ledgers_from_before(tmp_path: Path, without: tuple[str, ...]) -> None:
    """Files of older runs have no such arrays; all others must be there."""
    data = recorded()
    arrays = {f.name: getattr(data, f.name) for f in fields(LedgerData)}
    np.savez(tmp_path / "old.npz", **{name: value for name, value in arrays.items() if name not in without})
    assert same(LedgerData.load(tmp_path / "old.npz"), data)
    np.savez(tmp_path / "less.npz", **{name: value for name, value in arrays.items() if name != "reused"})
    with pytest.raises(RunError, match="is not a ledger"):
        LedgerData.load(tmp_path / "less.npz")
