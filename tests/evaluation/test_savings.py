"""Sentences about what is saved: the judgement, and what older results leave out."""

from __future__ import annotations

from typing import Any

import pytest

from gearshift.evaluation.savings import Bill, savings, verdict

UNIFIED = Bill("unified", 52.9e9, 450_000, 353e9, "ddim, 20 calls")


@pytest.mark.parametrize(
    ("training", "sampling", "head"),
    [
        (50e9, 300e9, "ours saves training and sampling against unified: "),
        (50e9, 432e9, "ours saves training, not sampling against unified: "),
        (53.9e9, 300e9, "ours saves sampling, not training against unified: "),
        (53.9e9, 432e9, "ours saves neither training nor sampling against unified: "),
        (52.9e9, 353e9, "ours saves neither training nor sampling against unified: "),  # the same is no saving
    ],
)
def test_both_neither_or_one(training: float, sampling: float, head: str) -> None:
    line = verdict(Bill("ours", training, 450_000, sampling, "ddim, 20 calls"), UNIFIED)
    assert line is not None and line.startswith(head)


def test_the_total_decides_where_images_are_known() -> None:
    """The published claim: a dearer image, and 250k against 450k iterations."""
    line = verdict(Bill("ours", 53.88e9, 250_000, 432e9, "ddim, 20 calls"), UNIFIED)
    assert line == (
        "ours saves training, not sampling against unified: training 53.88 against 52.9 GMACs per image (+1.9 %), "
        "13.47 against 23.8 PMACs in all (-43.4 %); sampling 432 against 353 GMACs per image (+22.4 %) "
        "(ddim, 20 calls)"
    )


def test_without_images_it_says_when_it_would_pay() -> None:
    line = verdict(Bill("ours", 2 * 52.9e9), UNIFIED)
    assert line is not None
    assert line.startswith("ours saves no training against unified: ")
    assert "so it saves in all if it needs less than 50 % of the images" in line
    assert line.endswith("; sampling is not known of both")


def test_two_ways_of_sampling_are_both_named() -> None:
    line = verdict(Bill("ours", sampling=1e9, how="heun"), Bill("base", sampling=2e9, how="ddim"))
    assert line == (
        "ours saves sampling against base: sampling 1 against 2 GMACs per image (-50.0 %) (heun against ddim); "
        "training is not known of both"
    )


def test_nothing_known_is_nothing_said() -> None:
    assert verdict(Bill("ours"), UNIFIED) is None
    assert verdict(Bill("ours", sampling=1.0), Bill("base", training=1.0)) is None


def results(names: list[str], macs: float, training: dict[str, Any] | None = None) -> dict[str, Any]:
    rows = [
        {"name": name, "solver": "ddim", "calls": 20, "macs_per_image": macs / (k + 1)} for k, name in enumerate(names)
    ]
    return {"rows": rows, **({} if training is None else {"training": training})}


def test_every_evaluation_against_the_first() -> None:
    cheap = results(["exit", "full"], 1e9, {"gmacs": 1.0, "images": 100})
    dear = results(["full", "exit"], 4e9, {"gmacs": 3.0, "images": 100})
    [line] = savings({"dear": dear, "cheap": cheap})
    assert line.startswith("cheap saves training and sampling against dear: ")
    assert "sampling 1 against 2 GMACs per image (-50.0 %) (exit, ddim, 20 calls)" in line, "rows of one name"
    assert len(savings({"a": dear, "b": cheap, "c": dear})) == 2


def test_results_of_before_can_be_compared() -> None:
    [line] = savings({"old": results(["full"], 2e9), "new": results(["full"], 1e9, {"gmacs": 1.0, "images": None})})
    assert line.startswith("new saves sampling against old: ") and line.endswith("; training is not known of both")
    assert savings({"a": {"rows": [{"name": "full"}]}, "b": {"rows": [{"name": "full"}]}}) == []
