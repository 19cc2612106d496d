"""The decision of one call: which rows are evaluated, by which decoder, how deep, and what is taken from memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gearshift.runtime.errors import UsageError

if TYPE_CHECKING:
    from gearshift.execution.exits import ExitView
    from gearshift.execution.stream import Rows

# What a reused block still computes shrinks from left to right; where two policies ask for different parts of one
# block, the one that computes least wins, because its result already contains the other's.
PARTS = ("qk", "map", "output", "block")
KINDS = ("self", "cross")
"""Of attention. A part that is named with its kind ("cross.output") is taken in the operators of that kind alone."""
SCOPED = tuple(f"{kind}.{part}" for kind in KINDS for part in PARTS[:-1])


class ExitRule(Protocol):
    """Looked at after each block named by `depths`; decides which of the rows still running leave there.

    A rule may also have a method `quiet(exits)` that names, out of its depths, those at which it expects nobody to
    leave, say because nobody did at the last call. There the next block runs before the host looks at the answer
    (`Packing.overlap`), so nothing stands idle. An expectation changes no image: who leaves all the same is read out
    from that depth, and has run one block more, which the trace counts. In simulation, with taps and with a memory
    every answer is waited for.
    """

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        """Depths, out of the backbone's `exits`, at which a row may leave. Elsewhere the rule costs nothing."""
        ...

    def begin(self, num_rows: int) -> Any:
        """State of one execution (patience counters and the like); None where the rule has none."""
        ...

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        """Boolean mask over the rows of `view`, on any device; the executor moves it to the host once."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What one call computes. Per-row tensors have one entry for each of the R rows and live on the host.

    Attributes:
        call: evaluate the network (True), or reuse the last prediction; one flag or bool [R].
        expert: path through the backbone (network or decoder); None routes by the row's noise level; int or int64 [R].
        depth: read out after this many blocks; None is all of them; int or int64 [R].
        exit: rule looked at after each block that lets rows leave before `depth`.
        bypass: blocks that are dropped, by index: for all rows, or block to bool [R] for the rows that drop it.
        reuse: pairs (block, part) taken from memory, part one of `PARTS` or `SCOPED`.
        forecast: what rows that are not called take for the prediction: their last one (0), or the line through their
            last two, in sigma / alpha (1).
        taps: depths that are read out as well (training, analysis).
    """

    call: bool | Tensor = True
    expert: int | Tensor | None = None
    depth: int | Tensor | None = None
    exit: ExitRule | None = None
    bypass: frozenset[int] | Mapping[int, Tensor] = field(default_factory=frozenset)
    reuse: frozenset[tuple[int, str]] = field(default_factory=frozenset)
    forecast: int = 0
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("call", "expert", "depth"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
                raise ValueError(f"StepPlan.{name} is decided on the host but lies on {value.device}")
        if isinstance(self.bypass, Mapping):
            for block, rows in self.bypass.items():
                if rows.device.type not in ("cpu", "meta"):
                    raise ValueError(f"StepPlan.bypass[{block}] is decided on the host but lies on {rows.device}")
        unknown = {part for _, part in self.reuse} - {*PARTS, *SCOPED}
        if self.forecast not in (0, 1):
            raise ValueError(
                f"StepPlan.forecast={self.forecast}; 0 holds the last prediction, 1 extrapolates the last two"
            )
        if unknown:
            raise ValueError(f"StepPlan.reuse names {sorted(unknown)}; the parts are {list(PARTS)}")

    def bypassed(self, block: int, rows: Rows) -> bool | Tensor:
        """Whether `rows` drop `block`: one answer for all, or host bool [n] where they differ."""
        if not isinstance(self.bypass, Mapping) or block not in self.bypass:
            return block in self.bypass
        dropped = self.bypass[block][rows.host()]
        some, every = bool(dropped.any()), bool(dropped.all())
        return dropped if some and not every else some

    def reused_part(self, block: int) -> str | None:
        """The part of `block` taken from memory, or None; "self.A+cross.B" where its kinds of attention differ."""
        asked = [part for index, part in self.reuse if index == block]
        if not asked:
            return None
        taken = {kind: strongest(asked, kind) for kind in KINDS}
        if len(set(taken.values())) == 1:
            return taken["self"]
        return "+".join(f"{kind}.{part}" for kind, part in taken.items() if part is not None)

    def key(self) -> tuple[Any, ...] | None:
        """Equal for plans that compute the same; None where a rule decides, which is like no other."""
        if self.exit is not None:
            return None
        fields = ("call", "expert", "depth", "bypass", "reuse", "forecast")
        return tuple(_hashable(getattr(self, name)) for name in fields)


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.tolist())
    if isinstance(value, Mapping):
        return tuple(sorted((key, _hashable(entry)) for key, entry in value.items()))
    return value


FULL = StepPlan()


def strongest(asked: Iterable[str], kind: str) -> str | None:
    """What is taken in attention of a kind where `asked` names parts of its block: the one that computes least."""
    parts = [part for name in asked if (part := name.removeprefix(f"{kind}.")) in PARTS]
    return max(parts, key=PARTS.index, default=None)


def _all(a: bool | Tensor, b: bool | Tensor) -> bool | Tensor:
    if isinstance(a, bool) and isinstance(b, bool):
        return a and b
    return torch.as_tensor(a) & torch.as_tensor(b)


def _least(a: int | Tensor | None, b: int | Tensor | None) -> int | Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def _same_expert(a: int | Tensor | None, b: int | Tensor | None) -> int | Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if not bool((torch.as_tensor(a) == torch.as_tensor(b)).all()):
        chosen = " and ".join(str(e if isinstance(e, int) else e.tolist()) for e in (a, b))
        raise UsageError(f"two policies choose different experts for one call ({chosen}); keep one of them")
    return a


def _either(
    a: frozenset[int] | Mapping[int, Tensor], b: frozenset[int] | Mapping[int, Tensor]
) -> frozenset[int] | Mapping[int, Tensor]:
    if isinstance(a, frozenset) and isinstance(b, frozenset):
        return a | b
    rows = [dict(side) if isinstance(side, Mapping) else dict.fromkeys(side, torch.tensor(True)) for side in (a, b)]
    total = next(len(mask) for side in (a, b) if isinstance(side, Mapping) for mask in side.values())
    none = torch.zeros(total, dtype=torch.bool)
    return {block: none | rows[0].get(block, none) | rows[1].get(block, none) for block in rows[0] | rows[1]}


def join(plans: Iterable[StepPlan]) -> StepPlan:
    """Compose plans: call = all agree, depth = the least, bypass and reuse = the union, at most one exit rule.

    Raises:
        UsageError: two plans bring an exit rule, or different experts.
    """
    result = FULL
    for plan in plans:
        if result.exit is not None and plan.exit is not None:
            rules = f"{type(result.exit).__name__} and {type(plan.exit).__name__}"
            raise UsageError(f"two exit rules in one plan ({rules}); keep one of them")
        result = replace(
            result,
            call=_all(result.call, plan.call),
            expert=_same_expert(result.expert, plan.expert),
            depth=_least(result.depth, plan.depth),
            exit=result.exit or plan.exit,
            bypass=_either(result.bypass, plan.bypass),
            reuse=result.reuse | plan.reuse,
            forecast=max(result.forecast, plan.forecast),
            taps=tuple(sorted({*result.taps, *plan.taps})),
        )
    return result
