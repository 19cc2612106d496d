"""DiT: a transformer whose blocks are modulated by time and class (Peebles and Xie, arXiv 2212.09748).

Time and class make one vector c, which every block and the readout turn into shifts, scales and gates (adaLN-Zero).
Names of parameters are those of the official repository, so released weights load strictly. All blocks have one width,
so the one final layer can read out after every block, as in ASE (arXiv 2408.05927).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gearshift.backbones.attention import Attention
from gearshift.backbones.base import Backbone
from gearshift.backbones.layers import Mlp, PatchEmbed, sincos_positions, sinusoid
from gearshift.execution.memory import NO_SLOT, Slot
from gearshift.execution.stream import Rows, Stream
from gearshift.runtime.errors import UsageError

TIME_FEATURES = 256
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """Shape of a DiT.

    Attributes:
        image_size: pixels (or latent pixels) per side, a multiple of `patch_size`.
        in_channels: channels C of the image.
        patch_size: pixels per token side.
        embed_dim: width D, a multiple of four and of `num_heads`.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: inner width of the MLP over D.
        learned_variance: predict C variance channels after the C noise channels, as in every released model.
        num_classes: classes K of a class-conditional model; labels are 0..K-1.
        null_class: one more row in the label table, index K: the null label of guidance.
    """

    image_size: int
    in_channels: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    learned_variance: bool = True
    num_classes: int | None = None
    null_class: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        _require(
            self.num_classes is None or self.num_classes > 0,
            f"num_classes={self.num_classes} must be positive; leave it null to do without",
        )
        _require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}",
        )
        _require(
            self.embed_dim % 4 == 0,
            f"embed_dim={self.embed_dim} must be a multiple of 4: sines and cosines of two coordinates",
        )
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}",
        )
        _require(
            not self.null_class or self.num_classes is not None,
            f"null_class={self.null_class} needs num_classes, which is {self.num_classes}",
        )

    @property
    def side(self) -> int:
        """Tokens per side."""
        return self.image_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: C, or 2C with a learned variance."""
        return self.in_channels * (1 + self.learned_variance)

    @property
    def label_rows(self) -> int:
        """Rows of the label table: K, and one more with a null class."""
        return (self.num_classes or 0) + int(self.null_class)

    def shrunk(self) -> DiTConfig:
        """The same network, only narrower (four channels per head): depth, patches, image and conditioning stay."""
        return replace(self, embed_dim=min(self.embed_dim, 4 * self.num_heads))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"DiT: {message}")


def _modulated(norm: nn.LayerNorm, hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(hidden) (1 + scale) + shift; hidden [n, N, D], shift and scale [n, 1, D]."""
    normed: Tensor = norm(hidden)
    return normed * (1 + scale) + shift


def _modulation(dim: int, parts: int) -> nn.Sequential:
    """SiLU and linear: c [n, D] to `parts` vectors side by side, [n, parts * D]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class TimeEmbedder(nn.Module):
    """Features [n, 256] of the time to [n, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.mlp(features)
        return embedded


class LabelEmbedder(nn.Module):
    """Labels int64 [n] to [n, D]. Dropping labels in training is the objective's part."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, labels: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(labels)
        return embedded


class DiTBlock(nn.Module):
    """Attention and MLP over tokens [n, N, D], each shifted, scaled and gated by c."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.attn = Attention(dim, config.num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), approximate="tanh")
        self.adaLN_modulation = _modulation(dim, 6)

    def forward(
        self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None = None, slot: Slot = NO_SLOT
    ) -> Tensor:
        """`cond["c"]` is [n, D]; there are no long skips."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond["c"])[:, None].chunk(6, dim=-1)
        hidden = hidden + gate1 * self.attn(_modulated(self.norm1, hidden, shift1, scale1), slot)
        output: Tensor = hidden + gate2 * self.mlp(_modulated(self.norm2, hidden, shift2, scale2))
        return output


class FinalLayer(nn.Module):
    """The readout: tokens [n, N, D] to their pixels [n, N, features], shifted and scaled by c."""

    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, features)
        self.adaLN_modulation = _modulation(dim, 2)

    def forward(self, hiddens: Sequence[Tensor], c: Tensor) -> Tensor:
        """Several states of the same rows, modulated alike; their pixels one after another, [len * n, N, features]."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return torch.cat([self.linear(_modulated(self.norm_final, hidden, shift, scale)) for hidden in hiddens])


class DiT(Backbone):
    """The DiT as a passive list of blocks. It can be read out after every one of them."""

    Config = DiTConfig
    pos_embed: nn.Parameter

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.image_size = config.image_size
        self.num_classes = config.num_classes
        self.cond_kind = "class" if config.num_classes else "none"

        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, dim)
        self.t_embedder = TimeEmbedder(dim)
        if self.cond_kind == "class":
            self.y_embedder = LabelEmbedder(config.label_rows, dim)
        # Fixed, but a parameter: official files hold it.
        self.pos_embed = nn.Parameter(sincos_positions(dim, config.side, config.side), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, config.patch_size**2 * config.out_channels)
        self.paths = (tuple(range(config.depth)),)
        self._initialise()

    def _initialise(self) -> None:
        """Every modulation and the last linear start at zero: each block is the identity, and the prediction zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.flatten(1))
        assert patches.bias is not None
        nn.init.zeros_(patches.bias)
        if self.cond_kind == "class":
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.02)
        modulations = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in (*modulations, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def exits(self, path: int = 0) -> tuple[int, ...]:
        """Every depth: all blocks have one width and share the readout."""
        return tuple(range(1, self.num_blocks(path) + 1))

    def readable(self, path: int = 0, *, own: bool = False) -> tuple[int, ...]:
        """The embedded image too has the readout's width."""
        return (0, *self.exits(path))

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        """Patches with their positions; c, the sum of time and label embedding, is made once per call.

        Args:
            x: images or latents [n, C, H, W].
            time: [n], the training index 0..999 in released models; fractions are allowed.
            cond: labels int64 [n] in 0..num_classes-1, or num_classes for the null class; or None.

        Raises:
            UsageError: shapes or kinds that the network does not take. Label values are not looked at: that would wait
                for the device.
        """
        self._check(x, time, cond)
        # In fp32 under autocast, as the parameters are; a network cast as a whole takes the time in its own precision.
        c = self.t_embedder(self.time_features(time).to(self.pos_embed.dtype))
        if self.cond_kind == "class":
            c = c + self.y_embedder(cond)
        return Stream(self.x_embedder(x) + self.pos_embed, time, Rows(x.shape[0]), {"c": c})

    def _check(self, x: Tensor, time: Tensor, cond: Tensor | None) -> None:
        wanted = (self.in_channels, self.image_size, self.image_size)
        shown = ", ".join(map(str, wanted))
        _require(x.dim() == 4 and x.shape[1:] == wanted, f"images must be [n, {shown}], got {list(x.shape)}")
        n = x.shape[0]
        _require(time.shape == (n,), f"time must be [{n}], one value per image, got {list(time.shape)}")
        if self.cond_kind == "none":
            _require(cond is None, "this network is unconditional, but conditioning was given")
            return
        _require(cond is not None, "this network needs class conditioning, got none")
        assert cond is not None
        fits = cond.shape == (n,) and cond.dtype in (torch.int64, torch.int32)
        _require(fits, f"labels must be integers [{n}], got {cond.dtype} {list(cond.shape)}")

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        """Shared by all depths: norm, modulation, linear to p*p*channels, unpatchify."""
        return self.readout_with(self.final_layer, hidden, cond, depth, path)

    def readout_key(self, depth: int, path: int = 0) -> Hashable:
        """One head serves every depth."""
        return path

    def readouts(
        self, hiddens: Sequence[Tensor], cond: dict[str, Tensor], depths: Sequence[int], path: int = 0
    ) -> list[Tensor]:
        """All depths at once: one modulation, and the narrow results are stacked, not the wide states."""
        if not hiddens:
            return []
        images = self.assemble(self.final_layer(hiddens, cond["c"]), self.out_channels, depths[-1])
        return list(images.split([hidden.shape[0] for hidden in hiddens]))

    def readout_modules(self, depth: int, path: int = 0) -> nn.Module:
        return self.final_layer

    def readout_with(
        self, head: nn.Module, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0
    ) -> Tensor:
        return self.assemble(head([hidden], cond["c"]), self.out_channels, depth)

    def tokens(self, hidden: Tensor, depth: int, path: int = 0) -> Tensor:
        return hidden

    def width(self, depth: int, path: int = 0) -> int:
        return self.config.embed_dim

    def patch(self, depth: int, path: int = 0) -> int:
        return self.config.patch_size

    @property
    def time_width(self) -> int:
        return TIME_FEATURES

    def time_features(self, time: Tensor) -> Tensor:
        """The sinusoid before the time MLP: cosines first; fp32 [n, 256]."""
        return sinusoid(time, TIME_FEATURES)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        """Label K of a network with a null class."""
        if self.cond_kind == "class" and self.config.null_class:
            return torch.full((num_rows,), self.config.num_classes or 0, dtype=torch.int64, device=device)
        if self.cond_kind == "class":
            raise UsageError(
                f"guidance needs a null label; this DiT has null_class=false and only its {self.num_classes} classes"
            )
        return super().null_cond(num_rows, device)
