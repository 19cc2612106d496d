"""Which numbers of several evaluations may be held against each other, and what sets the others apart.

Every number has a protocol: the string its evaluation gives for it, or, where a measure has none of its own (PSNR,
SSIM, label agreement), the entries that change it. Times have the conditions they were taken under. Numbers of one
protocol are comparable; all others are marked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gearshift.evaluation.document import plain
from gearshift.evaluation.table import columns_of, direction

Results = Mapping[str, Any]
Protocol = tuple[tuple[str, str], ...]
"""Parts of a protocol, each with a name ("" for parts of a protocol string)."""

TIMED = ("images_per_s", "speedup", "time_saved", "saving_realised")
CONDITIONS = (
    "device",
    "dtype",
    "batch",
    "torch",
    "cuda",
    "cudnn",
    "matmul_precision",
    "convolution_precision",
    "cudnn_benchmark",
    "deterministic",
    "compiled",
    "power_limit_w",
    "threads",
    "cores",
    "batch_policy",
)
"""Conditions without which times do not compare, by their names in `conditions.conditions` and the results."""
_SHARED = ("images", "labels", "guidance", "data", "rounding")
_SETTINGS = ("images", "seed", "chunk", "labels", "guidance", "ema", "dtype", "data", "rounding")


def protocol_of(results: Results, key: str) -> Protocol | None:
    """Everything the value of `key` depends on besides weights, seed and policy, without the name of the run. Empty
    where the evaluation does not say; None for keys whose values need no protocol (counts)."""
    if key in TIMED:
        conditions = results.get("conditions") or {}
        return tuple((name, plain(conditions[name])) for name in CONDITIONS if conditions.get(name) is not None)
    if not direction(key):
        return None
    protocol = {
        str(k): plain(v).replace(str(results.get("run") or "\0"), "RUN")
        for k, v in (results.get("protocol") or {}).items()
    }
    own = _entry(protocol, key)
    base = {"psnr": "psnr", "ssim": "ssim", "label_agreement": "classifier"}
    shared = next((name for start, name in base.items() if key.startswith(start)), None)
    if own is None and shared is None and not key.endswith("_to_full"):
        return ()
    parts = [("", part) for part in _parts(protocol[own])] if own is not None else []
    # A metric's own string says its number of images and its reference; what is compared with full compute has neither.
    names = ("labels", "rounding") if own is not None and shared is None and not key.endswith("_to_full") else _SHARED
    if shared is not None:
        names = (shared, *names)
    return (*parts, *((name, protocol[name]) for name in names if name in protocol))


def _entry(protocol: Mapping[str, str], key: str) -> str | None:
    """The name under which a protocol speaks of a key: its own, or that of the metric that gives it, whose string
    begins with all its keys ("precision_vgg16,recall_vgg16[...")."""
    heads = re.compile(rf"(?:[^|]*,)?{re.escape(key)}[,\[]")
    return key if key in protocol else next((name for name, text in protocol.items() if heads.match(text)), None)


def _parts(text: str) -> list[str]:
    """The parts of a string such as name[a|b|c]."""
    return [part.strip() for part in re.sub(r"\]$", "", text).split("|")]


def protocols_of(evaluations: Sequence[Results], key: str) -> list[Protocol | None]:
    """The protocol of `key` in every evaluation; None where it has no values of it, or needs no protocol. What no
    protocol is given for is comparable with nothing but itself."""
    found: list[Protocol | None] = []
    for number, results in enumerate(evaluations):
        measured = any(row.get(key) is not None for row in results["rows"])
        protocol = protocol_of(results, key) if measured else None
        found.append((("protocol", f"not given by evaluation {number + 1}"),) if protocol == () else protocol)
    return found


def groups(evaluations: Sequence[Results], key: str) -> list[Protocol]:
    """The different protocols of `key`, in order of appearance."""
    return list(dict.fromkeys(protocol for protocol in protocols_of(evaluations, key) if protocol is not None))


def marks_of(evaluations: Sequence[Results]) -> dict[str, list[str]]:
    """For every shown key with more than one protocol: the mark ("a", "b", ...) of every evaluation, "" where it has no
    values."""
    marks: dict[str, list[str]] = {}
    for column in columns_of([row for results in evaluations for row in results["rows"]]):
        different = groups(evaluations, column.key)
        if len(different) > 1:
            own = protocols_of(evaluations, column.key)
            marks[column.key] = ["" if p is None else letter(different.index(p)) for p in own]
    return marks


def letter(number: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa."""
    head = letter(number // 26 - 1) if number >= 26 else ""
    return head + chr(ord("a") + number % 26)


def difference(first: Protocol, second: Protocol, names: tuple[str, str]) -> str:
    """What one protocol has and the other has not, quoted under the names of their evaluations."""

    def only(mine: Protocol, other: Protocol) -> str:
        parts = [f"{name} {value}".strip() for name, value in mine if (name, value) not in other]
        return "; ".join(parts) or "nothing more"

    return f"{names[0]}: {only(first, second)} / {names[1]}: {only(second, first)}"


def warnings_of(evaluations: Sequence[Results], labels: Sequence[str]) -> list[str]:
    """One line per pair of protocols that share columns, naming the columns and what differs; one line for settings
    that change images without changing what is measured."""
    lines: dict[tuple[str, bool], list[str]] = {}
    for key in marks_of(evaluations):
        own, (first, *others) = protocols_of(evaluations, key), groups(evaluations, key)

        def whose(protocol: Protocol, mark: str, own: list[Protocol | None] = own) -> str:
            return f"{' and '.join(label for label, p in zip(labels, own, strict=True) if p == protocol)} [{mark}]"

        for number, other in enumerate(others, start=1):
            text = difference(first, other, (whose(first, "a"), whose(other, letter(number))))
            lines.setdefault((text, key in TIMED), []).append(key)
    out = []
    for (text, timed), keys in lines.items():
        what = "times taken under different conditions" if timed else "measured by different protocols"
        out.append(f"{', '.join(keys)}: {what}, not comparable across the marks. {text}")
    settings = [
        f"{name} " + " / ".join(f"{plain(value)} ({label})" for label, value in zip(labels, values, strict=True))
        for name in _SETTINGS
        if len(set(map(plain, values := [(r.get("protocol") or {}).get(name) for r in evaluations]))) > 1
    ]
    if settings:
        out.append(f"settings differ: {'; '.join(settings)}")
    return out


def comparable(evaluations: Sequence[Results]) -> Callable[[str], bool]:
    """Whether a key has values in two evaluations or more and one protocol in all of them."""

    def holds(key: str) -> bool:
        have = sum(any(row.get(key) is not None for row in results["rows"]) for results in evaluations)
        return have > 1 and len(groups(evaluations, key)) == 1

    return holds
