"""Inception Score: exp of the mean divergence of p(class | image) from p(class), by torch-fidelity's formula.

(Salimans et al., 1606.03498.) 10 splits after a shuffle with seed 2020. Without the shuffle, images that come sorted by
class make every split look as if it lacked the other classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.evaluation.features import FeatureExtractor
from gearshift.evaluation.metric import USUAL_N, Metric
from gearshift.evaluation.reference import Statistics
from gearshift.runtime.errors import UsageError

SPLITS = 10
SHUFFLE_SEED = 2020


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """The mean over `splits` of the score, in [1, classes], from logits [n, classes]; computed in float64.

    Raises UsageError for fewer rows than splits.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    if len(logits) < splits:
        raise UsageError(
            f"{splits} splits of an Inception Score need as many images, got {len(logits)}; raise the number"
        )
    # A class that nothing resembles would get p = 0 everywhere and 0 log 0 for its share; e^-600 is as good as zero.
    logits = logits.double()
    logits = (logits - logits.amax(dim=1, keepdim=True)).clamp_min(-600.0)
    # Named in full: the library takes whatever it is not told from its defaults.
    found = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=SHUFFLE_SEED)
    return float(found[KEY_METRIC_ISC_MEAN])


class InceptionScore(Metric):
    """The score of the samples alone; it knows nothing of a reference."""

    reference = "none"

    def __init__(self, name: str, extractors: Sequence[FeatureExtractor], minimum: int) -> None:
        super().__init__(name, extractors, {"inception_score": 1}, minimum, "logits")

    def note(self, count: int) -> str | None:
        if count >= USUAL_N:
            return None
        return (
            f"{self.keys[0]}: {count} samples, biased downwards ({SPLITS} splits of {count // SPLITS} see few classes "
            f"each); compare only values at the same n, published ones are at n={USUAL_N}"
        )

    def _measure(self, features: Tensor, reference: Statistics | None, device: torch.device) -> Sequence[float]:
        return (inception_score(features),)

    def _formula(self, count: int, reference: Sequence[Statistics]) -> str:
        return f"{SPLITS} splits, shuffled with seed {SHUFFLE_SEED}, mean over splits"
