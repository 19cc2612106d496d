"""Interleaved timing with clocks made by hand, and `gearshift bench` from the command line. Nothing here is timed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gearshift import cli
from gearshift.evaluation import conditions, throughput
from gearshift.evaluation.conditions import Quiet
from gearshift.evaluation.throughput import BUSY, Timing, interleave
from gearshift.verbs import bench_calls

CPU = torch.device("cpu")


class Clock:
    """A clock that only methods move: calling `takes(name, seconds...)` gives a method of these durations in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.ran: list[str] = []
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(throughput, "Quiet", lambda: SimpleNamespace(start=lambda: self, others=None))

    def others(self) -> float | None:
        return 0.03

    def takes(self, name: str, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def method() -> None:
            self.ran.append(name)
            self.now += left.pop(0)

        return method


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_methods_take_turns_and_every_second_round_runs_backwards(clock: Clock) -> None:
    told: list[str] = []
    methods = {name: clock.takes(name, *[1.0] * 5) for name in "ABC"}
    timings, others = interleave(methods, 4, CPU, warmup=1, on_run=told.append)
    assert "".join(clock.ran) == "ABC" + "ABC" + "CBA" + "ABC" + "CBA"
    assert told == clock.ran
    assert list(timings) == ["A", "B", "C"]
    assert others == 0.03


def test_warm_up_is_run_and_not_counted(clock: Clock) -> None:
    methods = {"A": clock.takes("A", 50.0, 60.0, 1.0, 2.0), "B": clock.takes("B", 70.0, 80.0, 3.0, 4.0)}
    timings, _ = interleave(methods, 2, CPU, warmup=2)
    assert timings["A"].seconds == (1.0, 2.0)
    assert timings["B"].seconds == (3.0, 4.0)
    clock.ran.clear()
    timings, _ = interleave({"A": clock.takes("A", 5.0)}, 1, CPU, warmup=0)
    assert clock.ran == ["A"]
    assert timings["A"].median == 5.0


def test_the_first_pass_of_the_warm_up_is_kept_apart(clock: Clock) -> None:
    methods = {"A": clock.takes("A", 50.0, 60.0, 1.0), "B": clock.takes("B", 70.0, 80.0, 3.0)}
    timings, _ = interleave(methods, 1, CPU, warmup=2)
    assert (timings["A"].first_s, timings["B"].first_s) == (50.0, 70.0)
    timings, _ = interleave({"A": clock.takes("A", 5.0)}, 1, CPU, warmup=0)
    assert timings["A"].first_s is None


def test_the_peak_of_memory_is_the_largest_of_a_round(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is forgotten before every run, so that no method pays for another or for the warm-up."""
    peak = 0

    def forget(device: torch.device) -> None:
        nonlocal peak
        peak = 0

    def taking(*amounts: int) -> Callable[[], None]:
        left = list(amounts)

        def method() -> None:
            nonlocal peak
            peak = max(peak, left.pop(0))

        return method

    monkeypatch.setattr(throughput, "forget_peak", forget)
    monkeypatch.setattr(throughput, "peak_memory", lambda device: peak)
    timings, _ = interleave({"A": taking(900, 5, 7, 6), "B": taking(800, 3, 2, 1)}, 3, CPU, warmup=1)
    assert (timings["A"].peak_memory_bytes, timings["B"].peak_memory_bytes) == (7, 3)


def test_the_machine_is_watched_from_the_end_of_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    watch = SimpleNamespace(others=lambda: events.append("others"))

    def start() -> Any:
        events.append("start")
        return watch

    monkeypatch.setattr(throughput, "Quiet", lambda: SimpleNamespace(start=start))
    _, others = interleave({"A": lambda: events.append("A")}, 2, CPU, warmup=1)
    assert events == ["A", "start", "A", "A", "others"]
    assert others is None


def test_a_ratio_is_the_median_of_ratios_within_rounds(clock: Clock) -> None:
    """The machine is five times slower for two rounds, and in one more for one method: the ratio of medians is off."""
    full, exits = (2.0, 2.0, 10.0, 10.0, 2.0), (1.0, 5.0, 5.0, 5.0, 1.0)
    methods = {"full": clock.takes("full", *full), "exits": clock.takes("exits", *exits)}
    timings, _ = interleave(methods, 5, CPU, warmup=0)
    assert timings["full"].seconds == full
    assert timings["exits"].seconds == exits
    assert timings["exits"].ratio_of(timings["full"]) == 0.5
    assert timings["exits"].median / timings["full"].median == 2.5
    assert timings["full"].ratio_of(timings["full"]) == 1.0


def test_ratios_need_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="longer than"):
        Timing((1.0,)).ratio_of(Timing((1.0, 2.0)))


@pytest.mark.parametrize(
    ("seconds", "spread"),
    [
        ((3.0,), 0.0),
        ((2.0, 4.0), 2 / 3),
        ((5.0, 4.0, 3.0), 0.5),
        ((1.0, 2.0, 3.0, 4.0, 5.0), 1.0),  # quartiles 1.5 and 4.5
        ((2.0,) * 9 + (900.0,), 0.0),  # one outlier is no spread
    ],
)
def test_spread_is_the_range_between_quartiles_over_the_median(seconds: tuple[float, ...], spread: float) -> None:
    assert Timing(seconds).spread == pytest.approx(spread)
    assert Timing(tuple(reversed(seconds))).spread == Timing(seconds).spread


# Other processes -----------------------------------------------------------------------------------------------------


def readings(monkeypatch: pytest.MonkeyPatch, busy: list[float], own: list[float], wall: list[float]) -> None:
    """What the three counters say, one reading after the other, on a machine of two cores."""
    monkeypatch.setattr(conditions, "_busy_seconds", lambda: busy.pop(0))
    monkeypatch.setattr(conditions, "_own_seconds", lambda: own.pop(0))
    monkeypatch.setattr(conditions, "time", SimpleNamespace(perf_counter=lambda: wall.pop(0)))
    monkeypatch.setattr(conditions, "_usable_cores", lambda: 2)


@pytest.mark.parametrize(
    ("busy", "own", "share"),
    [
        ([1000.0, 1006.0], [30.0, 32.0], 4 / 20),  # 6 s of CPU time went by in 10 s on two cores, 2 of them our own
        ([1000.0, 1002.0], [30.0, 32.0], 0.0),
        ([1000.0, 1001.9], [30.0, 32.0], 0.0),  # the counters tick apart
        ([1000.0, 1020.0], [30.0, 30.0], 1.0),
    ],
)
def test_others_is_the_share_of_all_cores_that_we_did_not_use(
    monkeypatch: pytest.MonkeyPatch, busy: list[float], own: list[float], share: float
) -> None:
    readings(monkeypatch, list(busy), list(own), [50.0, 60.0])
    assert Quiet().start().others() == pytest.approx(share)


def test_what_is_not_known_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nan = float("nan")
    readings(monkeypatch, [nan, nan], [1.0, 2.0], [50.0, 60.0])
    assert Quiet().start().others() is None
    readings(monkeypatch, [1.0, 2.0], [1.0, 2.0], [50.0, 50.0])  # no time has gone by
    assert Quiet().start().others() is None


def test_counters_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """user, nice, system, irq, softirq and steal count; idle, waiting, and guests (already in user) do not."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 5000 700 4 6 40 9 9\ncpu0 1 2 3 4\n")
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: real(stat if path == "/proc/stat" else path, *a, **k))
    monkeypatch.setattr(conditions.os, "sysconf", lambda name: {"SC_CLK_TCK": 50}[name])
    assert conditions._busy_seconds() == 200 / 50
    stat.write_text("nothing of the kind\n")
    assert conditions._busy_seconds() != conditions._busy_seconds()  # nan
    stat.unlink()
    assert conditions._busy_seconds() != conditions._busy_seconds()


# gearshift bench -----------------------------------------------------------------------------------------------------

TINY = ["batch=4", "repeats=2", "strata=2", "warmup=1", "solver.steps=3", "device=cpu", "shrink=true"]
ROW = {"policy", "ms_per_call", "macs_saved", "time_saved", "speedup", "saving_realised", "spread", "verdict"}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run(list(arguments)) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quiet, "others", lambda self: 0.01)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("exits", ["adadiff", "deediff", "none"])
def test_bench_times_a_fixed_depth_and_drawn_exits(capsys: pytest.CaptureFixture[str], exits: str) -> None:
    answer = said(capsys, "bench", *TINY, f"exits={exits}")
    assert set(answer) == {"rows", "target", "other_processes", "busy", "conditions"}
    assert [row["policy"] for row in answer["rows"]] == ["depth 4", "per-row exits, drawn"]
    for row in answer["rows"]:
        assert set(row) == ROW
        assert row["time_saved"] == pytest.approx(1 - 1 / row["speedup"])
        assert row["saving_realised"] == pytest.approx(row["time_saved"] / row["macs_saved"])
        assert row["ms_per_call"] > 0 and row["spread"] >= 0
    assert (answer["busy"], answer["other_processes"], answer["target"]) == (False, 0.01, 0.85)
    c = answer["conditions"]
    assert (c["batch"], c["rows"], c["guidance"], c["repeats"], c["weights"]) == (4, 4, 1.0, 2, "random")
    assert (c["tokens"], len(c["strata"]), c["dtype"], c["compiled"]) == (16, 2, "float32", False)


@pytest.mark.usefixtures("quiet")
def test_bench_of_a_fixed_depth_saves_what_profile_says(capsys: pytest.CaptureFixture[str]) -> None:
    for exits in ("adadiff", "deediff"):
        policy = ["policy=fixed_depth", "policy.depth=3", f"exits={exits}", "shrink=true"]
        [row] = said(capsys, "bench", *TINY, *policy)["rows"]
        profile = said(capsys, "profile", *policy)
        [fraction] = [e["fraction"] for e in profile["exits"] if e["depth"] == 3]
        assert row["policy"] == "depth 3"
        assert row["macs_saved"] == pytest.approx(1 - fraction, abs=1e-12)
        assert row["macs_saved"] == pytest.approx(profile["policy"]["macs_saved"], abs=1e-12)


@pytest.mark.usefixtures("quiet")
def test_bench_counts_both_branches_of_guidance(capsys: pytest.CaptureFixture[str]) -> None:
    once, twice = (
        said(capsys, "bench", *TINY, "policy=fixed_depth", "policy.depth=3", f"guidance={w}") for w in (1, 2)
    )
    assert (once["conditions"]["rows"], twice["conditions"]["rows"]) == (4, 8)
    assert once["rows"][0]["macs_saved"] == pytest.approx(twice["rows"][0]["macs_saved"])


REUSING = [
    ["policy=skip_every", "policy.k=3"],
    ["policy=hurry", "policy.last=4", "policy.operator=output"],
    ["policy=deep_features", "policy.interval=3"],
    ["policy=exit_schedule"],
]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("policy", REUSING, ids=lambda policy: policy[0])
@pytest.mark.parametrize("guidance", [1, 2])
def test_bench_of_what_plans_differently_at_every_call_saves_what_profile_says(
    capsys: pytest.CaptureFixture[str], policy: list[str], guidance: int
) -> None:
    """Two strata of seven calls: skips and reuse fall between the calls that are timed."""
    common = [*policy, "shrink=true", "solver.steps=7", f"guidance={guidance}"]
    [row] = said(capsys, "bench", *TINY, *common)["rows"]
    assert row["macs_saved"] == pytest.approx(said(capsys, "profile", *common)["policy"]["macs_saved"], abs=1e-12)
    assert row["macs_saved"] > 0.05


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("extrapolate", ["true", "false"])
def test_bench_of_a_policy_that_looks_back(capsys: pytest.CaptureFixture[str], extrapolate: str) -> None:
    """It has seen full compute before each call that is timed: after the warm-up it skips wherever it may."""
    policy = ["policy=adaptive_skip", "policy.threshold=1e9", f"policy.extrapolate={extrapolate}", "solver.steps=8"]
    [row] = said(capsys, "bench", *TINY, *policy, "strata=8")["rows"]
    assert row["macs_saved"] == pytest.approx(3 / 8)  # four to warm up, and the last one


def test_the_plans_of_one_part_weigh_by_how_often_they_are_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part of six calls, of which 1 and 3 are skipped, in no time: four sixths of the time are left."""

    def fake(methods: Any, rounds: int, device: Any, **_: Any) -> Any:
        assert list(methods) == ["full", "policy", "policy 1"]
        return {key: Timing((1e-9 if key == "policy 1" else 1.0,) * rounds) for key in methods}, 0.0

    monkeypatch.setattr(bench_calls, "interleave", fake)
    [row] = said(capsys, "bench", *TINY, "solver.steps=6", "strata=1", "policy=skip_every", "policy.k=2")["rows"]
    assert row["time_saved"] == pytest.approx(2 / 6) and row["macs_saved"] == pytest.approx(2 / 6)
    assert row["ms_per_call"] == pytest.approx(1000 * 4 / 6)


def scripted(monkeypatch: pytest.MonkeyPatch, share: float, others: float | None) -> None:
    """Every policy takes `share` of what full compute takes."""

    def fake(methods: Any, rounds: int, device: Any, **_: Any) -> Any:
        return {key: Timing((1.0 if key == "full" else share,) * rounds) for key in methods}, others

    monkeypatch.setattr(bench_calls, "interleave", fake)


@pytest.mark.parametrize(("share", "verdict"), [(0.5, "met"), (0.95, "missed"), (1.2, "missed")])
def test_the_verdict_compares_seconds_with_macs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, share: float, verdict: str
) -> None:
    scripted(monkeypatch, share, None)
    answer = said(capsys, "bench", *TINY, "policy=fixed_depth", "policy.depth=4")
    [row] = answer["rows"]
    assert row["verdict"] == verdict
    assert row["time_saved"] == pytest.approx(1 - share)
    assert row["speedup"] == pytest.approx(1 / share)
    assert row["saving_realised"] == pytest.approx((1 - share) / row["macs_saved"])
    assert row["ms_per_call"] == pytest.approx(1000 * share)
    assert (answer["busy"], answer["other_processes"]) == (False, None)


def test_full_compute_saves_nothing_that_could_be_realised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 1.0, 0.0)
    [row] = said(capsys, "bench", *TINY, "policy=full")["rows"]
    assert (row["macs_saved"], row["saving_realised"], row["verdict"]) == (0.0, None, "missed")


def test_strata_weigh_by_what_full_compute_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two noise levels, the second three times as slow: ratios 1 and 0.2 make (1 + 3 * 0.2) / 4."""
    times = [{"full": 1.0, "policy": 1.0}, {"full": 3.0, "policy": 0.6}]

    def fake(methods: Any, rounds: int, device: Any, **_: Any) -> Any:
        now = times.pop(0)
        return {key: Timing((now[key],) * rounds) for key in methods}, 0.0

    monkeypatch.setattr(bench_calls, "interleave", fake)
    [row] = said(capsys, "bench", *TINY, "solver.steps=4", "policy=fixed_depth", "policy.depth=4")["rows"]
    assert row["time_saved"] == pytest.approx(1 - 1.6 / 4)
    assert row["ms_per_call"] == pytest.approx(1000 * statistics.mean([1.0, 0.6]))


def test_a_busy_machine_gets_no_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One disturbed noise level is enough."""
    shares = iter([0.02, BUSY + 0.2, 0.04])
    monkeypatch.setattr(Quiet, "others", lambda self: next(shares))
    assert cli.run(["bench", *TINY, "strata=3"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out.splitlines()[-1])
    assert answer["busy"] is True
    assert answer["other_processes"] == pytest.approx(BUSY + 0.2)
    assert {row["verdict"] for row in answer["rows"]} == {"machine busy, no verdict"}
    assert "other processes used 30% of the CPU time; measure again on a quiet machine" in captured.err


@pytest.mark.parametrize("setting", ["batch=0", "repeats=0", "strata=0", "rounds=0"])
def test_bench_of_nothing_is_refused(capsys: pytest.CaptureFixture[str], setting: str) -> None:
    assert cli.run(["bench", *TINY, setting]) == 2
    assert f"gearshift: {setting} must be at least 1" in capsys.readouterr().err
