"""The contract under guidance: branches of one sample leave at different depths, on every toy, and the ledger says so.

Two of the toys have no conditioning; here they are given labels with a null label.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.diffusion.solvers.base import Call
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.execution.outputs import PACK, SIMULATE, Packing
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import Stream
from gearshift.policies import Policy, RunInfo, UncertaintyExit
from gearshift.sampling.loop import Sampler, sample_chunk

from ..contract import EAGER, TOLERANCE, LeaveAt, Subject, cost_table, plain_loop
from ..toys import Isotropic, LongSkips, TwoDecoders

B, W = 6, 2.5
PACKINGS = [EAGER, PACK, Packing(0.5), SIMULATE]


class _Labels(Backbone):
    """Three classes and a null class for a toy without conditioning."""

    num_labels = 3

    def _add_labels(self, width: int) -> None:
        self.cond_kind, self.num_classes = "class", self.num_labels
        self.label = nn.Embedding(self.num_labels + 1, width)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        return torch.full((num_rows,), self.num_labels, dtype=torch.int64, device=device)


class LabelledLongSkips(_Labels, LongSkips):
    """The label is added to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._add_labels(self.dim)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        stream = super().embed(x, time, None)
        stream.hidden = stream.hidden + self.label(cond)[:, None]
        return stream


class LabelledTwoDecoders(_Labels, TwoDecoders):
    """The label is added to the time vector that every block reads."""

    def __init__(self) -> None:
        super().__init__()
        self._add_labels(self.time_dim)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        stream = super().embed(x, time, None)
        stream.cond["time"] = stream.cond["time"] + self.label(cond)
        return stream


TOYS: dict[str, type[Backbone]] = {
    "isotropic": Isotropic,
    "long-skips": LabelledLongSkips,
    "two-decoders": LabelledTwoDecoders,
}


@functools.cache
def network(name: str, heads: bool = False) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        backbone = TOYS[name]()
        made = EarlyExit(ExitsConfig(), backbone) if heads else backbone
        for parameter in made.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return made.eval().requires_grad_(False)


def denoiser(name: str, heads: bool = False) -> Denoiser:
    return Denoiser(network(name, heads), VPSDE(VPSDEConfig()))


def path_at(d: Denoiser, time: float) -> int:
    return int(d.network.route(torch.as_tensor(d.process.log_snr(time)).reshape(1))[0])


def inputs(d: Denoiser) -> tuple[Tensor, Tensor]:
    size, channels = d.network.image_size, d.network.in_channels
    return torch.randn(B, channels, size, size, generator=torch.Generator().manual_seed(2)), torch.arange(B) % 3


def parted(exits: tuple[int, ...], shift: int = 1) -> Tensor:
    """A depth per row so that the two branches of every sample leave apart, int64 [2B]."""
    order = torch.tensor(exits)
    rows = torch.arange(B)
    return torch.cat([order[rows % len(exits)], order[(rows + shift) % len(exits)]])


def rows_by_hand(d: Denoiser, x: Tensor, time: float, labels: Tensor, depths: Tensor) -> Tensor:
    """Each row of both branches run alone, [2B, out_channels, H, W]."""
    cond = torch.cat([labels, torch.full((B,), 3)])
    fed = torch.full((2 * B,), float(d.process.network_time(time)))
    s = Subject("", d.network, path_at(d, time), torch.cat([x, x]), fed, cond)
    return torch.cat([plain_loop(s, depth, index=torch.tensor([row])) for row, depth in enumerate(depths.tolist())])


@pytest.fixture(params=[(name, time) for name in TOYS for time in (0.15, 0.8)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, float]:
    """A toy and a time; at the two times TwoDecoders takes its two paths."""
    name, time = request.param
    return name, time


def test_both_paths_are_met() -> None:
    assert [path_at(denoiser("two-decoders"), time) for time in (0.15, 0.8)] == [0, 1]


def test_branches_leave_apart_and_are_mixed_after_that(case: tuple[str, float]) -> None:
    name, time = case
    d = denoiser(name)
    x, labels = inputs(d)
    channels = d.network.in_channels
    for shift in (1, 2):
        depths = parted(d.network.exits(path_at(d, time)), shift)
        assert (depths[:B] != depths[B:]).all()
        alone = rows_by_hand(d, x, time, labels, depths)
        conditional, unconditional = alone.chunk(2)
        assert (conditional - unconditional).abs().mean() > 1e-2
        wanted = unconditional + W * (conditional - unconditional)
        for plan in (StepPlan(depth=depths), StepPlan(exit=LeaveAt(depths))):
            for packing in PACKINGS:
                p = d.predict(x, time, labels, plan=plan, guidance=W, packing=packing)
                assert torch.equal(p.depth, depths)
                # Guidance multiplies the rounding of both branches.
                torch.testing.assert_close(p.eps, wanted[:, :channels], rtol=1e-5, atol=2 * W * 1e-5)
                torch.testing.assert_close(p.held.eps, alone[:, :channels], **TOLERANCE)
                if name == "long-skips":  # variance is never mixed
                    assert p.variance is not None
                    torch.testing.assert_close(p.variance, conditional[:, channels:], **TOLERANCE)


def test_one_branch_may_be_skipped_while_the_other_leaves_early(case: tuple[str, float]) -> None:
    name, time = case
    d = denoiser(name)
    x, labels = inputs(d)
    held = d.predict(x, time, labels, guidance=W).held
    other = x.flip(0)
    depths = parted(d.network.exits(path_at(d, time)))
    call = torch.tensor([True] * B + [False] * B)
    p = d.predict(other, time, labels, plan=StepPlan(call=call, depth=depths), guidance=W, held=held, packing=EAGER)
    conditional = rows_by_hand(d, other, time, labels, depths)[:B, : d.network.in_channels]
    # Guidance doubles what kernels of another batch size round apart.
    torch.testing.assert_close(p.eps, torch.lerp(held.eps[B:], conditional, W), rtol=1e-4, atol=3e-5)
    assert p.depth.tolist() == [*depths[:B].tolist(), *[0] * B]
    assert torch.equal(p.held.eps[B:], held.eps[B:])


# The ledger ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parted(Policy):
    """Branches leave apart at every call, each time otherwise."""

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        path = int(state.network.route(torch.tensor([call.log_snr], dtype=torch.float64))[0])
        return StepPlan(depth=parted(state.network.exits(path), 1 + call.position % 2))


def sampler(name: str, policy: Policy, packing: Packing, heads: bool = False, steps: int = 5) -> Sampler:
    solver = DDIM(DDIMConfig(steps=steps, clip_x0=True))
    return Sampler(denoiser(name, heads), solver, policy, 0, B, W, packing=packing)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("packing", [EAGER, SIMULATE], ids=["packed", "simulated"])
def test_ledger_of_parted_branches(name: str, packing: Packing) -> None:
    """Every row is charged the path it took, to the depth it left at: by call, branch and sample."""
    s = sampler(name, Parted(), packing)
    net, table = s.denoiser.network, cost_table(s.denoiser.network)
    ledger = sample_chunk(s, torch.arange(B), table).ledger
    paths = [path_at(s.denoiser, call.time) for call in s.calls()]
    assert set(paths) == set(range(len(net.paths)))
    wanted = torch.stack([parted(net.exits(path), 1 + k % 2) for k, path in enumerate(paths)]).reshape(-1, 2, B)
    assert ledger.depth.tolist() == wanted.tolist()
    macs = [
        [[table.path_cost(path, int(depth), blocks=net.paths[path]).macs for depth in branch] for branch in depths]
        for path, depths in zip(paths, wanted, strict=True)
    ]
    assert ledger.macs.tolist() == macs
    assert ledger.full_macs.tolist() == [table.full(net, path).macs for path in paths]
    assert ledger.calls_per_image == 2 * len(paths)
    assert ledger.macs_saved == pytest.approx(1 - torch.tensor(macs).sum().item() / (2 * B * ledger.full_macs.sum()))


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("packing", [EAGER, SIMULATE], ids=["packed", "simulated"])
def test_ledger_of_branches_that_decide_for_themselves(name: str, packing: Packing) -> None:
    """A row pays an uncertainty head at every exit up to its own; the last depth has nothing to decide."""
    net = network(name, heads=True)
    seen: list[float] = []
    d = denoiser(name, heads=True)
    x, labels = inputs(d)
    for time in (0.15, 0.8):
        taps = net.exits(path_at(d, time))
        p = d.predict(x, time, labels, plan=StepPlan(taps=taps), guidance=W)
        seen += torch.cat([u.flatten(1).mean(1) for u in p.uncertainty.values()]).tolist()
    s = sampler(name, UncertaintyExit(float(torch.tensor(seen).median())), packing, heads=True, steps=8)
    table = cost_table(net)
    ledger = sample_chunk(s, torch.arange(B), table).ledger
    assert (ledger.depth[:, 0] != ledger.depth[:, 1]).any(), "branches have to part for this to prove anything"

    def cost(path: int, depth: int) -> int:
        heads = [e for e in net.exits(path)[:-1] if e <= depth]
        total = table.path_cost(path, depth, blocks=net.paths[path]).macs
        return total + sum(table.entries["uncertainty", path, e, "full"].macs for e in heads)

    for k, call in enumerate(s.calls()):
        path = path_at(s.denoiser, call.time)
        assert ledger.macs[k].tolist() == [[cost(path, int(z)) for z in branch] for branch in ledger.depth[k]]
