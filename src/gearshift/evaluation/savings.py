"""Whether one method saves training, sampling or neither against another: MACs alone, whatever the quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SAME = 1e-6
"""Relative difference of two costs up to which neither is a saving."""


_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


@dataclass(frozen=True)
class Bill:
    """What a method costs; None where it is not known.

    Attributes:
        name: of the method.
        training: MACs per training image, forward and backward.
        images: images it is trained on.
        sampling: MACs per sampled image.
        how: what is sampled with, for the sentence ("full, ddim 20 calls").
    """

    name: str
    training: float | None = None
    images: float | None = None
    sampling: float | None = None
    how: str = ""

    @property
    def total(self) -> float | None:
        """MACs of the whole training."""
        return None if self.training is None or self.images is None else self.training * self.images


def verdict(ours: Bill, base: Bill) -> str | None:
    """One sentence: what `ours` saves against `base`, and by how much. None where nothing of both is known.

    Training is judged by its total where both numbers of images are known, else per image; then the sentence says with
    how many images it would be even.
    """
    pairs = {
        "training": (ours.training, base.training) if None in (ours.total, base.total) else (ours.total, base.total),
        "sampling": (ours.sampling, base.sampling),
    }
    ratios = {what: a / b for what, (a, b) in pairs.items() if a is not None and b}
    if not ratios:
        return None
    saved = [what for what, ratio in ratios.items() if ratio < 1 - SAME]
    spent = [what for what in ratios if what not in saved]
    head = " and ".join(saved)
    if saved and spent:
        head += f", not {spent[0]}"
    elif not saved:
        head = f"neither {' nor '.join(spent)}" if len(spent) > 1 else f"no {spent[0]}"
    unknown = [what for what in pairs if what not in ratios]
    tail = "".join(f"; {what} is not known of both" for what in unknown)
    parts = [
        _training(ours, base) if "training" in ratios else "",
        _sampling(ours, base) if "sampling" in ratios else "",
    ]
    return f"{ours.name} saves {head} against {base.name}: {'; '.join(filter(None, parts))}{tail}"


def _training(ours: Bill, base: Bill) -> str:
    assert ours.training is not None and base.training
    text = f"training {_against(ours.training, base.training, ' per image')}"
    if ours.total is not None and base.total:
        return text + f", {_against(ours.total, base.total, ' in all')}"
    even = base.training / ours.training
    return text + f", so it saves in all if it needs less than {100 * even:.4g} % of the images"


def _sampling(ours: Bill, base: Bill) -> str:
    assert ours.sampling is not None and base.sampling
    how = ours.how if ours.how == base.how else f"{ours.how} against {base.how}"
    return f"sampling {_against(ours.sampling, base.sampling, ' per image')}{f' ({how})' if how else ''}"


def _against(ours: float, base: float, of: str) -> str:
    unit, name = macs_unit(max(ours, base))
    return f"{ours / unit:.4g} against {base / unit:.4g} {name}{of} ({100 * (ours / base - 1):+.1f} %)"


def macs_unit(macs: float) -> tuple[float, str]:
    """The unit that a number of MACs is said in, and its name."""
    unit, prefix = next((entry for entry in _UNITS if macs >= entry[0]), _UNITS[-1])
    return unit, f"{prefix}MACs"


def bill_of(results: Mapping[str, Any], label: str, row: Mapping[str, Any] | None) -> Bill:
    """From the content of a metrics.json and one of its rows; entries that an older file lacks are not known."""
    training = results.get("training") or {}
    per_image = training.get("gmacs")
    how = (
        ""
        if row is None
        else f"{row['name']}, {row.get('solver', 'solver unknown')}, {_number(row.get('calls'))} calls"
    )
    return Bill(
        name=label,
        training=None if per_image is None else 1e9 * per_image,
        images=training.get("images"),
        sampling=None if row is None else row.get("macs_per_image"),
        how=how,
    )


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else "?"


def savings(labelled: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every evaluation against the first one: rows of the same name, else the first row of each.

    Args:
        labelled: contents of metrics.json by label, in the order they were named.
    """
    (first, base), *others = labelled.items()
    lines = []
    for label, results in others:
        ours, theirs = _rows(results["rows"], base["rows"])
        line = verdict(bill_of(results, label, ours), bill_of(base, first, theirs))
        lines += [] if line is None else [line]
    return lines


def _rows(ours: list[Any], theirs: list[Any]) -> tuple[Any, Any]:
    by_name = {row["name"]: row for row in theirs}
    return next(((row, by_name[row["name"]]) for row in ours if row["name"] in by_name), (ours[0], theirs[0]))
