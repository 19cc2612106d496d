"""Uncertainty heads: tokens of one exit to a predicted error in [0, 1] (DeeDiff / AdaDiff, arXiv 2309.17074).

Three forms, each with weights that all noise levels share or a set for every training timestep (the w_t of the paper's
Eq. 5), chosen by the timestep of each row:

    TokenHead       a linear layer and a sigmoid for every token: D -> p*p*C, to be assembled to a map (official code),
                    or D -> 1, to be averaged (paper)
    AttentionHead   the tokens pooled by one learned query, then a linear layer and a sigmoid (the attention probe of
                    the reproduction that came with DuoDiff, arXiv 2410.09633)

Heads compute in the precision of their weights, fp32, whatever autocast says, as the official code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimestepLinear(nn.Module):
    """A linear layer for each of T timesteps; a row takes the one of its own timestep.

    Attributes:
        weight: [T, out, in]. bias: [T, out].
    """

    def __init__(self, timesteps: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(timesteps, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(timesteps, out_features))
        nn.init.trunc_normal_(self.weight, std=0.02)


def _linear(timesteps: int | None, in_features: int, out_features: int) -> nn.Linear | TimestepLinear:
    if timesteps is not None:
        return TimestepLinear(timesteps, in_features, out_features)
    linear = nn.Linear(in_features, out_features)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _exact(device: torch.device) -> AbstractContextManager[object]:
    """No autocast; there is none on meta, and switching off what is off takes its time too."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _sigmoid(values: Tensor) -> Tensor:
    return torch.sigmoid(values) if torch.is_grad_enabled() else values.sigmoid_()


def _apply(linear: nn.Linear | TimestepLinear, tokens: Tensor, time: Tensor | None, timestep: Tensor | None) -> Tensor:
    """[n, N, D] to [n, N, out] by the weights of each row's timestep; `time` [n, E] stands behind every token. Its part
    is one product per row, not per token."""
    width = tokens.shape[-1]
    if isinstance(linear, nn.Linear):
        if time is None:
            return F.linear(tokens, linear.weight, linear.bias)
        from_tokens = F.linear(tokens, linear.weight[:, :width], linear.bias)
        return from_tokens + F.linear(time, linear.weight[:, width:])[:, None]
    assert timestep is not None
    weight, row = linear.weight[timestep], linear.bias[timestep]
    if time is not None:
        row = row + torch.bmm(weight[:, :, width:], time[:, :, None])[..., 0]
    return torch.baddbmm(row[:, None], tokens, weight[:, :, :width].transpose(1, 2))


class TokenHead(nn.Module):
    """A linear layer and a sigmoid for every token.

    Args:
        width, time_width: D of the tokens, E of the time features (0: none).
        out_features: numbers per token.
        timesteps: T, a set of weights for each; None is one for all.
    """

    def __init__(self, width: int, time_width: int, out_features: int, timesteps: int | None = None) -> None:
        super().__init__()
        self.linear = _linear(timesteps, width + time_width, out_features)

    def forward(
        self,
        tokens: Tensor,
        time: Tensor | None = None,
        timestep: Tensor | None = None,
        pick: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Tokens [n, N, D], time features [n, E] or None, timesteps int64 [n] or None; to [n, N, out_features].

        `pick` takes some tokens out of the linear layer's narrow results: cheaper than a copy of the wide tokens, where
        most are taken.
        """
        dtype = self.linear.weight.dtype
        with _exact(tokens.device):
            time = None if time is None else time.to(dtype)
            values = _apply(self.linear, tokens.to(dtype), time, timestep)
            return _sigmoid(values if pick is None else pick(values))


class AttentionHead(nn.Module):
    """One learned query attends to the tokens; what it sees goes through a linear layer and a sigmoid.

    A single head of attention without an output projection: 3 (D^2 + D) + D for the query + D + 1 parameters, 788,993
    at D = 512. As there is one query, keys and values need not be made for every token: q.(W x) = (W^T q).x, and a
    weighted mean of values is the value of the weighted mean. So the same function takes 2 N D + 3 D^2 multiply-adds
    in place of 2 N D^2.

    Args:
        width, time_width: D of the tokens, E of the time features (0: none), which the last layer sees.
        timesteps: T, a query and a last layer for each; the projections are shared. None is one for all.
    """

    def __init__(self, width: int, time_width: int, timesteps: int | None = None) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(timesteps or 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.to_q, self.to_k, self.to_v = (_linear(None, width, width) for _ in range(3))
        self.linear = _linear(timesteps, width + time_width, 1)

    def forward(self, tokens: Tensor, time: Tensor | None = None, timestep: Tensor | None = None) -> Tensor:
        """As `TokenHead`, to [n, 1, 1]."""
        dtype, width = self.query.dtype, tokens.shape[-1]
        with _exact(tokens.device):
            tokens = tokens.to(dtype)
            query = self.to_q(self.query if timestep is None else self.query[timestep])  # [1 or n, D]
            key = query @ self.to_k.weight
            # The bias of the keys moves all scores of a query alike, which a softmax does not see.
            scores = (tokens @ key[:, :, None])[..., 0] + query @ self.to_k.bias[:, None]
            seen = (scores / math.sqrt(width)).softmax(-1)
            pooled = self.to_v(torch.bmm(seen[:, None], tokens))  # [n, 1, D]
            time = None if time is None else time.to(dtype)
            return _sigmoid(_apply(self.linear, pooled, time, timestep))
