"""Uncertainty heads held against the truth: heads whose answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gearshift.data.dataset import ImageDataset
from gearshift.data.latents import LatentDataset
from gearshift.data.text_rows import TextRows
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.evaluation.calibration import held_out, measure, obstacle, thresholds_of, training_times
from gearshift.evaluation.calibration_numbers import summarise
from gearshift.execution.outputs import Outputs
from gearshift.policies import Compose, FixedDepth, Policy, SkipEvery, UncertaintyExit
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError

from .evaluations import dataset
from .scripted_heads import PROCESS, Scripted, clock, grey, measured, oracle, with_heads

# Heads whose answers are known ---------------------------------------------------------------------------------------


def test_who_predicts_nothing_errs_by_the_mean_of_tanh_of_a_gaussian() -> None:
    found = measured(lambda x, time, depth: torch.full((len(x),), 0.556))
    assert found.error.shape == found.uncertainty.shape == (8, 2, 48)
    assert found.error.mean() == pytest.approx(0.556, abs=0.005)
    for one in summarise(found):
        assert one["error"] == pytest.approx(0.556, abs=0.005)
        assert abs(one["bias"]) < 0.005
        assert one["rank_correlation"] is None and one["within_time_share"] is None, "u is one number"


def test_who_says_the_true_error_is_calibrated_and_tells_everything_apart() -> None:
    """Maps in and one number per row out, through the executor; u equals the error up to the rounding of x."""
    for one in summarise(measured(oracle)):
        assert abs(one["bias"]) < 1e-5 and one["ece"] < 1e-5 and one["ece_by_time"] < 1e-5
        assert one["rank_correlation"] > 0.999
        assert one["within_time_share"] == pytest.approx(one["error_within_time_share"], abs=1e-3)
        assert one["within_time_share"] > 0.9, "without a prediction the error does not depend on the time"


def test_who_knows_the_time_only_tells_nothing_apart() -> None:
    for one in summarise(measured(clock)):
        assert one["within_time_share"] < 1e-9 < one["error_within_time_share"]
        assert one["rank_correlation"] is None
        assert max(one["by_time"]["uncertainty_sd"]) < 1e-9 < min(one["by_time"]["error_sd"])


def test_records_do_not_depend_on_the_batch_and_images_are_keyed() -> None:
    whole, parts = (measured(oracle, batch=batch) for batch in (48, 7))
    np.testing.assert_allclose(whole.error, parts.error, rtol=1e-5)
    np.testing.assert_allclose(whole.uncertainty, parts.uncertainty, rtol=1e-5)
    other = measured(oracle, seed=1)
    assert not np.allclose(whole.error, other.error, rtol=1e-2)
    denoiser = Denoiser(with_heads(False), VPSDE(VPSDEConfig()))
    small, large = (measure(denoiser, dataset(False), 16, 3, batch=batch) for batch in (5, 16))
    np.testing.assert_allclose(small.error, large.error, rtol=1e-4)
    np.testing.assert_allclose(small.uncertainty, large.uncertainty, rtol=1e-4)
    assert small.exits == tuple(denoiser.network.exits())


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """One process and many give the same numbers, and launchers share the threads out."""
    denoiser, before = Denoiser(with_heads(False), VPSDE(VPSDEConfig())), torch.get_num_threads()
    found, rows = [], list[int]()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(measure(denoiser, dataset(False), 16, 2, batch=4, on_rows=rows.append))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0].error, found[1].error)
    assert np.array_equal(found[0].uncertainty, found[1].uncertainty)
    assert sum(rows) == 2 * 16 * 2 and set(rows) == {4}


def test_a_subset_of_the_split_is_drawn_and_a_small_one_is_taken_whole() -> None:
    images = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 1, 8, 8) * 12
    data = ImageDataset(images, None, None, (), "ramp", "test", "0", "ramp")
    denoiser = Denoiser(Scripted(lambda x, time, depth: x[:, 0, 0, 0].sigmoid()), PROCESS)
    whole = measure(denoiser, data, 100, 2)
    assert whole.error.shape[2] == 20 and len(np.unique(whole.uncertainty[0, 0])) == 20
    few = measure(denoiser, data, 6, 2)
    chosen = [int(np.flatnonzero(whole.uncertainty[0, 0] == value)[0]) for value in few.uncertainty[0, 0]]
    assert len(set(chosen)) == 6 and chosen != list(range(6)), "sets may be sorted by class"
    np.testing.assert_array_equal(few.error[0], whole.error[0][:, chosen])


def test_labels_and_captions_are_those_of_the_images() -> None:
    net = Scripted(clock, "class")
    measure(Denoiser(net, PROCESS), grey(10), 10, 2, batch=4)
    seen = sorted(tuple(one.tolist()) for one in net.seen if one is not None)  # batches come in any order
    assert seen == [(0, 1, 2, 0)] * 2 + [(1, 2, 0, 1)] * 2 + [(2, 0)] * 2
    features = torch.arange(8.0)[:, None, None].expand(8, 2, 3).half()
    text = TextRows((features,), torch.arange(0, 9, 2))  # two captions each, of which the first is taken
    moments = torch.zeros(4, 1, 2, 8, 8)
    latents = LatentDataset((moments,), None, None, (), "latents", "train", "d", "made", 0.5, "sample", text)
    net = Scripted(clock, "text")
    measure(Denoiser(net, PROCESS), latents, 4, 2)
    assert net.seen[0] is not None and net.seen[0].dtype == torch.float32
    assert net.seen[0][:, 0, 0].tolist() == [0.0, 2.0, 4.0, 6.0]


def test_latents_are_drawn_once_for_all_times() -> None:
    """What is left of x without its noise is one draw from the image's Gaussian, in every batch and at every time."""
    moments = torch.zeros(6, 1, 2, 8, 8)
    moments[:, :, 0] = 3.0
    latents = LatentDataset((moments,), None, None, (), "latents", "train", "d", "made", 0.5)
    seen: dict[float, Tensor] = {}

    def look(x: Tensor, time: Tensor, depth: int) -> Tensor:
        seen[float(time[0])] = x
        return torch.zeros(len(x))

    records = measure(Denoiser(Scripted(look), PROCESS), latents, 6, 3)
    found = []
    for position, time in enumerate(records.times.tolist()):
        noise = keys.normal(0, "calibration_noise", torch.arange(6), position, (1, 8, 8))
        found.append((seen[time] - PROCESS.sigma(time).float() * noise) / PROCESS.alpha(time).float())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-3)
    assert float(found[0].mean()) == pytest.approx(1.5, abs=0.1) and float(found[0].std()) == pytest.approx(
        0.5, abs=0.1
    )
    again = measure(Denoiser(Scripted(look), PROCESS), latents, 6, 3, batch=2)
    np.testing.assert_allclose(records.error, again.error, rtol=1e-6)


def test_precision_is_that_of_sampling() -> None:
    for dtype, on in ((torch.float32, False), (torch.bfloat16, True)):
        net = Scripted(clock)
        measure(Denoiser(net, PROCESS), grey(), 4, 2, dtype=dtype)
        assert net.autocast == {on}


def test_a_depth_without_a_head_is_left_out() -> None:
    class Headless(Denoiser):
        def rows(self, *args: Any, **options: Any) -> Outputs:
            outputs = super().rows(*args, **options)
            outputs.uncertainty.pop(2)
            return outputs

    found = measure(Headless(Scripted(oracle), PROCESS), grey(), 8, 3)
    assert found.exits == (1,) and found.error.shape == (3, 1, 8)


def test_times_are_quantiles_of_the_training_times() -> None:
    assert training_times(VPSDE(VPSDEConfig()), 4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert training_times(PROCESS, 4).tolist() == [124.0, 374.0, 624.0, 874.0]
    assert training_times(Discrete(DiscreteConfig(num_steps=3)), 20).tolist() == [0.0, 1.0, 2.0]


# What it is held against ---------------------------------------------------------------------------------------------


class Source:
    image_size, channels, flip = 8, 1, False
    num_classes: int | None = 3

    def __init__(self, *splits: str) -> None:
        self.splits, self.loaded = splits, list[str]()

    def load(self, split: str) -> ImageDataset:
        if split not in self.splits:
            raise UsageError(f"no {split}")
        self.loaded.append(split)
        return grey(4, split)


def test_the_test_split_is_taken_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    both, train = Source("train", "test"), Source("train")
    assert held_out(both).split == "test" and held_out(both, both.load("train")).split == "test"
    own = both.load("test")
    assert held_out(both, own) is own
    assert capsys.readouterr().err == ""
    assert held_out(train).split == "train" and held_out(train, grey(4, "train")).split == "train"
    assert train.loaded == ["train"], "a split in memory is not read again"
    assert "of the train split (no test)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "data", "said"),
    [
        ({"has_uncertainty": False}, grey(), "this Scripted has no uncertainty heads"),
        ({"paths": ((0, 1), (0,))}, grey(), "has 2 paths"),
        ({"in_channels": 3}, grey(), "grey has images of 1 x 8 x 8, and Scripted takes 3 x 8 x 8"),
        ({"cond_kind": "class"}, dataset(False), "noise has no labels"),
        ({"cond_kind": "text"}, grey(), "grey has no captions with features"),
        ({}, grey(0), "grey has no images"),
        ({}, grey(), None),
    ],
)
def test_what_stands_in_the_way_is_said(change: dict[str, Any], data: ImageDataset, said: str | None) -> None:
    net = Scripted(oracle)
    for name, value in change.items():
        setattr(net, name, value)
    found = obstacle(net, data)
    assert found is None if said is None else found is not None and said in found


def test_thresholds_are_those_of_all_exit_rules() -> None:
    both = Compose([SkipEvery(k=2), UncertaintyExit(0.3)])
    policies: list[Policy] = [FixedDepth(2), UncertaintyExit(0.2), both, UncertaintyExit(0.2)]
    assert thresholds_of(policies) == [0.2, 0.3]
