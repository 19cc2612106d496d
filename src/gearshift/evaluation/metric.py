"""What a distribution metric is: it says what it needs of every image, and turns that into numbers.

Extractors, sampling and files are somebody else's business. A metric sees one matrix of features per network it asked
for, in the order of the image indices, and the statistics of the reference. `metrics` knows which metrics there are.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gearshift.evaluation.features import FeatureExtractor
from gearshift.evaluation.moments import float64_device, spread
from gearshift.evaluation.reference import Statistics
from gearshift.runtime.errors import RunError

# Values at fewer images than this are not what papers print: all of the usual protocols say 50,000.
USUAL_N = 50_000
_SEEDED = re.compile(r"(.+)\[s(\d+)\]")


class Metric(ABC):
    """One or more numbers about a set of images, from the features of one network or of several that differ in their
    seed (random networks: values are averaged over them, features standardised by the reference).

    Attributes:
        name: what it was asked for by: "fid", "kd@classifier".
        keys: the numbers it gives, by their names in the results.
        better: +1 or -1 per key: more or less is better.
        needs: extractor and tap of each matrix of features that `compute` takes.
        reference: what the statistics of the reference must hold.
        minimum: fewest images its value stands for; evaluation refuses below.
    """

    name: str
    keys: tuple[str, ...]
    better: Mapping[str, int]
    needs: tuple[tuple[FeatureExtractor, str], ...]
    reference: ClassVar[Literal["moments", "features", "none"]]
    minimum: int

    def __init__(
        self, name: str, extractors: Sequence[FeatureExtractor], keys: Mapping[str, int], minimum: int, tap: str
    ) -> None:
        """`keys` says for every number whether more (+1) or less (-1) is better."""
        self.name, self.minimum = name, minimum
        self.keys, self.better = tuple(keys), dict(keys)
        self.needs = tuple((extractor, tap) for extractor in extractors)
        self.standardise = all(is_random(extractor) for extractor in extractors)
        # What is expensive and depends on the reference alone is kept: every row of an evaluation asks for it again.
        self._prepared: dict[Statistics, Any] = {}

    def compute(self, samples: Sequence[Tensor], reference: Sequence[Statistics]) -> dict[str, float]:
        """The numbers, by key.

        `samples` holds one float32 [n, d] per entry of `needs`, `reference` the statistics of the same taps (nothing
        where `reference` is "none"). Raises RunError where features are not finite, UsageError for fewer rows than the
        formula can do with, ValueError where shapes do not belong together. A reference that `refusal` speaks against
        must not get here.
        """
        against: Sequence[Statistics | None] = [None] * len(samples) if self.reference == "none" else reference
        total = dict.fromkeys(self.keys, 0.0)
        for (extractor, tap), features, statistics in zip(self.needs, samples, against, strict=True):
            if features.dim() != 2 or (statistics is not None and features.shape[1] != statistics.dim):
                other = "" if statistics is None else f" and a reference of width {statistics.dim}"
                raise ValueError(f"{self.name}: features of shape {tuple(features.shape)}{other}")
            if not bool(torch.isfinite(features).all()):
                raise RunError(
                    f"{self.name}: '{tap}' of {extractor.name} holds values that are not finite; check the images and "
                    "the extractor's weights"
                )
            for key, value in zip(self.keys, self._measure(features, statistics, device_of(extractor)), strict=True):
                total[key] += value
        return {key: value / len(self.needs) for key, value in total.items()}

    def protocol(self, count: int, reference: Sequence[Statistics]) -> str:
        """Everything that changes the numbers, in one string, for `count` images in a repeat."""
        extractor, tap = self.needs[0]
        parts = [
            extractor.protocol,
            "" if tap == "features" else f"tap={tap}",
            f"mean over {len(self.needs)} seeds" if len(self.needs) > 1 else "",
            "standardised by the reference" if self.standardise else "",
            self._formula(count, reference),
            f"d={extractor.taps[tap]}",
            "u8-round",
            f"n={count}",
        ]
        if self.reference != "none":
            first = reference[0]
            kept = "" if self.reference == "moments" else f", {kept_features(first)} kept"
            parts.append(f"ref={first.describe()}{kept}")
        return f"{','.join(self.keys)}[{'|'.join(part for part in parts if part)}]"

    def refusal(self, reference: Sequence[Statistics]) -> str | None:
        """Why the numbers cannot be computed against `reference`, or None when they can."""
        for statistics in reference if self.reference == "features" else ():
            if statistics.features is None:
                return (
                    f"{self.name} compares features one by one, and {statistics.describe()} holds mean and covariance "
                    "only; make a reference with `gearshift reference`"
                )
        return None

    def note(self, count: int) -> str | None:
        """One line to print beside the numbers of `count` images (their bias), or None."""
        return None

    @abstractmethod
    def _measure(self, features: Tensor, reference: Statistics | None, device: torch.device) -> Sequence[float]:
        """The numbers, in order of `keys`, of checked features of one network; the work is done on `device`."""

    @abstractmethod
    def _formula(self, count: int, reference: Sequence[Statistics]) -> str:
        """The part of the protocol that says how the numbers are computed; may be empty."""

    def _pair(self, features: Tensor, reference: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features of the samples and of the reference, float64 [n, d] and [m, d] on `device`, ready to be compared.

        Those of random networks are standardised by the reference's moments: as they come, |mean| is about three times
        the spread, and a polynomial kernel sees little else.
        """
        assert reference.features is not None, "ask `refusal` first"
        pair = [values.to(device, torch.float64) for values in (features, reference.features)]
        if self.standardise:
            mean, covariance = reference.mean.to(device), reference.covariance.to(device)
            pair = [(values - mean) / spread(mean, covariance) for values in pair]
        return pair[0], pair[1]


def is_random(extractor: FeatureExtractor) -> bool:
    """Whether a network is one of random weights: those carry their seed in their name."""
    return _SEEDED.fullmatch(extractor.name) is not None


def group_name(extractors: Sequence[FeatureExtractor]) -> str:
    """One name for networks that differ in their seed: random_conv_64[s0-s2] or random_conv_64[s0,s3,s7]."""
    if len(extractors) == 1:
        return extractors[0].name
    found = [_SEEDED.fullmatch(extractor.name) for extractor in extractors]
    stems = {match[1] for match in found if match}
    if None in found or len(stems) != 1:
        raise ValueError(f"{[extractor.name for extractor in extractors]} are not one network under several seeds")
    seeds = [int(match[2]) for match in found if match]
    consecutive = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    span = f"s{seeds[0]}-s{seeds[-1]}" if consecutive else ",".join(f"s{seed}" for seed in seeds)
    return f"{stems.pop()}[{span}]"


def kept_features(statistics: Statistics) -> int:
    """How many features of the reference there are to compare with."""
    return 0 if statistics.features is None else len(statistics.features)


def device_of(extractor: FeatureExtractor) -> torch.device:
    """Where float64 work on an extractor's features is done: beside its network, on the host where that has none."""
    return float64_device(extractor.device)
