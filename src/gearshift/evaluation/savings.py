"""Sentences of judgement: whether one method saves training, sampling or neither against another (MACs alone, whatever
the quality), and whether a row of an evaluation beats what its MACs buy without the method (quality alone)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gearshift.evaluation.table import Column, Row, direction, is_distance, is_number

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


# Against the baselines of an evaluation ------------------------------------------------------------------------------

_CLOSENESS = "psnr_to_full"


def contests(rows: Sequence[Row]) -> list[str]:
    """Every row that baselines are set against, against each of these: one sentence for each pair.

    A row beats another in a measure where it is better by more than the larger standard deviation over repeats and by
    more than what is printed; else it does not. Measured are the Fréchet distances that both have, and closeness to
    full compute.
    """
    by_name = {row["name"]: row for row in rows}
    lines = []
    for base in rows:
        for name in (base.get("equal_macs_to"), *(base.get("also_against") or ())):
            line = _contest(by_name[name], base) if name in by_name else None
            lines += [] if line is None else [(list(by_name).index(name), line)]
    # All of one row together.
    return [line for _, line in sorted(lines, key=lambda entry: entry[0])]


def _contest(ours: Row, base: Row) -> str | None:
    measures = [*filter(is_distance, ours), _CLOSENESS]
    keys = [key for key in measures if _comparable(ours, base, key)]
    if not keys:
        return None
    ahead = [key for key in keys if _ahead(ours, base, key)]
    behind = [key for key in keys if key not in ahead]
    head = f"{ours['name']} {'beats' if ahead else 'does not beat'} {base['name']}"
    macs = [float(row.get("macs_per_image") or 0) for row in (base, ours)]
    if all(macs):
        head += f" at {100 * macs[0] / macs[1]:.4g} % of the MACs"
    parts = [_values(ours, base, won) for won in (ahead, behind) if won]
    if ahead and behind:
        return f"{head} in {parts[0]}; not in {parts[1]}"
    return f"{head}: {parts[0]}"


def _comparable(ours: Row, base: Row, key: str) -> bool:
    return all(is_number(row.get(key)) or _identical(row, key) for row in (ours, base))


def _identical(row: Row, key: str) -> bool:
    """Images equal to those of full compute have no finite PSNR."""
    return key == _CLOSENESS and row.get(key) is None and row.get("identical_to_full") == 1.0


def _ahead(ours: Row, base: Row, key: str) -> bool:
    mine, other = (math.inf if _identical(row, key) else float(row[key]) for row in (ours, base))
    if not direction(key) * (mine - other) > 0:
        return False
    noise = max((row.get("sd") or {}).get(key) or 0.0 for row in (ours, base))
    return abs(mine - other) > noise and _shown(ours, key) != _shown(base, key)


def _shown(row: Row, key: str) -> str:
    return Column(key, key, "number").cell(row)


def _values(ours: Row, base: Row, keys: Sequence[str]) -> str:
    def pair(key: str) -> str:
        name, unit = ("PSNR to full", " dB") if key == _CLOSENESS else (key, "")
        return f"{name} {_shown(ours, key)} against {_shown(base, key)}{unit}"

    return ", ".join(map(pair, keys))
