"""Reuse of deep features: against DeepCache (arXiv 2312.00858) written by hand, and what it saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers import DDIM, DDIMConfig
from gearshift.execution.stream import Stream
from gearshift.policies import DeepFeatureReuse, Full, Policy, RunInfo
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Sampler, sample_chunk

from ..contract import build, cost_table

STEPS = 7
INDEX = torch.arange(3)
PROCESS = Discrete(DiscreteConfig())
RUN = dict(rtol=1e-4, atol=1e-4)  # rounding, carried through a run


def sampler(name: str, policy: Policy, guidance: float = 2.0) -> Sampler:
    denoiser = Denoiser(build(name), PROCESS)
    return Sampler(denoiser, DDIM(DDIMConfig(steps=STEPS)), policy, chunk=3, guidance=guidance)


def run(name: str) -> RunInfo:
    return RunInfo(DDIM(DDIMConfig(steps=STEPS)).calls(PROCESS), build(name), batch=3, branches=2)


# Where ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("uvit-class", [{3}, {2}]),
        ("long-skips", [{3}, {2}]),
        ("unet-class", [{8}, {7}, {5}, {4}]),  # 7 enlarges and pops nothing: it lies inside the branch
        ("ldm-class", [{5}, {4}, {3}]),  # the last block of this network pops nothing
        ("two-decoders", [{3, 7}, {2}]),  # a block for each path, the shared one for both
        ("ldm-decoders", [{5, 9}, {4, 8}, {3}]),
        ("uvit-decoders", [{3, 5, 7}, {2}]),
    ],
)
def test_the_block_that_is_kept(name: str, wanted: list[set[int]]) -> None:
    network = build(name)
    for branch, blocks in enumerate(wanted):
        policy = DeepFeatureReuse(last=2, branch=branch)
        policy.check(run(name))
        assert policy.blocks_on(network) == blocks
        assert policy.memory_keys(run(name)) == {(block, "block") for block in blocks}
        assert policy.name == f"deep features last 2, branch {branch}"
    skips = len(wanted)
    message = rf"branch={skips}, but {network.name} has {skips} long skips, branches 0\.\.{skips - 1}"
    with pytest.raises(UsageError, match=message):
        DeepFeatureReuse(last=2, branch=skips).check(run(name))


@pytest.mark.parametrize("name", ["dit-class", "isotropic", "separate"])
def test_networks_without_long_skips_are_refused(name: str) -> None:
    """Also where only one of the paths has none."""
    message = rf"cuts a network at its long skips, and {build(name).name} has none; reuse attention instead"
    with pytest.raises(UsageError, match=message):
        DeepFeatureReuse(interval=2).check(run(name))


def test_a_branch_with_nothing_inside_is_refused() -> None:
    """A network whose first block pops what the embedding pushed."""
    network = build("unet-class")

    class Shallow:
        name, paths, pops = "Shallow", ((5, 6),), network.pops

    assert DeepFeatureReuse(last=1).blocks_on(Shallow()) == {5}  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"branch=1, but Shallow has 2 long skips.*something must lie inside"):
        DeepFeatureReuse(last=1, branch=1).blocks_on(Shallow())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(last=1, branch=-1), "branch=-1 must be at least 0, the outermost long skip"),
        (dict(branch=1), "needs one of last, interval and computed"),
        (dict(interval=2, computed=[0]), r"has interval=2 and computed=\[0\]"),
        (dict(interval=2, window=[3, 3]), r"window=\[3, 3\] is no interval"),
    ],
)
def test_what_makes_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"policy DeepFeatureReuse.*{message}"):
        DeepFeatureReuse(**arguments)


def test_too_few_calls_are_refused() -> None:
    with pytest.raises(UsageError, match="policy DeepFeatureReuse reuses at the last 7 calls of a run of 7"):
        DeepFeatureReuse(last=7).check(run("uvit-class"))


# DeepCache by hand ---------------------------------------------------------------------------------------------------


class DeepCache:
    """A U-shaped network as its authors run it: the whole of it and keep what enters the last levels, or the first
    levels, what was kept, and the last levels. `branch` counts skips from the outside."""

    def __init__(self, network: Backbone, branch: int) -> None:
        self.network, self.path, self.branch = network, network.paths[0], branch
        merging = [place for place, block in enumerate(self.path) if block in network.pops]
        self.entry = merging[len(merging) - branch - 1]  # of the decoder's last levels
        self.kept: Tensor | None = None
        self.ran = 0

    def _block(self, stream: Stream, hidden: Tensor, skips: list[Tensor], block: int) -> Tensor:
        self.ran += 1
        skip = skips.pop() if block in self.network.pops else None
        hidden = self.network.blocks[block](hidden, stream.cond, skip)
        if block in self.network.pushes:
            skips.append(hidden)
        return hidden

    def __call__(self, x: Tensor, time: float, cond: Tensor | None, shallow: bool) -> Tensor:
        network = self.network
        stream = network.embed(x, torch.full((len(x),), float(PROCESS.network_time(time))), cond)
        hidden, skips, path = stream.hidden, [skip.hidden for skip in stream.skips], self.path
        self.ran = 0
        if shallow:
            inward = iter(path)
            while len(skips) <= self.branch:
                hidden = self._block(stream, hidden, skips, next(inward))
            assert self.kept is not None
            hidden = self.kept
        else:
            for block in path[: self.entry]:
                hidden = self._block(stream, hidden, skips, block)
            self.kept = hidden
        for block in path[self.entry :]:
            hidden = self._block(stream, hidden, skips, block)
        return network.readout(hidden, stream.cond, len(path))

    def cost(self) -> int:
        """MACs of a shallow call."""
        table, path = cost_table(self.network).entries, self.path
        pushed = sum(block in self.network.pops for block in path) - sum(block in self.network.pushes for block in path)
        pushing = [place for place, block in enumerate(path) if block in self.network.pushes]
        wanted = self.branch + 1 - pushed
        first = pushing[wanted - 1] + 1 if wanted > 0 else 0
        blocks = sum(table["block", 0, block, "full"].macs for block in [*path[:first], *path[self.entry :]])
        return table["embed", 0, 0, "full"].macs + blocks + table["readout", 0, len(path), "full"].macs


@torch.no_grad()
def by_hand(s: Sampler, branch: int, shallow: list[int]) -> tuple[Tensor, DeepCache]:
    network, solver = s.denoiser.network, s.solver
    cache, labels = DeepCache(network, branch), s.cond(INDEX)
    assert labels is not None
    both = torch.cat([labels, torch.full((3,), 3)])
    state = solver.begin(PROCESS, keys.normal(s.seed, "init_noise", INDEX, 0, (2, 8, 8)))
    for call in s.calls():
        x = solver.network_input(state, call)
        eps = cache(torch.cat([x, x]), call.time, both, call.position in shallow)
        state = solver.advance(state, call, torch.lerp(eps[3:], eps[:3], s.guidance))
    return solver.result(state), cache


LEVELS = [call.log_snr for call in run("uvit-class").calls]
WHEN: list[tuple[dict[str, Any], list[int]]] = [
    (dict(interval=3), [1, 2, 4, 5]),
    (dict(last=2), [5, 6]),
    (dict(computed=[0, 1, 3, 6]), [2, 4, 5]),
    (dict(interval=7, window=[LEVELS[2], LEVELS[4]]), [2, 3, 4]),
]


@pytest.mark.parametrize(("when", "shallow"), WHEN, ids=["interval", "last", "computed", "window"])
@pytest.mark.parametrize(
    ("name", "branch"), [("uvit-class", 0), ("uvit-class", 1), *(("unet-class", b) for b in range(4)), ("ldm-class", 1)]
)
def test_it_is_deepcache(name: str, branch: int, when: dict[str, Any], shallow: list[int]) -> None:
    """Images against the loop by hand, and MACs against the sum over the blocks that it runs."""
    s, table = sampler(name, DeepFeatureReuse(branch=branch, **when)), cost_table(build(name))
    chunk = sample_chunk(s, INDEX, table)
    images, cache = by_hand(s, branch, shallow)
    torch.testing.assert_close(chunk.images, images, **RUN)
    full, reduced = table.full(build(name)).macs, cache.cost()
    assert reduced < full
    wanted = [reduced if position in shallow else full for position in range(STEPS)]
    assert chunk.ledger.macs.tolist() == [[[macs] * 3] * 2 for macs in wanted]
    assert chunk.ledger.macs_saved == pytest.approx(1 - sum(wanted) / (STEPS * full))
    plain = sample_chunk(replace(s, policy=Full()), INDEX, table)
    assert (chunk.images - plain.images).abs().max() > 1e-3


def test_the_outer_branches_save_more() -> None:
    costs = [DeepCache(build("unet-class"), branch).cost() for branch in range(4)]
    assert costs == sorted(costs) and len(set(costs)) == 4


def test_one_tensor_is_kept() -> None:
    """Per row, the output of one block: the hidden state that enters the last levels."""
    chunk = sample_chunk(sampler("uvit-class", DeepFeatureReuse(interval=3)), INDEX, cost_table(build("uvit-class")))
    tokens, width, branches = 16 + 2, 16, 2
    assert chunk.ledger.kept_bytes == 4 * tokens * width * branches
    assert chunk.ledger.kept.tolist() == [chunk.ledger.kept_bytes * held for held in (1, 1, 0, 1, 1, 0, 0)]


def test_another_decoder_has_nothing_to_take() -> None:
    """Two decoders: the first call of the second one computes, whatever the interval says."""
    s = sampler("two-decoders", DeepFeatureReuse(interval=99), guidance=1.0)
    chunk, table = sample_chunk(s, INDEX, cost_table(build("two-decoders"))), cost_table(build("two-decoders"))
    levels = torch.tensor([call.log_snr for call in s.calls()], dtype=torch.float64)
    paths = build("two-decoders").route(levels).tolist()
    first = paths.index(0)
    assert 0 < first < STEPS - 1
    full = [table.full(build("two-decoders"), path).macs for path in paths]
    assert (chunk.ledger.macs[:, 0, 0] == full).nonzero()[0].tolist() == [0, first]
    assert (chunk.ledger.macs[:, 0, 0] <= full).all()


@pytest.mark.parametrize("name", ["uvit-class", "unet-class"])
def test_reusing_nowhere_changes_no_bit(name: str) -> None:
    table = cost_table(build(name))
    plain = sample_chunk(sampler(name, Full()), INDEX, table)
    for when in (dict(last=0), dict(interval=1), dict(interval=3, window=[50, 60])):
        chunk = sample_chunk(sampler(name, DeepFeatureReuse(**when)), INDEX, table)  # type: ignore[arg-type]
        assert torch.equal(chunk.images, plain.images) and chunk.ledger.kept_bytes == 0
