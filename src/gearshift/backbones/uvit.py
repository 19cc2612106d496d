"""U-ViT: a vision transformer with long skips (Bao et al., "All are Worth Words", arXiv 2209.12152).

Time, class and text are tokens beside the image patches. Depth d means d/2 encoder blocks, one middle block and d/2
decoder blocks, which merge the encoder's outputs last in, first out. Names of parameters are those of the official
repository, so released weights load strictly. One readout (norm, linear, unpatchify, 3x3 convolution) serves every
depth, as in AdaDiff (arXiv 2309.17074).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gearshift.backbones.attention import Attention
from gearshift.backbones.base import Backbone
from gearshift.backbones.layers import Mlp, PatchEmbed, init_linear, sinusoid
from gearshift.execution.memory import NO_SLOT, Slot
from gearshift.execution.stream import Rows, Stream
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class UViTConfig:
    """Shape of a U-ViT.

    Attributes:
        image_size: pixels (or latent pixels) per side, a multiple of `patch_size`.
        in_channels: channels of the image; the prediction has as many.
        patch_size: pixels per token side.
        embed_dim: width D, even, a multiple of `num_heads`.
        depth: encoder and decoder blocks together, even; the middle block comes on top.
        num_heads: attention heads.
        mlp_ratio: inner width of the MLP over D.
        qkv_bias: bias in the fused q, k, v projection; off in every released model.
        mlp_time_embed: pass the time sinusoid through a two-layer MLP; off in every released model.
        num_classes: classes K of a class-conditional model; labels are 0..K-1.
        null_class: one more row in the label embedding, index K: the null label of guidance.
        context_dim: width of the text features of a text-conditional model.
        context_tokens: number of text tokens.
        conv: 3x3 convolution after unpatchifying; off in the ImageNet H models.
    """

    image_size: int
    in_channels: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    num_classes: int | None = None
    null_class: bool = False
    context_dim: int | None = None
    context_tokens: int | None = None
    conv: bool = True

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("num_classes", "context_dim", "context_tokens"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name}={value} must be positive; leave it null to do without")
        _require(
            self.depth % 2 == 0, f"depth={self.depth} must be even: half encoder, half decoder, a middle block on top"
        )
        _require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}",
        )
        _require(self.embed_dim % 2 == 0, f"embed_dim={self.embed_dim} must be even: half cosines, half sines of time")
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}",
        )
        _require(
            (self.context_dim is None) == (self.context_tokens is None),
            f"context_dim={self.context_dim} and context_tokens={self.context_tokens} must be given together",
        )
        _require(
            self.num_classes is None or self.context_dim is None,
            f"num_classes={self.num_classes} and context_dim={self.context_dim} exclude each other; keep one condition",
        )
        _require(
            not self.null_class or self.num_classes is not None,
            f"null_class={self.null_class} needs num_classes, which is {self.num_classes}",
        )

    @property
    def label_rows(self) -> int:
        """Rows of the label embedding: K, and one more with a null class."""
        return (self.num_classes or 0) + int(self.null_class)

    @property
    def extras(self) -> int:
        """Tokens before the image patches: time, and a label or the text."""
        return 1 + (self.num_classes is not None) + (self.context_tokens or 0)

    def shrunk(self) -> UViTConfig:
        """The same network, only narrower (four channels per head): depth, patches, image and conditioning stay."""
        return replace(self, embed_dim=min(self.embed_dim, 4 * self.num_heads))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"U-ViT: {message}")


class UViTBlock(nn.Module):
    """Pre-norm transformer block over all tokens [n, extras + L, D]; a decoder block first merges its long skip."""

    def __init__(self, config: UViTConfig, merges_skip: bool) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.num_heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if merges_skip else None

    def merge(self, hidden: Tensor, skip: Tensor | None) -> Tensor:
        """Concatenate the skip behind the main branch and project back to D; all that bypass leaves of a block."""
        if self.skip_linear is None or skip is None:
            return hidden
        merged: Tensor = self.skip_linear(torch.cat([hidden, skip], dim=-1))
        return merged

    def forward(
        self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None = None, slot: Slot = NO_SLOT
    ) -> Tensor:
        """`cond` is empty in a U-ViT: conditions are tokens of `hidden`."""
        hidden = self.merge(hidden, skip)
        hidden = hidden + self.attn(self.norm1(hidden), slot)
        return hidden + self.mlp(self.norm2(hidden))


class UViT(Backbone):
    """The U-ViT as a passive list of blocks: encoder, middle, decoder. It can be read out after every one of them."""

    Config = UViTConfig

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.in_channels = self.out_channels = config.in_channels
        self.image_size = config.image_size
        self.num_classes = config.num_classes
        self.cond_kind = "class" if config.num_classes else "text" if config.context_dim else "none"

        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, dim)
        self.time_embed: nn.Module = nn.Identity()
        if config.mlp_time_embed:
            self.time_embed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        if self.cond_kind == "class":
            self.label_emb = nn.Embedding(config.label_rows, dim)
        if config.context_dim is not None:
            self.context_embed = nn.Linear(config.context_dim, dim)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, config.extras + num_patches, dim))

        half = config.depth // 2
        self.in_blocks = nn.ModuleList(UViTBlock(config, merges_skip=False) for _ in range(half))
        self.mid_block = UViTBlock(config, merges_skip=False)
        self.out_blocks = nn.ModuleList(UViTBlock(config, merges_skip=True) for _ in range(half))
        self.paths = (tuple(range(config.depth + 1)),)
        self.pushes = frozenset(range(half))
        self.pops = frozenset(range(half + 1, config.depth + 1))

        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * config.in_channels)
        self.final_layer: nn.Module = nn.Identity()
        if config.conv:
            self.final_layer = nn.Conv2d(config.in_channels, config.in_channels, 3, padding=1)

        # Not part of the weights: no official file has it.
        self.register_buffer("null_context", None, persistent=False)
        self.null_context: Tensor | None
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    # A property, not a second container: each block has one name in the state dict, the official one.
    @property
    def blocks(self) -> list[UViTBlock]:
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def exits(self, path: int = 0) -> tuple[int, ...]:
        """Every depth: all blocks have one width and share the readout."""
        return tuple(range(1, self.num_blocks(path) + 1))

    def readable(self, path: int = 0, *, own: bool = False) -> tuple[int, ...]:
        """The embedded image too has the readout's width."""
        return (0, *self.exits(path))

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        """Tokens in the official order: [label, time, patches], [time, patches], or [time, text, patches].

        Args:
            x: images [n, C, H, W].
            time: [n], the value the network is fed (raw: the sinusoid has no scale of its own).
            cond: labels int64 [n] in 0..num_classes-1, or num_classes for the null class; text [n, L, D]; or None.

        Raises:
            UsageError: shapes or kinds that the network does not take. Label values are not looked at: that would wait
                for the device.
        """
        self._check(x, time, cond)
        patches = self.patch_embed(x)
        # In fp32 under autocast, as the parameters are; a network cast as a whole takes the time in its own precision.
        moment = self.time_embed(self.time_features(time).to(self.pos_embed.dtype))[:, None]
        if self.cond_kind == "class":
            tokens = [self.label_emb(cond)[:, None], moment, patches]
        elif self.cond_kind == "text":
            tokens = [moment, self.context_embed(cond), patches]
        else:
            tokens = [moment, patches]
        return Stream(torch.cat(tokens, dim=1) + self.pos_embed, time, Rows(x.shape[0]))

    def _check(self, x: Tensor, time: Tensor, cond: Tensor | None) -> None:
        size = self.image_size
        fits = x.dim() == 4 and x.shape[1:] == (self.in_channels, size, size)
        _require(fits, f"images must be [n, {self.in_channels}, {size}, {size}], got {list(x.shape)}")
        n = x.shape[0]
        _require(time.shape == (n,), f"time must be [{n}], one value per image, got {list(time.shape)}")
        if cond is None:
            _require(self.cond_kind == "none", f"this network needs {self.cond_kind} conditioning, got none")
            return
        _require(
            self.cond_kind != "none", f"this network is unconditional, got conditioning of shape {list(cond.shape)}"
        )
        if self.cond_kind == "class":
            fits = cond.shape == (n,) and cond.dtype in (torch.int64, torch.int32)
            _require(fits, f"labels must be integers [{n}], got {cond.dtype} {list(cond.shape)}")
        else:
            text = [n, self.config.context_tokens, self.config.context_dim]
            _require(list(cond.shape) == text, f"text features must be {text}, got {list(cond.shape)}")

    def bypass(self, block: int, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        """A dropped decoder block still merges its skip; the others vanish."""
        return self.blocks[block].merge(hidden, skip)

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        """Shared by all depths: norm, linear to p*p*C, image tokens only, unpatchify, convolution."""
        return self._to_image(self._pixels(hidden), depth)

    def readout_key(self, depth: int, path: int = 0) -> Hashable:
        """One head serves every depth."""
        return path

    def readouts(
        self, hiddens: Sequence[Tensor], cond: dict[str, Tensor], depths: Sequence[int], path: int = 0
    ) -> list[Tensor]:
        """All depths at once: the wide states are normed and projected where they lie, and only the narrow results are
        stacked, for one unpatchify and one convolution. No hidden state is copied."""
        if not hiddens:
            return []
        stacked = torch.cat([self._pixels(hidden) for hidden in hiddens])
        return list(self._to_image(stacked, depths[-1]).split([hidden.shape[0] for hidden in hiddens]))

    def readout_modules(self, depth: int, path: int = 0) -> nn.Module:
        return nn.ModuleDict({"norm": self.norm, "decoder_pred": self.decoder_pred, "final_layer": self.final_layer})

    def readout_with(
        self, head: nn.Module, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0
    ) -> Tensor:
        assert isinstance(head, nn.ModuleDict)
        pixels = head["decoder_pred"](head["norm"](hidden))[:, self.config.extras :]
        image: Tensor = head["final_layer"](self.assemble(pixels, self.out_channels, depth))
        return image

    def _pixels(self, hidden: Tensor) -> Tensor:
        """[n, extras + L, D] to the pixels of the image tokens, [n, L, p*p*C]."""
        pixels: Tensor = self.decoder_pred(self.norm(hidden))
        return pixels[:, self.config.extras :]

    def _to_image(self, pixels: Tensor, depth: int) -> Tensor:
        image: Tensor = self.final_layer(self.assemble(pixels, self.out_channels, depth))
        return image

    def tokens(self, hidden: Tensor, depth: int, path: int = 0) -> Tensor:
        return hidden[:, self.config.extras :]

    def width(self, depth: int, path: int = 0) -> int:
        return self.config.embed_dim

    def patch(self, depth: int, path: int = 0) -> int:
        return self.config.patch_size

    @property
    def time_width(self) -> int:
        return self.config.embed_dim

    def time_features(self, time: Tensor) -> Tensor:
        """The sinusoid of the time token, before its (usually absent) MLP; fp32 [n, D]."""
        return sinusoid(time, self.config.embed_dim)

    def set_null_context(self, context: Tensor) -> None:
        """Text features [L, D] of the empty string: the null condition of a text model. No weight: set it when loaded.

        Raises:
            UsageError: the model takes no text, or text of another shape.
        """
        wanted = [self.config.context_tokens, self.config.context_dim]
        _require(
            self.cond_kind == "text", f"a null context needs a text model; this one has cond_kind={self.cond_kind}"
        )
        _require(list(context.shape) == wanted, f"the null context must be {wanted}, got {list(context.shape)}")
        self.null_context = context.detach().to(self.pos_embed.device)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        """Label K of a network with a null class, or the text features given to `set_null_context`."""
        if self.cond_kind == "class" and self.config.null_class:
            return torch.full((num_rows,), self.config.num_classes or 0, dtype=torch.int64, device=device)
        if self.cond_kind == "class":
            raise UsageError(
                f"guidance needs a null label; this U-ViT has null_class=false and only its {self.num_classes} classes"
            )
        if self.cond_kind == "text":
            if self.null_context is None:
                raise UsageError(
                    "guidance of a text model needs the features of the empty string; give them to set_null_context"
                )
            return self.null_context.to(device).expand(num_rows, -1, -1)
        return super().null_cond(num_rows, device)

    def example_cond(self, num_rows: int, device: torch.device | str = "meta") -> Tensor | None:
        if self.config.context_tokens is not None and self.config.context_dim is not None:
            return torch.zeros(num_rows, self.config.context_tokens, self.config.context_dim, device=device)
        return super().example_cond(num_rows, device)
