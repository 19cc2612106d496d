"""Attention that can be taken apart: processors that keep maps, queries and keys, or outputs, and use them again.

`Separable` computes what the library's two plain processors compute, operation for operation. `Whole` goes around any
other processor and knows its output alone; queries and keys of such attention are kept where they are projected, before
the norms and rotations that its processor puts on them, and so without forming a map.

The operators are those of arXiv 2401.01008 (`map`), and of the same map from kept queries and keys, so that the fused
kernel is called (`qk`). What `output` keeps is the attention's own part: a residual that a processor adds is fresh.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

SEPARABLE = (AttnProcessor2_0, AttnProcessor)
PARTS = ("qk", "map", "output")
Kept = tuple[Tensor, ...]


class Reusing:
    """What the processors here have in common: what the next call takes, and what it keeps.

    Attributes:
        stock: the processor that was there before.
        takes: the part that is given, or None.
        given: its tensors.
        keeps: parts to keep.
        kept_qk, kept_map, kept_output: what the last call kept.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.reset()

    def reset(self) -> None:
        """Compute as ever, and hold nothing."""
        self.takes: str | None = None
        self.given: Kept = ()
        self.keeps: tuple[str, ...] = ()
        self.kept_qk: Kept | None = None
        self.kept_map: Kept | None = None
        self.kept_output: Kept | None = None

    def kept(self, part: str) -> Kept | None:
        """What was kept of a part."""
        found: Kept | None = getattr(self, f"kept_{part}")
        return found


class Separable(Reusing):
    """In the place of `AttnProcessor2_0`, or of `AttnProcessor` (`classic`), which forms the map in any case."""

    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        self.classic = type(stock) is AttnProcessor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.takes is None and not self.keeps:
            plain: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return plain
        residual = hidden_states
        if self.takes == "output":
            out = self.given[0]
        else:
            out = self._attended(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            if "output" in self.keeps:
                self.kept_output = (out,)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _attended(
        self, attn: Any, hidden: Tensor, text: Tensor | None, mask: Tensor | None, temb: Tensor | None
    ) -> Tensor:
        if attn.spatial_norm is not None:
            hidden = attn.spatial_norm(hidden, temb)
        shape = hidden.shape
        if len(shape) == 4:
            hidden = hidden.view(shape[0], shape[1], shape[2] * shape[3]).transpose(1, 2)
        batch, length, _ = hidden.shape if text is None else text.shape
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, length, batch)
            if not self.classic:
                mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        if attn.group_norm is not None:
            hidden = attn.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
        source = hidden
        if text is not None:
            source = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
        mixed = (
            self._classic(attn, hidden, source, mask)
            if self.classic
            else self._fused(attn, hidden, source, mask, batch)
        )
        out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        return out

    def _fused(self, attn: Any, hidden: Tensor, source: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        """As in `AttnProcessor2_0`: [B, N, heads * width]."""
        value = _split(attn.to_v(source), batch, attn.heads)
        if self.takes == "map":
            mixed = self.given[0] @ value
        else:
            if self.takes == "qk":
                query, key = self.given
            else:
                query, key = (_split(x, batch, attn.heads) for x in (attn.to_q(hidden), attn.to_k(source)))
                query = query if attn.norm_q is None else attn.norm_q(query)
                key = key if attn.norm_k is None else attn.norm_k(key)
                if "qk" in self.keeps:
                    self.kept_qk = (query, key)
            if "map" in self.keeps:
                weights = attention_map(query, key, mask)
                self.kept_map = (weights,)
                mixed = weights @ value
            else:
                mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(batch, -1, value.shape[1] * value.shape[3]).to(value.dtype)

    def _classic(self, attn: Any, hidden: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """As in `AttnProcessor`, whose heads lie in the batch."""
        value = attn.head_to_batch_dim(attn.to_v(source))
        if self.takes == "map":
            weights = self.given[0]
        else:
            if self.takes == "qk":
                query, key = self.given
            else:
                query, key = attn.head_to_batch_dim(attn.to_q(hidden)), attn.head_to_batch_dim(attn.to_k(source))
                if "qk" in self.keeps:
                    self.kept_qk = (query, key)
            weights = attn.get_attention_scores(query, key, mask)
            if "map" in self.keeps:
                self.kept_map = (weights,)
        mixed: Tensor = attn.batch_to_head_dim(torch.bmm(weights, value))
        return mixed


class Whole(Reusing):
    """Around any processor; it keeps and gives the output only."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.takes == "output":
            own = tuple(tensor.clone() for tensor in self.given)  # whoever called may write into it
            return own[0] if len(own) == 1 else own
        output = self.stock(*args, **kwargs)
        if "output" in self.keeps:
            self.kept_output = output if isinstance(output, tuple) else (output,)
        return output


def attention_map(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) of [B, h, N, d] and [B, h, M, d]: [B, h, N, M]."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _split(x: Tensor, batch: int, heads: int) -> Tensor:
    return x.view(batch, -1, heads, x.shape[-1] // heads).transpose(1, 2)


_around: dict[type, type[Whole]] = {}


def reusing(stock: Any) -> Reusing | None:
    """A processor that stands in for `stock`; None where it cannot be done (processors with weights of their own)."""
    if type(stock) in SEPARABLE:
        return Separable(stock)
    if isinstance(stock, nn.Module):
        return None
    kind = type(stock)
    if kind not in _around:
        # Attention modules look at the arguments that a processor names, and drop all others.
        made = type(f"Whole{kind.__name__}", (Whole,), {"__call__": _like(kind)})
        _around[kind] = made
    return _around[kind](stock)


def _like(kind: type) -> Any:
    def call(self: Whole, *args: Any, **kwargs: Any) -> Any:
        return Whole.__call__(self, *args, **kwargs)

    call.__signature__ = inspect.signature(kind.__call__)  # type: ignore[attr-defined]
    return call


def stock_of(attention: nn.Module) -> Any:
    """The processor of an attention module, or the one whose place ours has taken."""
    processor = attention.processor
    return getattr(processor, "stock", processor)


def can_be_taken_apart(attention: nn.Module) -> bool:
    """Whether maps can be kept, and not only outputs, queries and keys."""
    return type(stock_of(attention)) in SEPARABLE


def gives(attention: nn.Module, part: str) -> bool:
    """Whether a part of an attention operator can be taken from memory. Processors with weights of their own (those of
    IP-Adapter) keep their place, so only their queries and keys can."""
    if part == "qk":
        return can_be_taken_apart(attention) or bool(projections_of(attention))
    return can_be_taken_apart(attention) if part == "map" else not isinstance(stock_of(attention), nn.Module)


PROJECTIONS = ("to_q", "to_k", "add_q_proj", "add_k_proj")
"""Of queries and keys; the last two are of text that attends together with the image."""


def projections_of(attention: nn.Module) -> list[nn.Module]:
    """What makes queries and keys, where each has a projection of its own; nothing where they are made together."""
    if getattr(attention, "fused_projections", False):
        return []
    found = [getattr(attention, name, None) for name in PROJECTIONS]
    modules = [module for module in found if isinstance(module, nn.Module)]
    return modules if all(isinstance(module, nn.Module) for module in found[:2]) else []
