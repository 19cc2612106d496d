"""Reuse of attention over steps (arXiv 2401.01008), with three operators.

`map` takes the softmax map of the last computed call and multiplies it with fresh values, as in the paper. `qk` keeps
queries and keys instead and calls the fused kernel: the same map, the same fresh values, but N x N numbers are neither
kept nor formed. `output` takes the whole attention output, values included (PAB, T-GATE, FORA). Against fused attention
maps save little (what they save in products they cost in memory traffic), so results must name the operator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.network import Network
from gearshift.execution.parts import attention_of, kept_bytes, parts_of
from gearshift.execution.plan import FULL, KINDS, StepPlan
from gearshift.policies.base import RunInfo
from gearshift.policies.when import ScheduledReuse
from gearshift.runtime.errors import UsageError

OPERATORS = ("map", "qk", "output")
PREFERENCES = ("faithful", "fast")
ATTENTION = ("all", *KINDS)
LONGEST_MAP = 1024
"""Tokens up to which maps are kept: beyond it a map outgrows what else a layer holds many times over."""


@dataclass(frozen=True)
class AttentionReuse(ScheduledReuse):
    """Take attention from memory at some calls, in all layers or some.

    Attributes:
        operator: "map", "qk", "output", or "auto" (see `pick`).
        prefer: what `auto` is to be: "faithful" (values stay fresh), or "fast".
        layers: blocks that reuse; null is every block with attention.
        attention: "all", or only "self" or "cross" attention, where the network has both.
        last, interval, computed, window: when, see `ScheduledReuse`.
    """

    operator: str = "auto"
    prefer: str = "faithful"
    layers: list[int] | None = None
    attention: str = "all"

    def __post_init__(self) -> None:
        ScheduledReuse.__post_init__(self)
        known = (*OPERATORS, "auto")
        if self.operator not in known:
            raise UsageError(f"policy AttentionReuse: operator {self.operator!r} is not one of {', '.join(known)}")
        if self.prefer not in PREFERENCES:
            raise UsageError(f"policy AttentionReuse: prefer {self.prefer!r} is not one of {', '.join(PREFERENCES)}")
        if self.attention not in ATTENTION:
            raise UsageError(
                f"policy AttentionReuse: attention {self.attention!r} is not one of {', '.join(ATTENTION)}"
            )

    @property
    def name(self) -> str:
        where = "" if self.layers is None else f" in {len(self.layers)} layers"
        kind = "" if self.attention == "all" else f"{self.attention}-"
        return f"{kind}attention {self.operator} {self.when}{where}"

    def resolved(self, run: RunInfo) -> AttentionReuse:
        if self.operator != "auto":
            return self
        return replace(self, operator=pick(run.network, run.backend, self.prefer))

    def blocks_on(self, network: Network) -> list[int]:
        """Blocks that reuse on this network."""
        if self.layers is not None:
            return list(self.layers)
        parts, kind = parts_of(network), self._kind(network)
        return [b for b in sorted(attention_of(network)) if any((b, f"{kind}{part}") in parts for part in OPERATORS)]

    def _kind(self, network: Network) -> str:
        """What stands before the part in plans."""
        if self.attention == "all":
            return ""
        told_apart = any(part.startswith(KINDS) for _, part in parts_of(network))
        # Where nothing is told apart there is self-attention alone.
        return "" if self.attention == "self" and not told_apart else f"{self.attention}."

    def fits(self, network: Network) -> None:
        attending, parts, kind = sorted(attention_of(network)), parts_of(network), self._kind(network)
        if not attending:
            raise UsageError(
                f"policy AttentionReuse takes {self.operator} from attention, and {network.name} has no block with "
                "attention; reuse whole blocks instead (policy DeepFeatureReuse)"
            )
        without = [block for block in self.layers or () if block not in attending]
        if without:
            raise UsageError(
                f"policy AttentionReuse: layers {without} of {network.name} have no attention to take "
                f"{self.operator} from; those that have are {attending}"
            )
        chosen = self.blocks_on(network)
        other = [b for b in chosen if all((b, f"{kind}{part}") not in parts for part in OPERATORS)]
        if other or not chosen:
            raise UsageError(
                f"policy AttentionReuse: {self.attention}-attention is asked for, and "
                f"{f'layers {other}' if other else 'no layer'} of {network.name} "
                f"{'have none' if other else 'has any'}; leave out attention={self.attention}"
            )
        lacking = [b for b in chosen if self.operator != "auto" and (b, f"{kind}{self.operator}") not in parts]
        if lacking:
            offered = [part for part in OPERATORS if all((b, f"{kind}{part}") in parts for b in lacking)]
            raise UsageError(
                f"policy AttentionReuse: operator={self.operator} cannot be taken from layers {lacking} of "
                f"{network.name}, whose attention gives {' and '.join(offered)}; take one of these, or other layers"
            )

    def check(self, run: RunInfo) -> None:
        self.check_calls(run)
        self.resolved(run).fits(run.network)

    def begin(self, run: RunInfo) -> tuple[list[bool], frozenset[tuple[int, str]]]:
        """When, and what."""
        part = f"{self._kind(run.network)}{self.resolved(run).operator}"
        return self.reusing(run), frozenset((block, part) for block in self.blocks_on(run.network))

    def plan(self, state: tuple[list[bool], frozenset[tuple[int, str]]], call: Call) -> StepPlan:
        when, keys = state
        return StepPlan(reuse=keys) if when[call.position] else FULL

    def kept_bytes(self, network: Network, rows: int, element_size: int = 4) -> int:
        """Bytes kept for `rows` rows (samples times branches) between calls; `operator` must be settled."""
        part = f"{self._kind(network)}{self.operator}"
        return rows * kept_bytes(network, ((b, part) for b in self.blocks_on(network)), element_size)


def pick(network: Network, backend: str, prefer: str) -> str:
    """The operator for a network on a backend ("cpu", "cuda").

    Fast: the output, which leaves nothing of attention to compute. Faithful: on a GPU queries and keys, because fused
    kernels beat reading maps up to widths of heads that maps are too large for; on a CPU, whose memory is near its
    arithmetic, maps up to `LONGEST_MAP` tokens. What cannot be taken everywhere is not picked.
    """
    parts = parts_of(network)
    everywhere = {part for part in OPERATORS if all((block, part) in parts for block in attention_of(network))}
    if prefer == "fast" or "qk" not in everywhere:
        return "output"
    longest = max((shape.tokens for shapes in attention_of(network).values() for shape in shapes), default=0)
    return "map" if backend == "cpu" and longest <= LONGEST_MAP and "map" in everywhere else "qk"
