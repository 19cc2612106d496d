"""Several whole networks as one backbone: a path for each, nothing shared (Table 3 of arXiv 2312.09181).

Every row takes the network of its own noise level or, where the networks have no levels, the one that the plan names.
A row is embedded by that network alone, when it enters its path; a batch of mixed levels is split before anything runs.
With stages this is one network per stage; with two networks of different size it is a large and a small one by time
(DuoDiff, arXiv 2410.09633: by calls, `policies.NetworkSwitch`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.staging import StageRouter
from gearshift.execution.stream import Rows, Skip, Stream
from gearshift.runtime import config as configuration
from gearshift.runtime.errors import UsageError

# What the stream holds until a row enters its network.
_CONDITION, _AUGMENT = "condition", "augment"
# What all networks must have in common: they take the same images and conditions, and answer alike.
_COMMON = ("in_channels", "out_channels", "image_size", "cond_kind", "num_classes", "augment_dim")


@dataclass
class SeparateConfig:
    """Schema of `SeparateNetworks`.

    Attributes:
        networks: a backbone node each (`_target_` and its fields), or a backbone; the one next to the data first.
        boundaries: ratios sigma/alpha at which a network ends, inclusive, ascending; one fewer than networks. None: no
            network has levels of its own; plans say which one runs (`StepPlan.expert`), and where none does the first.
    """

    networks: list[Any] = field(default_factory=list)
    boundaries: tuple[float, ...] | None = ()

    def __post_init__(self) -> None:
        if not self.networks:
            raise UsageError("networks=[] names no network; give one backbone for each stage")
        if self.boundaries is None:
            return
        stages = StageRouter(self.boundaries).num_stages
        if stages != len(self.networks):
            raise UsageError(
                f"boundaries={list(self.boundaries)} make {stages} stages and networks names {len(self.networks)}; "
                "give one network for each stage"
            )

    def shrunk(self) -> SeparateConfig:
        """The same with every network narrowed by its own `shrunk`. Raises UsageError where one has none."""
        return dataclasses.replace(self, networks=[_shrunk(node, k) for k, node in enumerate(self.networks)])


class SeparateNetworks(Backbone):
    """K networks of one image shape, conditioning and augmentation, each a path of its own.

    Block i of network k is block (blocks of the networks before) + i. Weights are named `networks.K.<own name>`. Exits
    and heads are each network's own.

    Attributes:
        by_plan: plans say which network runs, not noise levels.

    Raises:
        UsageError: a node that makes no backbone of one path, or networks that do not take the same.
    """

    Config = SeparateConfig

    def __init__(self, config: SeparateConfig) -> None:
        super().__init__()
        self.config = config
        self.networks = nn.ModuleList(_built(node, k) for k, node in enumerate(config.networks))
        self._check()
        first = self.network(0)
        for name in _COMMON:
            setattr(self, name, getattr(first, name))
        self.by_plan = config.boundaries is None
        self.router = StageRouter(config.boundaries or ())  # without boundaries everything is stage 0
        self.boundaries = self.router.boundaries
        self._place: list[tuple[int, int]] = []  # network and block there, by block
        paths, pops, pushes, carries = [], set[int](), set[int](), dict[int, str]()
        for k, network in enumerate(self._each):
            offset = len(self._place)
            self._place += [(k, block) for block in range(len(network.blocks))]
            paths.append(tuple(offset + block for block in network.paths[0]))
            pops |= {offset + block for block in network.pops}
            pushes |= {offset + block for block in network.pushes}
            carries |= {offset + block: name for block, name in network.carries.items()}
        self.paths = tuple(paths)
        self.pops, self.pushes, self.carries = frozenset(pops), frozenset(pushes), carries
        self.has_uncertainty = any(network.has_uncertainty for network in self._each)

    @property
    def name(self) -> str:
        return f"{len(self.networks)} separate {' and '.join(dict.fromkeys(n.name for n in self._each))}"

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(block for network in self._each for block in network.blocks)

    @property
    def _each(self) -> list[Backbone]:
        return [self.network(k) for k in range(len(self.networks))]

    def network(self, path: int) -> Backbone:
        """The network of a path."""
        network = self.networks[path]
        assert isinstance(network, Backbone)
        return network

    def _check(self) -> None:
        for k, network in enumerate(self._each):
            if len(network.paths) != 1:
                raise UsageError(
                    f"networks.{k} ({network.name}) has {len(network.paths)} paths of its own; separate networks have "
                    "one each"
                )
            for name in _COMMON:
                ours, theirs = getattr(self.network(0), name), getattr(network, name)
                if ours != theirs:
                    raise UsageError(f"networks.0 has {name}={ours} and networks.{k} has {theirs}; make them equal")
            texts = [_text_shape(other) for other in (self.network(0), network)]
            if texts[0] != texts[1]:
                raise UsageError(f"networks.0 takes text of {texts[0]} and networks.{k} of {texts[1]}; make them equal")

    # Into the networks -----------------------------------------------------------------------------------------------

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        """Nothing yet: the images themselves, with what `enter` needs."""
        return Stream(x, time, Rows(len(x)), {} if cond is None else {_CONDITION: cond})

    def embed_augmented(self, x: Tensor, time: Tensor, cond: Tensor | None, augment: Tensor) -> Stream:
        if not self.augment_dim:
            return super().embed_augmented(x, time, cond, augment)
        stream = self.embed(x, time, cond)
        stream.cond[_AUGMENT] = augment
        return stream

    def enter(self, stream: Stream, path: int) -> Stream:
        """The rows as the network of their path embeds them."""
        network, cond = self.network(path), stream.cond.get(_CONDITION)
        if _AUGMENT in stream.cond:
            own = network.embed_augmented(stream.hidden, stream.time, cond, stream.cond[_AUGMENT])
        else:
            own = network.embed(stream.hidden, stream.time, cond)
        own = network.enter(own, 0)
        # It counts its rows from zero; they keep the numbers they have in the run.
        skips = [Skip(skip.hidden, stream.rows) for skip in own.skips]
        return Stream(own.hidden, own.time, stream.rows, own.cond, skips)

    def bypass(self, block: int, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None) -> Tensor:
        path, own = self._place[block]
        return self.network(path).bypass(own, hidden, cond, skip)

    def route(self, log_snr: Tensor) -> Tensor:
        return self.router.route(log_snr)

    # Out of them -----------------------------------------------------------------------------------------------------

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return self.network(path).exits()

    def readable(self, path: int = 0, *, own: bool = False) -> tuple[int, ...]:
        return self.network(path).readable(own=own)

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        return self.network(path).readout(hidden, cond, depth)

    def readout_key(self, depth: int, path: int = 0) -> Hashable:
        return path, self.network(path).readout_key(depth)

    def readouts(
        self, hiddens: Sequence[Tensor], cond: dict[str, Tensor], depths: Sequence[int], path: int = 0
    ) -> list[Tensor]:
        return self.network(path).readouts(hiddens, cond, depths)

    def readout_modules(self, depth: int, path: int = 0) -> nn.Module:
        return self.network(path).readout_modules(depth)

    def readout_with(
        self, head: nn.Module, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0
    ) -> Tensor:
        return self.network(path).readout_with(head, hidden, cond, depth)

    def tokens(self, hidden: Tensor, depth: int, path: int = 0) -> Tensor:
        return self.network(path).tokens(hidden, depth)

    def width(self, depth: int, path: int = 0) -> int:
        return self.network(path).width(depth)

    def patch(self, depth: int, path: int = 0) -> int:
        return self.network(path).patch(depth)

    def predicts_error(self, depth: int, path: int = 0) -> bool:
        """Of a network without heads of its own at no depth, whatever the others have."""
        return self.network(path).predicts_error(depth)

    def uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        return self.network(path).uncertainty(hidden, time, depth)

    def mean_uncertainty(self, hidden: Tensor, time: Tensor, depth: int, path: int = 0) -> Tensor:
        return self.network(path).mean_uncertainty(hidden, time, depth)

    def uncertainties(
        self, hiddens: Sequence[Tensor], time: Tensor, depths: Sequence[int], path: int = 0
    ) -> list[Tensor]:
        return self.network(path).uncertainties(hiddens, time, depths)

    def check_timesteps(self, count: int | None, first: float, process: str) -> None:
        for network in self._each:
            network.check_timesteps(count, first, process)

    # Heads around all networks embed the time by the features of network 0, which they share.
    @property
    def time_width(self) -> int:
        return self.network(0).time_width

    def time_features(self, time: Tensor) -> Tensor:
        return self.network(0).time_features(time)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        """That of network 0; every network must have one."""
        first, *_ = [network.null_cond(num_rows, device) for network in self._each]
        return first

    def example_cond(self, num_rows: int, device: torch.device | str = "meta") -> Tensor | None:
        return self.network(0).example_cond(num_rows, device)


def _built(node: Any, number: int) -> Backbone:
    if isinstance(node, Backbone):
        return node
    if not isinstance(node, Mapping):
        raise UsageError(f"networks.{number}={node!r} is no backbone; give its node, with _target_ and its fields")
    try:
        network = configuration.build(node)
    except UsageError as error:
        raise UsageError(f"networks.{number}: {error}") from error
    if not isinstance(network, Backbone):
        raise UsageError(f"networks.{number} names {type(network).__name__}, which is no backbone")
    return network


def _text_shape(network: Backbone) -> tuple[int, ...] | None:
    """[L, D] of the text that a network takes; None where it takes none."""
    example = network.example_cond(1) if network.cond_kind == "text" else None
    return None if example is None else tuple(example.shape[1:])


def _shrunk(node: Any, number: int) -> dict[str, Any]:
    if not isinstance(node, Mapping):
        raise UsageError(f"networks.{number} is a backbone already, and only nodes can be shrunk")
    target = configuration.locate(node[configuration.TARGET], f"networks.{number}")
    fields = {key: value for key, value in node.items() if key != configuration.TARGET}
    settings: Any = configuration.parse(fields, configuration.schema_of(target), owner=target)
    if not hasattr(settings, "shrunk"):
        raise UsageError(f"debug=tiny cannot shrink {target.__name__}: its configuration has no shrunk()")
    return {configuration.TARGET: node[configuration.TARGET], **dataclasses.asdict(settings.shrunk())}
