"""Answers that are looked at one block late: the same decisions and images, one block more for who left."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.execution import asking
from gearshift.execution.exits import ExitView
from gearshift.execution.memory import Memory
from gearshift.execution.outputs import PACK, SIMULATE, Outputs, Packing
from gearshift.execution.plan import StepPlan

from ..contract import CASES, EAGER, Subject, build, macs_per_row, plain_loop, random_depths

PATHS = [(case.name, path) for case in CASES for path in range(len(build(case.name).paths))]
LATE = replace(EAGER, overlap=True)
WAITING = replace(EAGER, overlap=False)
EXACT = dict(rtol=0, atol=1e-10)


@dataclass(frozen=True)
class Hits:
    """Row r wants to leave at depth d where `table[d, r]`, and may at its `patience`-th hit; `asked` notes who is
    asked."""

    table: Tensor
    calm: frozenset[int] = frozenset()
    patience: int = 1
    named: frozenset[int] | None = None
    asked: list[tuple[int, list[int]]] = field(default_factory=list)

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return [depth for depth in exits[:-1] if self.named is None or depth in self.named]

    def quiet(self, exits: tuple[int, ...]) -> Collection[int]:
        return self.calm

    def begin(self, num_rows: int) -> Tensor:
        return torch.zeros(num_rows, dtype=torch.int64)

    def leaves(self, view: ExitView, state: Tensor) -> Tensor:
        rows = view.rows.host()
        self.asked.append((view.depth, rows.tolist()))
        assert len(view.hidden) == len(rows)
        hit = self.table[view.depth, rows]
        state[rows] += hit.long()
        return hit & (state[rows] >= self.patience)

    def decided(self, exits: tuple[int, ...], full: int) -> Tensor:
        """Depth of every row by hand."""
        depths = []
        for row in range(self.table.shape[1]):
            hits = [depth for depth in self.depths(exits) if self.table[depth, row]]
            depths.append(hits[self.patience - 1] if len(hits) >= self.patience else full)
        return torch.tensor(depths)


def drawn(s: Subject, generator: torch.Generator, patience: int = 1) -> Hits:
    """Some rows leave, at some depths nobody; any of the depths may be called quiet."""
    depths = len(s.blocks) + 1
    table = torch.rand(depths, s.rows, generator=generator) < torch.rand(depths, 1, generator=generator) * 0.6
    table &= torch.rand(depths, 1, generator=generator) < 0.8
    calm = frozenset((torch.rand(depths, generator=generator) < 0.6).nonzero().flatten().tolist())
    return Hits(table, calm, patience)


def told(outputs: Outputs) -> list[tuple[Any, ...]]:
    """The trace."""
    return [(e.kind, e.path, e.index, e.mode, e.rows.host().tolist()) for e in outputs.trace]


def fresh(rule: Hits, **changes: Any) -> Hits:
    return replace(rule, asked=[], **changes)


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch, s: Subject) -> Iterator[list[int]]:
    """Blocks that had been run before each wait."""
    ran, found, plain = [0], [], asking.wait

    def counted(*arguments: Any) -> Tensor:
        found.append(ran[0])
        return plain(*arguments)

    def count(*_: object) -> None:
        ran[0] += 1

    hooks = [s.backbone.blocks[block].register_forward_hook(count) for block in s.blocks]
    with monkeypatch.context() as patch:
        patch.setattr(asking, "wait", counted)
        yield found
    for hook in hooks:
        hook.remove()


# The same decisions, the same images ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_any_expectation_gives_the_same(name: str, path: int) -> None:
    generator = torch.Generator().manual_seed(7)
    s = Subject.of(name, path, dtype=torch.float64)
    late = 0
    for number in range(4):
        rule = drawn(s, generator, patience=1 + number % 2)
        depths = random_depths(s, generator).clamp(min=s.exits[len(s.exits) // 2]) if number % 3 == 2 else None
        wanted = rule.decided(s.exits, len(s.blocks))
        wanted = wanted if depths is None else torch.minimum(wanted, depths)
        results: list[tuple[Hits, Outputs]] = []
        for packing in (WAITING, LATE, replace(LATE, min_fraction=0.5), replace(LATE, min_fraction=100.0), SIMULATE):
            own = fresh(rule)
            results.append((own, s.run(s.plan(exit=own, depth=depths), packing=packing)))
        for own, outputs in results:
            assert torch.equal(outputs.depth, wanted)
            assert own.asked == results[0][0].asked, "who is asked where must not depend on when answers are read"
            torch.testing.assert_close(outputs.prediction, results[0][1].prediction, **EXACT)
        late += int(sum(depth in rule.calm for depth in wanted.tolist()))
    assert late or len(s.exits) < 3, "somebody has to leave against expectation for this to prove anything"


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_nobody_leaves_bit_for_bit(name: str, path: int) -> None:
    s = Subject.of(name, path)
    rule = Hits(torch.zeros(len(s.blocks) + 1, s.rows, dtype=torch.bool), frozenset(s.exits))
    late, plain = (s.run(s.plan(exit=fresh(rule)), packing=packing) for packing in (LATE, WAITING))
    assert torch.equal(late.prediction, plain.prediction) and torch.equal(late.prediction, plain_loop(s))
    assert torch.equal(late.depth, plain.depth) and told(late) == told(plain)


def test_rows_of_several_paths() -> None:
    """Through the blocks they share, across the split, and on their own."""
    generator = torch.Generator().manual_seed(8)
    expert = torch.tensor([0, 1, 1, 0, 1, 0])
    for name in ("two-decoders", "exits-two-decoders", "separate", "unet-decoders", "unet-shared-middle"):
        s = Subject.of(name, dtype=torch.float64)
        longest = max(len(path) for path in s.backbone.paths)
        for _ in range(4):
            table = torch.rand(longest + 1, 6, generator=generator) < 0.3
            calm = frozenset((torch.rand(longest + 1, generator=generator) < 0.7).nonzero().flatten().tolist())
            rule = Hits(table, calm)
            own, other = fresh(rule), fresh(rule, calm=frozenset())
            late = s.run(StepPlan(expert=expert, exit=own), packing=LATE)
            plain = s.run(StepPlan(expert=expert, exit=other), packing=WAITING)
            assert torch.equal(late.depth, plain.depth) and own.asked == other.asked
            torch.testing.assert_close(late.prediction, plain.prediction, **EXACT)


def test_gradients_are_the_same() -> None:
    s = Subject.of("long-skips", dtype=torch.float64)
    rule = drawn(s, torch.Generator().manual_seed(1))
    rule = fresh(rule, calm=frozenset(s.exits))
    assert len(set(rule.decided(s.exits, 5).tolist())) > 1
    parameters = list(s.backbone.parameters())
    s.backbone.requires_grad_(True)
    try:
        found = []
        for packing in (LATE, WAITING):
            loss = s.run(s.plan(exit=fresh(rule)), packing=packing).prediction.square().sum()
            found.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    finally:
        s.backbone.requires_grad_(False)
    torch.testing.assert_close(found[0], found[1], **EXACT)


# What it costs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_who_leaves_against_expectation_pays_one_block_more(name: str, path: int) -> None:
    generator = torch.Generator().manual_seed(9)
    s = Subject.of(name, path)
    for number in range(4):
        rule = drawn(s, generator)
        depths = random_depths(s, generator) if number == 3 else torch.full((s.rows,), len(s.blocks))
        late, plain = (s.run(s.plan(exit=fresh(rule), depth=depths), packing=packing) for packing in (LATE, WAITING))
        more = set(told_by_row(late)) - set(told_by_row(plain))
        wanted = {
            (row, "block", s.blocks[depth])
            for row, (depth, target) in enumerate(zip(plain.depth.tolist(), depths.tolist(), strict=True))
            if depth in rule.calm and depth < target
        }
        assert more == wanted and not set(told_by_row(plain)) - set(told_by_row(late))
        added = macs_per_row(s.table(), late.trace, s.rows) - macs_per_row(s.table(), plain.trace, s.rows)
        for row, _, block in wanted:
            added[row] -= s.table().entries["block", path, block, "full"].macs
        assert not added.any()


def told_by_row(outputs: Outputs) -> list[tuple[int, str, int]]:
    return [(row, event.kind, event.index) for event in outputs.trace for row in event.rows.host().tolist()]


def test_when_all_leave_against_expectation_one_block_more_is_run() -> None:
    s = Subject.of("isotropic")
    table = torch.zeros(5, 6, dtype=torch.bool)
    table[1] = True
    outputs = s.run(StepPlan(exit=Hits(table, frozenset({1}))), packing=LATE)
    assert [event.index for event in outputs.trace if event.kind == "block"] == [0, 1]
    assert outputs.depth.tolist() == [1] * 6
    assert torch.equal(outputs.prediction, plain_loop(s, 1))


def test_the_simulation_charges_no_block_more() -> None:
    s = Subject.of("exits-isotropic")
    rule = drawn(s, torch.Generator().manual_seed(3))
    rule = fresh(rule, calm=frozenset(s.exits))
    assert min(rule.decided(s.exits, 4).tolist()) < 4
    simulated = s.run(StepPlan(exit=fresh(rule)), packing=Packing(simulate=True, overlap=True))
    plain = s.run(StepPlan(exit=fresh(rule)), packing=WAITING)
    assert told(simulated) == told(plain)


# When the host waits -------------------------------------------------------------------------------------------------


def test_one_wait_where_somebody_is_asked_and_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a quiet depth it comes when the next block is under way, elsewhere before."""
    for name in ("isotropic", "exits-uvit", "unet-class"):
        s = Subject.of(name)
        nobody = torch.zeros(len(s.blocks) + 1, s.rows, dtype=torch.bool)
        named = s.exits[:-1][::2]
        for calm in (frozenset[int](), frozenset(named), frozenset(named[:1])):
            with waits(monkeypatch, s) as found:
                s.run(StepPlan(exit=Hits(nobody, calm, named=frozenset(named))), packing=LATE)
            assert found == [depth + (depth in calm) for depth in named]
        with waits(monkeypatch, s) as found:
            s.run(packing=LATE)
            s.run(StepPlan(exit=Hits(nobody, frozenset(s.exits), named=frozenset())), packing=LATE)
        assert found == []


def test_nobody_left_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Subject.of("isotropic")
    table = torch.zeros(5, 6, dtype=torch.bool)
    table[2] = True
    for calm in (frozenset({1, 2, 3}), frozenset[int]()):
        rule = Hits(table, calm)
        with waits(monkeypatch, s) as found:
            s.run(StepPlan(exit=rule), packing=LATE)
        assert [depth for depth, _ in rule.asked] == [1, 2] and len(found) == 2


@pytest.mark.parametrize("with_memory", [True, False])
def test_with_a_memory_and_with_taps_answers_are_waited_for(monkeypatch: pytest.MonkeyPatch, with_memory: bool) -> None:
    """Otherwise rows that left would leave entries behind, or be told from the others too late for a tap."""
    s = Subject.of("uvit-class")
    rule = fresh(drawn(s, torch.Generator().manual_seed(5)), calm=frozenset(s.exits))
    assert len(set(rule.decided(s.exits, 5).tolist())) > 1
    found: list[tuple[Outputs, list[int]]] = []
    keys = frozenset((block, "block") for block in s.blocks)
    for packing in (LATE, WAITING):
        memory = Memory(s.rows, keys) if with_memory else None
        with waits(monkeypatch, s) as waited:
            for call in range(2 if with_memory else 1):
                reuse = keys if call else frozenset[tuple[int, str]]()
                if memory is not None:
                    memory.begin_call()
                plan = s.plan(exit=fresh(rule), reuse=reuse, taps=() if with_memory else s.exits)
                outputs = s.other(call).run(plan, memory, packing=packing)
        found.append((outputs, waited))
        if memory is not None:
            written = [memory.written(key).tolist() for key in sorted(keys)]
            assert written == [(rule.decided(s.exits, 5) > block).long().sub(1).tolist() for block, _ in sorted(keys)]
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][0].prediction, found[1][0].prediction)
    assert torch.equal(found[0][0].depth, found[1][0].depth)


def test_on_the_host_there_is_nothing_to_overlap() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [PACK.overlaps(device) for device in (cpu, cuda)] == [False, True]
    assert [LATE.overlaps(device) for device in (cpu, cuda)] == [True, True]
    assert [WAITING.overlaps(device) for device in (cpu, cuda)] == [False, False]
    assert [SIMULATE.overlaps(device) for device in (cpu, cuda)] == [False, False]


class Arrival:
    """An event of a device that takes its time: the mask lands when it is waited for, and not before."""

    def __init__(self, mask: Tensor, landing: Tensor) -> None:
        self.mask, self.landing = mask, landing

    def synchronize(self) -> None:
        self.landing.copy_(self.mask)


def test_an_answer_is_not_looked_at_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(mask: Tensor) -> tuple[Tensor, Any]:
        landing = ~mask
        return landing, Arrival(mask.clone(), landing)

    s = Subject.of("isotropic", dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        rule = drawn(s, generator)
        plain = s.run(StepPlan(exit=fresh(rule)), packing=WAITING)
        with monkeypatch.context() as patch:
            patch.setattr(asking, "send", send)
            late = s.run(StepPlan(exit=fresh(rule)), packing=LATE)
        assert torch.equal(late.depth, plain.depth)
        torch.testing.assert_close(late.prediction, plain.prediction, **EXACT)


def test_a_mask_travels_to_pinned_memory_and_is_told_of_by_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to CUDA, in which order."""
    said: list[str] = []

    class Landing:
        def copy_(self, mask: Any, non_blocking: bool) -> None:
            said.append(f"copy, blocking={not non_blocking}")

    def empty(shape: Any, **options: Any) -> Landing:
        said.append(f"{tuple(shape)} {options}")
        return Landing()

    class Event:
        def record(self, stream: Any) -> None:
            said.append(f"record on {stream}")

        def synchronize(self) -> None:
            said.append("synchronize")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    device = SimpleNamespace(type="cuda")
    mask: Any = SimpleNamespace(device=device, shape=(3,), dtype=torch.bool)  # no cpu(), no item()
    landing, arrived = asking.send(mask)
    assert said == [
        f"(3,) {dict(dtype=torch.bool, device='cpu', pin_memory=True)}",
        "copy, blocking=False",
        f"record on the stream of {device}",
    ]
    assert asking.wait(landing, arrived) is landing and said[3:] == ["synchronize"]


class OnDevice(Tensor):
    """A tensor that notes every way its values take to the host; what is computed from it is one, too."""

    ways: list[str] = []  # noqa: RUF012
    HOST = ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name in cls.HOST:
            cls.ways.append(name)
            with torch._C.DisableTorchFunctionSubclass():
                return func(args[0].as_subclass(Tensor), *args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@dataclass(frozen=True)
class Below:
    """Rows leave below a threshold of the head's mean, as those of a policy do."""

    threshold: float
    calm: bool

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return exits[:-1]

    def quiet(self, exits: tuple[int, ...]) -> Collection[int]:
        return exits if self.calm else ()

    def begin(self, num_rows: int) -> None:
        return None

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        return view.uncertainty() < self.threshold


@pytest.mark.parametrize("name", ["exits-isotropic", "exits-uvit"])
@pytest.mark.parametrize("calm", [True, False])
def test_values_of_the_device_reach_the_host_in_masks_alone(name: str, calm: bool) -> None:
    """Seen from the tensors themselves: of all that is computed from the images, only masks go to the host."""
    s = Subject.of(name)
    u = s.run(StepPlan(taps=s.exits)).uncertainty
    middle = float(
        torch.stack([value.flatten(1).mean(1) if value.ndim > 1 else value for value in u.values()]).median()
    )
    seen = Subject(s.case, s.backbone, s.path, s.x.as_subclass(OnDevice), s.time, s.cond)
    for threshold in (-1.0, middle):
        rule = Below(threshold, calm)
        OnDevice.ways.clear()
        outputs = seen.run(StepPlan(exit=rule), packing=replace(PACK, overlap=True))
        assert isinstance(outputs.prediction, OnDevice)
        heads = {event.index for event in outputs.trace if event.kind == "uncertainty"}
        assert OnDevice.ways == ["cpu"] * len(heads) and heads
        plain = s.run(StepPlan(exit=rule))
        assert torch.equal(outputs.depth, plain.depth)
        torch.testing.assert_close(outputs.prediction.as_subclass(Tensor), plain.prediction, rtol=1e-6, atol=1e-6)
        assert (threshold < 0) == (set(plain.depth.tolist()) == {len(s.blocks)})
