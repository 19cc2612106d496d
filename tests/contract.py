"""What the contract suite needs: the backbones it runs on, inputs, plain loops, scripted exit rules, random plans.

A new backbone joins the suite with one more `Case` in `CASES`: a factory of a small instance whose weights are random
(zero-initialised outputs would make every comparison trivially true).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.ldm_unet import LdmUNet, LdmUNetConfig
from gearshift.backbones.separate import SeparateConfig, SeparateNetworks
from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_config import UNetConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.backbones.uvit_decoders import MultiDecoderUViT, MultiDecoderUViTConfig
from gearshift.execution.cost import CostTable
from gearshift.execution.executor import execute
from gearshift.execution.exits import ExitView
from gearshift.execution.memory import NO_SLOT, Memory
from gearshift.execution.outputs import Event, Outputs, Packing
from gearshift.execution.plan import FULL, StepPlan
from gearshift.execution.stream import Rows

from .toys import Isotropic, LongSkips, TwoDecoders

EAGER = Packing(min_fraction=0.0)
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Case:
    """A backbone of the suite; the suite runs on each of its paths."""

    name: str
    factory: Callable[[], Backbone]


def _uvit(**conditioning: Any) -> Backbone:
    sizes = dict(image_size=8, in_channels=2, patch_size=2, embed_dim=16, depth=4, num_heads=2)
    return UViT(UViTConfig(**sizes, **conditioning))


def _dit(**settings: Any) -> Backbone:
    sizes = dict(image_size=8, in_channels=2, patch_size=2, embed_dim=16, depth=4, num_heads=2)
    return DiT(DiTConfig(**sizes, **settings))


def _separate() -> Backbone:
    networks = [_uvit(num_classes=3, null_class=True), _dit(num_classes=3, null_class=True, learned_variance=False)]
    return SeparateNetworks(SeparateConfig(networks, (1.0,)))


def _ldm(**settings: Any) -> Backbone:
    sizes = dict(image_size=8, in_channels=2, model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
    return LdmUNet(LdmUNetConfig(**sizes, attention_downsamplings=(2,), head_dim=4, num_groups=4, **settings))


def _unet(**settings: Any) -> Backbone:
    sizes = dict(image_size=8, in_channels=2, model_channels=8, channel_mult=(1, 2), num_blocks=1)
    return UNet(UNetConfig(**sizes, attention_resolutions=(4,), **settings))


def _pyramid(**settings: Any) -> Backbone:
    """Three levels, so that the pyramid is carried."""
    sizes = dict(image_size=8, in_channels=2, model_channels=8, channel_mult=(1, 1, 2), num_blocks=1)
    style = dict(attention_resolutions=(4,), encoder="residual", resample_filter=(1, 3, 3, 1))
    return UNet(UNetConfig(**sizes, **style, **settings))


def _uvit_decoders() -> Backbone:
    sizes = dict(image_size=8, in_channels=2, patch_size=2, embed_dim=16, depth=4, num_heads=2)
    return MultiDecoderUViT(MultiDecoderUViTConfig(**sizes, decoders=(24, 16, 8), boundaries=(1.0, 5.0)))


def _with_exits(backbone: Backbone, **config: Any) -> Backbone:
    return EarlyExit(ExitsConfig(**config), backbone)


CASES = [
    Case("isotropic", Isotropic),
    Case("long-skips", LongSkips),
    Case("two-decoders", TwoDecoders),
    Case("uvit-class", lambda: _uvit(num_classes=3, null_class=True)),
    Case("uvit-text", lambda: _uvit(context_dim=5, context_tokens=3, mlp_time_embed=True)),
    Case("dit-class", lambda: _dit(num_classes=3, null_class=True)),
    Case("dit-none", lambda: _dit(learned_variance=False)),
    Case("separate", _separate),
    Case("ldm-class", lambda: _ldm(num_classes=3, null_class=True)),
    Case("ldm-decoders", lambda: _ldm(decoders=(12, 4), decoder_attention=(True, False), boundaries=(2.0,))),
    Case("uvit-decoders", _uvit_decoders),
    Case("unet-class", lambda: _unet(num_classes=3, null_class=True, num_heads=2)),
    Case("unet-pyramid", lambda: _pyramid(embedding="fourier")),
    Case("unet-decoders", lambda: _unet(decoders=(12, 8, 4), boundaries=(1.0, 5.0), augment_dim=9)),
    Case("unet-shared-middle", lambda: _pyramid(decoders=(12, 4), boundaries=(2.0,), middle="shared")),
    Case("exits-isotropic", lambda: _with_exits(Isotropic(), head="per_exit")),
    Case("exits-uvit", lambda: _with_exits(_uvit(), uncertainty="token_mean", time_embed="concat", depths=[2, 4])),
    Case("exits-dit", lambda: _with_exits(_dit(num_classes=3), head="per_exit", time_embed="concat")),
    Case("exits-unet", lambda: _with_exits(_pyramid(), head="per_exit")),
    Case("exits-ldm", lambda: _with_exits(_ldm(num_classes=3, null_class=True), head="per_exit")),
    Case("exits-two-decoders", lambda: _with_exits(TwoDecoders(), head="per_exit", time_embed="concat")),
]


@functools.cache
def build(name: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """The backbone of a case, the same object and weights for every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = next(case for case in CASES if case.name == name).factory()
        for parameter in backbone.parameters():
            # Wide enough for exits, paths and reuse to differ, narrow enough for 1e-5 to hold.
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return backbone.to(dtype).eval().requires_grad_(False)


@dataclass(frozen=True)
class Subject:
    """One path of one backbone, with a batch of rows to run on."""

    case: str
    backbone: Backbone
    path: int
    x: Tensor
    time: Tensor
    cond: Tensor | None

    @classmethod
    def of(cls, name: str, path: int = 0, rows: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> Subject:
        backbone = build(name, dtype)
        generator = torch.Generator().manual_seed(seed)
        size = backbone.image_size
        x = torch.randn(rows, backbone.in_channels, size, size, generator=generator).to(dtype)
        time = torch.rand(rows, generator=generator) * 900
        return cls(name, backbone, path, x, time, example(backbone, rows, generator, dtype))

    @property
    def rows(self) -> int:
        return len(self.x)

    @property
    def exits(self) -> tuple[int, ...]:
        return self.backbone.exits(self.path)

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.backbone.paths[self.path]

    def plan(self, **fields: Any) -> StepPlan:
        """A plan on this path."""
        return StepPlan(expert=self.path, **fields) if len(self.backbone.paths) > 1 else StepPlan(**fields)

    def run(self, plan: StepPlan = FULL, memory: Memory | None = None, **options: Any) -> Outputs:
        """Execute on all rows."""
        stream = self.backbone.embed(self.x, self.time, self.cond)
        return execute(self.backbone, stream, plan, memory, **options)

    def run_some(self, index: Tensor, plan: StepPlan, memory: Memory | None = None, **options: Any) -> Outputs:
        """Execute on the rows `index` of the run only."""
        cond = None if self.cond is None else self.cond[index]
        stream = self.backbone.embed(self.x[index], self.time[index], cond)
        stream.rows = Rows(self.rows, index)
        return execute(self.backbone, stream, plan, memory, **options)

    def other(self, seed: int = 1) -> Subject:
        """The same rows with other images."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.x.shape, generator=generator).to(self.x.dtype)
        return Subject(self.case, self.backbone, self.path, x, self.time, self.cond)

    def table(self) -> CostTable:
        return cost_table(self.backbone)


@functools.cache
def cost_table(backbone: Backbone) -> CostTable:
    return CostTable.measure(backbone)


def example(backbone: Backbone, rows: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor | None:
    """Random conditioning of the backbone's kind."""
    if backbone.cond_kind == "class":
        return torch.randint(backbone.num_classes or 1, (rows,), generator=generator)
    meta = backbone.example_cond(rows)
    return None if meta is None else torch.randn(meta.shape, generator=generator).to(dtype)


def plain_loop(
    subject: Subject, depth: int | None = None, bypass: Collection[int] = (), index: Tensor | None = None
) -> Tensor:
    """The network run by hand: no executor, no memory."""
    backbone = subject.backbone
    index = torch.arange(subject.rows) if index is None else index
    cond = None if subject.cond is None else subject.cond[index]
    stream = backbone.enter(backbone.embed(subject.x[index], subject.time[index], cond), subject.path)
    hidden, skips, signals = stream.hidden, [skip.hidden for skip in stream.skips], stream.cond
    depth = len(subject.blocks) if depth is None else depth
    for block in subject.blocks[:depth]:
        skip = skips.pop() if block in backbone.pops else None
        if block in bypass:
            hidden = backbone.bypass(block, hidden, signals, skip)
        else:
            hidden = backbone.blocks[block](hidden, signals, skip, NO_SLOT)
        if block in backbone.pushes:
            skips.append(hidden)
        if block in backbone.carries:
            signals = {**signals, backbone.carries[block]: hidden}
    return backbone.readout(hidden, signals, depth, subject.path)


@dataclass(frozen=True)
class LeaveAt:
    """Row r leaves at `script[r]`; costs nothing, so it replays decisions through the rule instead of through depth."""

    script: Tensor

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return exits

    def begin(self, num_rows: int) -> None:
        return None

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        return self.script[view.rows.host()] == view.depth


@dataclass(frozen=True)
class Impatient:
    """Looks at the data and remembers: a row leaves at its second visit whose hidden state moved, or is odd enough."""

    share: float = 0.5

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return exits[:-1]

    def begin(self, num_rows: int) -> Tensor:
        return torch.zeros(num_rows, dtype=torch.int64)

    def leaves(self, view: ExitView, state: Tensor) -> Tensor:
        moved = view.previous is not None
        odd = (view.hidden.flatten(1)[:, 0].double() * 7919).frac().abs() < self.share
        state[view.rows.host()] += odd.long() + int(moved)
        return state[view.rows.host()] >= 3


def random_depths(subject: Subject, generator: torch.Generator) -> Tensor:
    """An exit for every row, host int64 [R]."""
    exits = torch.tensor(subject.exits)
    return exits[torch.randint(len(exits), (subject.rows,), generator=generator)]


def macs_per_row(table: CostTable, trace: list[Event], rows: int) -> Tensor:
    """What the trace charges each row, int64 [R]."""
    macs = torch.zeros(rows, dtype=torch.int64)
    for event in trace:
        macs[event.rows.host()] += table.of(event).macs
    return macs
