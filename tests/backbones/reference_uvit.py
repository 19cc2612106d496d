"""U-ViT written once more, straight from its definition, to compare with: no modules, no fused operators.

Reads everything it needs to know off a state dict with the official names, apart from the number of heads and the patch
size. Shares no code with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    out = torch.einsum("...i,oi->...o", x, state[f"{name}.weight"])
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5) ** 0.5 * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def attention(x: Tensor, state: State, name: str, heads: int) -> Tensor:
    dim = x.shape[-1]
    head = dim // heads
    qkv = linear(x, state, f"{name}.qkv")
    outs = []
    for h in range(heads):
        q, k, v = (qkv[..., part * dim + h * head : part * dim + (h + 1) * head] for part in range(3))
        scores = torch.einsum("nid,njd->nij", q, k) / math.sqrt(head)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        outs.append(torch.einsum("nij,njd->nid", weights / weights.sum(-1, keepdim=True), v))
    return linear(torch.cat(outs, -1), state, f"{name}.proj")


def block(x: Tensor, state: State, name: str, heads: int, skip: Tensor | None = None) -> Tensor:
    if skip is not None:
        x = linear(torch.cat([x, skip], -1), state, f"{name}.skip_linear")
    x = x + attention(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn", heads)
    hidden = gelu(linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
    return x + linear(hidden, state, f"{name}.mlp.fc2")


def time_token(time: Tensor, state: State, dim: int) -> Tensor:
    frequencies = torch.tensor([10000 ** (-k / (dim // 2)) for k in range(dim // 2)], dtype=torch.float64)
    angles = time.double()[:, None] * frequencies
    token = torch.cat([angles.cos(), angles.sin()], -1).to(state["pos_embed"].dtype)
    if "time_embed.0.weight" in state:
        token = linear(silu(linear(token, state, "time_embed.0")), state, "time_embed.2")
    return token[:, None]


def patchify(x: Tensor, p: int) -> list[list[Tensor]]:
    """Patches [n, C, p, p] by row and column."""
    return [[x[:, :, i : i + p, j : j + p] for j in range(0, x.shape[3], p)] for i in range(0, x.shape[2], p)]


def convolve3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    height, width = x.shape[2:]
    padded = torch.zeros(x.shape[0], x.shape[1], height + 2, width + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    out = bias[None, :, None, None].expand(x.shape[0], -1, height, width)
    for i in range(3):
        for j in range(3):
            out = out + torch.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
    return out


def readout(tokens: Tensor, state: State, extras: int, side: int, p: int) -> Tensor:
    pixels = linear(layer_norm(tokens, state, "norm"), state, "decoder_pred")[:, extras:]
    channels = pixels.shape[-1] // (p * p)
    image = torch.empty(tokens.shape[0], channels, side * p, side * p, dtype=tokens.dtype)
    for token in range(side * side):
        row, column = divmod(token, side)
        for p1 in range(p):
            for p2 in range(p):
                for c in range(channels):
                    image[:, c, row * p + p1, column * p + p2] = pixels[:, token, (p1 * p + p2) * channels + c]
    if "final_layer.weight" in state:
        image = convolve3(image, state["final_layer.weight"], state["final_layer.bias"])
    return image


def uvit(state: State, x: Tensor, time: Tensor, cond: Tensor | None, heads: int, p: int) -> list[Tensor]:
    """Predictions [n, C, H, W] of the shared readout after every block, the full depth last."""
    weight = state["patch_embed.proj.weight"]
    patches = [
        torch.einsum("ncij,dcij->nd", patch, weight) + state["patch_embed.proj.bias"]
        for row in patchify(x, p)
        for patch in row
    ]
    tokens = [time_token(time, state, weight.shape[0])]
    if "label_emb.weight" in state:
        tokens = [state["label_emb.weight"][cond][:, None], *tokens]
    if "context_embed.weight" in state:
        tokens = [*tokens, linear(cond, state, "context_embed")]
    extras = sum(token.shape[1] for token in tokens)
    hidden = torch.cat([*tokens, torch.stack(patches, 1)], 1) + state["pos_embed"]
    half = len({name.split(".")[1] for name in state if name.startswith("in_blocks.")})
    skips, exits = [], []
    for i in range(half):
        hidden = block(hidden, state, f"in_blocks.{i}", heads)
        skips.append(hidden)
        exits.append(hidden)
    hidden = block(hidden, state, "mid_block", heads)
    exits.append(hidden)
    for i in range(half):
        hidden = block(hidden, state, f"out_blocks.{i}", heads, skips.pop())
        exits.append(hidden)
    return [readout(h, state, extras, x.shape[2] // p, p) for h in exits]
