"""Tables of what stages and training cost, from the entries `stages` and `training` of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gearshift.evaluation.document import Block, Heading, Tabled, Text
from gearshift.evaluation.savings import macs_unit
from gearshift.evaluation.stage_costs import interval
from gearshift.evaluation.table import format_count, format_number
from gearshift.evaluation.tabular import Table


def cost_blocks(results: Mapping[str, Any]) -> list[Block]:
    """What the report says of stages and of the training; nothing where an evaluation has no such entries."""
    blocks: list[Block] = []
    stages = results.get("stages")
    if stages:
        also = stages.get("buffers_stored")
        text = (
            f"{stages['params_stored']:,} parameters are stored, {stages['params_shared']:,} of them are used by every "
            "stage. Averages weigh the stages by what stands beside them; they are not interchangeable."
        )
        if also:
            text += f" A checkpoint also holds {also:,} numbers that are no parameters (fixed filters and the like)."
        blocks += [
            Heading("Stages"),
            Tabled(stages_table(stages)),
            Tabled(averages_table(stages)),
            Text(text, quiet=True),
        ]
    training = results.get("training")
    if training:
        blocks += [Heading("Cost of the training"), Tabled(training_table(training)), Text(_note(training), quiet=True)]
    return blocks


def stages_table(stages: Mapping[str, Any]) -> Table:
    """One row per stage: noise levels, active parameters, those no other stage uses, GMACs of one image forward."""
    heads = ("stage", "sigma / alpha", "active parameters", "only in it", "GMACs", "GMACs conv+linear")
    body = [
        (
            str(stage["path"]),
            interval(stage["sigma"]),
            format_count(stage["params_active"]),
            format_count(stage["params_own"]),
            format_number(stage["gmacs"]),
            format_number(stage["gmacs_conv_linear"]),
        )
        for stage in stages["stages"]
    ]
    return Table(heads, (True, True, False, False, False, False), tuple(body))


def averages_table(stages: Mapping[str, Any]) -> Table:
    """One row per weighting, with its shares."""
    body = [
        (
            name,
            str(average["of"]),
            " / ".join(f"{100 * share:.3g} %" for share in average["shares"]),
            format_number(average["gmacs"]),
            format_number(average["gmacs_conv_linear"]),
        )
        for name, average in stages["averages"].items()
    ]
    return Table(
        ("average", "shares of", "shares", "GMACs", "GMACs conv+linear"), (True, True, False, False, False), tuple(body)
    )


def training_table(training: Mapping[str, Any]) -> Table:
    """One row: images, MACs per training image forward and with the backward pass, and all of it."""
    images, total = training.get("images"), training.get("pmacs")
    unit, name = macs_unit(1e15 * (total or 0))
    heads = ("objective", "images", "GMACs per image, forward", "and backward", "conv+linear", "in all")
    cells = (
        str(training["objective"]),
        "not known" if images is None else f"{images:,}",
        format_number(training["gmacs_forward"]),
        format_number(training["gmacs"]),
        format_number(training["gmacs_conv_linear"]),
        "not known" if total is None else f"{format_number(1e15 * total / unit)} {name}",
    )
    return Table(heads, (True, False, False, False, False, False), (cells,))


def _note(training: Mapping[str, Any]) -> str:
    text = f"Counted, not timed: {training['rule']}. FLOPs = 2 MACs."
    mix = training.get("stages")
    if mix:
        shares = " / ".join(f"{100 * share:.3g} %" for share in mix["shares"])
        text += f" Stages are computed {shares} of the time ({mix['of']})."
    if training.get("before"):
        text += f" The training it starts from ({training['before']}) is not counted."
    return text
