"""The distribution metrics that can be named, and how a name becomes a metric.

`fid`, `kid`, `sfid` and `inception_score` mean the networks of the papers and nothing else. `fd@X`, `kd@X`,
`precision_recall@X` and `density_coverage@X` take any network X that can be built, and say so in their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gearshift.evaluation.features import FeatureExtractor
from gearshift.evaluation.frechet import FrechetMetric
from gearshift.evaluation.inception_score import InceptionScore
from gearshift.evaluation.kernel import KernelMetric
from gearshift.evaluation.manifold import DensityCoverage, PrecisionRecall
from gearshift.evaluation.metric import USUAL_N, Metric, group_name, is_random
from gearshift.evaluation.weights import Unavailable
from gearshift.runtime.errors import UsageError

__all__ = ["METRICS", "PAIRED", "Metric", "build_metrics", "network_of"]

METRICS: Mapping[str, str] = {
    "fid": "Fréchet Inception distance: Inception 2015-12-05, pool3; from 10,000 images",
    "sfid": "the same on spatial features of Inception (sFID); from 10,000 images",
    "kid": "kernel Inception distance: unbiased, 100 subsets of 1000; from 1,000 images",
    "inception_score": "Inception Score: 10 splits, shuffled; from 5,000 images",
    "precision_recall": "precision and recall on VGG16, k=3 (= precision_recall@vgg16)",
    "density_coverage": "density and coverage on VGG16, k=5 (= density_coverage@vgg16)",
    "fd@X": "Fréchet distance on the features of X: classifier, random_conv, random_vgg16, inception, vgg16",
    "kd@X": "kernel distance on the features of X",
    "precision_recall@X": "precision and recall on the features of X, k=3",
    "density_coverage@X": "density and coverage on the features of X, k=5",
}
PAIRED: Mapping[str, str] = {
    "label_agreement": "share of samples that a classifier trained on the data gives the label they were asked for",
    "lpips": "LPIPS with AlexNet to the full computation, where its weights are present",
    "lpips@vgg": "LPIPS with VGG16 to the full computation, where its weights are present",
}
"""What compares image by image, beside PSNR and SSIM, which are always there; built elsewhere."""
_DEFAULT_NETWORK = {
    "fid": "inception",
    "sfid": "inception",
    "kid": "inception",
    "inception_score": "inception",
    "precision_recall": "vgg16",
    "density_coverage": "vgg16",
}
_ON_ANY = ("fd", "kd", "precision_recall", "density_coverage")
# One random network is no measure: scale and even order of values change with its seed.
_LEAST_SEEDS = 3


def build_metrics(
    names: Sequence[str], *, extractors: Callable[[str], list[FeatureExtractor] | Unavailable]
) -> tuple[list[Metric], list[Unavailable]]:
    """The metrics of `names` (see METRICS) that can be computed here, and those that cannot, with reasons.

    `extractors` gives the networks behind a name (several where they differ in their seed only); it is asked once per
    name, so metrics on one network share it. A metric that was named twice is built once. Raises UsageError for an
    unknown name or fewer than three random networks.
    """
    networks: dict[str, list[FeatureExtractor] | Unavailable] = {}
    metrics: dict[tuple[str, ...], Metric] = {}
    missing: dict[str, Unavailable] = {}
    for name in names:
        kind, network = _parse(name)
        if network not in networks:
            networks[network] = extractors(network)
        found = networks[network]
        if isinstance(found, Unavailable):
            missing[name] = replace(found, name=name)
            continue
        if all(is_random(extractor) for extractor in found) and len(found) < _LEAST_SEEDS:
            raise UsageError(
                f"{name} on {group_name(found)}: one random network is no measure; give at least {_LEAST_SEEDS} seeds"
            )
        metric = _build(name, kind, found)
        metrics.setdefault(metric.keys, metric)
    return list(metrics.values()), list(missing.values())


def network_of(name: str) -> str:
    """The network a metric is computed on. Raises UsageError for an unknown name."""
    return _parse(name)[1]


def _parse(name: str) -> tuple[str, str]:
    kind, at, network = name.partition("@")
    if at and network and kind in _ON_ANY:
        return kind, network
    if not at and kind in _DEFAULT_NETWORK:
        return kind, _DEFAULT_NETWORK[kind]
    raise UsageError(f"there is no metric '{name}'; there are {', '.join([*PAIRED, *METRICS])} (X: a network)")


def _build(name: str, kind: str, networks: list[FeatureExtractor]) -> Metric:
    group = group_name(networks)
    if kind == "fid":
        return FrechetMetric(name, networks, "fid", minimum=10_000, usual=USUAL_N)
    if kind == "sfid":
        return FrechetMetric(name, networks, "sfid", minimum=10_000, tap="spatial", usual=USUAL_N)
    if kind == "fd":
        return FrechetMetric(name, networks, f"fd_{group}")
    if kind == "kid":
        return KernelMetric(name, networks, "kid", minimum=1000)
    if kind == "kd":
        return KernelMetric(name, networks, f"kd_{group}")
    if kind == "inception_score":
        return InceptionScore(name, networks, minimum=5_000)
    if kind == "precision_recall":
        return PrecisionRecall(name, networks, group)
    return DensityCoverage(name, networks, group)
