"""The U-Net of DDPM++ and NCSN++ written once more, straight from its definition: no modules, no fused operators.

Reads what it needs to know off a state dict with the official names and the official (interleaved) order of q, k and v.
Shares no code with the package. Every convention that is easy to get wrong is an argument, so that tests can show that
it matters.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Conventions:
    """The right ones are the defaults."""

    heads: int = 1
    max_groups: int = 32
    eps: float = 1e-6
    interleaved: bool = True
    sines_first: bool = True
    half_sum: float = math.sqrt(0.5)
    half_attention: float = math.sqrt(0.5)
    half_pyramid: float = math.sqrt(0.5)


RIGHT = Conventions()


def linear(x: Tensor, state: State, name: str) -> Tensor:
    out = torch.einsum("ni,oi->no", x, state[f"{name}.weight"])
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def group_norm(x: Tensor, state: State, name: str, how: Conventions) -> Tensor:
    channels = x.shape[1]
    groups = min(how.max_groups, channels // 4)
    parts = []
    for g in range(groups):
        part = x[:, g * channels // groups : (g + 1) * channels // groups]
        mean = part.mean((1, 2, 3), keepdim=True)
        variance = ((part - mean) ** 2).mean((1, 2, 3), keepdim=True)
        parts.append((part - mean) / torch.sqrt(variance + how.eps))
    normed = torch.cat(parts, 1)
    return normed * state[f"{name}.weight"][None, :, None, None] + state[f"{name}.bias"][None, :, None, None]


def bordered(x: Tensor, border: int) -> Tensor:
    n, channels, height, width = x.shape
    out = torch.zeros(n, channels, height + 2 * border, width + 2 * border, dtype=x.dtype)
    out[:, :, border : border + height, border : border + width] = x
    return out


def correlate(x: Tensor, weight: Tensor) -> Tensor:
    """[n, C, H, W] with [O, C, k, k], no border."""
    k = weight.shape[-1]
    height, width = x.shape[2] - k + 1, x.shape[3] - k + 1
    out = torch.zeros(x.shape[0], weight.shape[0], height, width, dtype=x.dtype)
    for i in range(k):
        for j in range(k):
            out = out + torch.einsum("nchw,oc->nohw", x[:, :, i : i + height, j : j + width], weight[:, :, i, j])
    return out


def convolve(x: Tensor, state: State, name: str) -> Tensor:
    weight = state[f"{name}.weight"]
    return correlate(bordered(x, weight.shape[-1] // 2), weight) + state[f"{name}.bias"][None, :, None, None]


def each(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel correlated with one [k, k] filter, no border."""
    n, channels, height, width = x.shape
    out = correlate(x.reshape(n * channels, 1, height, width), kernel[None, None])
    return out.reshape(n, channels, *out.shape[2:])


def halve(x: Tensor, kernel: Tensor) -> Tensor:
    return each(bordered(x, (len(kernel) - 1) // 2), kernel)[:, :, ::2, ::2]


def double(x: Tensor, kernel: Tensor) -> Tensor:
    """Every pixel leaves four times the filter around it; what hangs over the border is cut."""
    n, channels, height, width = x.shape
    k = len(kernel)
    border = (k - 1) // 2
    out = torch.zeros(n, channels, 2 * height + k - 2, 2 * width + k - 2, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            out[:, :, 2 * i : 2 * i + k, 2 * j : 2 * j + k] += 4 * kernel * x[:, :, i, j, None, None]
    return out[:, :, border : border + 2 * height, border : border + 2 * width]


def resampled(x: Tensor, state: State, name: str, kind: str) -> Tensor:
    if f"{name}.resample_filter" not in state:
        return x
    kernel = state[f"{name}.resample_filter"][0, 0]
    return halve(x, kernel) if kind == "down" else double(x, kernel)


def attention(x: Tensor, state: State, name: str, how: Conventions) -> Tensor:
    n, channels, height, width = x.shape
    head = channels // how.heads
    qkv = convolve(group_norm(x, state, f"{name}.norm2", how), state, f"{name}.qkv").reshape(n, 3 * channels, -1)
    outs = []
    for h in range(how.heads):
        if how.interleaved:
            q, k, v = (qkv[:, 3 * head * h + part : 3 * head * (h + 1) : 3] for part in range(3))
        else:
            q, k, v = (qkv[:, part * channels + head * h : part * channels + head * (h + 1)] for part in range(3))
        scores = torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(head)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        outs.append(torch.einsum("nqk,nck->ncq", weights / weights.sum(-1, keepdim=True), v))
    mixed = torch.cat(outs, 1).reshape(n, channels, height, width)
    return (x + convolve(mixed, state, f"{name}.proj")) * how.half_attention


def block(x: Tensor, emb: Tensor, state: State, name: str, how: Conventions) -> Tensor:
    kind = name.rsplit("_", 1)[1]
    inner = resampled(silu(group_norm(x, state, f"{name}.norm0", how)), state, f"{name}.conv0", kind)
    inner = convolve(inner, state, f"{name}.conv0") + linear(emb, state, f"{name}.affine")[:, :, None, None]
    inner = convolve(silu(group_norm(inner, state, f"{name}.norm1", how)), state, f"{name}.conv1")
    if f"{name}.skip.weight" in state:
        x = convolve(resampled(x, state, f"{name}.skip", kind), state, f"{name}.skip")
    x = (x + inner) * how.half_sum
    return attention(x, state, name, how) if f"{name}.qkv.weight" in state else x


def pyramid(aux: Tensor, state: State, name: str) -> Tensor:
    """First the 3x3 convolution over a border that is wide enough for both, then the filter and every second pixel."""
    kernel = state[f"{name}.resample_filter"][0, 0]
    wide = correlate(bordered(aux, 1 + (len(kernel) - 1) // 2), state[f"{name}.weight"])
    return each(wide, kernel)[:, :, ::2, ::2] + state[f"{name}.bias"][None, :, None, None]


def embedding(state: State, time: Tensor, cond: Tensor | None, augment: Tensor | None, how: Conventions) -> Tensor:
    width = state["map_layer0.weight"].shape[1]
    if "map_noise.freqs" in state:
        angles = 2 * math.pi * time[:, None] * state["map_noise.freqs"]
    else:
        half = width // 2
        frequencies = torch.tensor([10000 ** -(i / (half - 1)) for i in range(half)], dtype=torch.float64)
        angles = time.double()[:, None] * frequencies
    halves = [angles.sin(), angles.cos()]
    emb = torch.cat(halves if how.sines_first else halves[::-1], 1).to(state["map_layer0.weight"].dtype)
    if cond is not None:
        classes = state["map_label.weight"].shape[1]
        one_hot = torch.zeros(len(cond), classes, dtype=emb.dtype)
        for row, label in enumerate(cond.tolist()):
            if label < classes:
                one_hot[row, label] = math.sqrt(classes)
        emb = emb + linear(one_hot, state, "map_label")
    if augment is not None:
        emb = emb + linear(augment, state, "map_augment")
    return silu(linear(silu(linear(emb, state, "map_layer0")), state, "map_layer1"))


def unet(
    state: State,
    x: Tensor,
    time: Tensor,
    cond: Tensor | None = None,
    augment: Tensor | None = None,
    how: Conventions = RIGHT,
) -> Tensor:
    """Prediction [n, C, H, W]."""
    emb = embedding(state, time, cond, augment, how)
    sides = sorted({int(side) for name in state for side in re.findall(r"^enc\.(\d+)x", name)}, reverse=True)
    blocks = 1 + max(int(i) for name in state for i in re.findall(r"^enc\.\d+x\d+_block(\d+)", name))
    hidden, aux, skips = x, x, []
    for level, side in enumerate(sides):
        here = f"enc.{side}x{side}_"
        if level == 0:
            hidden = convolve(hidden, state, here + "conv")
        else:
            hidden = block(hidden, emb, state, here + "down", how)
            if here + "aux_residual.weight" in state:
                hidden = aux = (hidden + pyramid(aux, state, here + "aux_residual")) * how.half_pyramid
        skips.append(hidden)
        for i in range(blocks):
            hidden = block(hidden, emb, state, f"{here}block{i}", how)
            skips.append(hidden)
    for level, side in enumerate(reversed(sides)):
        here = f"dec.{side}x{side}_"
        for name in ("in0", "in1") if level == 0 else ("up",):
            hidden = block(hidden, emb, state, here + name, how)
        for i in range(blocks + 1):
            hidden = block(torch.cat([hidden, skips.pop()], 1), emb, state, f"{here}block{i}", how)
    here = f"dec.{sides[0]}x{sides[0]}_"
    assert not skips
    return convolve(silu(group_norm(hidden, state, here + "aux_norm", how)), state, here + "aux_conv")
