"""The U-Nets of Score SDE and EDM (DDPM++, NCSN++), with one decoder or one for each stage of the noise level.

Shapes and names are those of the official EDM networks (arXiv 2206.00364). With several decoders (multi-stage
diffusion, arXiv 2312.09181) the encoder is shared, and a row takes the decoder of its own noise level: path k is the
encoder and decoder k, stage 0 next to the data. The middle blocks stand in each decoder, at the encoder's width, as in
the EDM variant of that paper, or belong to the shared half, as in its VP variant. One decoder of the encoder's width is
the plain network, bit for bit. By itself it can be read out at full depth only; heads of exits can be set behind
every decoder level (`backbones.unet_exits`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.backbones.staging import StageRouter
from gearshift.backbones.unet_blocks import SMALL, BlockStyle, PyramidBlock, UNetBlock, group_norm
from gearshift.backbones.unet_config import UNetConfig, require
from gearshift.backbones.unet_exits import DecoderLevels, Level
from gearshift.backbones.unet_norm import normed
from gearshift.execution.stream import Rows, Skip, Stream
from gearshift.runtime.errors import UsageError

FOURIER_SCALE = 16.0
EMB_MULT = 4
"""Width of the embedding over `model_channels`."""


class Fourier(nn.Module):
    """Fixed random frequencies; a buffer of the state dict."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * FOURIER_SCALE)


class UNet(DecoderLevels):
    """The U-Net as a passive list of blocks: encoder, middle, decoder."""

    Config = UNetConfig
    first_weights = SMALL

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = self.out_channels = config.in_channels
        self.image_size = config.image_size
        self.num_classes = config.num_classes
        self.cond_kind = "class" if config.num_classes else "none"
        self.augment_dim = config.augment_dim
        self.boundaries = config.boundaries
        self._router = StageRouter(config.boundaries)

        emb, noise = config.model_channels * EMB_MULT, config.noise_channels
        if config.embedding == "fourier":
            self.map_noise = Fourier(noise)
        if config.num_classes is not None:
            self.map_label = nn.Linear(config.num_classes, noise)
        if config.augment_dim:
            self.map_augment = nn.Linear(config.augment_dim, noise, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)

        taps = config.resample_filter
        self._style = BlockStyle(emb, config.max_groups, config.num_heads, config.dropout, taps, config.nin)
        # Held in a tuple, so that the state dict has each block once, under its official name.
        self._blocks: tuple[UNetBlock | PyramidBlock, ...] = ()
        self.enc = nn.ModuleDict()
        skips, width, shared = self._build_encoder()
        self.dec: nn.ModuleDict | None = None
        self.decs: nn.ModuleList | None = None
        if config.decoders:
            self.decs = nn.ModuleList(nn.ModuleDict() for _ in config.decoders)
        else:
            self.dec = nn.ModuleDict()
        paths, levels = [], []
        self.pops: frozenset[int] = frozenset()
        for stage, base in enumerate(config.decoders or (config.model_channels,)):
            own, ends = self._build_decoder(self.decoder(stage), base, skips, width)
            paths.append((*shared, *own))
            levels.append(tuple(level._replace(depth=len(shared) + level.depth) for level in ends))
        self.paths, self.levels = tuple(paths), tuple(levels)
        self._initialise()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # Construction ----------------------------------------------------------------------------------------------------

    def _add(self, modules: nn.ModuleDict, name: str, block: UNetBlock | PyramidBlock) -> int:
        """Registers a block under its official name; its index."""
        modules[name] = block
        self._blocks = (*self._blocks, block)
        return len(self._blocks) - 1

    def _build_encoder(self) -> tuple[list[int], int, list[int]]:
        """Registers what all paths share; widths of the skips in order, width at the end, and block indices."""
        config, style = self.config, self._style
        width = above = config.in_channels  # of the hidden state, and of the pyramid one level up
        skips: list[int] = []
        shared: list[int] = []
        ends: list[int] = []  # the blocks whose outputs are skips
        carried: list[int] = []
        for level, mult in enumerate(config.channel_mult):
            side = config.image_size >> level
            name = f"{side}x{side}"
            if level == 0:
                width = config.model_channels
                self.enc[f"{name}_conv"] = nn.Conv2d(config.in_channels, width, 3, padding=1)
            else:
                shared.append(self._add(self.enc, f"{name}_down", UNetBlock(width, width, style, resample="down")))
                if config.encoder == "residual":
                    pyramid = PyramidBlock(above, width, style.taps, counted=not config.nin)
                    shared.append(self._add(self.enc, f"{name}_aux_residual", pyramid))
                    carried.append(shared[-1])
                    above = width
                ends.append(shared[-1])
            skips.append(width)
            for number in range(config.num_blocks):
                attends = side in config.attention_resolutions
                block = UNetBlock(width, config.model_channels * mult, style, attention=attends)
                width = config.model_channels * mult
                shared.append(self._add(self.enc, f"{name}_block{number}", block))
                ends.append(shared[-1])
                skips.append(width)
        self.pushes = frozenset(ends)
        self.carries = dict.fromkeys(carried[:-1], "aux")  # nobody reads the last one
        if config.middle == "shared":
            shared += self._build_middle(self.enc, width)
        return skips, width, shared

    def _build_middle(self, modules: nn.ModuleDict, width: int) -> list[int]:
        side = self.config.image_size >> (len(self.config.channel_mult) - 1)
        indices = []
        for number, attends in enumerate((True, False)):
            block = UNetBlock(width, width, self._style, attention=attends)
            indices.append(self._add(modules, f"{side}x{side}_in{number}", block))
        return indices

    def _build_decoder(
        self, modules: nn.ModuleDict, base: int, skips: list[int], width: int
    ) -> tuple[list[int], list[Level]]:
        """Registers one decoder of base width `base` behind an encoder that ends at `width`; its block
        indices, and where its levels end, counted from its own first block."""
        config, style = self.config, self._style
        pending = list(skips)
        indices: list[int] = []
        levels: list[Level] = []
        pops = set()
        if config.middle == "decoder":
            indices += self._build_middle(modules, width)
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            side = config.image_size >> level
            if level < len(config.channel_mult) - 1:
                block = UNetBlock(width, width, style, resample="up")
                indices.append(self._add(modules, f"{side}x{side}_up", block))
            for number in range(config.num_blocks + 1):
                attends = number == config.num_blocks and side in config.attention_resolutions
                block = UNetBlock(width + pending.pop(), base * mult, style, attention=attends)
                width = base * mult
                indices.append(self._add(modules, f"{side}x{side}_block{number}", block))
                pops.add(indices[-1])
            levels.append(Level(len(indices), width, config.image_size // side))
        size = config.image_size
        modules[f"{size}x{size}_aux_norm"] = group_norm(width, config.max_groups)
        modules[f"{size}x{size}_aux_conv"] = nn.Conv2d(width, config.in_channels, 3, padding=1)
        self.pops = self.pops | pops
        return indices, levels

    def _initialise(self) -> None:
        """Xavier uniform, biases zero; what ends a residual branch, and the prediction, nearly zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self._blocks:
            block.initialise()
        with torch.no_grad():
            for stage in range(len(self.paths)):
                self.own_head(stage)[1].weight.mul_(SMALL)

    def decoder(self, stage: int) -> nn.ModuleDict:
        """The modules of one stage's decoder, by official name; its readout included."""
        if self.decs is not None:
            chosen = self.decs[stage]
            assert isinstance(chosen, nn.ModuleDict)
            return chosen
        assert self.dec is not None
        return self.dec

    def own_head(self, path: int) -> tuple[nn.GroupNorm, nn.Conv2d]:
        side = self.image_size
        modules = self.decoder(path)
        norm, convolution = modules[f"{side}x{side}_aux_norm"], modules[f"{side}x{side}_aux_conv"]
        assert isinstance(norm, nn.GroupNorm) and isinstance(convolution, nn.Conv2d)
        return norm, convolution

    def level_norm(self, width: int) -> nn.GroupNorm:
        return group_norm(width, self.config.max_groups)

    # The contract ----------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[UNetBlock | PyramidBlock, ...]:
        return self._blocks

    def route(self, log_snr: Tensor) -> Tensor:
        return self._router.route(log_snr)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        """The first convolution, pushed as the first long skip, and the embedding that all blocks read.

        Args:
            x: images [n, C, H, W].
            time: [n], 999 t for VP, ln(sigma)/4 for EDM: the value the process feeds.
            cond: labels int64 [n] in 0..num_classes-1, or num_classes for the null class; or None.

        Raises:
            UsageError: shapes or kinds that the network does not take. Label values are not looked at: that would wait
                for the device.
        """
        return self._embed(x, time, cond, None)

    def embed_augmented(self, x: Tensor, time: Tensor, cond: Tensor | None, augment: Tensor) -> Stream:
        require(self.augment_dim > 0, "augment_dim=0: this network takes no augmentation labels; train it without")
        wanted = [x.shape[0], self.augment_dim]
        require(list(augment.shape) == wanted, f"augmentation labels must be {wanted}, got {list(augment.shape)}")
        return self._embed(x, time, cond, augment)

    def _embed(self, x: Tensor, time: Tensor, cond: Tensor | None, augment: Tensor | None) -> Stream:
        self._check(x, time, cond)
        side, rows = self.image_size, Rows(x.shape[0])
        x = x.contiguous(memory_format=torch.channels_last)
        hidden = self.enc[f"{side}x{side}_conv"](x)
        signals = {"emb": self._embedding(time, cond, augment)}
        if self.config.encoder == "residual":
            signals["aux"] = x
        return Stream(hidden, time, rows, signals, [Skip(hidden, rows)])

    def _embedding(self, time: Tensor, cond: Tensor | None, augment: Tensor | None) -> Tensor:
        # In fp32 under autocast, as the parameters are; a network cast as a whole takes the time in its own precision.
        dtype = self.map_layer0.weight.dtype
        features = self.time_features(time).to(dtype)
        if cond is not None and self.num_classes is not None:
            known = torch.arange(self.num_classes, device=cond.device)
            one_hot = (cond[:, None] == known).to(dtype)  # label K is none of them
            features = features + self.map_label(one_hot * math.sqrt(self.num_classes))
        if augment is not None:
            features = features + self.map_augment(augment.to(dtype))
        embedded: Tensor = F.silu(self.map_layer1(F.silu(self.map_layer0(features))))
        return embedded

    def _check(self, x: Tensor, time: Tensor, cond: Tensor | None) -> None:
        wanted = (self.in_channels, self.image_size, self.image_size)
        shown = ", ".join(map(str, wanted))
        require(x.dim() == 4 and x.shape[1:] == wanted, f"images must be [n, {shown}], got {list(x.shape)}")
        n = x.shape[0]
        require(time.shape == (n,), f"time must be [{n}], one value per image, got {list(time.shape)}")
        if self.cond_kind == "none":
            require(cond is None, "this network is unconditional, but conditioning was given")
            return
        require(cond is not None, "this network needs class conditioning, got none")
        assert cond is not None
        fits = cond.shape == (n,) and cond.dtype in (torch.int64, torch.int32)
        require(fits, f"labels must be integers [{n}], got {cond.dtype} {list(cond.shape)}")

    def bypass(self, block: int, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        """A dropped block leaves its shortcut, unscaled; neither paper drops any, so this choice is the project's.

        The shortcut concatenates the popped skip, resamples and changes the width; without any of these it is the
        identity. The factor sqrt(1/2) belongs to a sum of two branches, and one of them is gone.
        """
        return self._blocks[block].shortcut(hidden, skip)

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        """Norm, SiLU and convolution of the path's decoder; at full depth only."""
        self.check_depth(depth, path)
        norm, convolution = self.own_head(path)
        image: Tensor = convolution(normed(hidden, norm, active=True))
        return image.contiguous()

    @property
    def time_width(self) -> int:
        return self.config.noise_channels

    def time_features(self, time: Tensor) -> Tensor:
        """Sines, then cosines, of the time; fp32 (float64 in a float64 network) [n, time_width].

        Positional frequencies go from 1 to 10^-4, both included; Fourier ones are the buffer's, times 2 pi.
        """
        precise = torch.promote_types(torch.float32, self.map_layer0.weight.dtype)
        if self.config.embedding == "fourier":
            rates = 2 * math.pi * self.map_noise.freqs.to(precise)
        else:
            half = self.config.noise_channels // 2
            rates = 1e-4 ** (torch.arange(half, dtype=precise, device=time.device) / (half - 1))
        angles = time.to(precise)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        """Label K of a network with a null class."""
        if self.cond_kind == "class" and self.config.null_class:
            return torch.full((num_rows,), self.config.num_classes or 0, dtype=torch.int64, device=device)
        if self.cond_kind == "class":
            raise UsageError(
                f"guidance needs a null label; this U-Net has null_class=false and only its {self.num_classes} classes"
            )
        return super().null_cond(num_rows, device)
