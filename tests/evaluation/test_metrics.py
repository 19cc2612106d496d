import pytest
import torch

from gearshift.evaluation.metrics import METRICS, Metric, build_metrics
from gearshift.evaluation.weights import Unavailable
from gearshift.runtime.errors import RunError, UsageError

from .fakes import Named, draw, reference_of

DIM = 4


def networks(name):
    if name.startswith("random"):
        return [Named(f"{name}_{DIM}[s{seed}]", DIM) for seed in range(3)]
    if name == "inception":
        return [Named("inception_2015_12_05", DIM, logits=7, spatial=5)]
    return [Named({"classifier": "classifier_digits"}.get(name, name), DIM)]


ALL = [
    "fid",
    "sfid",
    "kid",
    "inception_score",
    "precision_recall",
    "density_coverage",
    *(
        f"{kind}@{x}"
        for kind in ("fd", "kd", "precision_recall", "density_coverage")
        for x in ("classifier", "random_conv")
    ),
]
KEYS = {
    "fid": ("fid",),
    "sfid": ("sfid",),
    "kid": ("kid",),
    "inception_score": ("inception_score",),
    "precision_recall": ("precision_vgg16", "recall_vgg16"),
    "density_coverage": ("density_vgg16", "coverage_vgg16"),
    "fd@classifier": ("fd_classifier_digits",),
    "fd@random_conv": ("fd_random_conv_4[s0-s2]",),
    "kd@classifier": ("kd_classifier_digits",),
    "kd@random_conv": ("kd_random_conv_4[s0-s2]",),
    "precision_recall@classifier": ("precision_classifier_digits", "recall_classifier_digits"),
    "precision_recall@random_conv": ("precision_random_conv_4[s0-s2]", "recall_random_conv_4[s0-s2]"),
    "density_coverage@classifier": ("density_classifier_digits", "coverage_classifier_digits"),
    "density_coverage@random_conv": ("density_random_conv_4[s0-s2]", "coverage_random_conv_4[s0-s2]"),
}


@pytest.fixture
def metrics() -> list[Metric]:
    built, missing = build_metrics(ALL, extractors=networks)
    assert not missing
    return built


def test_names_keys_and_directions(metrics):
    assert {metric.name: metric.keys for metric in metrics} == KEYS
    lower = {key for metric in metrics for key, sign in metric.better.items() if sign < 0}
    assert lower == {
        key for keys in KEYS.values() for key in keys if key.startswith(("fid", "sfid", "kid", "fd_", "kd_"))
    }
    assert all(set(metric.better) == set(metric.keys) for metric in metrics)


def test_every_name_that_can_be_listed_can_be_built(metrics):
    for name in METRICS:
        [metric], _ = build_metrics([name.replace("@X", "@vgg16")], extractors=networks)
        assert metric.name == name.replace("@X", "@vgg16")


def test_needs_and_minima(metrics):
    by_name = {metric.name: metric for metric in metrics}
    taps = {name: {tap for _, tap in metric.needs} for name, metric in by_name.items()}
    assert taps["sfid"] == {"spatial"} and taps["inception_score"] == {"logits"}
    assert all(found == {"features"} for name, found in taps.items() if name not in ("sfid", "inception_score"))
    least = {name: metric.minimum for name, metric in by_name.items()}
    assert (least["fid"], least["sfid"], least["kid"], least["inception_score"]) == (10_000, 10_000, 1000, 5000)
    assert (least["fd@classifier"], least["kd@random_conv"]) == (2, 2)
    assert (least["precision_recall"], least["density_coverage@classifier"]) == (5, 7)
    assert by_name["fid"].reference == by_name["fd@classifier"].reference == "moments"
    assert by_name["kid"].reference == by_name["precision_recall"].reference == "features"
    assert [metric.standardise for metric in metrics] == ["random" in metric.name for metric in metrics]


def test_what_papers_print_states_its_bias_below_their_number(metrics):
    notes = {metric.name: metric.note(20_000) for metric in metrics}
    assert {name for name, note in notes.items() if note} == {"fid", "sfid", "inception_score"}
    assert all(metric.note(50_000) is None for metric in metrics)


def inputs(metric, n, m, seed):
    """Samples and references as a metric needs them."""
    widths = [extractor.taps[tap] for extractor, tap in metric.needs]
    samples = [draw(n, width, seed + i, 0.9, 0.2) for i, width in enumerate(widths)]
    reference = [reference_of(draw(m, width, 100 + seed + i)) for i, width in enumerate(widths)]
    return samples, [] if metric.reference == "none" else reference


def test_values_are_functions_of_the_features_alone(metrics):
    """Not of global generators, not of what was computed before."""
    for metric in metrics:
        samples, reference = inputs(metric, 60, 70, 0)
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        first = metric.compute(samples, reference)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(2)
        metric.compute(*inputs(metric, 30, 40, 7))
        assert metric.compute(samples, reference) == first
        assert tuple(first) == metric.keys and all(isinstance(value, float) for value in first.values())


def test_order_of_the_images_does_not_matter(metrics):
    for metric in metrics:
        samples, reference = inputs(metric, 60, 70, 0)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
        shuffled = metric.compute([part[order] for part in samples], reference)
        # Splits of an Inception Score are of images that stand together.
        tolerance = 0.05 if metric.name == "inception_score" else 1e-9
        assert shuffled == pytest.approx(metric.compute(samples, reference), rel=tolerance), metric.name


def test_features_that_cannot_be_right_are_refused(metrics):
    for metric in metrics:
        samples, reference = inputs(metric, 60, 70, 0)
        spoiled = [part.clone() for part in samples]
        spoiled[-1][3, 1] = float("nan")
        with pytest.raises(RunError, match="not finite"):
            metric.compute(spoiled, reference)
        with pytest.raises(ValueError, match="shape"):
            metric.compute([part[0] for part in samples], reference)
        with pytest.raises(ValueError, match=r"zip|shorter|longer"):
            metric.compute([*samples, samples[0]], reference)
        if metric.reference != "none":
            with pytest.raises(ValueError, match="a reference of width"):
                metric.compute([part[:, :2] for part in samples], reference)


def test_protocols_name_numbers_network_counts_and_reference(metrics):
    for metric in metrics:
        _, reference = inputs(metric, 60, 70, 0)
        protocol = metric.protocol(60, reference)
        extractor, tap = metric.needs[0]
        parts = [*metric.keys, extractor.protocol, f"d={extractor.taps[tap]}", "n=60", "u8-round"]
        if metric.reference != "none":
            parts.append("ref=noise-train-70[digest 1234abcd]")
        if len(metric.needs) > 1:
            parts += ["mean over 3 seeds", "standardised by the reference"]
        assert all(part in protocol for part in parts), protocol
        assert ("70 kept" in protocol) == (metric.reference == "features")


def test_metrics_on_one_network_share_it():
    asked = []

    def counted(name):
        asked.append(name)
        return networks(name)

    built, _ = build_metrics(["fid", "kid", "fd@classifier", "sfid", "kd@classifier"], extractors=counted)
    assert asked == ["inception", "classifier"]
    assert built[0].needs[0][0] is built[1].needs[0][0] is built[3].needs[0][0]


def test_what_is_named_twice_is_built_once():
    built, _ = build_metrics(["precision_recall", "fid", "precision_recall@vgg16", "fid"], extractors=networks)
    assert [metric.name for metric in built] == ["precision_recall", "fid"]


def test_missing_networks_are_said_for_each_metric():
    missing = Unavailable("inception_2015_12_05", "the file is not there", "curl ...")

    def without(name):
        return missing if name == "inception" else networks(name)

    built, unavailable = build_metrics(["fid", "fd@classifier", "kid", "fid"], extractors=without)
    assert [metric.name for metric in built] == ["fd@classifier"]
    assert unavailable == [Unavailable(name, "the file is not there", "curl ...") for name in ("fid", "kid")]


@pytest.mark.parametrize(
    "name", ["fjd", "fid@vgg16", "inception_score@classifier", "fd", "kd@", "classifier", "@vgg16", ""]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(UsageError, match=f"'{name}'; there are label_agreement, lpips, .*, fid, "):
        build_metrics([name], extractors=networks)


def test_one_random_network_is_no_measure():
    with pytest.raises(UsageError, match=r"random_conv_4\[s0-s1\].*at least 3 seeds"):
        build_metrics(["fd@random_conv"], extractors=lambda name: networks(name)[:2])


def test_seeds_are_named_one_by_one_where_they_have_gaps():
    chosen = [Named(f"random_conv_4[s{seed}]", DIM) for seed in (0, 3, 7)]
    [metric], _ = build_metrics(["fd@random_conv"], extractors=lambda name: chosen)
    assert metric.keys == ("fd_random_conv_4[s0,s3,s7]",)
    different = [Named("random_conv_4[s0]", DIM), Named("random_vgg16_4[s1]", DIM), Named("random_conv_4[s2]", DIM)]
    with pytest.raises(ValueError, match="not one network under several seeds"):
        build_metrics(["fd@random_conv"], extractors=lambda name: different)


@pytest.mark.gpu
def test_work_beside_the_network_gives_the_values_of_the_host(metrics, monkeypatch):
    for metric in metrics:
        samples, reference = inputs(metric, 1100, 1200, 0)
        host = metric.compute(samples, reference)
        [beside], _ = build_metrics([metric.name], extractors=networks)
        monkeypatch.setattr(Named, "device", torch.device("cuda", 0))
        found = beside.compute(samples, reference)
        monkeypatch.undo()
        # Counts may differ where a distance and a radius agree to the last bit.
        assert found == pytest.approx(host, rel=1e-3 if metric.reference == "features" else 1e-9, abs=1e-9), metric.name
