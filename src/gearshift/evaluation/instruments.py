"""The metrics of an evaluation, made ready: what they need is looked for, what is missing said, counts checked."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gearshift.data.cache import cache_root
from gearshift.data.dataset import ImageDataset
from gearshift.evaluation.classifier import Classifier
from gearshift.evaluation.features import FeatureExtractor, build_extractor
from gearshift.evaluation.metrics import PAIRED, Metric, build_metrics, network_of
from gearshift.evaluation.observe import Observer
from gearshift.evaluation.paired import Lpips, load_lpips
from gearshift.evaluation.reference import Statistics, load_reference
from gearshift.evaluation.references import reference_for
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.evaluation.weights import FILES, Unavailable, locate
from gearshift.runtime.errors import UsageError
from gearshift.runtime.progress import Progress

References = Sequence[Statistics]


@dataclass
class Instruments:
    """What looks at the images.

    Attributes:
        metrics: distribution metrics that can be computed here.
        observer: what is kept of every image for them.
        unavailable: what cannot be computed, with reasons.
        given: by fingerprint of the extractor, reference statistics from files that were named.
    """

    metrics: list[Metric]
    observer: Observer
    unavailable: list[Unavailable]
    given: dict[str, dict[str, Statistics]] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls, settings: EvaluationConfig, data: ImageDataset, classifier: Classifier | None, device: torch.device
    ) -> Instruments:
        """Builds extractors and metrics.

        Raises UsageError for unknown names, for files of weights that were named and are not the released ones, for
        references that no metric reads, for fewer images than a metric stands for, and for reference files that do
        not fit; RunError for files that cannot be read.
        """
        weights = {name: path for name, path in settings.weights.items() if path is not None}
        references = {name: path for name, path in settings.references.items() if path is not None}
        for name, path in weights.items():
            if isinstance(place := locate(FILES[name], name, path), Unavailable):
                raise UsageError(f"evaluation.weights.{name}={path}: {place.reason}; leave it out to do without")
        names = [name for name in settings.metrics if name not in PAIRED]
        networks = dict.fromkeys(map(network_of, names))
        for name, path in references.items():
            if name not in networks:
                raise UsageError(
                    f"evaluation.references.{name}={path} would not be read: evaluation.metrics are on "
                    f"{', '.join(networks) or 'no network'}"
                )
        extractors: dict[str, list[FeatureExtractor] | Unavailable] = {}

        def extractor(name: str) -> list[FeatureExtractor] | Unavailable:
            if name not in extractors:
                extractors[name] = build_extractor(
                    settings.extractors.get(name, name),
                    image_size=data.image_size,
                    data_name=data.name,
                    classifier=classifier,
                    device=device,
                    weights=weights,
                )
            return extractors[name]

        metrics, unavailable = build_metrics(names, extractors=extractor)
        for metric in metrics:
            check_count(metric, settings)
        lpips: dict[str, Lpips] = {}
        for name in settings.metrics:
            if name.partition("@")[0] == "lpips":
                net = name.partition("@")[2] or "alex"
                found = load_lpips(net=net, weights=weights, device=device)
                if isinstance(found, Unavailable):
                    unavailable.append(found)
                else:
                    lpips[f"lpips_{net}_to_full"] = found
        judge = None
        if "label_agreement" in settings.metrics:
            found_judge = extractor("classifier")
            if isinstance(found_judge, Unavailable):
                unavailable.append(Unavailable("label_agreement", found_judge.reason, found_judge.fetch_line))
            else:
                [judge] = found_judge
        given = {}
        for name, path in references.items():
            sources = extractor(name)
            if isinstance(sources, Unavailable):
                continue
            if len(sources) > 1:
                raise UsageError(
                    f"evaluation.references.{name}={path}: {name} is several networks; leave it to be computed"
                )
            given[sources[0].fingerprint] = load_reference(path, extractor=sources[0])
        ready = cls([], Observer.of([], judge, lpips), unavailable, given)
        for metric in metrics:
            reason = ready._refusal(metric)
            if reason is None:
                ready.metrics.append(metric)
            else:
                unavailable.append(Unavailable(metric.name, reason, "gearshift reference data=... extractor=..."))
        ready.observer = Observer.of(ready.metrics, judge, lpips)
        return ready

    def _refusal(self, metric: Metric) -> str | None:
        """Why a metric cannot be computed against the references that were given; None when it can."""
        if metric.reference == "none":
            return None
        known = []
        for extractor, tap in metric.needs:
            if extractor.fingerprint not in self.given:
                return None  # it is computed from the data, with all that is needed
            statistics = self.given[extractor.fingerprint].get(tap)
            if statistics is None:
                return f"the file of references for {extractor.name} holds nothing for '{tap}'"
            known.append(statistics)
        return metric.refusal(known)

    def with_references(self, data: ImageDataset) -> list[tuple[Metric, References]]:
        """Every metric with the statistics of the split `data`, computed (and cached) where no file was given."""
        wanted: dict[str, tuple[FeatureExtractor, dict[str, None]]] = {}
        for metric in self.metrics:
            if metric.reference != "none":
                for extractor, tap in metric.needs:
                    wanted.setdefault(extractor.fingerprint, (extractor, {}))[1][tap] = None
        found = dict(self.given)
        for key, (extractor, taps) in wanted.items():
            if key not in found:
                found[key] = _computed(extractor, tuple(taps), data)
        return [
            (
                metric,
                []
                if metric.reference == "none"
                else [found[extractor.fingerprint][tap] for extractor, tap in metric.needs],
            )
            for metric in self.metrics
        ]

    def protocols(self, settings: EvaluationConfig, distances: Sequence[tuple[Metric, References]]) -> dict[str, Any]:
        """One protocol string per metric."""
        found = {metric.name: metric.protocol(settings.num_images, reference) for metric, reference in distances}
        return found | {name: network.protocol for name, network in self.observer.lpips.items()}


def _computed(extractor: FeatureExtractor, taps: tuple[str, ...], data: ImageDataset) -> dict[str, Statistics]:
    """Statistics of `data`, from the cache or shown while they are made."""
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def tell(done: int, total: int) -> None:
            if not bars:  # only now is it known that they are not in the cache
                bars.append(stack.enter_context(Progress(total, f"reference, {extractor.name}", unit="images")))
            bars[0].update(done - bars[0].done)

        return reference_for(extractor, data, taps, cache_root(), tell)


def check_count(metric: Metric, settings: EvaluationConfig) -> None:
    """Raises UsageError where a repeat has fewer images than the metric, or the settings, ask for."""
    least = metric.minimum if settings.min_images is None else settings.min_images
    if settings.num_images < least:
        raise UsageError(
            f"{metric.name} asks for at least {least} images and evaluation.num_images={settings.num_images}: its "
            f"value would say more of the number than of the images; raise num_images, leave {metric.name} out of "
            "evaluation.metrics, or set evaluation.min_images for a trial"
        )
