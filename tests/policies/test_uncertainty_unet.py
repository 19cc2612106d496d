"""Exit by uncertainty on U-Nets: rows that leave at levels of different width and side, packed and simulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gearshift.backbones.exits import EarlyExit
from gearshift.backbones.unet_config import UNetConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.execution.outputs import PACK, SIMULATE, Packing
from gearshift.execution.plan import StepPlan
from gearshift.policies import RunInfo, UncertaintyExit

from ..backbones.unets import PYRAMID, STAGED, STANDARD, drawn, inputs, with_exits
from ..contract import EAGER, TOLERANCE, Subject, cost_table, macs_per_row

CLASSES = replace(PYRAMID, num_blocks=1, num_classes=3, null_class=True)
ROWS = 8


def subject(uncertainty: str = "pixel_map", config: UNetConfig = CLASSES) -> Subject:
    """Three levels and the pyramid; uncertainties that spread, around a half at every level."""
    network = with_exits(drawn(config, torch.float32), uncertainty=uncertainty).requires_grad_(False)
    x, time = inputs(config, ROWS, torch.float32)
    s = Subject("unet", network, 0, x, time, torch.arange(ROWS) % 3)
    for depth, values in zip(s.exits, means(s), strict=True):
        around_a_half(network, f"0_{depth}", values)
    return s


def around_a_half(network: EarlyExit, head: str, values: Tensor) -> None:
    """Moves what a head says, if it says `values` now."""
    network.uncertainty_heads[head].linear.bias -= values.mean().logit()


def plan(policy: UncertaintyExit, network: EarlyExit, batch: int = ROWS, branches: int = 1) -> StepPlan:
    return policy.plan(policy.begin(RunInfo((), network, batch, branches)), None)  # type: ignore[arg-type]


def means(s: Subject) -> Tensor:
    """Mean uncertainty at every exit of every row, [exits, R]."""
    u = s.run(StepPlan(taps=s.exits)).uncertainty
    return torch.stack([u[d].flatten(1).mean(1) if u[d].ndim > 1 else u[d] for d in s.exits])


def first_below(values: Tensor, depths: tuple[int, ...], threshold: float) -> list[int]:
    before = list(enumerate(depths[:-1]))
    return [next((d for i, d in before if values[i, row] < threshold), depths[-1]) for row in range(values.shape[1])]


def thresholds(values: Tensor) -> list[float]:
    """Five, halfway between neighbouring values, so that rounding decides nothing."""
    ordered = values.flatten().sort().values
    between = ((ordered[1:] + ordered[:-1]) / 2)[(ordered[1:] - ordered[:-1]) > 1e-5].tolist()
    return between[:: max(len(between) // 5, 1)][:5]


@pytest.mark.parametrize("uncertainty", ["pixel_map", "token_mean"])
def test_packing_is_simulation_at_mixed_levels(uncertainty: str) -> None:
    s = subject(uncertainty)
    assert len(s.exits) == 3
    values = means(s)
    mixed = 0
    for threshold in thresholds(values[:-1]):
        rule = plan(UncertaintyExit(threshold), s.backbone)  # type: ignore[arg-type]
        wanted = first_below(values, s.exits, threshold)
        simulated = s.run(rule, packing=SIMULATE)
        assert simulated.depth.tolist() == wanted
        replayed = s.run(StepPlan(depth=torch.tensor(wanted)))
        for packing in (EAGER, PACK, Packing(0.5)):
            packed = s.run(rule, packing=packing)
            assert packed.depth.tolist() == wanted
            torch.testing.assert_close(packed.prediction, simulated.prediction, **TOLERANCE)
            torch.testing.assert_close(packed.prediction, replayed.prediction, **TOLERANCE)
        mixed += len(set(wanted)) == 3
    assert mixed >= 2, "all three levels have to be left at in one run"


def test_nobody_pays_for_what_lies_behind_its_level() -> None:
    s = subject(config=replace(STANDARD, model_channels=8, num_classes=3))
    values, table = means(s), cost_table(s.backbone)
    rule = plan(UncertaintyExit(float(values[:-1].median())), s.backbone)  # type: ignore[arg-type]
    packed, simulated = (s.run(rule, packing=packing) for packing in (EAGER, SIMULATE))
    macs = macs_per_row(table, packed.trace, s.rows)
    assert torch.equal(macs, macs_per_row(table, simulated.trace, s.rows))
    blocks, heads = s.backbone.paths[0], 0
    for depth in s.exits:
        if depth != s.exits[-1]:  # rules ask everywhere but at the full depth
            heads += table.entries["uncertainty", 0, depth, "full"].macs
        wanted = table.path_cost(0, depth, blocks=blocks).macs + heads
        assert macs[packed.depth == depth].tolist() == [wanted] * int((packed.depth == depth).sum())
    assert packed.depth.unique().tolist() == list(s.exits) == [7, 10]


def test_threshold_zero_is_the_plain_network_bit_for_bit() -> None:
    s = subject()
    outputs = s.run(plan(UncertaintyExit(0.0), s.backbone))  # type: ignore[arg-type]
    plain = Subject(s.case, drawn(CLASSES, torch.float32), 0, s.x, s.time, s.cond)
    with torch.no_grad():
        assert torch.equal(outputs.prediction, plain.run().prediction)
    assert {event.kind for event in outputs.trace} == {"embed", "block", "readout"}
    first = s.run(plan(UncertaintyExit(1.0), s.backbone))  # type: ignore[arg-type]
    assert first.depth.tolist() == [s.exits[0]] * ROWS
    assert torch.equal(first.prediction, s.run(StepPlan(depth=s.exits[0])).prediction)


def test_decoders_of_other_widths_decide_for_their_own_rows() -> None:
    """Three stages in one batch, each row by the head of its stage's level."""
    network = with_exits(drawn(STAGED, torch.float32)).requires_grad_(False)
    x, time = inputs(STAGED, 9, torch.float32)
    expert = torch.arange(9) % 3
    base = Subject("unet-decoders", network, 0, x, time, None)

    def said() -> Tensor:
        """Of every row, by the decoder of its stage."""
        u = [base.run(StepPlan(expert=path, taps=(7,))).uncertainty[7].flatten(1).mean(1) for path in range(3)]
        return torch.stack(u)[expert, torch.arange(9)]

    for path in range(3):
        around_a_half(network, f"{path}_7", said()[expert == path])
    values = said()
    left = set()
    for threshold in thresholds(values):
        exit_rule = plan(UncertaintyExit(threshold), network, batch=9).exit
        rule = StepPlan(expert=expert, exit=exit_rule)
        wanted = torch.where(values < threshold, 7, 10)
        replayed = base.run(StepPlan(expert=expert, depth=wanted)).prediction
        for packing in (EAGER, PACK, SIMULATE):
            outputs = base.run(rule, packing=packing)
            assert torch.equal(outputs.depth, wanted)
            torch.testing.assert_close(outputs.prediction, replayed, **TOLERANCE)
        left |= set(zip(expert.tolist(), wanted.tolist(), strict=True))
    assert left == {(path, depth) for path in range(3) for depth in (7, 10)}


def test_branches_of_a_guided_sample_leave_together() -> None:
    s = subject()
    denoiser = Denoiser(s.backbone, VPSDE(VPSDEConfig()))
    tapped = denoiser.predict(s.x, 0.4, s.cond, plan=StepPlan(taps=s.exits), guidance=2.0).uncertainty
    values = torch.stack([tapped[d].flatten(1).mean(1) for d in s.exits])
    joint = values.reshape(3, 2, ROWS).mean(1).repeat(1, 2)
    apart = 0
    for threshold in thresholds(joint[:-1]):
        wanted = torch.tensor(first_below(joint, s.exits, threshold))
        policy = UncertaintyExit(threshold, joint=True)
        for packing in (EAGER, SIMULATE):
            rule = plan(policy, s.backbone, ROWS, 2)  # type: ignore[arg-type]
            found = denoiser.predict(s.x, 0.4, s.cond, plan=rule, guidance=2.0, packing=packing)
            assert torch.equal(found.depth, wanted)
            replayed = denoiser.predict(s.x, 0.4, s.cond, plan=StepPlan(depth=wanted), guidance=2.0)
            torch.testing.assert_close(found.eps, replayed.eps, **TOLERANCE)
        apart += len(set(first_below(values, s.exits, threshold)[:ROWS])) > 1
    assert apart > 0
