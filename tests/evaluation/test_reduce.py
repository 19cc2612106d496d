"""From arrays over images to numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gearshift.evaluation import reduce
from gearshift.evaluation.batches import all_cores
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.evaluation.shards import Shards
from gearshift.sampling.ledger import LedgerData


def ledger(depth: list[list[int]], cost: int = 10, full: int = 50) -> LedgerData:
    """Calls x samples, one branch; every block costs `cost`; depth 0 is a call that was skipped."""
    blocks = np.array(depth, dtype=np.int16)[:, None]
    return LedgerData(
        depth=blocks,
        called=blocks > 0,
        macs=blocks.astype(np.int64) * cost,
        reused=np.zeros_like(blocks),
        full_macs=np.full(len(depth), full, dtype=np.int64),
        time=np.linspace(1, 0, len(depth)),
        log_snr=np.linspace(-5, 5, len(depth)),
    )


def test_cost_in_closed_form() -> None:
    full, cheap = ledger([[5, 5], [5, 5], [5, 5], [5, 5]]), ledger([[5, 3], [0, 1], [2, 0], [5, 5]])
    numbers = reduce.cost_numbers(cheap, full, 4)
    macs = (120 + 90) / 2
    assert numbers["macs_per_image"] == macs and numbers["flops_per_image"] == 2 * macs
    assert numbers["calls"] == 3.0 and numbers["steps"] == 4
    assert numbers["full_equivalents"] == pytest.approx(macs / 50)
    assert numbers["macs_saved"] == pytest.approx(1 - macs / 200)
    assert numbers["mean_depth"] == pytest.approx((5 + 3 + 1 + 2 + 5 + 5) / 6)
    assert (numbers["longest_skip"], numbers["blocks_reused"], numbers["kept_bytes_per_image"]) == (1, 0.0, 0)
    assert numbers["longest_skip_log_snr"] == pytest.approx(10 / 3)
    same = reduce.cost_numbers(full, full, 4)
    assert (same["macs_saved"], same["full_equivalents"]) == (0.0, 4.0)


def test_reuse_and_what_is_kept_for_it() -> None:
    reusing = replace(
        ledger([[5, 5], [5, 5]]),
        reused=np.array([[[0, 0]], [[5, 2]]], dtype=np.int16),
        kept=np.array([1200, 0], dtype=np.int64),
    )
    numbers = reduce.cost_numbers(reusing, ledger([[5, 5], [5, 5]]), 2)
    assert numbers["blocks_reused"] == pytest.approx(7 / 20) and numbers["kept_bytes_per_image"] == 1200


def test_what_is_kept_is_the_most_of_any_chunk(tmp_path: Path) -> None:
    """A policy that decides by data may keep more in a later chunk."""
    shards = Shards(tmp_path, "0")
    for number, kept in enumerate(([0, 3], [5, 2], [1, 1])):
        data = replace(ledger([[5, 5], [5, 5]]), kept=np.array(kept, dtype=np.int64))
        shards.save(number, {f"ledger/{name}": getattr(data, name) for name in data.__dataclass_fields__})
    settings = EvaluationConfig(solvers={"x": {}}, num_images=6, chunk=2)
    found = reduce.RowArrays(shards, settings, []).ledger()
    assert found.kept.tolist() == [5, 3] and found.kept_bytes == 5 and found.num_samples == 6


def test_fewer_steps_save_against_all_steps() -> None:
    numbers = reduce.cost_numbers(ledger([[5], [5]]), ledger([[5], [5], [5], [5]]), 2)
    assert numbers["macs_saved"] == 0.5 and numbers["full_equivalents"] == 2.0


def test_agreement_by_class() -> None:
    requested, predicted = np.array([0, 0, 1, 1, 3, 3, 3, 3]), np.array([0, 1, 1, 1, 0, 3, 3, 4])
    assert reduce.per_class(requested, predicted) == [0.5, 1.0, None, 0.5, None]


def test_per_image_and_its_quantiles() -> None:
    found = reduce.per_image(ledger([[5, 3], [0, 1]]), np.array([0.0, 255.0**2 / 100]))
    assert found["macs_per_image"].tolist() == [50, 40]
    assert math.isnan(found["psnr_to_full"][0]) and found["psnr_to_full"][1] == pytest.approx(20.0)
    assert found["mean_depth"].tolist() == [5, 2]
    quantiles = reduce.distribution(found)
    assert quantiles["macs_per_image"]["p50"] == 45 and quantiles["macs_per_image"]["max"] == 50
    assert quantiles["psnr_to_full"]["min"] == pytest.approx(20.0), "an image that is equal has no decibels"
    assert "psnr_to_full" not in reduce.distribution({"psnr_to_full": np.array([np.nan])})


def test_mean_leaves_out_what_is_infinite() -> None:
    assert reduce.mean([None, 1.0, 3.0]) == 2.0 and reduce.mean([None, None]) is None


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(ValueError, match="inside"), all_cores():
            raise ValueError("inside")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
