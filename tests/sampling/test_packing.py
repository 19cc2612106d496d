"""Packed against simulated sampling under the real uncertainty rule, over whole trajectories.

Under replayed decisions the two runs compute the same, so they agree up to rounding. Under decisions of their own they
part where a row's uncertainty lies at the threshold up to rounding; such a flip sends a sample elsewhere from that call
on, so flips are counted apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers.base import Call
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.execution.exits import ExitView
from gearshift.execution.outputs import PACK, SIMULATE, Packing
from gearshift.execution.plan import ExitRule, StepPlan
from gearshift.policies import Policy, RunInfo, UncertaintyExit
from gearshift.sampling.loop import Chunk, Sampler, sample_chunk

from ..contract import EAGER, TOLERANCE, cost_table
from ..toys import LongSkips

B = 12
Values = dict[tuple[int, int, int], float]


@dataclass(frozen=True)
class _Spy:
    """A rule that notes what it was told: uncertainty by (call, row, depth)."""

    rule: ExitRule
    call: int
    seen: Values

    def depths(self, exits: tuple[int, ...]) -> Collection[int]:
        return self.rule.depths(exits)

    def begin(self, num_rows: int) -> Any:
        return self.rule.begin(num_rows)

    def leaves(self, view: ExitView, state: Any) -> Tensor:
        def told() -> Tensor:
            values = view.uncertainty()
            for row, value in zip(view.rows.host().tolist(), values.tolist(), strict=True):
                self.seen[self.call, row, view.depth] = value
            return values

        return self.rule.leaves(replace(view, uncertainty=told), state)


@dataclass(frozen=True)
class Watched(UncertaintyExit):
    """The policy, with its values noted in `seen`."""

    seen: Values = field(default_factory=dict)

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        plan = super().plan(state, call)
        assert plan.exit is not None
        return StepPlan(exit=_Spy(plan.exit, call.position, self.seen))


@contextmanager
def rounding(sampler: Sampler, unit: float) -> Iterator[None]:
    """Blocks that round by their batch size, as kernels do that are chosen by it: off by up to two units."""
    handles = [
        block.register_forward_hook(lambda _module, _inputs, out: out * (1 + unit * (len(out) % 5 - 2)))
        for block in sampler.denoiser.network.blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Replay(Policy):
    """Depths of an earlier run, int64 [R] by call."""

    depths: tuple[Tensor, ...] = ()

    static: ClassVar[bool] = True

    def plan(self, state: Any, call: Call) -> StepPlan:
        return StepPlan(depth=self.depths[call.position])


def _uvit() -> Backbone:
    shape = dict(image_size=8, in_channels=2, patch_size=2, embed_dim=16, depth=6, num_heads=2)
    return UViT(UViTConfig(num_classes=3, null_class=True, **shape))  # type: ignore[arg-type]


NETWORKS = {"long-skips": (LongSkips, 1.0), "uvit": (_uvit, 1.0), "uvit-guided": (_uvit, 2.0)}


@pytest.fixture(params=NETWORKS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """Six DDIM calls of a network with uncertainties that spread over [0, 1].

    The process ends at alpha 0.37: from pure noise on, a step of random weights multiplies rounding by 1 / alpha.
    """
    factory, guidance = NETWORKS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EarlyExit(ExitsConfig(), factory())
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    network.eval().requires_grad_(False)
    solver = DDIM(DDIMConfig(steps=6))
    return Sampler(
        Denoiser(network, Discrete(DiscreteConfig(beta_end=0.004))), solver, UncertaintyExit(0.5), 3, B, guidance
    )


def run(sampler: Sampler, policy: Policy, packing: Packing) -> Chunk:
    s = replace(sampler, policy=policy, packing=packing)
    return sample_chunk(s, torch.arange(B), cost_table(sampler.denoiser.network))


def replayed(sampler: Sampler, packed: Chunk) -> Chunk:
    depths = torch.from_numpy(packed.ledger.depth).long().flatten(1)
    return run(sampler, Replay(tuple(depths)), SIMULATE)


def threshold(sampler: Sampler) -> float:
    """One that parts the rows at every call: the median of all uncertainties that full compute meets."""
    watched = Watched(1e-9)
    run(sampler, watched, SIMULATE)
    return float(np.median(list(watched.seen.values())))


@pytest.mark.parametrize("packing", [EAGER, PACK, Packing(0.5)], ids=lambda p: f"drop at {p.min_fraction}")
def test_replayed_decisions_give_the_same_images(sampler: Sampler, packing: Packing) -> None:
    policy = UncertaintyExit(threshold(sampler))
    for unit in (0.0, 2.0**-23):
        with rounding(sampler, unit):
            packed = run(sampler, policy, packing)
            simulated = replayed(sampler, packed)
        torch.testing.assert_close(packed.images, simulated.images, **TOLERANCE)
        assert (packed.ledger.depth == simulated.ledger.depth).all()
        assert (packed.ledger.macs < simulated.ledger.full_macs[:, None, None]).any()
    varied = [len(set(depths.flatten().tolist())) for depths in packed.ledger.depth]
    assert sum(count > 1 for count in varied) >= 3, "rows have to leave apart for this to prove anything"
    if sampler.branches == 2:
        assert (packed.ledger.depth[:, 0] != packed.ledger.depth[:, 1]).any()


def test_replayed_decisions_in_half_precision(sampler: Sampler) -> None:
    """bf16 has 8 bits: here each block rounds by up to 2^-9 of its size, otherwise in a batch of another size.

    The tolerance, over six calls, is 2^-8 of the images' standard deviation in the mean and 2^-5 for single pixels.
    """
    half = replace(sampler, dtype=torch.bfloat16)
    policy = UncertaintyExit(threshold(sampler))
    for unit in (0.0, 2.0**-9):
        with rounding(half, unit):
            packed = run(half, policy, EAGER)
            error = (packed.images - replayed(half, packed).images).abs()
        assert float(error.mean()) <= 2**-8 * float(packed.images.std())
        assert float(error.max()) <= 2**-5 * float(packed.images.std())
    other = run(half, UncertaintyExit(0.0), SIMULATE).images
    moved = float((packed.images - other).abs().mean())
    assert moved > 2**-5 * float(other.std()), "other depths have to be further than rounding"


def first_flips(packed: Chunk, simulated: Chunk) -> dict[int, tuple[int, int]]:
    """By sample whose rows did not leave alike in both runs: (call, branch) where they first parted."""
    apart = packed.ledger.depth != simulated.ledger.depth  # [K, G, N]
    return {
        int(sample): tuple(int(i) for i in np.argwhere(apart[:, :, sample])[0])  # type: ignore[misc]
        for sample in np.flatnonzero(apart.any(axis=(0, 1)))
    }


def check(sampler: Sampler, at: float) -> int:
    """Both runs decide for themselves; returns the number of flips."""
    ours, theirs = Watched(at), Watched(at)
    packed, simulated = run(sampler, ours, EAGER), run(sampler, theirs, SIMULATE)
    flips = first_flips(packed, simulated)
    for sample, (call, branch) in flips.items():
        depth = min(int(chunk.ledger.depth[call, branch, sample]) for chunk in (packed, simulated))
        for seen in (ours.seen, theirs.seen):
            assert abs(seen[call, branch * B + sample, depth] - at) <= 1e-5, "not a matter of rounding"
    kept = [sample for sample in range(B) if sample not in flips]
    assert kept
    torch.testing.assert_close(packed.images[kept], simulated.images[kept], **TOLERANCE)
    assert (packed.ledger.macs[..., kept] == simulated.ledger.macs[..., kept]).all()
    return len(flips)


def test_independent_decisions_part_only_at_the_threshold(sampler: Sampler) -> None:
    middle = threshold(sampler)
    assert check(sampler, middle) == 0
    with rounding(sampler, 2.0**-23):
        assert check(sampler, middle) <= 1
    # Flips on purpose: thresholds between the two values of one uncertainty that the runs rounded apart. Whether there
    # are any that flip depends on the machine's kernels, so the rounding grows until there are.
    assert any(flips(sampler, middle, 2.0**power, far) for power in (-23, -22, -21, -20) for far in (5, 500))


def flips(sampler: Sampler, middle: float, unit: float, count: int) -> bool:
    """Whether some of the `count` thresholds nearest to `middle` that part two roundings makes the runs part."""
    with rounding(sampler, unit):
        ours, theirs = Watched(middle), Watched(middle)
        run(sampler, ours, EAGER)
        run(sampler, theirs, SIMULATE)
        apart = [
            max(value, theirs.seen[key]) for key, value in ours.seen.items() if theirs.seen.get(key, value) != value
        ]
        near = sorted(apart, key=lambda at: abs(at - middle))[:count]
        return any(check(sampler, at) for at in near)
