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
