"""Three small backbones: an isotropic stack, one with long skips, and a two-resolution U-Net with two decoders.

Each also has a `forward` written as one would write the network without gearshift; the contract suite compares with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.backbones.attention import Attention
from gearshift.backbones.base import Backbone
from gearshift.backbones.layers import Mlp, PatchEmbed, sinusoid
from gearshift.execution.memory import NO_SLOT, Slot
from gearshift.execution.stream import Rows, Stream


class ConditionedBlock(nn.Module):
    """Attention and MLP, each shifted and scaled by the conditioning vector, as in DiT."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = Attention(dim, heads, qkv_bias=True)
        self.mlp = Mlp(dim, 2 * dim)
        self.modulation = nn.Linear(dim, 4 * dim)

    def forward(
        self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None = None, slot: Slot = NO_SLOT
    ) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(cond["vector"]))[:, None].chunk(4, dim=-1)
        hidden = hidden + self.attn(self.norm(hidden) * (1 + scale1) + shift1, slot)
        return hidden + self.mlp(self.norm(hidden) * (1 + scale2) + shift2)


class Isotropic(Backbone):
    """Class-conditional stack with one head for all depths; time and label reach blocks and head through `cond`."""

    def __init__(self, depth: int = 4, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.dim, self.patch_size = dim, 2
        self.in_channels = self.out_channels = 2
        self.image_size = 8
        self.cond_kind, self.num_classes = "class", 3
        self.patches = PatchEmbed(2, 2, dim)
        self.position = nn.Parameter(torch.randn(1, 16, dim))
        self.label = nn.Embedding(4, dim)
        self.blocks = nn.ModuleList(ConditionedBlock(dim, heads) for _ in range(depth))
        self.paths = (tuple(range(depth)),)
        self.head = nn.ModuleDict({"shift": nn.Linear(dim, dim), "out": nn.Linear(dim, 2 * 2 * 2)})

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return tuple(range(1, len(self.blocks) + 1))

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        vector = self.time_features(time).to(self.position.dtype) + self.label(cond)
        return Stream(self.patches(x) + self.position, time, Rows(len(x)), {"vector": vector})

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        return self.readout_with(self.head, hidden, cond, depth, path)

    def readout_modules(self, depth: int, path: int = 0) -> nn.Module:
        return self.head

    def readout_with(
        self, head: nn.Module, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0
    ) -> Tensor:
        assert isinstance(head, nn.ModuleDict)
        return self.assemble(head["out"](hidden + head["shift"](cond["vector"])[:, None]), 2, depth)

    def tokens(self, hidden: Tensor, depth: int, path: int = 0) -> Tensor:
        return hidden

    def width(self, depth: int, path: int = 0) -> int:
        return self.dim

    def patch(self, depth: int, path: int = 0) -> int:
        return self.patch_size

    @property
    def time_width(self) -> int:
        return self.dim

    def time_features(self, time: Tensor) -> Tensor:
        return sinusoid(time, self.dim)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        return torch.full((num_rows,), 3, dtype=torch.int64, device=device)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None, path: int = 0) -> Tensor:
        vector = sinusoid(time, self.dim).to(self.position.dtype) + self.label(cond)
        hidden = self.patches(x) + self.position
        for block in self.blocks:
            hidden = block(hidden, {"vector": vector})
        return self.readout(hidden, {"vector": vector}, len(self.blocks))


class SkipBlock(nn.Module):
    """Attention and MLP over tokens; a decoder block first merges its long skip."""

    def __init__(self, dim: int, heads: int, merges: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.mlp = Mlp(dim, dim)
        self.merge = nn.Linear(2 * dim, dim) if merges else None

    def entry(self, hidden: Tensor, skip: Tensor | None) -> Tensor:
        if self.merge is None or skip is None:
            return hidden
        merged: Tensor = self.merge(torch.cat([hidden, skip], dim=-1))
        return merged

    def forward(
        self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None = None, slot: Slot = NO_SLOT
    ) -> Tensor:
        hidden = self.entry(hidden, skip)
        hidden = hidden + self.attn(self.norm(hidden), slot)
        return hidden + self.mlp(self.norm(hidden))


class LongSkips(Backbone):
    """Unconditional, U-ViT-like: two encoder blocks, a middle, two decoder blocks; time is a token; variance channels.

    It can be read out from the middle on.
    """

    def __init__(self, half: int = 2, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.half, self.dim = half, dim
        self.in_channels, self.out_channels, self.image_size = 1, 2, 6
        self.patches = PatchEmbed(2, 1, dim)
        self.encoder = nn.ModuleList(SkipBlock(dim, heads, merges=False) for _ in range(half + 1))
        self.decoder = nn.ModuleList(SkipBlock(dim, heads, merges=True) for _ in range(half))
        self.paths = (tuple(range(2 * half + 1)),)
        self.pushes, self.pops = frozenset(range(half)), frozenset(range(half + 1, 2 * half + 1))
        self.head = nn.Linear(dim, 2 * 2 * 2)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        return (*self.encoder, *self.decoder)

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return tuple(range(self.half + 1, 2 * self.half + 2))

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        moment = sinusoid(time, self.dim).to(self.head.weight.dtype)[:, None]
        return Stream(torch.cat([moment, self.patches(x)], dim=1), time, Rows(len(x)))

    def bypass(self, block: int, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        module = self.blocks[block]
        assert isinstance(module, SkipBlock)
        return module.entry(hidden, skip)

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        return self.readout_with(self.head, hidden, cond, depth, path)

    def readouts(
        self, hiddens: Sequence[Tensor], cond: dict[str, Tensor], depths: Sequence[int], path: int = 0
    ) -> list[Tensor]:
        return list(self.readout(torch.cat(list(hiddens)), cond, depths[-1], path).split([len(h) for h in hiddens]))

    def readout_modules(self, depth: int, path: int = 0) -> nn.Module:
        return self.head

    def readout_with(
        self, head: nn.Module, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0
    ) -> Tensor:
        return self.assemble(head(hidden[:, 1:]), 2, depth)

    def tokens(self, hidden: Tensor, depth: int, path: int = 0) -> Tensor:
        return hidden[:, 1:]

    def width(self, depth: int, path: int = 0) -> int:
        return self.dim

    def patch(self, depth: int, path: int = 0) -> int:
        return 2

    @property
    def time_width(self) -> int:
        return self.dim

    def time_features(self, time: Tensor) -> Tensor:
        return sinusoid(time, self.dim)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None, path: int = 0) -> Tensor:
        moment = sinusoid(time, self.dim).to(self.head.weight.dtype)[:, None]
        hidden = torch.cat([moment, self.patches(x)], dim=1)
        skips = []
        for block in self.encoder[:-1]:
            hidden = block(hidden, {})
            skips.append(hidden)
        hidden = self.encoder[-1](hidden, {})
        for block in self.decoder:
            hidden = block(hidden, {}, skips.pop())
        return self.readout(hidden, {}, self.num_blocks())


class ConvBlock(nn.Module):
    """An entry (resample, merge, change width), then a residual convolution with the time, then attention if asked for.

    The entry is what remains when the block is dropped, so shapes still fit.
    """

    def __init__(self, inp: int, out: int, time: int, *, resample: str = "none", skip: int = 0, heads: int = 0) -> None:
        super().__init__()
        self.resample = resample
        self.fit = nn.Conv2d(inp + skip, out, 1)
        self.conv = nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.attn = Attention(out, heads) if heads else None

    def entry(self, hidden: Tensor, skip: Tensor | None) -> Tensor:
        if self.resample == "down":
            hidden = F.avg_pool2d(hidden, 2)
        elif self.resample == "up":
            hidden = F.interpolate(hidden, scale_factor=2.0)
        fitted: Tensor = self.fit(hidden if skip is None else torch.cat([hidden, skip], dim=1))
        return fitted

    def forward(
        self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None = None, slot: Slot = NO_SLOT
    ) -> Tensor:
        hidden = self.entry(hidden, skip)
        hidden = hidden + F.silu(self.conv(hidden) + self.time(cond["time"])[:, :, None, None])
        if self.attn is not None:
            tokens = hidden.flatten(2).transpose(1, 2)
            hidden = hidden + self.attn(tokens, slot.scope("self")).transpose(1, 2).reshape(hidden.shape)
        return hidden


class TwoDecoders(Backbone):
    """U-Net of two resolutions with a shared encoder and two decoders of different width and length.

    Blocks 0-2 are the encoder; path 0 (low noise) goes on with 3-5, path 1 (high noise) with 6-9. Every exit has a
    readout of its own: both paths at the end of the encoder and at their decoder levels, path 1 inside the encoder too.
    """

    def __init__(self, wide: int = 12, narrow: int = 8, enc: int = 8) -> None:
        super().__init__()
        self.in_channels = self.out_channels = 3
        self.image_size, self.time_dim = 8, 8
        t = self.time_dim
        self.stem = nn.Conv2d(3, enc, 3, padding=1)
        self.blocks = nn.ModuleList(
            [
                ConvBlock(enc, enc, t),  # 0: 8x8, pushed
                ConvBlock(enc, enc, t, resample="down"),  # 1: 4x4, pushed
                ConvBlock(enc, enc, t, heads=2),  # 2: 4x4, the shared part ends here
                ConvBlock(enc, narrow, t, skip=enc),  # 3: 4x4
                ConvBlock(narrow, narrow, t, resample="up", skip=enc),  # 4: 8x8
                ConvBlock(narrow, narrow, t),  # 5: 8x8
                ConvBlock(enc, wide, t, skip=enc, heads=3),  # 6: 4x4
                ConvBlock(wide, wide, t),  # 7: 4x4
                ConvBlock(wide, wide, t, resample="up", skip=enc),  # 8: 8x8
                ConvBlock(wide, wide, t, heads=2),  # 9: 8x8
            ]
        )
        self.pushes, self.pops = frozenset({0, 1}), frozenset({3, 4, 6, 8})
        self.paths = ((0, 1, 2, 3, 4, 5), (0, 1, 2, 6, 7, 8, 9))
        self._exits = ((3, 4, 6), (2, 3, 5, 7))
        self._width = {
            **{(0, d): w for d, w in zip(range(1, 7), (enc, enc, enc, narrow, narrow, narrow), strict=True)},
            **{(1, d): w for d, w in zip(range(1, 8), (enc, enc, enc, wide, wide, wide, wide), strict=True)},
        }
        self.heads = nn.ModuleDict()
        for path, depths in enumerate(self._exits):
            for depth in depths:
                p = self.patch(depth, path)
                self.heads[f"{path}_{depth}"] = nn.Linear(self.width(depth, path), p * p * 3)

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return self._exits[path]

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        moment = sinusoid(time, self.time_dim).to(self.stem.weight.dtype)
        return Stream(self.stem(x), time, Rows(len(x)), {"time": moment})

    def bypass(self, block: int, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        module = self.blocks[block]
        assert isinstance(module, ConvBlock)
        return module.entry(hidden, skip)

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        return self.readout_with(self.heads[f"{path}_{depth}"], hidden, cond, depth, path)

    def readout_modules(self, depth: int, path: int = 0) -> nn.Module:
        return self.heads[f"{path}_{depth}"]

    def readout_with(
        self, head: nn.Module, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0
    ) -> Tensor:
        return self.assemble(head(self.tokens(hidden, depth, path)), 3, depth, path)

    def tokens(self, hidden: Tensor, depth: int, path: int = 0) -> Tensor:
        return hidden.flatten(2).transpose(1, 2)

    def width(self, depth: int, path: int = 0) -> int:
        return self._width[path, depth]

    def patch(self, depth: int, path: int = 0) -> int:
        full = {0: (1, 5, 6), 1: (1, 6, 7)}[path]
        return 1 if depth in full else 2

    @property
    def time_width(self) -> int:
        return self.time_dim

    def time_features(self, time: Tensor) -> Tensor:
        return sinusoid(time, self.time_dim)

    def route(self, log_snr: Tensor) -> Tensor:
        return (log_snr < 0).long()

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None, path: int = 0) -> Tensor:
        c = {"time": sinusoid(time, self.time_dim).to(self.stem.weight.dtype)}
        b = self.blocks
        high = b[0](self.stem(x), c)
        low = b[1](high, c)
        hidden = b[2](low, c)
        if path == 0:
            hidden = b[5](b[4](b[3](hidden, c, low), c, high), c)
        else:
            hidden = b[9](b[8](b[7](b[6](hidden, c, low), c), c, high), c)
        return self.readout(hidden, c, self.num_blocks(path), path)
