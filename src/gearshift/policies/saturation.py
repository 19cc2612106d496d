"""Exit where the hidden state has stopped changing (CALM, arXiv 2207.07061, "hidden-state saturation").

CALM leaves a token where the cosine similarity of two consecutive layers' states exceeds a threshold. Here an image
leaves where the mean of that similarity over its tokens (of U-Nets, over its positions) does. No head and no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gearshift.execution.exits import ExitView
from gearshift.policies.threshold_exit import ThresholdExit, alias


@dataclass(frozen=True)
class SaturationExit(ThresholdExit):
    """Each row leaves after the first block that changes its state by less than the threshold: 1 minus the mean cosine
    similarity of the outputs of this block and the one before.

    Outputs of different shape, as between the levels of a U-Net, count as changed by 1.

    Attributes:
        similarity: in place of `threshold`: 1 - threshold, which must be exceeded. It is kept as `threshold`.
    """

    similarity: float | None = None

    said: ClassVar[str] = "change"

    def __post_init__(self) -> None:
        threshold = alias(type(self).__name__, "similarity", self.similarity, self.threshold)
        object.__setattr__(self, "threshold", threshold)
        object.__setattr__(self, "similarity", None)
        super().__post_init__()

    def first(self) -> int:
        return 1  # there is nothing before the embedding

    def measure(self, view: ExitView) -> Tensor:
        hidden, before = view.hidden, view.previous
        if before is None or before.shape != hidden.shape:
            return torch.ones(len(hidden), device=hidden.device)
        channels = -1 if hidden.ndim == 3 else 1
        similarity = F.cosine_similarity(hidden.float(), before.float(), dim=channels)
        return (1 - similarity.flatten(1).mean(1)).clamp(0, 1)
