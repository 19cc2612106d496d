"""What `gearshift plan` writes: policies as YAML, with a header that says how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from gearshift.policies import Planned
from gearshift.runtime.config import TARGET


def plan_text(policy: Planned, header: Sequence[str]) -> str:
    """A plan, one line per list, readable and small."""
    lines = [*(f"# {line}" for line in header), f"{TARGET}: gearshift.policies.Planned"]
    for name in ("network", "blocks", "solver", "branches"):
        lines.append(f"{name}: {getattr(policy, name)}")
    levels = ", ".join(f"{level:.8g}" for level in policy.log_snr)
    lines.append(f"log_snr: [{levels}]")
    for name, meaning in (
        ("call", "branches that are evaluated"),
        ("depth", "0: all blocks"),
        ("forecast", "1: what is not evaluated is extrapolated"),
    ):
        lines.append(f"{name}: {list(getattr(policy, name))} # {meaning}")
    taken = ["{" + ", ".join(f"{b}: {part}" for b, part in sorted(some.items())) + "}" for some in policy.reuse]
    lines.append("reuse: [" + ", ".join(taken) + "] # block: part that is taken from memory")
    return "\n".join(lines) + "\n"


def threshold_text(
    node: Mapping[str, Any], threshold: float, command: str, budget: float, cost: float, psnr: float
) -> str:
    """A policy with the threshold that was found."""
    header = [
        f"Threshold for {budget:g} of full compute; on calibration noise {cost:.4f}, {psnr:.2f} dB to full compute.",
        command,
    ]
    body = yaml.safe_dump({**node, "threshold": threshold}, sort_keys=False)
    return "".join(f"# {line}\n" for line in header) + body
