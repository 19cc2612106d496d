"""Bins of the noise level: which level falls where, on both axes."""

from __future__ import annotations

import pytest
import torch

from gearshift.diffusion.bins import NoiseBins
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.runtime.errors import UsageError

LINEAR = Discrete(DiscreteConfig())
PROCESSES: list[Process] = [LINEAR, VPSDE(VPSDEConfig()), Discrete(DiscreteConfig(schedule="cosine"))]


def level(process: Process, index: float) -> float:
    return float(process.log_snr(process.time_of_training_index(index)))


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_equal_bins_floor(count: int) -> None:
    bins = NoiseBins(count, owner="x")
    for index in range(1000):
        assert bins.of(index, 0.0) == index * count // 1000
    if count > 1:
        border = 1000 / count
        assert bins.of(border, 0.0) == 1 and bins.of(border - 1e-6, 0.0) == 0
        assert bins.of(border - 1e-12, 0.0) == 1  # rounding of a time, not another level


def test_the_edges_of_the_published_table() -> None:
    bins = NoiseBins(10, owner="x")
    found = {index: bins.of(index, 0.0) for index in (0, 99, 99.9, 100, 199, 200, 899, 899.99, 900, 999)}
    assert found == {0: 0, 99: 0, 99.9: 0, 100: 1, 199: 1, 200: 2, 899: 8, 899.99: 8, 900: 9, 999: 9}


def test_beyond_the_ends() -> None:
    for bins in (NoiseBins(4, owner="x"), NoiseBins(2, edges=[10.0], owner="x")):
        last = len(bins.keys)
        assert bins.of(-0.7, 0.0) == bins.of(-1e9, 0.0) == 0
        assert bins.of(1000.5, 0.0) == bins.of(1e9, 0.0) == last
    bins = NoiseBins(2, "log_snr", [0.0], owner="x")
    assert bins.of(0.0, float("inf")) == 0 and bins.of(0.0, -1e9) == 1


def test_both_domains_agree_where_the_edges_are_converted() -> None:
    generator = torch.Generator().manual_seed(0)
    for process in PROCESSES:
        for _ in range(20):
            edges = sorted((torch.rand(3, generator=generator) * 900 + 50).tolist())
            by_index = NoiseBins(4, edges=edges, owner="x")
            by_level = NoiseBins(4, "log_snr", [level(process, edge) for edge in edges], owner="x")
            for index in [*(torch.rand(50, generator=generator) * 999).tolist(), edges[1]]:
                assert by_index.of(index, level(process, index)) == by_level.of(index, level(process, index))
            assert by_index.of(edges[1], 0.0) == 2


def test_log_snr_edges_of_the_linear_table() -> None:
    """Where equal bins of the training index lie in log-SNR, two digits, for the linear table."""
    published = {
        100: 2.14,
        200: 0.65,
        300: -0.43,
        400: -1.43,
        500: -2.47,
        600: -3.64,
        700: -4.97,
        800: -6.50,
        900: -8.22,
    }
    for index, value in published.items():
        assert level(LINEAR, index) == pytest.approx(value, abs=0.006)


@pytest.mark.parametrize("domain", ["training_index", "log_snr"])
def test_many_at_once(domain: str) -> None:
    for process in PROCESSES:
        edges = [40.0, 333.3, 900.0]
        bins = NoiseBins(
            4, domain, edges if domain == "training_index" else [level(process, e) for e in edges], owner="x"
        )
        times = process.time_of_training_index(torch.cat([torch.linspace(0, 999, 777).double(), torch.tensor(edges)]))
        index, log_snr = process.training_index(times), process.log_snr(times)
        together = bins.of_all(index, log_snr)
        assert together.dtype == torch.int64 and set(together.tolist()) == {0, 1, 2, 3}
        assert together.tolist() == [bins.of(i, s) for i, s in zip(index.tolist(), log_snr.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(count=2, edges=[1.0, 2.0]), "me: 2 bins need 1 edges"),
        (dict(count=3, edges=[5.0, 2.0]), "ordered from data to noise"),
        (dict(count=3, edges=[5.0, 5.0]), "ordered from data to noise"),
        (dict(count=3, domain="log_snr", edges=[-1.0, 2.0]), "ordered from data to noise"),
        (dict(count=2, domain="log_snr"), "give edges for log_snr"),
        (dict(count=1, domain="sigma"), "'sigma' is neither"),
    ],
)
def test_bins_that_make_no_sense(arguments, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        NoiseBins(**arguments, owner="me")
