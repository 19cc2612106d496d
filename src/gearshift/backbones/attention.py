"""The one attention operator of the project, in parts that can be kept and reused.

Projections (q, k, v), scores (the softmax map), mix (map times v) and out (projection) are separate, so a plan can take
the `map`, the pair `qk`, or the whole `output` from memory (arXiv 2401.01008 and its relatives). Without a plan it is
one fused call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.execution.memory import NO_SLOT, Slot


class Attention(nn.Module):
    """Multi-head self-attention over tokens [n, N, D]; rows of `qkv` are the q, k and v blocks, heads inside each.

    Args:
        dim: D.
        num_heads: heads h; D must divide by it. The scale is (D/h)^-1/2.
        qkv_bias: whether the fused projection has a bias.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"attention width {dim} does not divide by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        n, length, width = x.shape
        head = width // count // self.num_heads
        return x.reshape(n, length, count, self.num_heads, head).permute(2, 0, 3, 1, 4).unbind(0)

    def value(self, x: Tensor) -> Tensor:
        """v alone, [n, h, N, d]: what map and qk reuse still project."""
        dim = x.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[2 * dim :]
        return self._heads(F.linear(x, self.qkv.weight[2 * dim :], bias), 1)[0]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax map [n, h, N, N]."""
        return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)

    def out(self, mixed: Tensor) -> Tensor:
        """Merge heads [n, h, N, d] and project, [n, N, D]."""
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, slot: Slot = NO_SLOT) -> Tensor:
        """x: [n, N, D]. Parts named by the slot are loaded instead of computed, and stored when asked for."""
        if (held := slot.load("output")) is not None:
            return held[0]
        if (held := slot.load("map")) is not None:
            mixed = held[0] @ self.value(x)
        elif (held := slot.load("qk")) is not None:
            mixed = F.scaled_dot_product_attention(held[0], held[1], self.value(x))
        else:
            q, k, v = self._heads(self.qkv(x), 3)
            if slot.wants("qk"):
                # Copies: views would keep the values, half as much again, in memory with them. In the layout of the
                # projections, so that the output comes out in it too and needs no copy.
                slot.store("qk", *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)))
            if slot.wants("map"):
                weights = self.scores(q, k)
                slot.store("map", weights)
                mixed = weights @ v
            else:
                mixed = F.scaled_dot_product_attention(q, k, v)
        output = self.out(mixed)
        if slot.wants("output"):
            slot.store("output", output)
        return output
