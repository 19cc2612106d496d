"""What earlier calls of a run left behind, per (block, part) and row, and a block's view of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gearshift.execution.stream import Rows, gather, to_device

Key = tuple[int, str]


class Slot:
    """One block's view of the memory during one call: what it may load, and what it is asked to store.

    Blocks with several attention operators give each a name: `slot.scope("cross")`.
    """

    __slots__ = ("_held", "_part", "_prefix", "_stored", "_wanted")

    def __init__(
        self,
        part: str | None = None,
        wanted: frozenset[str] = frozenset(),
        held: dict[str, tuple[Tensor, ...]] | None = None,
        stored: dict[str, tuple[Tensor, ...]] | None = None,
        prefix: str = "",
    ) -> None:
        self._part, self._wanted, self._prefix = part, wanted, prefix
        self._held = {} if held is None else held
        self._stored = {} if stored is None else stored

    def scope(self, name: str) -> Slot:
        """The same slot for a named operator inside the block."""
        return Slot(self._part, self._wanted, self._held, self._stored, f"{self._prefix}{name}.")

    def load(self, part: str) -> tuple[Tensor, ...] | None:
        """Tensors of `part` to use instead of computing it, or None: compute."""
        return self._held[self._prefix + part] if part == self._part else None

    def wants(self, part: str) -> bool:
        """Whether `part` should be stored when it is computed."""
        return part in self._wanted

    def store(self, part: str, *tensors: Tensor) -> None:
        """Leave `tensors`, each [n, ...] over the rows of the call, for later calls."""
        self._stored[self._prefix + part] = tensors

    @property
    def stored(self) -> dict[str, tuple[Tensor, ...]]:
        return self._stored


NO_SLOT = Slot()


class Memory:
    """Entries of one run, addressed by original rows.

    Args:
        num_rows: rows of the run, R.
        keys: the (block, part) pairs that may be reused in this run; only those are stored.
    """

    def __init__(self, num_rows: int, keys: Iterable[Key]) -> None:
        self.num_rows = num_rows
        self.keys = frozenset(keys)
        self._entries: dict[Key, dict[str, tuple[Tensor, ...]]] = {}
        # -1: no valid entry. On the host, because the executor splits blocks by it.
        self._written = {key: torch.full((num_rows,), -1, dtype=torch.int64) for key in self.keys}
        self._step = -1
        self._all = _by_block(self.keys)
        self._wanted = self._all

    def begin_call(self, wanted: frozenset[Key] | None = None) -> None:
        """Start the next call; entries written from here on carry its number.

        `wanted` are the keys worth storing in this call, None being all of them. Storing what nobody will read costs
        memory, and of a `map` the fused kernel.
        """
        self._step += 1
        self._wanted = self._all if wanted is None else _by_block(wanted & self.keys)

    def fork(self) -> Memory:
        """A memory of its own that holds the same entries; no tensor is copied."""
        twin = Memory(self.num_rows, ())
        twin.keys, twin._step, twin._all, twin._wanted = self.keys, self._step, self._all, self._wanted
        # Entries are replaced and never written into, so both may hold the same tensors.
        twin._entries = {key: dict(entry) for key, entry in self._entries.items()}
        twin._written = {key: written.clone() for key, written in self._written.items()}
        return twin

    def wanted(self, block: int) -> frozenset[str]:
        """Parts of `block` that this call should store."""
        return self._wanted.get(block, frozenset())

    def written(self, key: Key) -> Tensor:
        """Per row, the number of the call that wrote its entry, -1 where there is none; host int64 [R]."""
        return self._written[key]

    def valid(self, key: Key, rows: Rows) -> Tensor:
        """Whether each of `rows` has an entry, host bool [n]."""
        if key not in self.keys:
            return torch.zeros(len(rows), dtype=torch.bool)
        written = self._written[key]
        return (written if rows.index is None else written[rows.index]) >= 0

    def read(self, key: Key, rows: Rows) -> dict[str, tuple[Tensor, ...]]:
        """Entries of `rows`, by scoped name."""
        positions = rows.index
        return {
            name: tuple(gather(tensor, positions) for tensor in tensors) for name, tensors in self._entries[key].items()
        }

    def write(self, key: Key, rows: Rows, values: dict[str, tuple[Tensor, ...]], keep: Tensor | None = None) -> None:
        """Store `values`, [n, ...] over `rows`; `keep` (host bool [n]) leaves the entries of the other rows alone.

        Raises:
            ValueError: before the first `begin_call`, when the entry could not be told from none.
        """
        if self._step < 0:
            raise ValueError("Memory.begin_call was not called before the first call of the run")
        if keep is not None and not bool(keep.all()):
            positions = keep.nonzero().flatten()
            values = {name: tuple(gather(t, positions) for t in tensors) for name, tensors in values.items()}
            rows = rows.take(positions)
        if len(rows) == self.num_rows:
            self._entries[key] = {name: tuple(t.detach() for t in tensors) for name, tensors in values.items()}
        else:
            entry = self._entries.setdefault(key, {})
            for name, tensors in values.items():
                if name not in entry:
                    entry[name] = tuple(t.new_zeros((self.num_rows, *t.shape[1:])) for t in tensors)
                index = to_device(rows.host(), tensors[0].device)
                # Out of place: an entry may be the very tensor that a block handed on.
                entry[name] = tuple(
                    old.index_copy(0, index, new.detach()) for old, new in zip(entry[name], tensors, strict=True)
                )
        self._written[key][rows.host()] = self._step

    def forget(self, rows: Tensor) -> None:
        """Drop the entries of `rows` (host int64): these rows compute again before they reuse."""
        for written in self._written.values():
            written[rows] = -1

    def invalidate(self) -> None:
        """Forget everything: the branches, the resolution or the weights changed."""
        self._entries.clear()
        for written in self._written.values():
            written.fill_(-1)

    def drop(self, keys: Iterable[Key]) -> None:
        """Free the tensors of `keys`, which nobody will read before they are written again."""
        for key in keys:
            if self._entries.pop(key, None) is not None:
                self._written[key].fill_(-1)

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(
            t.numel() * t.element_size()
            for entry in self._entries.values()
            for tensors in entry.values()
            for t in tensors
        )


def _by_block(keys: Iterable[Key]) -> dict[int, frozenset[str]]:
    parts: dict[int, set[str]] = {}
    for block, part in keys:
        parts.setdefault(block, set()).add(part)
    return {block: frozenset(found) for block, found in parts.items()}
