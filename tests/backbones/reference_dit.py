"""DiT written once more, straight from its definition, to compare with: no modules, no fused operators.

Reads everything it needs to know off a state dict with the official names, apart from the number of heads and the patch
size. Shares no code with the package.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6) ** 0.5


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def time_features(time: Tensor) -> Tensor:
    """Cosines, then sines, of t * 10000^(-k/128), k = 0..127, in single precision."""
    rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    return torch.stack([torch.cat([torch.cos(t * rates), torch.sin(t * rates)]) for t in time.float()])


def positions(width: int, rows: int, columns: int) -> Tensor:
    """Token by token: the column fills the first half, the row the second, each as sines, then cosines."""
    quarter = width // 4
    table = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                rate = 10000.0 ** (-k / quarter)
                token = table[row * columns + column]
                token[k], token[quarter + k] = np.sin(column * rate), np.cos(column * rate)
                token[2 * quarter + k], token[3 * quarter + k] = np.sin(row * rate), np.cos(row * rate)
    return torch.from_numpy(table[None].astype(np.float32))


def attention(x: Tensor, state: State, name: str, heads: int) -> Tensor:
    dim = x.shape[-1]
    head = dim // heads
    qkv = linear(x, state, f"{name}.qkv")
    outs = []
    for h in range(heads):
        q, k, v = (qkv[..., part * dim + h * head : part * dim + (h + 1) * head] for part in range(3))
        scores = torch.einsum("bid,bjd->bij", q, k) / math.sqrt(head)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        outs.append(torch.einsum("bij,bjd->bid", weights / weights.sum(-1, keepdim=True), v))
    return linear(torch.cat(outs, -1), state, f"{name}.proj")


def block(x: Tensor, c: Tensor, state: State, name: str, heads: int) -> Tensor:
    dim = x.shape[-1]
    made = linear(silu(c), state, f"{name}.adaLN_modulation.1")
    shift1, scale1, gate1, shift2, scale2, gate2 = (made[:, None, i * dim : (i + 1) * dim] for i in range(6))
    x = x + gate1 * attention(layer_norm(x) * (1 + scale1) + shift1, state, f"{name}.attn", heads)
    inner = gelu(linear(layer_norm(x) * (1 + scale2) + shift2, state, f"{name}.mlp.fc1"))
    return x + gate2 * linear(inner, state, f"{name}.mlp.fc2")


def final(x: Tensor, c: Tensor, state: State, patch: int, side: int) -> Tensor:
    dim = x.shape[-1]
    made = linear(silu(c), state, "final_layer.adaLN_modulation.1")
    shift, scale = made[:, None, :dim], made[:, None, dim:]
    pixels = linear(layer_norm(x) * (1 + scale) + shift, state, "final_layer.linear")
    channels = pixels.shape[-1] // patch**2
    image = torch.zeros(len(x), channels, side * patch, side * patch)
    for token in range(side * side):
        row, column = divmod(token, side)
        for p1 in range(patch):
            for p2 in range(patch):
                first = (p1 * patch + p2) * channels
                image[:, :, row * patch + p1, column * patch + p2] = pixels[:, token, first : first + channels]
    return image


def dit(state: State, x: Tensor, time: Tensor, labels: Tensor | None, heads: int, patch: int) -> list[Tensor]:
    """Predictions after every block, [n, C or 2C, H, W] each."""
    kernel, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    side = x.shape[-1] // patch
    tokens = []
    for row in range(side):
        for column in range(side):
            cut = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(torch.einsum("bcij,dcij->bd", cut, kernel) + bias)
    hidden = torch.stack(tokens, 1) + state["pos_embed"]
    c = linear(
        silu(linear(time_features(time), state, "t_embedder.mlp.0")),
        state,
        "t_embedder.mlp.2",
    )
    if labels is not None:
        c = c + state["y_embedder.embedding_table.weight"][labels]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    images = []
    for index in range(depth):
        hidden = block(hidden, c, state, f"blocks.{index}", heads)
        images.append(final(hidden, c, state, patch, side))
    return images
