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
from gearshift.execution.parts import attention_of, kept_bytes
from gearshift.execution.plan import FULL, StepPlan
from gearshift.policies.base import RunInfo
from gearshift.policies.when import ScheduledReuse
from gearshift.runtime.errors import UsageError

OPERATORS = ("map", "qk", "output")
PREFERENCES = ("faithful", "fast")
LONGEST_MAP = 1024
"""Tokens up to which maps are kept: beyond it a map outgrows what else a layer holds many times over."""


@dataclass(frozen=True)
class AttentionReuse(ScheduledReuse):
    """Take attention from memory at some calls, in all layers or some.

    Attributes:
        operator: "map", "qk", "output", or "auto" (see `pick`).
        prefer: what `auto` is to be: "faithful" (values stay fresh), or "fast".
        layers: blocks that reuse; null is every block with attention.
        last, interval, computed, window: when, see `ScheduledReuse`.
    """

    operator: str = "auto"
    prefer: str = "faithful"
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        ScheduledReuse.__post_init__(self)
        known = (*OPERATORS, "auto")
        if self.operator not in known:
            raise UsageError(f"policy AttentionReuse: operator {self.operator!r} is not one of {', '.join(known)}")
        if self.prefer not in PREFERENCES:
            raise UsageError(f"policy AttentionReuse: prefer {self.prefer!r} is not one of {', '.join(PREFERENCES)}")

    @property
    def name(self) -> str:
        where = "" if self.layers is None else f" in {len(self.layers)} layers"
        return f"attention {self.operator} {self.when}{where}"

    def resolved(self, run: RunInfo) -> AttentionReuse:
        if self.operator != "auto":
            return self
        return replace(self, operator=pick(run.network, run.backend, self.prefer))

    def blocks_on(self, network: Network) -> list[int]:
        """Blocks that reuse on this network."""
        return sorted(attention_of(network)) if self.layers is None else list(self.layers)

    def check(self, run: RunInfo) -> None:
        self.check_calls(run)
        attending = sorted(attention_of(run.network))
        if not attending:
            raise UsageError(
                f"policy AttentionReuse takes {self.operator} from attention, and {run.network.name} has no block with "
                "attention; reuse whole blocks instead (policy DeepFeatureReuse)"
            )
        without = [block for block in self.layers or () if block not in attending]
        if without:
            raise UsageError(
                f"policy AttentionReuse: layers {without} of {run.network.name} have no attention to take "
                f"{self.operator} from; those that have are {attending}"
            )

    def begin(self, run: RunInfo) -> tuple[list[bool], frozenset[tuple[int, str]]]:
        """When, and what."""
        operator = self.resolved(run).operator
        return self.reusing(run), frozenset((block, operator) for block in self.blocks_on(run.network))

    def plan(self, state: tuple[list[bool], frozenset[tuple[int, str]]], call: Call) -> StepPlan:
        when, keys = state
        return StepPlan(reuse=keys) if when[call.position] else FULL

    def kept_bytes(self, network: Network, rows: int, element_size: int = 4) -> int:
        """Bytes kept for `rows` rows (samples times branches) between calls; `operator` must be settled."""
        return rows * kept_bytes(network, ((b, self.operator) for b in self.blocks_on(network)), element_size)


def pick(network: Network, backend: str, prefer: str) -> str:
    """The operator for a network on a backend ("cpu", "cuda").

    Fast: the output, which leaves nothing of attention to compute. Faithful: on a GPU queries and keys, because fused
    kernels beat reading maps up to widths of heads that maps are too large for; on a CPU, whose memory is near its
    arithmetic, maps up to `LONGEST_MAP` tokens.
    """
    if prefer == "fast":
        return "output"
    longest = max((shape.tokens for shapes in attention_of(network).values() for shape in shapes), default=0)
    return "map" if backend == "cpu" and longest <= LONGEST_MAP else "qk"
