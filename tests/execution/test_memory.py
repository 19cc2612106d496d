"""Memory, slots and streams by themselves."""

from __future__ import annotations

import pytest
import torch

from gearshift.execution.memory import NO_SLOT, Memory, Slot
from gearshift.execution.stream import Rows, Stream, gather


def test_entries_follow_their_rows() -> None:
    """Against a dictionary of rows, over random writes and reads."""
    generator = torch.Generator().manual_seed(0)
    memory, model, key = Memory(8, [(0, "map")]), {}, (0, "map")
    for step in range(30):
        memory.begin_call()
        chosen = (torch.rand(8, generator=generator) < 0.5).nonzero().flatten()
        if not len(chosen):
            continue
        keep = torch.rand(len(chosen), generator=generator) < 0.7
        if bool(keep.any()):
            values = torch.randn(len(chosen), 3, generator=generator)
            memory.write(key, Rows(8, chosen), {"map": (values, 2 * values)}, keep)
            model.update({row: (values[i], step) for i, row in enumerate(chosen.tolist()) if keep[i]})
        assert memory.written(key).tolist() == [model[row][1] if row in model else -1 for row in range(8)]
        assert memory.valid(key, Rows(8, chosen)).tolist() == [row in model for row in chosen.tolist()]
        known = torch.tensor(sorted(model))
        for position, scale in ((0, 1), (1, 2)):
            read = memory.read(key, Rows(8, known))["map"][position]
            assert torch.equal(read, torch.stack([scale * model[row][0] for row in known.tolist()]))


def test_a_stored_tensor_is_not_written_through() -> None:
    """An entry may be the tensor a block handed on; a later partial write must not change that tensor."""
    memory, given = Memory(3, [(0, "block")]), torch.zeros(3, 2)
    memory.begin_call()
    memory.write((0, "block"), Rows(3), {"block": (given,)})
    memory.write((0, "block"), Rows(3, torch.tensor([1])), {"block": (torch.ones(1, 2),)})
    assert torch.equal(given, torch.zeros(3, 2))
    assert memory.num_bytes == 3 * 2 * 4


def test_forgotten_rows_have_no_entry() -> None:
    memory, keys = Memory(4, [(0, "map"), (1, "qk")]), [(0, "map"), (1, "qk")]
    memory.begin_call()
    for key in keys:
        memory.write(key, Rows(4), {key[1]: (torch.arange(4.0),)})
    memory.forget(torch.tensor([1, 3]))
    for key in keys:
        assert memory.valid(key, Rows(4)).tolist() == [True, False, True, False]
        assert memory.read(key, Rows(4, torch.tensor([0, 2])))[key[1]][0].tolist() == [0, 2]
    memory.begin_call()
    memory.write(keys[0], Rows(4, torch.tensor([3])), {"map": (torch.tensor([9.0]),)})
    assert memory.written(keys[0]).tolist() == [0, -1, 0, 1] and memory.written(keys[1])[3] == -1


def test_entries_carry_no_graph() -> None:
    memory = Memory(2, [(0, "block")])
    memory.begin_call()
    memory.write((0, "block"), Rows(2), {"block": (torch.ones(2, 1, requires_grad=True) * 2,)})
    assert not memory.read((0, "block"), Rows(2))["block"][0].requires_grad


def test_write_needs_a_call() -> None:
    with pytest.raises(ValueError, match="begin_call"):
        Memory(1, [(0, "map")]).write((0, "map"), Rows(1), {"map": (torch.ones(1),)})


def test_keys_that_were_not_asked_for_are_never_valid() -> None:
    memory = Memory(2, [(0, "map"), (1, "qk")])
    assert memory.valid((3, "map"), Rows(2)).tolist() == [False, False]
    assert memory.wanted(0) == {"map"} and memory.wanted(3) == frozenset()


def test_slots_of_named_operators() -> None:
    slot = Slot("map", frozenset({"map", "output"}), {"cross.map": (torch.ones(1),)})
    assert slot.scope("cross").load("map") is not None
    assert slot.scope("cross").load("output") is None
    assert slot.wants("output") and not slot.wants("qk")
    slot.scope("self").scope("inner").store("output", torch.zeros(1))
    assert list(slot.stored) == ["self.inner.output"]
    assert NO_SLOT.load("map") is None and not NO_SLOT.wants("map")


def test_rows() -> None:
    everybody = Rows(5)
    some = everybody.take(torch.tensor([1, 2, 4]))
    fewer = some.take(torch.tensor([0, 2]))
    assert (len(everybody), len(some), fewer.host().tolist()) == (5, 3, [1, 4])
    assert everybody.positions_of(some) is not None and everybody.positions_of(some).tolist() == [1, 2, 4]  # type: ignore[union-attr]
    assert some.positions_of(fewer).tolist() == [0, 2]  # type: ignore[union-attr]
    assert some.positions_of(some) is None
    assert fewer.on(torch.device("cpu")).tolist() == [1, 4]


def test_skips_are_narrowed_when_popped() -> None:
    """Two skips pushed for different rows, popped by fewer."""
    stream = Stream(torch.arange(5.0)[:, None], torch.arange(5.0), Rows(5), {"c": torch.arange(5)})
    stream.push()
    stream = stream.take(torch.tensor([0, 2, 3]))
    stream.hidden = stream.hidden * 10
    stream.push()
    later = stream.take(torch.tensor([1, 2]))
    assert later.pop().flatten().tolist() == [20, 30]
    assert later.pop().flatten().tolist() == [2, 3]
    assert later.cond["c"].tolist() == [2, 3] and later.time.tolist() == [2, 3]
    assert len(stream.skips) == 2  # the parent keeps its own


def test_gather_of_everything_is_the_tensor_itself() -> None:
    x = torch.ones(2)
    assert gather(x, None) is x


def filled() -> Memory:
    memory = Memory(4, [(0, "map"), (0, "block"), (1, "qk")])
    memory.begin_call()
    memory.write((0, "map"), Rows(4), {"map": (torch.arange(4.0),)})
    memory.write((1, "qk"), Rows(4), {"a.qk": (torch.ones(4, 2), torch.zeros(4, 2)), "b.qk": (torch.ones(4),)})
    return memory


def contents(memory: Memory) -> dict[tuple[int, str], dict[str, list[list[float]]]]:
    valid = {key: Rows(4, memory.valid(key, Rows(4)).nonzero().flatten()) for key in memory.keys}
    return {
        key: {name: [t.tolist() for t in tensors] for name, tensors in memory.read(key, rows).items()}
        for key, rows in valid.items()
        if len(rows)
    }


def test_a_fork_holds_the_same_tensors() -> None:
    memory = filled()
    twin = memory.fork()
    assert twin.keys == memory.keys and twin.num_bytes == memory.num_bytes and contents(twin) == contents(memory)
    for key in ((0, "map"), (1, "qk")):
        assert twin.written(key).tolist() == memory.written(key).tolist()
        for name, tensors in memory.read(key, Rows(4)).items():
            assert all(a is b for a, b in zip(tensors, twin.read(key, Rows(4))[name], strict=True))
    twin.begin_call()  # it goes on counting where the first stands
    twin.write((0, "block"), Rows(4), {"block": (torch.ones(4),)})
    assert twin.written((0, "block")).tolist() == [1] * 4


@pytest.mark.parametrize("change", ["whole", "rows", "forget", "drop", "invalidate", "wanted"])
@pytest.mark.parametrize("of_the_fork", [True, False])
def test_a_fork_goes_its_own_way(change: str, of_the_fork: bool) -> None:
    memory = filled()
    twin = memory.fork()
    changed, other = (twin, memory) if of_the_fork else (memory, twin)
    before, written = contents(other), {key: other.written(key).tolist() for key in other.keys}
    size, rows = other.num_bytes, Rows(4, torch.tensor([1, 3]))
    if change != "wanted":
        changed.begin_call()
    if change == "whole":
        changed.write((0, "map"), Rows(4), {"map": (torch.zeros(4),)})
    elif change == "rows":
        changed.write((0, "map"), rows, {"map": (torch.full((2,), 9.0),)})
        changed.write((1, "qk"), rows, {"a.qk": (torch.full((2, 2), 9.0),) * 2, "b.qk": (torch.full((2,), 9.0),)})
    elif change == "forget":
        changed.forget(torch.tensor([0]))
    elif change == "drop":
        changed.drop([(0, "map"), (1, "qk")])
    elif change == "invalidate":
        changed.invalidate()
    else:
        changed.begin_call(frozenset())
        assert not changed.wanted(0) and other.wanted(0) == {"map", "block"}
        return
    assert contents(changed) != before
    assert contents(other) == before and other.num_bytes == size
    assert {key: other.written(key).tolist() for key in other.keys} == written


def test_a_call_may_store_less() -> None:
    memory = Memory(2, [(0, "map"), (0, "block"), (1, "qk")])
    assert memory.wanted(0) == {"map", "block"}
    memory.begin_call(frozenset({(0, "block"), (5, "map"), (1, "map")}))  # keys that are not the run's are not stored
    assert memory.wanted(0) == {"block"} and not memory.wanted(1) and not memory.wanted(5)
    memory.begin_call(frozenset())
    assert not memory.wanted(0)
    memory.begin_call()
    assert memory.wanted(0) == {"map", "block"} and memory.wanted(1) == {"qk"}


def test_what_is_dropped_takes_no_room_and_is_not_valid() -> None:
    memory = filled()
    memory.drop([(1, "qk"), (0, "block")])  # of the second nothing is there
    assert memory.num_bytes == 4 * 4
    assert memory.written((1, "qk")).tolist() == [-1] * 4 and not memory.valid((1, "qk"), Rows(4)).any()
    assert memory.written((0, "map")).tolist() == [0] * 4
    memory.begin_call()
    memory.write((1, "qk"), Rows(4, torch.tensor([2])), {"a.qk": (torch.ones(1, 2), torch.ones(1, 2))})
    assert memory.valid((1, "qk"), Rows(4)).tolist() == [False, False, True, False]
