"""Exit where the uncertainty head falls below a threshold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.execution.exits import ExitView
from gearshift.execution.outputs import PACK, SIMULATE, Packing
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import Rows
from gearshift.policies import RunInfo, UncertaintyExit
from gearshift.runtime.errors import UsageError

from ..contract import EAGER, TOLERANCE, Subject, build
from ..toys import Isotropic


def subject(rows: int = 8, **config: object) -> Subject:
    """Isotropic with heads whose weights are large, so uncertainties spread over [0, 1]."""
    base = Subject.of("isotropic", rows=rows)
    torch.manual_seed(3)
    network = EarlyExit(ExitsConfig(**config), base.backbone)  # type: ignore[arg-type]
    for parameter in network.uncertainty_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return Subject("isotropic", network.requires_grad_(False), 0, base.x, base.time, base.cond)


def plan(policy: UncertaintyExit, s: Subject, batch: int | None = None) -> StepPlan:
    run = RunInfo((), s.backbone, batch or s.rows, s.rows // (batch or s.rows))
    return policy.plan(policy.begin(run), None)  # type: ignore[arg-type]


def means(s: Subject) -> Tensor:
    """Mean uncertainty at every exit of every row, [exits, R]."""
    u = s.run(StepPlan(taps=s.exits)).uncertainty
    return torch.stack([u[d].flatten(1).mean(1) if u[d].ndim > 1 else u[d] for d in s.exits])


def first_below(values: Tensor, threshold: float) -> list[int]:
    return [next((d + 1 for d in range(3) if values[d, r] < threshold), 4) for r in range(values.shape[1])]


@pytest.mark.parametrize("uncertainty", ["pixel_map", "token_mean"])
def test_each_row_leaves_at_its_first_exit_below(uncertainty: str) -> None:
    s = subject(uncertainty=uncertainty)
    values = means(s)
    seen = set()
    for threshold in torch.linspace(float(values.min()), float(values.max()), 9)[1:-1].tolist():
        threshold += 1e-4
        for packing in (EAGER, SIMULATE):
            outputs = s.run(plan(UncertaintyExit(threshold), s), packing=packing)
            assert outputs.depth.tolist() == first_below(values, threshold)
            seen |= set(outputs.depth.tolist())
    assert len(seen) >= 3


def test_threshold_zero_is_full_compute_bit_for_bit() -> None:
    s = subject()
    outputs = s.run(plan(UncertaintyExit(0.0), s))
    assert torch.equal(outputs.prediction, s.run().prediction)
    assert outputs.depth.tolist() == [4] * 8
    assert {event.kind for event in outputs.trace} == {"embed", "block", "readout"}  # no head is run


def test_threshold_one_leaves_at_the_first_exit() -> None:
    s = subject()
    for parameter in s.backbone.get_submodule("uncertainty_heads").parameters():
        parameter.fill_(1000.0 if parameter.ndim == 1 else 0.0)  # sigmoid saturates at exactly 1
    assert float(means(s).min()) == 1.0
    outputs = s.run(plan(UncertaintyExit(1.0), s))
    assert outputs.depth.tolist() == [1] * 8
    assert torch.equal(outputs.prediction, s.run(StepPlan(depth=1)).prediction)
    assert s.run(plan(UncertaintyExit(1.0, depths=[3, 2]), s)).depth.tolist() == [2] * 8


def test_only_some_exits() -> None:
    s = subject()
    values = means(s)
    threshold = float(values.median())
    depth = s.run(plan(UncertaintyExit(threshold, depths=[2]), s)).depth
    assert depth.tolist() == [2 if values[1, row] < threshold else 4 for row in range(8)]
    events = s.run(plan(UncertaintyExit(threshold, depths=[2]), s)).trace
    assert {event.index for event in events if event.kind == "uncertainty"} == {2}


def test_heads_run_only_on_rows_that_are_still_there() -> None:
    s = subject()
    outputs = s.run(plan(UncertaintyExit(float(means(s).median())), s), packing=EAGER)
    for event in outputs.trace:
        if event.kind == "uncertainty":
            assert event.rows.host().tolist() == [r for r in range(8) if outputs.depth[r] >= event.index]


def test_batch_statistic_moves_everybody_together() -> None:
    """And one hard sample changes the exit of the others, which the sample statistic does not let it do."""
    s = subject()
    values = means(s)
    for threshold in torch.linspace(float(values.min()), float(values.max()), 7).tolist():
        depth = s.run(plan(UncertaintyExit(threshold, statistic="batch"), s)).depth
        wanted = next((d + 1 for d in range(3) if float(values[d].mean()) < threshold), 4)
        assert depth.tolist() == [wanted] * 8
    threshold = float(values[0].mean()) + 1e-4
    easy = torch.tensor([int(values[0].argmin())])
    hard = torch.tensor(sorted([int(values[0].argmin()), int(values[0].argmax())]))
    for statistic in ("batch", "sample"):
        policy = plan(UncertaintyExit(min(threshold, float(values[0, hard].mean())), statistic=statistic), s)
        alone = int(s.run_some(easy, policy).depth[0])
        together = int(s.run_some(hard, policy).depth[hard.tolist().index(int(easy[0]))])
        assert alone == 1
        assert (together == 1) == (statistic == "sample")


def test_branches_of_a_sample_decide_together() -> None:
    """Eight rows are two branches of four samples; the mean over the branches decides."""
    s = subject()
    values = means(s)
    pairs = values.reshape(4, 2, 4).mean(1).repeat(1, 2)
    apart = 0
    for threshold in torch.linspace(float(values.min()), float(values.max()), 9)[1:-1].tolist():
        for packing in (EAGER, SIMULATE):
            joint = s.run(plan(UncertaintyExit(threshold, joint=True), s, batch=4), packing=packing)
            assert joint.depth.tolist() == first_below(pairs, threshold)
            assert torch.equal(joint.depth[:4], joint.depth[4:])
        single = s.run(plan(UncertaintyExit(threshold), s, batch=4))
        apart += int((single.depth[:4] != single.depth[4:]).sum())
        torch.testing.assert_close(joint.prediction, s.run(StepPlan(depth=joint.depth)).prediction, **TOLERANCE)
    assert apart > 0  # otherwise the joint decision was nothing new


def test_polarity() -> None:
    """u < theta is c > 1 - theta."""
    s = subject()
    rule = plan(UncertaintyExit(0.08), s).exit
    assert rule is not None
    u = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    view = ExitView(1, 0, (1, 4), Rows(500), u[:, None], None, lambda: u)
    assert torch.equal(rule.leaves(view, None), (1 - u) > 0.92)


def test_what_does_not_fit() -> None:
    info = RunInfo((), build("isotropic"), 2, 1)
    with pytest.raises(UsageError, match="this Isotropic has none"):
        UncertaintyExit(0.1).check(info)
    with pytest.raises(UsageError, match="asks for depth 7"):
        UncertaintyExit(0.1, depths=[7]).check(RunInfo((), EarlyExit(ExitsConfig(), Isotropic()), 2, 1))
    with pytest.raises(UsageError, match=r"1.5 is outside \[0, 1\]"):
        UncertaintyExit(1.5)
    with pytest.raises(UsageError, match="'max' is neither"):
        UncertaintyExit(0.1, statistic="max")


# Patience ------------------------------------------------------------------------------------------------------------

PATIENT = dict(patience=2, patience_depth=6)


@functools.cache
def thirteen_blocks(uncertainty: str = "pixel_map") -> Subject:
    """A U-ViT of 13 blocks, as the official pixel models; six rows with three labels and a null class."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        shape = dict(image_size=4, in_channels=1, patch_size=2, embed_dim=8, depth=12, num_heads=2)
        backbone = UViT(UViTConfig(num_classes=3, null_class=True, **shape))  # type: ignore[arg-type]
        network = EarlyExit(ExitsConfig(uncertainty=uncertainty), backbone)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        x = torch.randn(6, 1, 4, 4)
    network.eval().requires_grad_(False)
    return Subject("uvit-13", network, 0, x, torch.arange(6) * 150.0, torch.arange(6) % 3)


def with_hits(blocks: Collection[int]) -> Subject:
    """Heads forced by their biases: certain after these blocks (counted from 0), uncertain after all others."""
    s = thirteen_blocks()
    forced = copy.deepcopy(s.backbone)
    for depth in range(1, 14):
        linear = forced.get_submodule(f"uncertainty_heads.0_{depth}.linear")
        torch.nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
        torch.nn.init.constant_(linear.bias, -5.0 if depth - 1 in blocks else 5.0)  # type: ignore[arg-type]
    return Subject(s.case, forced, s.path, s.x, s.time, s.cond)


def patient_exit(values: list[float], threshold: float, patience: int, patience_depth: int) -> int:
    """Depth at which a row of these uncertainties (depths 1..13) leaves; written from the rule in words."""
    hits = 0
    for depth, value in enumerate(values[:-1], start=1):
        hits += value < threshold
        if value < threshold and (depth > patience_depth or hits >= patience):
            return depth
    return len(values)


@pytest.mark.parametrize(
    ("hits", "patience", "block"),
    [
        ({2, 4}, PATIENT, 4),
        ({2}, PATIENT, 12),  # full depth
        ({2, 6}, PATIENT, 6),
        ({2}, {}, 2),
        ({2, 3}, PATIENT, 3),
        ({6}, PATIENT, 6),  # the middle block and the decoder leave at one hit
        ({5}, PATIENT, 12),
        ({0, 5}, PATIENT, 5),
        ({2, 4, 5}, dict(patience=3, patience_depth=6), 5),
        ({2, 4}, dict(patience=3, patience_depth=6), 12),
        (set(), PATIENT, 12),
    ],
)
def test_patience_is_the_official_truth_table(hits: set[int], patience: dict[str, int], block: int) -> None:
    """Blocks count from 0 and depth is block + 1; blocks 0..5 are the encoder. Hits need not be consecutive."""
    s = with_hits(hits)
    for packing in (EAGER, SIMULATE):
        outputs = s.run(plan(UncertaintyExit(0.5, **patience), s), packing=packing)  # type: ignore[arg-type]
        assert outputs.depth.tolist() == [block + 1] * s.rows


def test_patience_counts_each_row_by_itself_whatever_the_packing() -> None:
    s = thirteen_blocks()
    u = s.run(StepPlan(taps=s.exits)).uncertainty
    values = torch.stack([u[d].flatten(1).mean(1) for d in s.exits])
    moved = 0
    for threshold in torch.linspace(float(values.min()), float(values.max()), 9)[1:-1].tolist():
        wanted = [patient_exit(values[:, row].tolist(), threshold, 2, 6) for row in range(s.rows)]
        moved += wanted != [patient_exit(values[:, row].tolist(), threshold, 1, 0) for row in range(s.rows)]
        for packing in (EAGER, PACK, Packing(0.5), SIMULATE):
            outputs = s.run(plan(UncertaintyExit(threshold, **PATIENT), s), packing=packing)
            assert outputs.depth.tolist() == wanted
            torch.testing.assert_close(
                outputs.prediction, s.run(StepPlan(depth=torch.tensor(wanted))).prediction, **TOLERANCE
            )
    assert moved >= 3, "patience has to matter for this to prove anything"


@pytest.mark.parametrize("joint", [False, True])
def test_patience_counts_each_guidance_branch(joint: bool) -> None:
    """Branches with hits of their own; together they count the hits of their mean."""
    s = thirteen_blocks("token_mean")
    denoiser = Denoiser(s.backbone, VPSDE(VPSDEConfig()))
    tapped = denoiser.predict(s.x, 0.4, s.cond, plan=StepPlan(taps=s.exits), guidance=2.0).uncertainty
    values = torch.stack([tapped[d] for d in s.exits])
    means = values.reshape(13, 2, s.rows).mean(1).repeat(1, 2)
    apart = 0
    for threshold in torch.linspace(float(values.min()), float(values.max()), 9)[1:-1].tolist():
        decisive = means if joint else values
        wanted = torch.tensor([patient_exit(row.tolist(), threshold, 2, 6) for row in decisive.T])
        policy = UncertaintyExit(threshold, joint=joint, **PATIENT)  # type: ignore[arg-type]
        for packing in (EAGER, PACK, SIMULATE):
            p = denoiser.predict(s.x, 0.4, s.cond, plan=plan(policy, s, s.rows), guidance=2.0, packing=packing)
            assert p.depth.tolist() == wanted.tolist()
            replayed = denoiser.predict(s.x, 0.4, s.cond, plan=StepPlan(depth=wanted), guidance=2.0)
            torch.testing.assert_close(p.eps, replayed.eps, **TOLERANCE)
        apart += int((wanted[:6] != wanted[6:]).any())
    assert apart == 0 if joint else apart >= 2


def test_patience_of_one_is_no_patience() -> None:
    s = thirteen_blocks()
    values = s.run(StepPlan(taps=s.exits)).uncertainty[4].flatten(1).mean(1)
    for threshold in values.tolist():
        without = s.run(plan(UncertaintyExit(threshold), s))
        for policy in (
            UncertaintyExit(threshold, patience=1, patience_depth=6),
            UncertaintyExit(threshold, patience=2, patience_depth=0),
        ):
            outputs = s.run(plan(policy, s))
            assert torch.equal(outputs.depth, without.depth)
            assert torch.equal(outputs.prediction, without.prediction)
            assert [(e.kind, e.index, len(e.rows)) for e in outputs.trace] == [
                (e.kind, e.index, len(e.rows)) for e in without.trace
            ]


def test_impossible_patience() -> None:
    with pytest.raises(UsageError, match="patience 0 must be at least 1 and patience_depth 6 at least 0"):
        UncertaintyExit(0.1, patience=0, patience_depth=6)
    with pytest.raises(UsageError, match="patience_depth -1 at least 0"):
        UncertaintyExit(0.1, patience_depth=-1)
