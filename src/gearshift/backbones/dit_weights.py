"""DiT weights in the layout of diffusers (`DiTTransformer2DModel`), both ways, tensor by tensor and bit by bit.

There q, k and v are apart, the time and label embedders are copied into every block, and the table of positions is
made anew instead of stored. The same weights do not give the same numbers in diffusers (0.42): its time features have
frequencies 10000^(-k/127) instead of 10000^(-k/128), which moves the outputs
of random weights by some 2 % in the middle of the time axis and 14 % at its noisy end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gearshift.backbones.dit import EPS, DiT
from gearshift.backbones.layers import sincos_positions
from gearshift.runtime.errors import RunError, UsageError

StateDict = dict[str, Tensor]

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
SUBFOLDER = "transformer"
CONFIG = "config.json"

_POSITIONS = "pos_embed"
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_COPIED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV, _QKV_PARTS = "attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_THEIR_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_EMBEDDERS = "norm1.emb."


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Whether names are those of a diffusers transformer."""
    return any(name.startswith("transformer_blocks.") for name in state)


def to_diffusers(state: Mapping[str, Tensor]) -> StateDict:
    """Weights of a `DiT` under the names of diffusers. Copies and the parts of q, k, v share storage with `state`.

    Raises:
        RunError: `pos_embed` is not the fixed table, which that layout has no place for, or a name is unknown.
    """
    depth = 1 + max((int(match[1]) for name in state if (match := _BLOCK.fullmatch(name))), default=-1)
    converted: StateDict = {}
    for name, tensor in state.items():
        if name == _POSITIONS:
            if not torch.allclose(tensor.cpu().float(), _positions(*tensor.shape[1:]), rtol=0, atol=1e-5):
                raise RunError(
                    "pos_embed is not the sin-cos table of this size; diffusers makes that table itself and has no "
                    "place for another"
                )
            continue
        module, _, kind = name.rpartition(".")
        match = _BLOCK.fullmatch(module)
        if module in _OUTER:
            converted[f"{_OUTER[module]}.{kind}"] = tensor
        elif module in _COPIED:
            for block in range(depth):
                converted[f"transformer_blocks.{block}.{_EMBEDDERS}{_COPIED[module]}.{kind}"] = tensor
        elif match is not None and match[2] == _QKV:
            for part, rows in zip(_QKV_PARTS, tensor.chunk(3), strict=True):
                converted[f"transformer_blocks.{match[1]}.{part}.{kind}"] = rows
        elif match is not None and match[2] in _IN_BLOCK:
            converted[f"transformer_blocks.{match[1]}.{_IN_BLOCK[match[2]]}.{kind}"] = tensor
        else:
            raise RunError(f"{name} is no weight of a DiT, so the layout of diffusers has no name for it")
    return converted


def from_diffusers(state: Mapping[str, Tensor], num_tokens: int) -> StateDict:
    """The inverse of `to_diffusers`, with the table of positions for a square of `num_tokens` tokens.

    Names that are no part of the layout are handed on as they are, for a strict load to refuse.

    Raises:
        RunError: the copies of an embedder differ between blocks (a DiT has one), or a part of q, k, v is missing.
    """
    ours = {theirs: own for own, theirs in (_OUTER | _IN_BLOCK).items()}
    copied = {theirs: own for own, theirs in _COPIED.items()}
    converted: StateDict = {}
    first: dict[str, str] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        match = _THEIR_BLOCK.fullmatch(module)
        inside = match[2] if match is not None else ""
        block = f"blocks.{match[1]}." if match is not None else ""
        if inside.startswith(_EMBEDDERS) and inside.removeprefix(_EMBEDDERS) in copied:
            own = f"{copied[inside.removeprefix(_EMBEDDERS)]}.{kind}"
            if own not in converted:
                converted[own], first[own] = tensor, name
            elif not torch.equal(converted[own], tensor):
                raise RunError(
                    f"{name} and {first[own]} differ: the embedders of these blocks were trained apart, and a DiT has "
                    "one for all; only files whose copies are equal can be read"
                )
        elif inside in _QKV_PARTS:
            own = f"{block}{_QKV}.{kind}"
            if own not in converted:
                names = [f"transformer_blocks.{block.split('.')[1]}.{part}.{kind}" for part in _QKV_PARTS]
                missing = [part for part in names if part not in state]
                if missing:
                    raise RunError(f"{missing[0]} is missing beside {name}; fetch the whole file")
                converted[own] = torch.cat([state[part] for part in names])
        elif (inside or module) in ours:
            converted[f"{block}{ours[inside or module]}.{kind}"] = tensor
        else:
            converted[name] = tensor
    width = len(converted["x_embedder.proj.weight"]) if "x_embedder.proj.weight" in converted else 0
    if width % 4 == 0 and math.isqrt(num_tokens) ** 2 == num_tokens:
        converted[_POSITIONS] = _positions(num_tokens, width)
    return converted


def diffusers_config(network: DiT) -> dict[str, Any]:
    """What `DiTTransformer2DModel.from_pretrained` reads beside the weights.

    Raises:
        UsageError: that class cannot hold this network.
    """
    config = network.config
    if config.num_classes is None or not config.null_class or config.mlp_ratio != 4.0:
        raise UsageError(
            "the DiT of diffusers has classes, a null class and mlp_ratio=4; this one has "
            f"num_classes={config.num_classes}, null_class={config.null_class}, mlp_ratio={config.mlp_ratio}"
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.embed_dim // config.num_heads,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        # Of the second norm of a block; the first one's is fixed there, at the same value.
        "norm_eps": EPS,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.image_size,
    }


def _positions(num_tokens: int, width: int) -> Tensor:
    side = math.isqrt(num_tokens)
    return sincos_positions(width, side, side)
