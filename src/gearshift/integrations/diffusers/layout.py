"""A model of `diffusers` as a list of blocks, so that policies can speak of it as of our own networks.

U-Nets: a block is a layer of a stage (its ResNet, with the attention that follows it), a down- or upsampler, or the
whole middle; each has the long skips of the model, so deep features can be cut where a long skip is merged. In
transformers a block is a block. What comes before and after is the embedding and the readout.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.execution.cost import CostTable
from gearshift.execution.memory import Key
from gearshift.execution.parts import Shapes, declare
from gearshift.execution.plan import KINDS, PARTS
from gearshift.integrations.diffusers.attention import gives
from gearshift.integrations.diffusers.compat import Passed
from gearshift.runtime.errors import RunError, UsageError

CUT = [
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "AttnDownBlock2D",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    "AttnUpBlock2D",
    "DownBlock3D",
    "CrossAttnDownBlock3D",
    "UpBlock3D",
    "CrossAttnUpBlock3D",
    "DownBlockMotion",
    "CrossAttnDownBlockMotion",
    "UpBlockMotion",
    "CrossAttnUpBlockMotion",
    "DownBlockSpatioTemporal",
    "CrossAttnDownBlockSpatioTemporal",
    "UpBlockSpatioTemporal",
    "CrossAttnUpBlockSpatioTemporal",
]
"""Stages of U-Nets that run their layers one after the other, each with a long skip."""
LAYERS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")
"""Lists of modules in a stage, in the order in which a layer runs them."""
TRANSFORMERS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
"""Lists of blocks in a transformer, in the order in which they run."""


@dataclass(eq=False)
class Site:
    """An attention operator: its module, and whether it is "self" or "cross" attention; `place` is its name in its
    model, which several denoisers of a pipeline may have alike."""

    name: str
    module: nn.Module
    kind: str
    place: str = ""

    def __post_init__(self) -> None:
        self.place = self.place or self.name


@dataclass(eq=False)
class Block:
    """One block of a model.

    Attributes:
        name: "down.0.1" (stage and layer), "down.0.sampler", "mid", "up.2.0", or that of the module.
        modules: in the order in which they run; the last gives the block's output.
        passed: how it is passed by, None where it cannot be.
    """

    name: str
    modules: list[nn.Module]
    passed: Passed | None = None
    sites: list[Site] = field(default_factory=list)


@dataclass(eq=False)
class Stage:
    """A module around several blocks, by their numbers, which need not be entered when none of them runs."""

    module: nn.Module
    blocks: list[int]


class PipelineNetwork:
    """The denoisers of a pipeline, seen as one network with a path through each.

    Args:
        denoisers: by the name of the component; several are used one after the other (Wan 2.2).
        boundary: noise level (sigma of flow matching) below which the second denoiser takes over.

    Attributes: see `execution.network.Network`. `has_stages` says whether it is a U-Net that can be cut, `beside` are
    other models of the pipeline, which decide its images too, `table` what its blocks cost, once that was measured.
    """

    carries: Mapping[int, str] = {}
    has_uncertainty = False
    takes_exit_rules = False  # the models of a pipeline run as a whole

    def __init__(self, denoisers: Mapping[str, Any], boundary: float | None = None) -> None:
        self.denoisers = dict(denoisers)
        self.boundary = boundary
        self.table: CostTable | None = None
        self.beside: Mapping[str, nn.Module] = {}
        self.blocks: list[Block] = []
        self.stages: list[Stage] = []
        pushes: set[int] = set()
        pops: set[int] = set()
        paths = []
        for name, model in self.denoisers.items():
            start = len(self.blocks)
            prefix = f"{name}." if len(self.denoisers) > 1 else ""
            found = list(blocks_of(model))
            for block, _ in found:
                block.name = prefix + block.name
                for site in block.sites:
                    site.name = prefix + site.name
            self.blocks += [block for block, _ in found]
            pushes |= {start + k for k, (_, skip) in enumerate(found) if skip == "push"}
            pops |= {start + k for k, (_, skip) in enumerate(found) if skip == "pop"}
            self.stages += list(_stages(model, self.blocks, start))
            paths.append(tuple(range(start, len(self.blocks))))
        self.paths, self.pushes, self.pops = tuple(paths), frozenset(pushes), frozenset(pops)
        self.has_stages = bool(self.pops)
        first = next(iter(self.denoisers.values()))
        self.name = f"{type(first).__name__}-{_digest(self.denoisers)}"
        self.in_channels = int(first.config.get("in_channels") or 0)
        size = first.config.get("sample_size")
        self.image_size = size if isinstance(size, int) else 0
        self.sites = [site for block in self.blocks for site in block.sites]
        declare(self, self.parts())  # type: ignore[arg-type]  # it is run by its own library

    def parts(self, shapes: Mapping[str, tuple[int, int, int, int]] | None = None) -> dict[Key, Shapes]:
        """What can be taken from memory; `shapes` are tokens, source tokens, heads and width by site, if known."""
        both = any(site.kind == "cross" for site in self.sites)
        found: dict[Key, Shapes] = {}
        for number, block in enumerate(self.blocks):
            if number in self.pops | self.pushes or block.passed is not None or self.has_stages:
                found[number, "block"] = ()
            for kind in ("", *(KINDS if both else ())):
                sites = [site for site in block.sites if site.kind == kind or not kind]
                sites = [site for site in sites if any(gives(site.module, part) for part in PARTS[:-1])]
                if not sites:
                    continue
                dot = f"{kind}." if kind else ""
                known = [] if shapes is None else [shapes[site.name] for site in sites if site.name in shapes]
                if any(gives(site.module, "output") for site in sites):
                    found[number, f"{dot}output"] = tuple((n, h * d) for n, _, h, d in known)
                if all(gives(site.module, "qk") for site in sites):
                    found[number, f"{dot}qk"] = tuple(s for n, m, h, d in known for s in ((h, n, d), (h, m, d)))
                if all(gives(site.module, "map") for site in sites):
                    found[number, f"{dot}map"] = tuple((h, n, m) for n, m, h, _ in known)
        return found

    def learn(self, shapes: Mapping[str, tuple[int, int, int, int]]) -> None:
        """Take note of the shapes that a run has."""
        declare(self, self.parts(shapes))  # type: ignore[arg-type]

    def num_blocks(self, path: int = 0) -> int:
        return len(self.paths[path])

    def exits(self, path: int = 0) -> tuple[int, ...]:
        """Every depth where all blocks can be passed by; otherwise the full depth alone."""
        blocks = self.paths[path]
        if blocks and all(self.blocks[block].passed is not None for block in blocks):
            return tuple(range(1, len(blocks) + 1))
        return (len(blocks),)

    def check_depth(self, depth: int, path: int = 0) -> None:
        if depth not in self.exits(path):
            raise UsageError(f"{self.name} cannot be read out at depth {depth}; it can at {list(self.exits(path))}")

    def route(self, log_snr: Tensor) -> Tensor:
        """Which denoiser is called at a noise level."""
        if self.boundary is None or len(self.paths) == 1:
            return torch.zeros_like(log_snr, dtype=torch.int64)
        limit = 2 * math.log((1 - self.boundary) / self.boundary)
        return (log_snr > limit).long()

    def block(self, name: str) -> int:
        """Number of the block with a name.

        Raises:
            UsageError: there is none.
        """
        names = [block.name for block in self.blocks]
        if name not in names:
            raise UsageError(f"{self.name} has no block {name!r}; it has {', '.join(names)}")
        return names.index(name)

    def measure_costs(self) -> CostTable:
        """What its blocks cost, see `execution.cost.CostTable.measure`.

        Raises:
            RunError: it was not called yet, so nothing says how large its inputs are.
        """
        if self.table is None:
            raise RunError(f"{self.name} was not called yet, and what it costs depends on what it is called with")
        return self.table

    def state_dict(self) -> dict[str, Tensor]:
        """Of all models that decide the images."""
        every = {**self.denoisers, **self.beside}
        return {f"{name}.{key}": value for name, model in every.items() for key, value in model.state_dict().items()}

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, model in {**self.denoisers, **self.beside}.items():
            yield from ((f"{name}.{key}", value) for key, value in model.named_buffers())

    def modules(self) -> Iterator[nn.Module]:
        for model in self.denoisers.values():
            yield from model.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        for model in self.denoisers.values():
            yield from model.parameters()

    def buffers(self) -> Iterator[Tensor]:
        for model in self.denoisers.values():
            yield from model.buffers()


def blocks_of(model: nn.Module) -> Iterator[tuple[Block, str | None]]:
    """The blocks of a model in the order in which they run, and whether each pushes or pops a long skip."""
    found: list[tuple[Block, str | None]]
    if hasattr(model, "down_blocks"):
        found = list(_unet(model)) if _can_be_cut(model) else []
    else:
        found = []
        for name in TRANSFORMERS:
            some = getattr(model, name, None)
            if isinstance(some, nn.ModuleList):
                found += [(Block(f"{name}.{k}", [block], _passed(block)), None) for k, block in enumerate(some)]
    sites = _sites(model)
    for block, skip in found:
        inside = {id(module) for part in block.modules for module in part.modules()}
        block.sites = [site for site in sites if id(site.module) in inside]
        yield block, skip


def _can_be_cut(model: Any) -> bool:
    stages = [*model.down_blocks, *getattr(model, "up_blocks", ())]
    return all(type(stage).__name__ in CUT for stage in stages)


def _unet(model: Any) -> Iterator[tuple[Block, str | None]]:
    for side, skip, samplers in (("down", "push", "downsamplers"), ("up", "pop", "upsamplers")):
        for number, stage in enumerate(getattr(model, f"{side}_blocks", ())):
            for layer in range(len(stage.resnets)):
                lists = [getattr(stage, name, None) for name in LAYERS]
                modules = [some[layer] for some in lists if some is not None and layer < len(some)]
                yield Block(f"{side}.{number}.{layer}", [m for m in modules if m is not None]), skip
            for sampler in getattr(stage, samplers, None) or ():
                yield Block(f"{side}.{number}.sampler", [sampler]), "push" if side == "down" else None
        if side == "down" and getattr(model, "mid_block", None) is not None:
            yield Block("mid", [model.mid_block]), None


def _stages(model: Any, blocks: Sequence[Block], start: int) -> Iterator[Stage]:
    if not hasattr(model, "down_blocks") or not _can_be_cut(model):
        return
    for module in (*model.down_blocks, *getattr(model, "up_blocks", ())):
        inside = {id(part) for part in module.modules()}
        yield Stage(module, [k for k in range(start, len(blocks)) if id(blocks[k].modules[0]) in inside])


def _passed(block: nn.Module) -> Passed | None:
    try:
        return Passed(block)
    except KeyError:
        return None


def _sites(model: nn.Module) -> list[Site]:
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "processor") and hasattr(module, "set_processor"):
            kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
            found.append(Site(name, module, kind))
    return found


def _digest(denoisers: Mapping[str, Any]) -> str:
    """Of what a model is made like; two checkpoints of one architecture are alike."""
    about = {}
    for name, model in denoisers.items():
        config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
        about[name] = [type(model).__name__, config]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:8]
