"""What `gearshift plan` writes: policies as YAML, with a header that says how they came about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from gearshift.evaluation.rows import code_digest, identity_of
from gearshift.evaluation.weights import weights_digest
from gearshift.policies import Planned, Policy
from gearshift.runtime.config import TARGET
from gearshift.sampling.loop import Sampler

OTHER_NAMES = ("certainty", "similarity")
"""Under which policies take 1 - threshold."""


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


def kept_at(run: Path, name: str, sampler: Sampler, images: int, **about: Any) -> Path:
    """The file, below a run's folder, of what a search has measured on so many images; named by what decides it."""
    decides = {
        "weights": weights_digest(sampler.denoiser.network),
        "code": code_digest(),
        "torch": torch.__version__,
        "sampler": identity_of(sampler),
        "images": images,
        **about,
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    stem, _, suffix = name.rpartition(".")
    folder = run / "plans"
    folder.mkdir(exist_ok=True)
    return folder / f"{stem}-{digest}.{suffix}"


def threshold_text(
    node: Mapping[str, Any], policy: Policy, command: str, budget: float, cost: float, psnr: float
) -> str:
    """A policy node with the threshold, or the thresholds, that were found."""
    found: Any = policy
    thresholds = getattr(found, "thresholds", None)
    header = [
        f"{'Threshold' if thresholds is None else 'Thresholds'} for {budget:g} of full compute; on calibration noise "
        f"{cost:.4f}, {psnr:.2f} dB to full compute.",
        command,
    ]
    own = {key: value for key, value in node.items() if key not in OTHER_NAMES}
    own["threshold"] = found.threshold
    if thresholds is not None or "thresholds" in own:
        own["thresholds"] = None if thresholds is None else [float(value) for value in thresholds]
    body = yaml.safe_dump(own, sort_keys=False)
    return "".join(f"# {line}\n" for line in header) + body
