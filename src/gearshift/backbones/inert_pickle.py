"""Reads what a pickle says without doing what it says.

A pickle is a program: names in it are imported, called and given state. Here a name stays a name. The few that hold
numbers (tensors, ordered dictionaries) stand for functions of this file, a container of torch or an object whose
class came with the pickle becomes a `Record` of its state, and any other name ends the reading. Nothing is imported, no
method of what was read is called, and there is no attribute that a pickle could set.

Pickles of protocol 2 to 5 are understood, with tensors as `pickle.dump` writes them and objects as NVIDIA's
`torch_utils.persistence` does: a call of `_reconstruct_persistent_obj` with a dictionary of class name, source and
state. The storage of a tensor is a file of torch.save inside the pickle; torch reads it with `weights_only=True`.
"""

from __future__ import annotations

import io
import mmap
import os
import pickletools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.runtime.errors import RunError, UsageError

# The largest official file has 1.2 GB and some hundred thousand operations.
_LARGEST = 8 << 30
_MOST_OPERATIONS = 5_000_000
_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8}
_MODULES = ("ModuleDict", "ModuleList", "Sequential")
_MARK = object()


@dataclass(frozen=True, slots=True)
class Name:
    """A global that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """An object that was not made: the name of its class, and its state."""

    kind: str
    state: dict[str, Any] | None = None


class _Refused(Exception):
    """What is wrong, to be said with the name of the file."""


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """What the file holds: builtin containers, strings, bytes and numbers, tensors on the host, and `Record`.

    Raises:
        UsageError: there is no such file.
        RunError: the file is damaged, too large, or asks for anything else; names what it asked for.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"there is no file {file}; give the path of a .pkl file")
    size = file.stat().st_size
    if not 0 < size <= _LARGEST:
        raise RunError(f"{file} has {size} bytes; a pickle of a network has 1 to {_LARGEST}. Fetch it again")
    try:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Machine().run(view)
    except _Refused as error:
        raise RunError(f"{file} {error}; it was not read, and nothing in it was run") from error
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError, RecursionError, OSError) as error:
        said = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise RunError(f"{file} is no sound pickle ({type(error).__name__}: {said}); fetch it again") from error


# Names that stand for functions of this file -------------------------------------------------------------------------


def _dictionary(*items: Any) -> dict[Any, Any]:
    if items:
        raise _Refused("makes a dictionary from something else than its entries")
    return {}


def _storage(data: bytes) -> torch.storage.TypedStorage:
    if not isinstance(data, bytes):
        raise _Refused("has a storage that is not bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # storages with a type are what these files hold
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader fails in as many ways as a file can be broken
        said = (str(error).splitlines() or [""])[0]
        raise _Refused(f"has a storage that torch does not read as one ({said})") from error
    if not isinstance(found, torch.storage.TypedStorage):
        raise _Refused(f"has a {type(found).__name__} in the place of a storage")
    return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage) or storage.dtype not in _DTYPES:
        raise _Refused("has a tensor without a storage of numbers")
    shape = [size, stride]
    if not all(isinstance(part, tuple) and all(type(n) is int and n >= 0 for n in part) for part in shape):
        raise _Refused(f"has a tensor of shape {size!r:.80} and stride {stride!r:.80}")
    count, last = 1, 0
    for length, step in zip(size, stride, strict=True):
        count, last = count * length, last + (length - 1) * step
    numbers = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if type(offset) is not int or offset < 0 or count > numbers or (count and offset + last >= numbers):
        raise _Refused(f"has a tensor of shape {list(size)} in a storage of {numbers} numbers")
    empty = torch.empty(0, dtype=storage.dtype)
    try:
        return empty.set_(storage._untyped_storage, offset, size, stride).clone(memory_format=torch.contiguous_format)
    except (RuntimeError, OverflowError) as error:  # a stride beyond 64 bits, along an axis of one
        raise _Refused(f"has a tensor of stride {stride!r:.80}") from error


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise _Refused(f"has a parameter that is a {type(data).__name__}")
    return data


def _persistent(meta: Any) -> Record:
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise _Refused("has a persistent object that is not described by a class and its state")
    state = meta.get("state")
    if state is not None and not isinstance(state, dict):
        raise _Refused(f"has a {meta['class_name']!r:.80} whose state is a {type(state).__name__}")
    return Record(meta["class_name"], state or {})


_CALLED: Mapping[Name, Callable[..., Any]] = {
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch.storage", "_load_from_bytes"): _storage,
    Name("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    Name("collections", "OrderedDict"): _dictionary,
}
_MADE: Mapping[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _dictionary,
    Name("dnnlib.util", "EasyDict"): _dictionary,
    **{Name("torch.nn.modules.container", kind): lambda kind=kind: Record(kind) for kind in _MODULES},
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}


class _Machine:
    """The stack and the memo of the pickle protocol, and of its operations those that only hold data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= _MOST_OPERATIONS:
                raise _Refused(f"has more than {_MOST_OPERATIONS} operations")
            name = operation.name
            if name == "STOP":
                [found] = self.stack
                return found
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _NUMBERS or name in _STRINGS:
                self.stack.append(argument)
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name in _TUPLES:
                self.stack.append(tuple(self._popped(_TUPLES[name])))
            else:
                self._step(name, argument)
        raise _Refused("ends in the middle")

    def _step(self, name: str, argument: Any) -> None:
        if name in ("PROTO", "FRAME"):
            return
        if name == "MARK":
            self.stack.append(_MARK)
        elif name == "TUPLE":
            self.stack.append(tuple(self._marked()))
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self._top(object)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self._top(object)
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.stack.append(self._global(argument))
        elif name in ("APPEND", "APPENDS"):
            items = self._items(name == "APPENDS", 1)
            self._top(list).extend(items)
        elif name == "ADDITEMS":
            items = self._marked()
            self._top(set).update(_keys(items))
        elif name == "FROZENSET":
            self.stack.append(frozenset(_keys(self._marked())))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._items(name == "SETITEMS", 2)
            self._top(dict).update(zip(_keys(items[::2]), items[1::2], strict=True))
        elif name in ("REDUCE", "NEWOBJ"):
            self._make(_CALLED if name == "REDUCE" else _MADE)
        elif name == "BUILD":
            state = self._popped(1)[0]
            record = self._top(Record)
            if record.state is not None or not isinstance(state, dict):
                raise _Refused(f"gives a {record.kind} a state of its own kind")
            record.state = state
        else:
            raise _Refused(f"uses the operation {name}, which no pickle of a network needs")

    def _global(self, argument: str | None) -> Name:
        parts = self._popped(2) if argument is None else argument.split(" ", 1)
        if not all(isinstance(part, str) for part in parts):
            raise _Refused("names a global by something else than text")
        name = Name(*parts)
        if name not in _CALLED and name not in _MADE:
            raise _Refused(f"asks for {str(name)!r:.80}, and only tensors and plain containers are read")
        return name

    def _make(self, known: Mapping[Name, Callable[..., Any]]) -> None:
        name, arguments = self._popped(2)
        if not isinstance(name, Name) or name not in known or not isinstance(arguments, tuple):
            what = name if isinstance(name, Name) else f"a {type(name).__name__}"
            raise _Refused(f"calls {what} as one that can not be called so")
        try:
            self.stack.append(known[name](*arguments))
        except TypeError as error:
            raise _Refused(f"calls {name} with other arguments than it takes") from error

    def _top(self, kind: type) -> Any:
        if not self.stack or self.stack[-1] is _MARK or not isinstance(self.stack[-1], kind):
            raise _Refused(f"changes something that is no {kind.__name__}")
        return self.stack[-1]

    def _popped(self, count: int) -> list[Any]:
        if count == 0:
            return []
        taken = self.stack[-count:]
        if len(taken) < count or any(item is _MARK for item in taken):
            raise _Refused("takes more than it has")
        del self.stack[-count:]
        return taken

    def _marked(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise _Refused("takes more than it has")

    def _items(self, many: bool, count: int) -> list[Any]:
        items = self._marked() if many else self._popped(count)
        if len(items) % count:
            raise _Refused("has a key without a value")
        return items


def _keys(items: list[Any]) -> list[Any]:
    """Only what hashes by itself: nothing that was read is asked for its hash."""
    for item in items:
        if not isinstance(item, (str, int, float, bool, bytes, type(None))):
            raise _Refused(f"has a key that is a {type(item).__name__}")
    return items
