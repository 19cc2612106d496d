"""Pickles are read as data: what is honest comes out equal, and what wants to run is refused without running."""

import builtins
import collections
import os
import pickle
import struct
import subprocess

import pytest
import torch

from gearshift.backbones.inert_pickle import Record, read_pickle
from gearshift.runtime.errors import RunError, UsageError


@pytest.fixture
def read(tmp_path):
    def run(data):
        file = tmp_path / "net.pkl"
        file.write_bytes(data)
        return read_pickle(file)

    return run


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_containers_and_numbers(read, protocol):
    held = {
        "int": [0, -1, 255, 70_000, -(2**40), 2**100],
        "float": [1.5, float("inf")],
        "text": ("a", "ü" * 300, ""),
        "rest": [None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "dict": collections.OrderedDict([("b", 1), ("a", {3: 4})]),
        "many": list(range(3000)),
    }
    if protocol >= 4:
        held |= {"set": {"x", "y"}, "frozen": frozenset([1]), "bytes": [b"", b"abc" * 200]}
    held["again"] = held["many"]
    found = read(pickle.dumps(held, protocol))
    assert found == held
    assert found["again"] is found["many"]
    assert list(found["dict"]) == ["b", "a"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4),
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[3:7],
        torch.tensor(2.5, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.arange(6, dtype=torch.int64),
        torch.randn(2, 3, 4, 4).half().contiguous(memory_format=torch.channels_last),
        torch.nn.Parameter(torch.ones(3)),
    ],
)
def test_tensors(read, tensor):
    found = read(pickle.dumps([tensor, tensor], 4))[0]
    assert torch.equal(found, tensor.detach()) and found.dtype == tensor.dtype
    assert not found.requires_grad and found.is_contiguous()


def test_containers_of_torch_become_records(read):
    found = read(pickle.dumps(torch.nn.ModuleDict({"a": torch.nn.ModuleDict()}), 4))
    assert isinstance(found, Record) and found.kind == "ModuleDict"
    assert found.state["_modules"]["a"].kind == "ModuleDict" and found.state["training"] is True


# What wants to run --------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of any function with any arguments, and then a state."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments, state)

    def __reduce__(self):
        return self.parts


def raw(*operations):
    """A pickle of protocol 4 from its operations."""
    return b"\x80\x04" + b"".join(operations) + b"."


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """Fails where anything is called that a hostile pickle would call."""
    ran = []
    for owner, attribute in ((os, "system"), (builtins, "eval"), (builtins, "exec"), (subprocess, "Popen")):
        monkeypatch.setattr(owner, attribute, lambda *a, attribute=attribute, **k: ran.append(attribute))
    yield
    assert ran == []


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        (pickle.dumps(Calls(os.system, "true"), 2), r"(posix|os)\.system"),
        (pickle.dumps(Calls(os.system, "true"), 4), r"(posix|os)\.system"),
        (pickle.dumps({"ema": [1, {"deep": Calls(eval, "1")}]}, 4), r"builtins\.eval"),
        (pickle.dumps(Calls(exec, "raise SystemExit"), 4), r"builtins\.exec"),
        (pickle.dumps(Calls(getattr, Calls(__import__, "os"), "getcwd"), 4), r"builtins\.getattr"),
        (pickle.dumps(Calls(subprocess.getoutput, "true"), 4), r"subprocess\.getoutput"),
        (pickle.dumps(Calls(torch.load, "x"), 4), r"torch\.serialization\.load"),
        (raw(name("collections", "OrderedDict.fromkeys"), b")R"), r"collections\.OrderedDict\.fromkeys"),
        (raw(name("torch._utils", "torch"), b")R"), r"torch\._utils\.torch"),
        (raw(name("builtins", "dict"), b")R"), r"builtins\.dict"),
    ],
)
@pytest.mark.usefixtures("nothing_runs")
def test_other_names_are_refused_by_name(read, data, asked):
    with pytest.raises(RunError, match=rf"asks for '{asked}'.*nothing in it was run"):
        read(data)


REBUILD = name("torch._utils", "_rebuild_tensor_v2")
STORAGE = name("torch.storage", "_load_from_bytes")
ORDERED = name("collections", "OrderedDict")
PERSISTENT = name("torch_utils.persistence", "_reconstruct_persistent_obj")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (raw(REBUILD, b")R"), "with other arguments"),
        (raw(REBUILD, b"(NK\x00))NNtR"), "without a storage of numbers"),
        (raw(STORAGE, text("path"), b"\x85R"), "a storage that is not bytes"),
        (raw(STORAGE, b"C\x04abcd\x85R"), "does not read as one"),
        (raw(ORDERED, b"]\x85R"), "from something else"),
        (raw(PERSISTENT, b"]\x85R"), "not described by a class"),
        (raw(PERSISTENT, b"}", text("type"), text("module"), b"s\x85R"), "not described by a class"),
        # State, attributes and calls on what is not an object of a network.
        (raw(ORDERED, b"}b"), "no Record"),
        (raw(ORDERED, b")R}b"), "no Record"),
        (raw(REBUILD, b"N}", text("__code__"), b"Ns\x86b"), "no Record"),
        (raw(name("torch.nn.modules.container", "ModuleDict"), b")\x81", b"N}\x86b"), "state of its own kind"),
        (
            raw(name("torch.nn.modules.container", "ModuleDict"), b")R"),
            r"calls torch\.nn\.\S*ModuleDict as",
        ),
        (raw(REBUILD, b")\x81"), r"calls torch\._utils\._rebuild_tensor_v2 as"),
        (raw(ORDERED, b")R)R"), "calls a dict as"),
        (raw(ORDERED, ORDERED, b"R"), r"calls collections\.OrderedDict as"),
        # Operations that no network needs: extension registry, persistent ids, instances, keyword construction.
        (raw(b"\x82\x01"), "operation EXT1"),
        (raw(b"NQ"), "operation BINPERSID"),
        (b"\x80\x02ios\nsystem\n(.", "operation INST"),
        (raw(b"(", ORDERED, b"o"), "operation OBJ"),
        (raw(ORDERED, b")}\x92"), "operation NEWOBJ_EX"),
        # Damage.
        (raw(b"0"), "POP"),
        (raw(b"t"), "takes more than it has"),
        (raw(b"R"), "takes more than it has"),
        (raw(b"(N\x85"), "is no sound pickle"),
        (raw(b"h\x07"), "is no sound pickle"),
        (raw(b"]](s"), "takes more than it has"),
        (raw(b"}(Nu"), "a key without a value"),
        (raw(b"}(]Nu"), "a key that is a list"),
        (raw(b"NN"), "is no sound pickle"),
        (b"\x80\x04N", "is no sound pickle"),
        (b"not a pickle", "is no sound pickle"),
        (raw(b"\x8e" + struct.pack("<Q", 1 << 62)), "is no sound pickle"),
        (raw(b"\x8d" + struct.pack("<Q", 1 << 62)), "is no sound pickle"),
    ],
)
@pytest.mark.usefixtures("nothing_runs")
def test_what_is_not_data_is_refused(read, data, said):
    with pytest.raises(RunError, match=said):
        read(data)


def edited(tensor, position, value):
    """The pickle of a tensor whose reconstruction is told another offset, size or stride."""

    class Told:
        def __reduce__(self):
            function, arguments = tensor.__reduce_ex__(4)
            changed = list(arguments)
            changed[position] = value
            return function, tuple(changed)

    return pickle.dumps(Told(), 4)


@pytest.mark.parametrize(
    ("position", "value"),
    [(1, 2), (1, -1), (1, True), (2, (1 << 40,)), (2, (5,)), (2, (-1,)), (2, 4), (3, (2,)), (3, (0, 0)), (3, (-1,))],
)
def test_tensors_that_reach_beyond_their_storage_are_refused(read, position, value):
    assert torch.equal(read(edited(torch.arange(4.0), 1, 0)), torch.arange(4.0))
    with pytest.raises(RunError, match=r"has a tensor|sound"):
        read(edited(torch.arange(4.0), position, value))


def test_a_tensor_is_not_blown_up_by_its_strides(read):
    with pytest.raises(RunError, match=r"\[4, 1000000000\] in a storage of 4 numbers"):
        read(pickle.dumps(torch.arange(4.0)[:, None].expand(4, 10**9), 4))


def test_a_storage_cannot_run_anything_either(read, tmp_path):
    """Its bytes are a file of torch.save, which is a pickle again."""
    trap = tmp_path / "ran"
    inner = pickle.dumps(Calls(os.mkdir, str(trap)), 2)
    for data in (inner, torch_file(Calls(os.mkdir, str(trap)), tmp_path)):
        outer = raw(STORAGE, b"\x8e" + struct.pack("<Q", len(data)) + data, b"\x85R")
        with pytest.raises(RunError, match="torch does not read"):
            read(outer)
        assert not trap.exists()
    pickle.loads(inner)  # the trap works where nobody looks
    assert trap.exists()


def torch_file(value, folder):
    torch.save(value, folder / "x.pt", _use_new_zipfile_serialization=False)
    return (folder / "x.pt").read_bytes()


def test_a_storage_that_is_a_tensor_is_refused(read, tmp_path):
    data = torch_file(torch.ones(3), tmp_path)
    with pytest.raises(RunError, match="a Tensor in the place of a storage"):
        read(raw(STORAGE, b"\x8e" + struct.pack("<Q", len(data)) + data, b"\x85R"))


def test_endless_and_empty_files(read, tmp_path, monkeypatch):
    monkeypatch.setattr("gearshift.backbones.inert_pickle._MOST_OPERATIONS", 1000)
    with pytest.raises(RunError, match="more than 1000 operations"):
        read(raw(b"N" * 2000))
    with pytest.raises(RunError, match="has 0 bytes"):
        read(b"")
    with pytest.raises(UsageError, match="there is no file"):
        read_pickle(tmp_path / "nowhere.pkl")
    monkeypatch.setattr("gearshift.backbones.inert_pickle._LARGEST", 10)
    with pytest.raises(RunError, match="has 12 bytes"):
        read(b"not a pickle")
