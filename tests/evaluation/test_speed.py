"""Speed of whole generations, with clocks made by hand. Nothing here is timed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.evaluation import speed, throughput
from gearshift.evaluation.conditions import Quiet
from gearshift.evaluation.speed import SpeedSettings, measure_speed, saving_realised
from gearshift.evaluation.throughput import Timing
from gearshift.execution.cost import CostTable
from gearshift.policies import Full, SkipEvery
from gearshift.runtime.errors import RunError, UsageError
from gearshift.sampling.loop import Sampler, sample_chunk

NO_TABLE: Any = None
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Row:
    """Stands for a sampler."""

    name: str
    chunk: int = 0
    device: torch.device = CPU

    def generate(self, index: Tensor, table: object, cond: object = None) -> Any:
        """Replaced by what a test says generations are."""
        raise NotImplementedError


class Machine:
    """Generations that take what `seconds(row, batch, number of the pass)` says, and a memory of `room` images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10.0
        self.passes: list[tuple[str, int, int]] = []  # row, first image, images
        self.room = 10**9
        self.shares = [0.01]
        self.seconds = lambda name, batch, number: 1.0
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(Quiet, "others", lambda _: self.shares.pop(0) if len(self.shares) > 1 else self.shares[0])
        monkeypatch.setattr(Row, "generate", lambda row, *args, **more: self.sample_chunk(row, *args, **more))

    def sample_chunk(self, sampler: Row, index: Tensor, table: object, cond: object = None) -> Any:
        batch = len(index)
        assert sampler.chunk == batch, "rows are checked and planned for the batch they are timed at"
        assert torch.equal(index, torch.arange(int(index[0]), int(index[0]) + batch))
        number = sum(1 for name, _, size in self.passes if (name, size) == (sampler.name, batch))
        self.passes.append((sampler.name, int(index[0]), batch))
        if batch > self.room:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB."
            )
        self.now += self.seconds(sampler.name, batch, number)
        return SimpleNamespace(ledger=SimpleNamespace(macs_per_image=100.0 * batch))

    def order(self, batch: int) -> str:
        return "".join(name for name, _, size in self.passes if size == batch)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def measured(names: str = "AB", told: list[str] | None = None, start: int = 0, **settings: Any) -> speed.Speed:
    rows: Any = {name: Row(name) for name in names}
    return measure_speed(
        rows,
        dict.fromkeys(names, "A"),
        NO_TABLE,
        SpeedSettings(**settings),
        start=start,
        on_pass=None if told is None else told.append,
    )


# Order ---------------------------------------------------------------------------------------------------------------


def test_rows_take_turns_at_every_batch_size_and_for_the_latency(machine: Machine) -> None:
    told: list[str] = []
    settings = {"images": 16, "rounds": 3, "sweep": (32, 4, 16, 4), "latency_repeats": 2, "warmup": 2}
    measured(told=told, **settings)
    turns = "ABAB" + "AB" + "BA" + "AB"
    # The main batch is also of the sweep and is not timed twice.
    assert [machine.order(batch) for batch in (16, 4, 32, 1)] == [turns, turns, turns, "ABAB" + "AB" + "BA"]
    sizes = [size for _, _, size in machine.passes]
    assert list(dict.fromkeys(sizes)) == [16, 4, 32, 1]
    assert told == [name for name, _, _ in machine.passes]
    assert len(told) == SpeedSettings(**settings).passes(2)


def test_passes_are_counted_before_they_are_made(machine: Machine) -> None:
    for settings in ({"images": 8}, {"images": 8, "sweep": (8,)}, {"images": 8, "sweep": (1, 2), "latency_repeats": 3}):
        machine.passes.clear()
        measured("ABC", **settings)
        assert len(machine.passes) == SpeedSettings(**settings).passes(3)


def test_all_rows_make_the_same_images_and_latency_sees_new_ones(machine: Machine) -> None:
    measured(start=7, images=5, rounds=2, sweep=(3,), latency_repeats=3, warmup=2)
    assert {first for _, first, size in machine.passes if size > 1} == {7}
    singles = {name: [first for n, first, size in machine.passes if (n, size) == (name, 1)] for name in "AB"}
    assert singles["A"] == singles["B"] == [7, 7, 7, 8, 9]  # two to warm up


# Numbers -------------------------------------------------------------------------------------------------------------


def test_the_first_pass_stands_apart(machine: Machine) -> None:
    """The first of two warm-up passes pays for compilation; neither of them counts."""
    machine.seconds = lambda name, batch, number: {0: 90.0, 1: 5.0}.get(number, 2.0)
    found = measured(images=10, rounds=3, sweep=(10,), warmup=2)
    for row in found.rows.values():
        assert row["speed"]["first_pass_s"] == 90.0
        assert row["images_per_s"] == 5.0
        assert row["seconds_spread"] == 0.0


def test_speedups_are_medians_of_ratios_within_rounds(machine: Machine) -> None:
    """The machine is five times slower for two rounds, and in one more for B: the ratio of medians is off."""
    times = {"A": (1.0, 2.0, 2.0, 10.0, 10.0, 2.0), "B": (1.0, 1.0, 5.0, 5.0, 5.0, 1.0)}
    machine.seconds = lambda name, batch, number: times[name][number]
    found = measured(images=20, rounds=5, sweep=(20,))
    own = found.rows["B"]
    assert (own["speedup"], own["time_saved"]) == (2.0, 0.5)
    assert own["images_per_s"] == 20 / 5.0
    assert own["speed"]["sweep"] == [
        {
            "batch": 20,
            "images_per_s": 4.0,
            "speedup": 2.0,
            "spread": Timing(times["B"][1:]).spread,
            "peak_memory_bytes": None,
        }
    ]
    assert (found.rows["A"]["speedup"], found.rows["A"]["time_saved"]) == (1.0, 0.0)
    assert own["speed"]["peak_memory_bytes"] is None  # not measured on the CPU
    assert own["speed"]["latency_ms"] is None  # not asked for


def test_every_row_is_compared_with_its_own_reference(machine: Machine) -> None:
    machine.seconds = lambda name, batch, number: {"A": 4.0, "B": 2.0, "C": 8.0, "D": 2.0}[name]
    rows: Any = {name: Row(name) for name in "ABCD"}
    found = measure_speed(rows, {"A": "A", "B": "A", "C": "C", "D": "C"}, NO_TABLE, SpeedSettings(sweep=(2,)))
    assert list(found.rows) == list("ABCD")
    assert [row["speedup"] for row in found.rows.values()] == [1.0, 2.0, 1.0, 4.0]
    assert [row["speed"]["sweep"][0]["speedup"] for row in found.rows.values()] == [1.0, 2.0, 1.0, 4.0]


def test_macs_of_the_images_that_were_timed(machine: Machine) -> None:
    found = measured(images=4, sweep=(8,), latency_repeats=2)
    assert found.macs == {name: {4: 400.0, 8: 800.0} for name in "AB"}


@pytest.mark.parametrize(("shares", "worst"), [([0.0, 0.3, 0.1], 0.3), ([0.2, 0.1, 0.0], 0.2), ([None], None)])
def test_the_most_disturbed_part_counts(machine: Machine, shares: list[float | None], worst: float | None) -> None:
    machine.shares = list(shares)  # type: ignore[arg-type]
    assert measured(images=4, sweep=(8,), latency_repeats=1).others == worst


def test_percentiles_of_a_known_series(machine: Machine) -> None:
    """1..101 seconds in some order, one of them the warm-up: percentile p of 1..101 is p + 1."""
    series = [50.0, *(float(1 + (37 * i) % 101) for i in range(101))]
    machine.seconds = lambda name, batch, number: series[number] if batch == 1 else 1.0
    latency = measured("A", images=4, latency_repeats=101).rows["A"]["speed"]["latency_ms"]
    assert latency == pytest.approx(
        {"p50": 51e3, "p90": 91e3, "p95": 96e3, "p99": 100e3, "min": 1e3, "mean": 51e3, "repeats": 101}
    )


@pytest.mark.parametrize(
    ("seconds", "percent", "value"),
    [
        ((3.0,), 99, 3.0),
        ((4.0, 2.0), 50, 3.0),
        ((4.0, 2.0), 90, 3.8),
        ((1.0, 2.0, 9.0), 100, 9.0),
        ((5.0, 1.0), 0, 1.0),
    ],
)
def test_percentiles_lie_between_neighbours(seconds: tuple[float, ...], percent: float, value: float) -> None:
    assert Timing(seconds).percentile(percent) == pytest.approx(value)


@pytest.mark.parametrize(
    ("time_saved", "macs_saved", "share"), [(0.3, 0.4, 0.75), (-0.1, 0.4, -0.25), (0.3, 0.01, None), (0.1, -0.2, None)]
)
def test_a_saving_that_is_none_is_not_realised(time_saved: float, macs_saved: float, share: float | None) -> None:
    assert saving_realised(time_saved, macs_saved) == (None if share is None else pytest.approx(share))


# Out of memory -------------------------------------------------------------------------------------------------------


def test_the_sweep_ends_where_memory_does(machine: Machine) -> None:
    machine.room = 16
    found = measured(images=8, rounds=2, sweep=(4, 32, 64, 8), latency_repeats=1)
    for name in "AB":
        *fitting, last = found.rows[name]["speed"]["sweep"]
        assert [entry["batch"] for entry in fitting] == [4, 8]
        assert all(entry["images_per_s"] == entry["batch"] for entry in fitting)
        assert last == {
            "batch": 32,
            "images_per_s": None,
            "speedup": None,
            "spread": None,
            "peak_memory_bytes": None,
            "reason": "A ran out of memory: CUDA out of memory. Tried to allocate 2.00 GiB",
        }
        assert found.rows[name]["speed"]["latency_ms"]["repeats"] == 1  # the program goes on
    assert machine.order(32) == "A" and machine.order(64) == ""
    assert found.macs["A"].keys() == {4, 8}


def test_the_main_batch_has_to_fit(machine: Machine) -> None:
    machine.room = 16
    with pytest.raises(RunError, match=r"with 32 images at a time \(A ran out of memory: .*\); time fewer"):
        measured(images=32)


def test_other_errors_are_not_taken_for_a_lack_of_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Row, "generate", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measured(images=32, sweep=(64,))


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"images": 0}, "timing of images=0: it must be at least 1"),
        ({"rounds": 0}, "timing of rounds=0: it must be at least 1"),
        ({"warmup": 0}, "timing of warmup=0: it must be at least 1"),
        ({"latency_repeats": -1}, "timing of latency_repeats=-1: it must be at least 0"),
        ({"sweep": (8, 0)}, "timing over batch sizes [8, 0]: every one must be at least 1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as error:
        SpeedSettings(**settings)
    assert str(error.value) == line


# A real sampler ------------------------------------------------------------------------------------------------------


def test_a_real_generation_is_what_is_timed() -> None:
    network = UViT(UViTConfig(image_size=8, patch_size=4, in_channels=1, embed_dim=16, depth=2, num_heads=2))
    denoiser = Denoiser(network.eval().requires_grad_(False), VPSDE(VPSDEConfig()))
    solver = DDIM(DDIMConfig(steps=4))
    samplers = {"full": Sampler(denoiser, solver, Full()), "skip": Sampler(denoiser, solver, SkipEvery(k=2))}
    table = CostTable.measure(network)
    settings = SpeedSettings(images=3, rounds=1, sweep=(2,), latency_repeats=2)
    found = measure_speed(samplers, {"full": "full", "skip": "full"}, table, settings, start=5)
    for name, sampler in samplers.items():
        ledger = sample_chunk(dataclasses.replace(sampler, chunk=3), torch.arange(5, 8), table).ledger
        assert found.macs[name] == {3: ledger.macs_per_image, 2: ledger.take(slice(2)).macs_per_image}
        assert found.rows[name]["images_per_s"] > 0
        assert found.rows[name]["speed"]["first_pass_s"] > 0
    assert found.macs["skip"][3] == pytest.approx(found.macs["full"][3] * 3 / 4)  # one of four calls is left out


# On a device ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_peak_memory_is_that_of_each_row() -> None:
    device = torch.device("cuda")

    def take(mebibytes: int) -> Any:
        return lambda: torch.empty(mebibytes << 20, dtype=torch.uint8, device=device).zero_()

    kept = take(4)()  # weights are held all the time
    timings, _ = throughput.interleave({"large": take(64), "small": take(8)}, 3, device)
    held = torch.cuda.memory_allocated(device)
    assert held >= kept.numel()
    assert timings["large"].peak_memory_bytes == held + (64 << 20)
    assert timings["small"].peak_memory_bytes == held + (8 << 20)


@pytest.mark.gpu
def test_the_device_is_waited_for_on_both_sides() -> None:
    device = torch.device("cuda")
    done: list[bool] = []

    def method() -> None:
        done.append(torch.cuda.current_stream(device).query())
        torch.cuda._sleep(50_000_000)
        done.append(torch.cuda.current_stream(device).query())

    torch.cuda._sleep(50_000_000)
    throughput.seconds_of(method, device)
    done.append(torch.cuda.current_stream(device).query())
    assert done == [True, False, True]


@pytest.mark.gpu
def test_memory_that_ran_out_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")

    def sample(sampler: Row, index: Tensor, table: object, cond: object = None) -> Any:
        third = torch.cuda.get_device_properties(device).total_memory // 3
        pieces = [torch.empty(third, dtype=torch.uint8, device=device) for _ in range(len(index))]
        return SimpleNamespace(ledger=SimpleNamespace(macs_per_image=float(len(pieces))))

    monkeypatch.setattr(Row, "generate", sample)
    before = torch.cuda.memory_allocated(device)
    rows: Any = {"A": Row("A", device=device)}
    found = measure_speed(rows, {"A": "A"}, NO_TABLE, SpeedSettings(images=1, rounds=1, sweep=(1, 4)))
    fits, fails = found.rows["A"]["speed"]["sweep"]
    assert fits["peak_memory_bytes"] > 0
    assert fails["images_per_s"] is None and "out of memory" in fails["reason"]
    assert torch.cuda.memory_allocated(device) == before
