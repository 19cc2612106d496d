"""Several devices against one, with processes played by threads. Nothing here is timed."""

from __future__ import annotations

import statistics
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gearshift.evaluation import speed
from gearshift.evaluation.speed import SpeedSettings, measure_scaling, scaling

NO_TABLE: Any = None
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """Stands for a sampler."""

    chunk: int = 0
    device: torch.device = CPU

    def generate(self, index: torch.Tensor, table: object, cond: object = None) -> Any:
        """Replaced by what a test says generations are."""
        raise NotImplementedError


def test_scaling_of_one_node() -> None:
    """20 images per pass: 10 per second alone; with both at work one takes 2.5 s and the other 4 s."""
    together = [("a", (2.5, 2.5, 9.0)), ("a", (4.0, 4.0, 4.0))]
    assert scaling(20, [2.0, 2.0, 7.0], together) == {
        "devices": 2,
        "nodes": 1,
        "images_per_s_alone": 10.0,
        "images_per_s_device": statistics.median([20 / 2.5, 20 / 4.0]),
        "images_per_s_node": 10.0,
        "images_per_s": 10.0,  # 40 images until the slower is done
        "efficiency": 0.5,
    }


def test_scaling_of_several_nodes() -> None:
    together = [("a", (1.0,)), ("b", (2.0,)), ("a", (2.0,)), ("b", (4.0,)), ("c", (1.0,))]
    found = scaling(8, [1.0], together)
    assert (found["devices"], found["nodes"]) == (5, 3)
    assert found["images_per_s_device"] == statistics.median([8, 4, 4, 2, 8])
    assert found["images_per_s_node"] == statistics.median([16 / 2, 16 / 4, 8 / 1])
    assert found["images_per_s"] == 40 / 4
    assert found["efficiency"] == pytest.approx(10 / (5 * 8))


def test_a_perfect_machine_scales_perfectly() -> None:
    found = scaling(4, [0.5] * 3, [("a", [0.5] * 3)] * 8)
    assert found["efficiency"] == 1.0
    assert found["images_per_s"] == found["images_per_s_node"] == 8 * found["images_per_s_device"]


class Peers:
    """Processes played by threads: each has a rank, and they meet at a barrier."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.passes: set[tuple[int, int]] = set()  # first image, images
        self.count, self.place = count, threading.local()
        self.meeting = threading.Barrier(count, timeout=20)
        self.events: list[str] = []  # appended to under the interpreter's lock
        self.box: dict[int, Any] = {}
        monkeypatch.setattr(Row, "generate", lambda row, *args, **more: self.sample_chunk(row, *args, **more))
        monkeypatch.setattr(speed, "world_size", lambda: count)
        monkeypatch.setattr(speed, "is_main", lambda: self.place.rank == 0)
        monkeypatch.setattr(speed.peers, "barrier", self.barrier)
        monkeypatch.setattr(speed.peers, "gather", self.gather)
        monkeypatch.setattr(speed, "seconds_of", self.seconds_of)
        monkeypatch.setattr(speed.socket, "gethostname", lambda: f"host{self.place.rank // 2}")

    def sample_chunk(self, sampler: Row, index: torch.Tensor, table: object, cond: object = None) -> Any:
        self.passes.add((int(index[0]), len(index)))
        return SimpleNamespace(ledger=SimpleNamespace(macs_per_image=1.0))

    def barrier(self, what: str) -> None:
        if self.meeting.wait() == 0:
            self.events.append("|")
        self.meeting.wait()

    def gather(self, value: Any, what: str) -> list[Any] | None:
        self.box[self.place.rank] = value
        self.meeting.wait()
        return [self.box[rank] for rank in range(self.count)] if self.place.rank == 0 else None

    def seconds_of(self, method: Any, device: torch.device) -> float:
        method()
        self.events.append(str(self.place.rank))
        return float(1 + self.place.rank)

    def run(self, settings: SpeedSettings) -> list[Any]:
        answers: list[Any] = [None] * self.count

        def process(rank: int) -> None:
            self.place.rank = rank
            row: Any = Row()
            answers[rank] = measure_scaling(row, NO_TABLE, settings, start=3)

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        return answers


def test_the_main_process_is_timed_alone_and_then_all_start_together(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = Peers(monkeypatch, 3)
    answers = peers.run(SpeedSettings(images=6, rounds=2, warmup=2))
    warm, *rounds = "".join(peers.events).split("|")
    assert sorted(warm) == list("001122")
    assert ["".join(sorted(part)) for part in rounds] == ["0", "012", "0", "012"]
    assert answers[1:] == [None, None]
    assert answers[0] == {
        "devices": 3,
        "nodes": 2,
        "images_per_s_alone": 6.0,
        "images_per_s_device": 3.0,
        "images_per_s_node": statistics.median([12 / 2, 6 / 3]),
        "images_per_s": 18 / 3,
        "efficiency": pytest.approx(1 / 3),
    }
    assert peers.passes == {(3, 6)}, "all have the same work"


def test_one_process_has_nothing_to_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = Peers(monkeypatch, 1)
    assert peers.run(SpeedSettings()) == [None]
    assert peers.passes == set() and peers.events == []
