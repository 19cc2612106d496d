"""What policies are told of a run, and shown of each step of its scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.diffusion.solvers.base import Call
from gearshift.policies.base import Policy, RunInfo
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class Shown:
    """See `policies.base.Observed`."""

    eps: Tensor
    called: Tensor
    branches: int


def shown_of(
    run: RunInfo, call: Call, called: Tensor, sample: Tensor, output: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Shown]:
    """The sampler's x before and after a step, and what was predicted; [B, ...] fp32, x as the network sees it.

    Args:
        called: rows that were evaluated, branch after branch, host bool.
        sample, output, after: of the scheduler's step, [B, ...], or [B * frames, ...], or with both branches [2B, ...].
    """
    if sample.shape[0] == run.num_rows != run.batch:  # each branch is stepped, and all are alike
        sample, output, after = (x[: run.batch] for x in (sample, output, after))
    evaluated = torch.zeros(run.num_rows, dtype=torch.bool)
    evaluated[: len(called)] = called
    eps = output if output.shape == sample.shape else output[:, : sample.shape[1]]
    # In half precision the second difference of latents is mostly rounding.
    before, following = sample.float(), after.float()
    if run.sigma_frame:
        before, following = before * call.alpha, following * call.next_alpha
    tensors = [x.reshape(run.batch, -1, *x.shape[1:]).squeeze(1) for x in (before, following, eps)]
    return tensors[0], tensors[1], Shown(tensors[2], evaluated, len(called) // run.batch)


def first_that_fits(policy: Policy, runs: list[RunInfo]) -> RunInfo:
    """Raises UsageError, of the first, where the policy fits none of the runs."""
    refusals = []
    for run in runs:
        try:
            policy.check(run)
        except UsageError as error:
            refusals.append(error)
        else:
            return run
    raise refusals[0]
