"""What an image costs under a policy whose plans are known beforehand, counted without sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gearshift.execution.cost import CostTable
from gearshift.policies.base import Policy
from gearshift.sampling.loop import Sampler


def macs_of(sampler: Sampler, policy: Policy, table: CostTable) -> int | None:
    """MACs per image of `policy` under the sampler's solver and guidance; what plans reuse is taken to be there. None
    where a plan decides by data, or tells samples apart."""
    info = sampler.info(sampler.calls())
    network, state = info.network, policy.begin(info)
    if not policy.static:
        return None
    levels = torch.tensor([call.log_snr for call in info.calls], dtype=torch.float64)
    low, high = sampler.guidance_interval or (float("-inf"), float("inf"))
    costs: dict[Any, int] = {}
    total = 0
    for call, path in zip(info.calls, network.route(levels).tolist(), strict=True):
        plan = policy.plan(state, call)
        per_row = isinstance(plan.depth, Tensor) or isinstance(plan.expert, Tensor)
        if plan.exit is not None or per_row or isinstance(plan.bypass, Mapping):
            return None
        wanted = info.branches if low <= call.log_snr <= high else 1
        called = torch.as_tensor(plan.call).expand(info.num_rows).reshape(info.branches, info.batch)[:wanted]
        rows = called.float().mean(1).sum()
        if not bool(rows):
            continue
        key = (path, plan.expert, plan.depth, plan.reuse, plan.bypass)
        if key not in costs:
            costs[key] = table.of_plan(network, plan, path).macs
        total += round(float(rows) * costs[key])
    return total
