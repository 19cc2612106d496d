"""The U-Net of latent diffusion written once more, straight from its definition, to compare with.

Reads everything it needs to know off a state dict in the official names and order, apart from the channels per head and
the number of groups. Shares no code with the package.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def time_features(time: Tensor, width: int) -> Tensor:
    """Cosines, then sines, [n, width], in float64."""
    half = width // 2
    frequencies = torch.tensor([math.exp(-math.log(10000) * k / half) for k in range(half)], dtype=torch.float64)
    angles = time.double()[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], 1)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return torch.einsum("ni,oi->no", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def convolve(x: Tensor, state: State, name: str, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)


def normalise(x: Tensor, state: State, name: str, groups: int) -> Tensor:
    n, channels, height, width = x.shape
    together = x.reshape(n, groups, -1)
    centred = together - together.mean(-1, keepdim=True)
    normed = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5) ** 0.5
    normed = normed.reshape(n, channels, height, width)
    return normed * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def residual(x: Tensor, embedding: Tensor, state: State, name: str, groups: int) -> Tensor:
    hidden = convolve(silu(normalise(x, state, f"{name}.in_layers.0", groups)), state, f"{name}.in_layers.2")
    hidden = hidden + linear(silu(embedding), state, f"{name}.emb_layers.1")[:, :, None, None]
    hidden = convolve(silu(normalise(hidden, state, f"{name}.out_layers.0", groups)), state, f"{name}.out_layers.3")
    if f"{name}.skip_connection.weight" in state:
        x = convolve(x, state, f"{name}.skip_connection")
    return x + hidden


def attention(x: Tensor, state: State, name: str, head_dim: int, groups: int) -> Tensor:
    n, channels, height, width = x.shape
    tokens = normalise(x, state, f"{name}.norm", groups).reshape(n, channels, height * width)
    weight = state[f"{name}.qkv.weight"][:, :, 0]
    qkv = torch.einsum("oc,nct->not", weight, tokens) + state[f"{name}.qkv.bias"][:, None]
    outs = []
    for head in range(channels // head_dim):  # the q, k and v of one head lie together
        first = 3 * head * head_dim
        q, k, v = (qkv[:, first + part * head_dim : first + (part + 1) * head_dim] for part in range(3))
        scores = torch.einsum("nct,ncs->nts", q, k) / head_dim**0.5
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        outs.append(torch.einsum("nts,ncs->nct", weights / weights.sum(-1, keepdim=True), v))
    mixed = torch.cat(outs, 1)
    out = torch.einsum("oc,nct->not", state[f"{name}.proj_out.weight"][:, :, 0], mixed)
    out = out + state[f"{name}.proj_out.bias"][:, None]
    return x + out.reshape(n, channels, height, width)


def doubled(x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    out = torch.empty(n, channels, 2 * height, 2 * width, dtype=x.dtype)
    for i in (0, 1):
        for j in (0, 1):
            out[:, :, i::2, j::2] = x
    return out


def layers(x: Tensor, embedding: Tensor, state: State, name: str, head_dim: int, groups: int) -> Tensor:
    """All layers `name.0`, `name.1`, ... of one block, told apart by what weights they have."""
    place = 0
    while any(key.startswith(f"{name}.{place}.") for key in state):
        layer = f"{name}.{place}"
        if f"{layer}.in_layers.0.weight" in state:
            x = residual(x, embedding, state, layer, groups)
        elif f"{layer}.qkv.weight" in state:
            x = attention(x, state, layer, head_dim, groups)
        elif f"{layer}.op.weight" in state:
            x = convolve(x, state, f"{layer}.op", stride=2)
        elif f"{layer}.conv.weight" in state:
            x = convolve(doubled(x), state, f"{layer}.conv")
        else:
            x = convolve(x, state, layer)
        place += 1
    return x


def count(state: State, name: str) -> int:
    depth = name.count(".") + 1
    return len({key.split(".")[depth] for key in state if key.startswith(f"{name}.")})


def ldm_unet(
    state: State, x: Tensor, features: Tensor, labels: Tensor | None, head_dim: int, groups: int, decoder: str = ""
) -> Tensor:
    """Prediction [n, C, H, W]; `features` are those of time [n, width]; `decoder` is the prefix of the way up."""
    embedding = linear(silu(linear(features, state, "time_embed.0")), state, "time_embed.2")
    if labels is not None:
        embedding = embedding + state["label_emb.weight"][labels]
    hidden, skips = x, []
    for block in range(count(state, "input_blocks")):
        hidden = layers(hidden, embedding, state, f"input_blocks.{block}", head_dim, groups)
        skips.append(hidden)
    hidden = layers(hidden, embedding, state, "middle_block", head_dim, groups)
    for block in range(count(state, f"{decoder}output_blocks")):
        hidden = torch.cat([hidden, skips.pop()], 1)
        hidden = layers(hidden, embedding, state, f"{decoder}output_blocks.{block}", head_dim, groups)
    assert not skips
    return convolve(silu(normalise(hidden, state, f"{decoder}out.0", groups)), state, f"{decoder}out.2")
