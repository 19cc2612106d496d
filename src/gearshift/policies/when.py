"""At which calls of a run something is taken from memory: what the policies of reuse have in common."""

from __future__ import annotations

from dataclasses import dataclass

from gearshift.policies.base import Policy, RunInfo
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class ScheduledReuse(Policy):
    """Base of policies that reuse at some calls and compute at the others. The first call is always computed.

    Attributes:
        last: reuse at the last r calls (HURRY of arXiv 2401.01008: late reuse disturbs least).
        interval: compute at every k-th call (positions 0, k, 2k, ...), reuse at those between (DeepCache's N).
        computed: the positions that compute, for intervals that are not uniform.
        window: least and greatest log-SNR of a call that may reuse; the others compute.
    """

    last: int | None = None
    interval: int | None = None
    computed: list[int] | None = None
    window: list[float] | None = None

    def __post_init__(self) -> None:
        owner = f"policy {type(self).__name__}"
        given = {name: getattr(self, name) for name in ("last", "interval", "computed")}
        named = [f"{name}={value}" for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise UsageError(
                f"{owner} needs one of last, interval and computed to say when it reuses, and has "
                f"{' and '.join(named) or 'none'}"
            )
        if self.last is not None and self.last < 0:
            raise UsageError(f"{owner}: last={self.last} calls must be at least 0")
        if self.interval is not None and self.interval < 1:
            raise UsageError(f"{owner}: interval={self.interval} must be at least 1, which reuses nothing")
        if self.computed is not None and (not self.computed or min(self.computed) != 0):
            raise UsageError(
                f"{owner}: computed={list(self.computed)} must begin with call 0, which has nothing to reuse"
            )
        if self.window is not None and not (len(self.window) == 2 and self.window[0] < self.window[1]):
            raise UsageError(
                f"{owner}: window={list(self.window)} is no interval; give the least log-SNR that may reuse, then the "
                "greatest"
            )

    @property
    def when(self) -> str:
        """For names."""
        inside = "" if self.window is None else f" in [{self.window[0]:g}, {self.window[1]:g}]"
        if self.last is not None:
            return f"last {self.last}{inside}"
        if self.interval is not None:
            return f"1:{self.interval}{inside}"
        return f"all but {len(self.computed or ())} calls{inside}"

    def reusing(self, run: RunInfo) -> list[bool]:
        """For every call, whether it reuses."""
        total = len(run.calls)
        low, high = self.window or (float("-inf"), float("inf"))
        if self.last is not None:
            chosen = [position >= total - self.last for position in range(total)]
        elif self.interval is not None:
            chosen = [position % self.interval != 0 for position in range(total)]
        else:
            chosen = [position not in set(self.computed or ()) for position in range(total)]
        return [k > 0 and chosen[k] and low <= call.log_snr <= high for k, call in enumerate(run.calls)]

    def check_calls(self, run: RunInfo) -> None:
        """Raises UsageError where the run has fewer calls than the policy speaks of."""
        total, owner = len(run.calls), f"policy {type(self).__name__}"
        if self.last is not None and self.last >= total:
            raise UsageError(
                f"{owner} reuses at the last {self.last} calls of a run of {total}, whose first has nothing to reuse; "
                f"set last to at most {total - 1}"
            )
        if self.computed is not None and max(self.computed) >= total:
            raise UsageError(
                f"{owner} computes at call {max(self.computed)} of a run of {total} calls (0..{total - 1})"
            )
