"""The small tables under the main one: speed in detail, scaling, spread over images, agreement per class.

What some row was measured for and another was not says "not measured" in that row; a table nobody has numbers for is
None, and the report says so in words.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gearshift.evaluation.table import NOT_MEASURED, Row, format_bytes, format_count, format_number, is_number
from gearshift.evaluation.tabular import Table

_PERCENTILES = ("p50", "p90", "p95", "p99")
_CLASSES_SHOWN = 10


def throughput_table(rows: Sequence[Row]) -> Table | None:
    """Images per second at every batch size of the sweep, with the speed-up against full compute in parentheses, and
    the largest spread (interquartile range over median) of a row."""
    sweeps = [{int(entry["batch"]): entry for entry in _speed(row).get("sweep") or []} for row in rows]
    batches = sorted({batch for sweep in sweeps for batch in sweep})
    if not batches:
        return None
    values = [[_number(sweep.get(batch), "images_per_s") for batch in batches] for sweep in sweeps]

    def cell(entry: Mapping[str, Any] | None) -> str:
        speed, ratio = _number(entry, "images_per_s"), _number(entry, "speedup")
        if speed is None:
            return NOT_MEASURED
        return format_number(speed) + ("" if ratio is None else f" ({ratio:.2f}×)")

    def spread(sweep: Mapping[int, Mapping[str, Any]]) -> str:
        found = [value for entry in sweep.values() if (value := _number(entry, "spread")) is not None]
        return f"{100 * max(found):.1f} %" if found else NOT_MEASURED

    return _table(
        ["run", *(f"batch {batch}" for batch in batches), "largest spread"],
        [
            [str(row["name"]), *(cell(sweep.get(batch)) for batch in batches), spread(sweep)]
            for row, sweep in zip(rows, sweeps, strict=True)
        ],
        [(k + 1, [line[k] for line in values], +1) for k in range(len(batches))],
    )


def latency_table(rows: Sequence[Row]) -> Table | None:
    """Latency at batch 1 in milliseconds (median and percentiles), the first pass in seconds (warm-up and compilation,
    apart from all other times) and the peak memory, per batch size where the sweep has it."""
    speeds = [_speed(row) for row in rows]
    if not any(
        speed.get("latency_ms") or _number(speed, "first_pass_s") is not None or _peaks(speed) for speed in speeds
    ):
        return None
    peaks = [_peaks(speed) for speed in speeds]
    sizes = list(dict.fromkeys(size for found in peaks for size in found)) or [""]
    latencies = [speed.get("latency_ms") or {} for speed in speeds]
    heads = [
        "run",
        *(f"{name} [ms]" for name in _PERCENTILES),
        "timed passes",
        "first pass [s]",
        *(f"peak memory {size}".strip() for size in sizes),
    ]
    body = []
    for row, speed, latency, peak in zip(rows, speeds, latencies, peaks, strict=True):
        numbers = [_number(latency, name) for name in _PERCENTILES]
        first, repeats = _number(speed, "first_pass_s"), _number(latency, "repeats")
        body.append(
            [
                str(row["name"]),
                *map(_text, numbers),
                _text(repeats, "{:.0f}".format),
                _text(first),
                *(_text(peak.get(size), format_bytes) for size in sizes),
            ]
        )
    best: list[tuple[int, list[float | None], int]] = [
        (k + 1, [_number(latency, name) for latency in latencies], -1) for k, name in enumerate(_PERCENTILES)
    ]
    best += [(7 + k, [peak.get(size) for peak in peaks], -1) for k, size in enumerate(sizes)]
    return _table(heads, body, best)


def scaling_table(scaling: Mapping[str, Any] | None) -> Table | None:
    """Images per second of one process alone, per device, per node and of all, and the scaling efficiency."""
    if not scaling:
        return None
    shown: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("devices", "devices", "{:.0f}".format),
        ("nodes", "nodes", "{:.0f}".format),
        ("images_per_s_alone", "images/s, one alone", format_number),
        ("images_per_s_device", "images/s per device", format_number),
        ("images_per_s_node", "images/s per node", format_number),
        ("images_per_s", "images/s, all", format_number),
        ("efficiency", "scaling efficiency", lambda value: f"{100 * value:.1f} %"),
    )
    cells = [_text(_number(scaling, key), show) for key, _, show in shown]
    return Table(tuple(head for _, head, _ in shown), (False,) * len(shown), (tuple(cells),))


def spread_table(rows: Sequence[Row]) -> Table | None:
    """5th, 50th and 95th percentile over images of what a row recorded per image."""
    shown: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("macs_per_image", "MACs/image", format_count),
        ("psnr_to_full", "PSNR to full", format_number),
        ("mean_depth", "mean depth", format_number),
    )
    have = [entry for entry in shown if any((row.get("distribution") or {}).get(entry[0]) for row in rows)]
    if not have:
        return None

    def cell(row: Row, key: str, show: Callable[[float], str]) -> str:
        found = (row.get("distribution") or {}).get(key) or {}
        if all(_number(found, name) is None for name in ("p5", "p50", "p95")):
            identical = key == "psnr_to_full" and row.get("identical_to_full") == 1.0
            return "identical" if identical else NOT_MEASURED
        return " · ".join(_text(_number(found, name), show) for name in ("p5", "p50", "p95"))

    body = [[str(row["name"]), *(cell(row, key, show) for key, _, show in have)] for row in rows]
    return _table(["run", *(f"{head}, p5 · p50 · p95" for _, head, _ in have)], body, [])


def classes_table(rows: Sequence[Row]) -> Table | None:
    """Label agreement per class: every class where they are few, else the lowest, the median and the highest."""
    shares = [
        [float("nan") if v is None else float(v) for v in row.get("label_agreement_per_class") or []] for row in rows
    ]
    most = max(map(len, shares), default=0)
    if most == 0:
        return None

    def percent(value: float | None) -> str:
        return _text(value, lambda share: f"{100 * share:.1f} %")

    if most <= _CLASSES_SHOWN:
        padded = [[*line, *[float("nan")] * (most - len(line))] for line in shares]
        body = [[str(row["name"]), *map(percent, line)] for row, line in zip(rows, padded, strict=True)]
        columns = [(k + 1, [line[k] for line in padded], +1) for k in range(most)]
        return _table(["run", *(f"class {k}" for k in range(most))], body, columns)
    body = []
    for row, line in zip(rows, shares, strict=True):
        known = [(share, k) for k, share in enumerate(line) if is_number(share)]
        if not known:
            body.append([str(row["name"]), *[NOT_MEASURED] * 3])
            continue
        (low, low_class), (high, high_class) = min(known), max(known)
        middle = percent(statistics.median(share for share, _ in known))
        ends = (f"{percent(low)} (class {low_class})", f"{percent(high)} (class {high_class})")
        body.append([str(row["name"]), ends[0], middle, ends[1]])
    return _table(["run", "lowest class", "median class", "highest class"], body, [])


def _table(
    heads: Sequence[str], body: Sequence[Sequence[str]], columns: Sequence[tuple[int, Sequence[float | None], int]]
) -> Table:
    """Text in the first column, numbers in the others. `columns`: (column, its values, better) where one is best."""
    best = set()
    for k, values, better in columns:
        known = {r: better * value for r, value in enumerate(values) if is_number(value) and value is not None}
        if len({body[r][k] for r in known}) > 1:
            top = body[max(known, key=lambda r: known[r])][k]
            best |= {(r, k) for r in known if body[r][k] == top}
    left = (True, *[False] * (len(heads) - 1))
    return Table(tuple(heads), left, tuple(map(tuple, body)), frozenset(best))


def _speed(row: Row) -> Mapping[str, Any]:
    speed: Mapping[str, Any] = row.get("speed") or {}
    return speed


def _peaks(speed: Mapping[str, Any]) -> dict[str, float]:
    """Peak memory by batch size ("at batch 32"), or the one of the row ("")."""
    found = {f"at batch {e['batch']}": _number(e, "peak_memory_bytes") for e in speed.get("sweep") or []}
    known = {size: value for size, value in found.items() if value is not None}
    single = _number(speed, "peak_memory_bytes")
    return known or ({} if single is None else {"": single})


def _number(found: Mapping[str, Any] | None, key: str) -> float | None:
    value = None if found is None else found.get(key)
    return float(value) if value is not None and is_number(value) else None


def _text(value: float | None, show: Callable[[float], str] = format_number) -> str:
    return show(value) if value is not None and is_number(value) else NOT_MEASURED
