import warnings

import pytest
import torch

from gearshift.evaluation.inception_score import InceptionScore, inception_score
from gearshift.runtime.errors import RunError, UsageError

from .fakes import Named, draw


def labelled(per_class, classes, seed=0, sharpness=4.0):
    """Logits that favour the image's class, sorted by class."""
    favoured = torch.eye(classes).repeat_interleave(per_class, dim=0) * sharpness
    return favoured + draw(per_class * classes, classes, seed)


def test_closed_forms():
    # Nothing is recognised; every class is recognised with certainty and all are equally frequent.
    assert inception_score(torch.zeros(50, 7)) == pytest.approx(1.0, rel=1e-12)
    certain = 1000.0 * torch.eye(10)
    assert inception_score(certain.repeat(20, 1), splits=1) == pytest.approx(10.0, rel=1e-9)
    # One class only.
    assert inception_score(certain[:1].repeat(50, 1)) == pytest.approx(1.0, rel=1e-9)


def by_definition(logits):
    p = logits.double().softmax(dim=1)
    marginal = p.mean(dim=0)
    return float((p * (p / marginal).log()).sum(dim=1).mean().exp())


def test_is_the_exponential_of_the_mutual_information():
    logits = draw(200, 12, 0, scale=2.0)
    assert inception_score(logits, splits=1) == pytest.approx(by_definition(logits), rel=1e-10)


def test_agrees_with_torchmetrics_and_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torchmetrics.image.inception import InceptionScore as Library

    logits = draw(600, 12, 1, scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its shuffle comes from the global generator; with one split it does not matter.
        library = Library(feature=torch.nn.Identity(), splits=1)
        library.update(logits.double())
        assert inception_score(logits, splits=1) == pytest.approx(float(library.compute()[0]), rel=1e-10)
    found = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    assert inception_score(logits) == pytest.approx(found["inception_score_mean"], rel=1e-12)
    # The other number of the library is a deviation over splits, not an error bar, and is not reported.
    assert found["inception_score_std"] > 0


def test_samples_sorted_by_class_score_like_shuffled_ones():
    """Without the shuffle every split holds one class of ten and the score falls to almost 1."""
    logits = labelled(100, 10)
    shuffled = logits[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    value = inception_score(logits)
    assert value == pytest.approx(inception_score(shuffled), rel=0.01) and value > 4
    blocks = [by_definition(part) for part in logits.chunk(10)]
    assert sum(blocks) / 10 < 1.5


def test_few_samples_bias_the_score_downwards():
    logits = draw(6000, 50, 2, scale=2.0)
    values = [inception_score(logits[:n]) for n in (100, 600, 6000)]
    assert values == sorted(values) and values[0] < 0.9 * values[2]


def test_shuffle_leaves_the_global_generators_alone():
    import numpy as np

    logits = draw(100, 5, 3)
    np.random.seed(1)
    before, state = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    first = inception_score(logits)
    assert (np.random.get_state()[1] == before).all() and torch.equal(torch.random.get_rng_state(), state)
    np.random.seed(2)
    torch.manual_seed(2)
    assert inception_score(logits) == first


def test_certainty_is_not_undefined():
    """Nobody resembles class 5: its share is 0 log 0, which the library's formula alone turns into nan."""
    certain = 3e4 * torch.eye(5)[:4].repeat(25, 1)
    assert inception_score(certain, splits=1) == pytest.approx(4.0, rel=1e-9)


def test_as_a_metric():
    metric = InceptionScore("inception_score", [Named("inception_2015_12_05", 8, logits=12)], 5000)
    assert metric.keys == ("inception_score",) and metric.better == {"inception_score": 1}
    assert metric.reference == "none" and metric.needs[0][1] == "logits"
    logits = draw(60, 12, 4)
    assert metric.compute([logits], []) == {"inception_score": inception_score(logits)}
    assert metric.refusal([]) is None
    assert metric.protocol(5000, []) == (
        "inception_score[protocol of inception_2015_12_05|tap=logits|10 splits, shuffled with seed 2020, mean over"
        " splits|d=12|u8-round|n=5000]"
    )
    assert "biased downwards" in metric.note(49_999) and metric.note(50_000) is None
    with pytest.raises(UsageError, match=r"10 splits .* got 9"):
        metric.compute([logits[:9]], [])
    with pytest.raises(RunError, match="'logits' of inception_2015_12_05 holds values that are not finite"):
        metric.compute([logits / 0], [])
