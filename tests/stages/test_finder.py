"""Similarity curves against their definition, and boundaries against curves whose crossings are known."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from gearshift.diffusion.edm import EDM, EDMConfig
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.runtime import keys
from gearshift.runtime.errors import RunError, UsageError
from gearshift.stages import optimal
from gearshift.stages.axis import Axis
from gearshift.stages.finder import Curves, Search, measure, pairs, stratified
from gearshift.stages.grid import centres, similarities
from gearshift.stages.optimal import OptimalDenoiser
from gearshift.stages.rows import Rows
from gearshift.stages.thresholds import crossing, three_stages

VP = VPSDE(VPSDEConfig())


@pytest.fixture(scope="module")
def denoiser():
    images = keys.integers(5, "image", torch.arange(60), 0, 256, (1, 3, 3)).to(torch.uint8)
    return OptimalDenoiser(Rows.of(images), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["surrogate", "literal"])
def test_curves_are_what_they_are_defined_as(denoiser, mode, monkeypatch):
    """From noise predictions themselves, not from the differences of means."""
    axis = Axis.of(VP)
    search = Search(queries=100, eta=0.1, mode=mode, seed=4)
    curves = measure(denoiser, axis, search)
    share = stratified(100, 4)
    clean, noise = pairs(denoiser, torch.arange(100), 4)
    sigma, last = axis.sigma(share), torch.exp(-0.5 * VP.log_snr(1.0))
    z = clean + sigma[:, None] * noise
    eps = denoiser.eps(z, sigma)
    if mode == "surrogate":
        end = (z - denoiser.mean) / sigma[:, None]
    else:
        end = denoiser.eps(clean + last * noise, float(last))
    assert torch.equal(curves.share, share)
    torch.testing.assert_close(curves.near, ((eps - noise).abs() <= 0.1).double().mean(1))
    torch.testing.assert_close(curves.far, ((eps - end).abs() <= 0.1).double().mean(1))
    assert 0.1 < curves.near.mean() < 0.9 and 0.1 < curves.far.mean() < 0.9
    assert (curves.share.diff() > 0).all()
    torch.testing.assert_close(curves.running_near()[30], curves.near[:31].mean())
    torch.testing.assert_close(curves.running_far()[30], curves.far[30:].mean())
    # The same numbers from chunks of another size, up to the rounding of products.
    monkeypatch.setattr(denoiser, "chunk_size", 13)
    assert torch.equal(measure(denoiser, axis, search).near, curves.near)


def test_shares_are_stratified():
    share = stratified(50, 1)
    assert ((share * 50).long() == torch.arange(50)).all() and not torch.equal(share, stratified(50, 2))


def curves_of(near, far, count=2000):
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    zero = torch.zeros(count, dtype=torch.float64)
    return Curves(share, near(share).double(), far(share).double(), zero, zero)


def step(share):
    """1 up to 0.36, then 0: the mean falls to 0.9 at 0.4."""
    return share < 0.36


def rise(share):
    """0 up to 0.73, then 1: the mean from behind is 0.9 at 0.7."""
    return share > 0.73


def test_known_boundaries():
    found = three_stages(curves_of(step, rise), Search(queries=2000), replicates=10)
    assert found.share == pytest.approx((0.4, 0.7), abs=1e-3)
    assert found.replicates.shape == (10, 2) and found.failed == 0
    # Boundaries follow alpha: 0.36 / 0.8 and 1 - 0.27 / 0.8.
    found = three_stages(curves_of(step, rise), Search(queries=2000, alpha=0.8), replicates=0)
    assert found.share == pytest.approx((0.45, 0.6625), abs=1e-3)


def test_a_curve_that_comes_back_is_cut_where_it_first_falls():
    """U-shaped, as S0 is: its running mean is above alpha again at the end, where the greatest tau would lie."""

    def u_shaped(share):
        return (share < 0.3) | (share > 0.36)

    curves = curves_of(u_shaped, rise)
    running = curves.running_near()
    assert running[-1] > 0.9 and running.min() < 0.9
    found = three_stages(curves, Search(queries=2000), replicates=0)
    assert found.share[0] == pytest.approx(1 / 3, abs=1e-3)
    at = int(found.share[0] * 2000)
    assert running[at] >= 0.9 > running[at + 1] and running[at + 50] < running[at]
    # Below alpha between 1/3 and 0.6 only: too short a stretch to count when 0.3 is asked for.
    with pytest.raises(RunError, match=r"S0 .* never falls below alpha for 0\.3 of the axis"):
        three_stages(curves, Search(queries=2000), sustain=0.3)


@pytest.mark.parametrize(
    ("mean", "stretch", "found"),
    [
        ([1, 1, 0.5, 1, 0.5, 0.5, 1], 2, 3),  # a dip that is too short
        ([1, 1, 0.5, 1, 0.5, 0.5, 1], 1, 1),
        ([1, 1, 1, 1, 0.5], 3, 3),  # up to the end
        ([0.5, 0.5, 1, 1], 2, -1),
        ([0.5, 1, 1, 1], 2, None),
        ([0.9, 0.9], 1, None),  # alpha itself is enough
    ],
)
def test_first_sustained_crossing(mean, stretch, found):
    assert crossing(torch.tensor(mean, dtype=torch.float64), 0.9, stretch) == found


def test_uncertainty_is_that_of_independent_measurements():
    """Replicates of one noisy measurement scatter about as much as measurements with other noise do."""

    def noisy(seed):
        def of(profile):
            def values(share):
                return (keys.uniform(seed, "noisy", torch.arange(len(share)), 0).double() < profile(share)).double()

            return values

        return curves_of(of(lambda s: torch.sigmoid((0.4 - s) * 12)), of(lambda s: torch.sigmoid((s - 0.6) * 12)))

    search = Search(queries=2000, alpha=0.8)
    measured = torch.tensor([three_stages(noisy(seed), search, replicates=0).share for seed in range(40)])
    said = three_stages(noisy(0), search, replicates=100).replicates.std(0)
    ratio = said / measured.std(0)
    assert (ratio > 0.6).all() and (ratio < 1.6).all()


def test_curves_without_boundaries_are_told_apart():
    always = curves_of(torch.ones_like, rise)
    with pytest.raises(RunError, match=r"alpha=0.9: the running mean of S0 .* \[1.0000, 1.0000\] and never falls"):
        three_stages(always, Search(queries=2000))
    never = curves_of(step, torch.zeros_like)
    with pytest.raises(RunError, match=r"S1 .* is below alpha from its beginning.*lower alpha, raise eta=0\.0078125"):
        three_stages(never, Search(queries=2000))
    crossed = curves_of(lambda share: share < 0.63, lambda share: share > 0.46)
    with pytest.raises(RunError, match=r"first boundary at 0\.\d+ .* second at 0\.\d+.*raise alpha or lower eta"):
        three_stages(crossed, Search(queries=2000))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eta": 0.0}, "eta=0 must be above 0"),
        ({"eta": -1.0}, "eta=-1 must be above 0"),
        ({"alpha": 1.0}, "alpha=1 is a mean similarity"),
        ({"alpha": 0.0}, "alpha=0 is a mean similarity"),
        ({"queries": 99}, "queries=99 are too few"),
        ({"mode": "paper"}, "mode=paper is not one of surrogate, literal"),
    ],
)
def test_bad_searches(settings, said):
    with pytest.raises(UsageError, match=said):
        Search(**settings)


# The axis of averages ------------------------------------------------------------------------------------------------

SHARE = torch.linspace(0, 1, 11, dtype=torch.float64)


def test_axes_of_vp():
    axis = Axis.of(VP)
    assert axis.name == "time" and axis.time(SHARE).tolist() == pytest.approx((0.001 + 0.999 * SHARE).tolist())
    for name in ("training", "vp_time"):
        torch.testing.assert_close(Axis.of(VP, name).time(SHARE), axis.time(SHARE))
    level = Axis.of(VP, "log_snr").log_snr(SHARE)
    torch.testing.assert_close(level.diff(), level.diff()[:1].expand(10))
    part = Axis.of(VP, t_min=0.2, t_max=0.6)
    assert part.time(SHARE)[[0, 5, 10]].tolist() == pytest.approx([0.2, 0.4, 0.6])


def test_axes_of_a_table():
    table = Discrete(DiscreteConfig(first_index=1))
    assert Axis.of(table).time(SHARE)[[0, -1]].tolist() == pytest.approx([1, 1000])
    trained = Axis.of(table, "training").time(SHARE)
    assert (trained == trained.round()).all() and (trained - Axis.of(table).time(SHARE)).abs().max() <= 1


def test_axes_of_edm():
    """By itself the paper's axis: the same ratios as VP has at equal shares, so VP boundaries carry over by sigma."""
    edm = EDM(EDMConfig())
    axis = Axis.of(edm)
    assert axis.name == "vp_time"
    torch.testing.assert_close(axis.sigma(SHARE), Axis.of(VP).sigma(SHARE))
    torch.testing.assert_close(axis.time(SHARE), axis.sigma(SHARE))  # time is sigma
    torch.testing.assert_close(edm.cdf(Axis.of(edm, "training").time(SHARE)), SHARE, rtol=0, atol=1e-4)
    assert Axis.of(edm, "time").time(SHARE)[5] == pytest.approx(40.001)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "steps"}, "axis=steps is not one of auto, time, training"),
        ({"t_min": 0.7, "t_max": 0.6}, r"t_min=0.7 and t_max=0.6 must be two times of vp_sde"),
        ({"t_min": 0.0}, r"t_min=0 and t_max=1 must be two times"),
        ({"t_min": -1.0}, r"t_min=-1"),
    ],
)
def test_bad_axes(settings, said):
    with pytest.raises(UsageError, match=said):
        Axis.of(VP, **settings)


# Every two levels of a grid ------------------------------------------------------------------------------------------


def test_similarities_are_what_they_are_defined_as(denoiser):
    axis, search, nodes = Axis.of(VP), Search(queries=100, eta=0.1), 8
    found = similarities(denoiser, axis, search, nodes)
    assert found.shape == (12, nodes, nodes)
    clean, noise = pairs(denoiser, torch.arange(12), 0)
    sigma = axis.sigma(centres(nodes))
    eps = torch.stack([denoiser.eps(clean + s * noise, float(s)) for s in sigma], dim=1)
    expected = ((eps[:, :, None] - eps[:, None]).abs() <= 0.1).double().mean(3)
    torch.testing.assert_close(found.double(), expected)
    assert 0.1 < found.mean() < 0.95
    with pytest.raises(UsageError, match="queries=100 over nodes=40 noise levels leave 2 pairs"):
        similarities(denoiser, axis, search, 40)


# Several processes ---------------------------------------------------------------------------------------------------

PROGRAM = """
import json, torch
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.runtime import keys
from gearshift.stages import optimal
from gearshift.stages.axis import Axis
from gearshift.stages.finder import Search, measure
from gearshift.stages.optimal import OptimalDenoiser
from gearshift.stages.rows import Rows
optimal._QUERIES = 32
images = keys.integers(5, "image", torch.arange(60), 0, 256, (1, 3, 3)).to(torch.uint8)
denoiser = OptimalDenoiser(Rows.of(images))
curves = measure(denoiser, Axis.of(VPSDE(VPSDEConfig())), Search(queries=150, eta=0.1))
print(json.dumps(None if curves is None else [getattr(curves, f).tolist() for f in ("near", "far", "entropy")]))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(denoiser, monkeypatch):
    monkeypatch.setattr(optimal, "_QUERIES", 32)
    alone = OptimalDenoiser(denoiser.rows)
    expected = measure(alone, Axis.of(VP), Search(queries=150, eta=0.1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    answers = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both]
    assert answers[1] is None
    assert answers[0] == [getattr(expected, name).tolist() for name in ("near", "far", "entropy")]
