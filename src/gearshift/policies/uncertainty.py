"""Exit where the uncertainty head falls below a threshold (DeeDiff / AdaDiff, arXiv 2309.17074), and the learned exit
of BERxiT (EACL 2021), whose one head serves all depths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gearshift.execution.exits import ExitView
from gearshift.execution.network import Network
from gearshift.policies.threshold_exit import ThresholdExit, alias
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class UncertaintyExit(ThresholdExit):
    """Each row leaves after the first block whose predicted uncertainty is below the threshold.

    Attributes:
        certainty: in place of `threshold`: the papers' 1 - threshold, which must be exceeded. Kept as `threshold`.
    """

    certainty: float | None = None

    said: ClassVar[str] = "uncertainty"
    asks_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        threshold = alias(type(self).__name__, "certainty", self.certainty, self.threshold)
        object.__setattr__(self, "threshold", threshold)
        object.__setattr__(self, "certainty", None)
        super().__post_init__()

    def fits(self, network: Network) -> None:
        if not network.has_uncertainty:
            raise UsageError(
                f"policy {type(self).__name__} needs uncertainty heads, and this {network.name} has none; "
                "train with exits=adadiff (official code) or exits=deediff (paper)"
            )
        super().fits(network)

    def measure(self, view: ExitView) -> Tensor:
        return view.uncertainty()


@dataclass(frozen=True)
class LearnedExit(UncertaintyExit):
    """The exit of BERxiT: one head for all depths has learned how wrong the readout is (exits=berxit)."""

    said: ClassVar[str] = "learned exit"

    def fits(self, network: Network) -> None:
        super().fits(network)
        inside: Any = getattr(network, "network", None)  # of several networks side by side, the run's own
        config: Any = getattr(inside(0) if inside is not None else network, "config", None)
        per = getattr(config, "per", None)
        if per != "network":
            raise UsageError(
                f"policy LearnedExit asks one head for all depths, and {network.name} has exits.per={per}; train "
                "with exits=berxit, or take policy=uncertainty_exit"
            )
