"""Uncertainty heads held against the truth: heads whose answers are known, and what a report makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.data.dataset import ImageDataset
from gearshift.data.latents import LatentDataset
from gearshift.data.text_rows import TextRows
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.evaluation.calibration import (
    Records,
    calibrate,
    curve,
    held_out,
    measure,
    obstacle,
    spearman,
    summarise,
    thresholds_of,
    training_times,
    within_share,
)
from gearshift.evaluation.calibration_plots import FILES, calibration_figures, sentence
from gearshift.evaluation.evaluate import Evaluator
from gearshift.evaluation.instruments import Instruments
from gearshift.evaluation.report import write_report
from gearshift.evaluation.results import pictures
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.execution.outputs import Outputs
from gearshift.execution.stream import Rows, Stream
from gearshift.policies import Compose, FixedDepth, Policy, SkipEvery, UncertaintyExit
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Sampler

from .evaluations import POLICIES, dataset, ddim, network, told

GREY = 128 / 127.5 - 1  # of images in [-1, 1] that are 128 everywhere
PROCESS = Discrete(DiscreteConfig())
Says = Callable[[Tensor, Tensor, int], Tensor]


class Plus(nn.Module):
    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        return hidden


class Scripted(Backbone):
    """Two blocks that do nothing; predicts no noise at all, and of its error what it is told to."""

    in_channels = out_channels = 1
    image_size = 8
    has_uncertainty = True
    paths = ((0, 1),)

    def __init__(self, says: Says, cond_kind: str = "none") -> None:
        super().__init__()
        self.says, self.cond_kind = says, cond_kind
        self.weight = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList([Plus(), Plus()])
        self.seen: list[Tensor | None] = []
        self.autocast: set[bool] = set()

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return (1, 2)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        self.seen.append(cond)
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return Stream(x, time, Rows(len(x)), {})

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        return torch.zeros_like(hidden)

    def uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        return self.says(hidden, time, depth)


def oracle(x: Tensor, time: Tensor, depth: int) -> Tensor:
    """The map tanh|noise| of grey images: the true error of who predicts nothing."""
    alpha, sigma = (one(time)[:, None, None, None].float() for one in (PROCESS.alpha, PROCESS.sigma))
    noise = (x - alpha * GREY) / sigma
    return noise.abs().tanh()


def clock(x: Tensor, time: Tensor, depth: int) -> Tensor:
    return (time / 1000 * 0.5 + 0.25).float()


def grey(count: int = 64, split: str = "test") -> ImageDataset:
    images = torch.full((count, 1, 8, 8), 128, dtype=torch.uint8)
    return ImageDataset(images, torch.arange(count) % 3, 3, (), "grey", split, "0", "grey images")


def with_heads(labels: bool) -> EarlyExit:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EarlyExit(ExitsConfig(), network(labels, False)).eval().requires_grad_(False)


def measured(says: Says, times: int = 8, **options: Any) -> Records:
    return measure(Denoiser(Scripted(says), PROCESS), grey(), 48, times, **options)


def exits_of(uncertainty: Any, error: Any) -> dict[str, Any]:
    """Of one exit, from arrays [times, images]."""
    one, other = (np.asarray(values, dtype=np.float64)[:, None] for values in (uncertainty, error))
    times = np.arange(len(one), dtype=np.float64)
    [found] = summarise(Records((3,), times, -times, one, other))
    return found


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


# Numbers -------------------------------------------------------------------------------------------------------------


def test_right_on_average_is_calibrated() -> None:
    """Errors spread evenly around each prediction: ECE 0, though no prediction is right."""
    predicted = np.repeat([[0.1], [0.2], [0.4]], 30, axis=1)
    error = predicted + np.tile([-0.05, 0.05], 15)
    found = exits_of(predicted, error)
    assert found["ece"] == pytest.approx(0, abs=1e-12) and found["ece_by_time"] == pytest.approx(0, abs=1e-12)
    off = exits_of(predicted + 0.03, error)
    assert off["ece"] == pytest.approx(0.03) and off["bias"] == pytest.approx(0.03)
    assert off["ece_by_time"] == pytest.approx(0.03)


def test_one_answer_for_all_times_is_seen_by_time_only() -> None:
    generator = np.random.default_rng(0)
    error = np.array([[0.1], [0.3]]) + np.zeros((2, 500))
    predicted = 0.2 + 1e-3 * generator.standard_normal((2, 500))
    found = exits_of(predicted, error)
    assert found["ece"] < 0.03 and found["ece_by_time"] == pytest.approx(0.1, abs=1e-3)


def test_bins_hold_equally_many_and_order_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    u = np.round(generator.uniform(0, 1, 301), 1)  # with many ties
    error = generator.uniform(0, 1, 301)
    points, ece = curve(u, error, bins=10)
    order = generator.permutation(301)
    again, same = curve(u[order], error[order], bins=10)
    np.testing.assert_allclose(points, again, rtol=1e-12)
    assert ece == pytest.approx(same, rel=1e-12)
    assert points.shape == (2, 10) and (np.diff(points[0]) >= 0).all()
    assert ece >= abs(u.mean() - error.mean()) - 1e-12, "no less than what is wrong on average"
    few, _ = curve(np.array([0.1, 0.3]), np.array([0.2, 0.2]))
    assert few.tolist() == [[0.1, 0.3], [0.2, 0.2]]


def test_variance_within_and_between_times_add_up() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((6, 40)) * 0.5 + generator.standard_normal((6, 1))
    share = within_share(values)
    assert share is not None and share * values.var() == pytest.approx(values.var(1).mean())
    assert within_share(np.full((3, 7), 0.1)) is None
    assert within_share(np.arange(4.0)[None]) == 1.0
    assert within_share(np.repeat(np.arange(3.0), 4).reshape(3, 4)) == 0.0


def test_rank_correlation_is_spearmans() -> None:
    scipy = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    one = np.round(generator.uniform(0, 1, 60), 1)
    other = one + generator.standard_normal(60)
    assert spearman(one, other) == pytest.approx(scipy.spearmanr(one, other).statistic)
    assert spearman(one, one**3) == pytest.approx(1) and spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, np.zeros(60)) is None


def test_times_without_a_correlation_do_not_count() -> None:
    found = exits_of([[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]], [[0.2, 0.3, 0.4], [0.1, 0.2, 0.3]])
    assert found["rank_correlation"] == pytest.approx(1) and found["by_time"]["rank_correlation"][1] is None


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


# In an evaluation ----------------------------------------------------------------------------------------------------

HEADS = {"_target_": "gearshift.policies.UncertaintyExit", "threshold": 0.5}


def evaluation(folder: Path, *, heads: bool = True, data: ImageDataset | None = None, **settings: Any) -> Evaluator:
    denoiser = Denoiser(with_heads(True) if heads else network(True, False), VPSDE(VPSDEConfig()))

    def sampler(policy: Policy, solver: Any, **options: Any) -> Sampler:
        made = Sampler(denoiser, solver, policy, **options)
        made.check()
        return made

    rules = {"depth 2": POLICIES["depth 2"], **({"exit": HEADS} if heads else {})}
    chosen: dict[str, Any] = dict(
        policies=rules, solvers={"ddim": ddim(3)}, num_images=4, chunk=4, metrics=[], timing_images=0, equal_macs=False
    )
    config = EvaluationConfig(**{**chosen, **settings})
    instruments = Instruments.prepare(config, dataset(True), None, torch.device("cpu"))
    return Evaluator(config, sampler, instruments, dataset(True), torch.device("cpu"), folder / "e", held_out=data)


def test_a_report_says_what_was_found(tmp_path: Path) -> None:
    held = ImageDataset(**{**vars(dataset(True)), "split": "test"})
    e = evaluation(tmp_path, data=held, calibration_images=9, calibration_times=4)
    e.run()
    found = told(e)
    json.dumps(found, allow_nan=False)
    own = found["calibration"]
    assert (own["split"], own["images"], own["thresholds"]) == ("test", 9, [0.5])
    assert [one["depth"] for one in own["exits"]] == list(e.planned[0].sampler.denoiser.network.exits())
    assert own["log_snr"] == sorted(own["log_snr"], reverse=True) and len(own["log_snr"]) == 4
    assert found["unavailable"] == [] and not any("train split" in line for line in found["warnings"])
    write_report(tmp_path / "out", found, pictures(e))
    for name in FILES:
        content = (tmp_path / "out" / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Uncertainty against the true error" in text and sentence(own) in text
    assert all(f"]({name})" in text for name in FILES)
    assert "| 5 |" in text and "9 of the 16 test images of noise, with their labels" in text
    assert sentence(own) in (tmp_path / "out" / "report.html").read_text()


def test_without_it_everything_is_what_it_was(tmp_path: Path) -> None:
    """The same numbers and files, but for the section and its three figures, which go where a later report has none."""
    found, files = [], []
    for images in (6, 0):
        e = evaluation(tmp_path / str(images), calibration_images=images, calibration_times=2)
        e.run()
        found.append(told(e))
        write_report(tmp_path / "out", found[-1], pictures(e))
        files.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert "calibration" not in found[1]
    assert found[0].pop("calibration")["split"] == "train"
    [warning] = [line for line in found[0]["warnings"] if "train split" in line]
    found[0]["warnings"].remove(warning)
    assert found[0] == found[1]
    assert set(files[0]) - set(files[1]) == set(FILES) and set(files[1]) < set(files[0])
    assert {name for name in files[1] if files[0][name] != files[1][name]} == {
        "metrics.json", "report.md", "report.html",
    }  # fmt: skip


def test_without_heads_the_reason_is_given(tmp_path: Path) -> None:
    e = evaluation(tmp_path, heads=False, calibration_images=6)
    e.run()
    found = told(e)
    assert "calibration" not in found
    assert found["unavailable"] == [
        {"name": "calibration", "reason": "this UViT has no uncertainty heads", "fetch": ""}
    ]
    assert e.unavailable[0].name == "calibration", "known before anything is sampled"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"calibration_images": -1}, "calibration_images=-1 must be at least 0"),
        ({"calibration_images": 1}, "calibration_images=1 tells nothing apart"),
        ({"calibration_times": 0}, "calibration_times=0 must be at least 1"),
    ],
)
def test_settings_that_measure_nothing(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        EvaluationConfig(solvers={"ddim": ddim(2)}, **settings)


# Text and figures ----------------------------------------------------------------------------------------------------


def entry(*exits: dict[str, Any], images: int = 5, thresholds: tuple[float, ...] = ()) -> dict[str, Any]:
    times = len(exits[0]["by_time"]["error"])
    own = {"protocol": "p.", "split": "test", "images": images, "times": list(range(times))}
    return {
        **own, "log_snr": [float(-k) for k in range(times)], "thresholds": list(thresholds),
        "exits": [{**one, "depth": k + 1} for k, one in enumerate(exits)],
    }  # fmt: skip


def test_the_sentence_follows_the_numbers() -> None:
    def exit_of(share: float | None, truth: float | None, rank: float | None) -> dict[str, Any]:
        found = exits_of([[0.1, 0.2]], [[0.1, 0.2]])
        return {**found, "within_time_share": share, "error_within_time_share": truth, "rank_correlation": rank}

    assert sentence(entry(exit_of(0.02, 0.1, 0.314))) == (
        "Of the variance of the predicted error 2.00 % (exit 1) lies within times, of that of the true error 10.0 % "
        "(exit 1); the rank correlation of the two within times is 0.31 (exit 1)."
    )
    several = sentence(entry(exit_of(0.02, 0.1, 0.3), exit_of(0.5, 0.2, -0.1), exit_of(None, 0.15, None)))
    assert "2.00 % (exit 1) to 50.0 % (exit 2) lies within times" in several
    assert "true error 10.0 % (exit 1) to 20.0 % (exit 2)" in several
    assert several.endswith("within times is −0.10 (exit 2) to 0.30 (exit 1).")
    none = sentence(entry(exit_of(None, None, None)))
    assert "is the same for every image and time" in none and "no image is told from another" in none


@pytest.mark.parametrize(("exits", "times"), [(1, 1), (1, 6), (29, 6)])
def test_figures_of_any_size_are_pictures(exits: int, times: int) -> None:
    generator = np.random.default_rng(0)
    error = generator.uniform(0.05, 0.5, (times, exits, 12))
    uncertainty = error + 0.02 * generator.standard_normal(error.shape)
    uncertainty[:, 0] = 0.2  # of which nothing is correlated
    levels = np.arange(times, dtype=np.float64)
    records = Records(tuple(range(exits)), levels, -levels, uncertainty, error)
    found = calibrate(records, grey(), [0.1, 0.2, 0.9])
    drawn = calibration_figures(found)
    assert [figure.file for figure in drawn] == list(FILES)
    for figure in drawn:
        assert figure.png.startswith(b"\x89PNG") and len(figure.png) > 8_000
        assert "thresholds" in figure.caption or figure.file == FILES[2]
