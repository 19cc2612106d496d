"""Exits by a threshold: two names of one number, thresholds by noise level, patience in a row; saturation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gearshift.assembly import build_policy
from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.execution.exits import ExitView
from gearshift.execution.outputs import SIMULATE, Packing
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import Rows
from gearshift.policies import FromFile, LearnedExit, RunInfo, SaturationExit, UncertaintyExit
from gearshift.policies.threshold_exit import BelowThreshold, ThresholdExit
from gearshift.runtime.errors import UsageError

from ..contract import EAGER, TOLERANCE, Subject, build
from ..toys import Isotropic


def subject(**config: object) -> Subject:
    base = Subject.of("isotropic", rows=8)
    torch.manual_seed(3)
    network = EarlyExit(ExitsConfig(**config), base.backbone)  # type: ignore[arg-type]
    for parameter in network.uncertainty_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return Subject("isotropic", network.requires_grad_(False), 0, base.x, base.time, base.cond)


def plan(policy: ThresholdExit, s: Subject) -> StepPlan:
    return policy.plan(policy.begin(RunInfo((), s.backbone, s.rows, 1)), None)  # type: ignore[arg-type]


# Names ---------------------------------------------------------------------------------------------------------------


def test_certainty_is_one_minus_the_threshold() -> None:
    for certainty, threshold in ((0.92, 0.08), (0.95, 0.05), (0.87, 0.13), (0.0, 1.0), (1.0, 0.0)):
        assert UncertaintyExit(certainty=certainty) == UncertaintyExit(threshold)
        assert SaturationExit(similarity=certainty) == SaturationExit(threshold)
    s = subject()
    for certainty in torch.linspace(0.3, 0.7, 7).tolist():
        policies = UncertaintyExit(certainty=certainty), UncertaintyExit(1 - certainty)
        by_name, by_threshold = (s.run(plan(policy, s)).depth.tolist() for policy in policies)
        assert by_name == by_threshold
    assert replace(UncertaintyExit(certainty=0.9), threshold=0.3) == UncertaintyExit(0.3)


def test_one_number_has_one_name() -> None:
    with pytest.raises(UsageError, match=r"threshold=0.1 and certainty=0.9 are two names of one thing"):
        UncertaintyExit(0.1, certainty=0.9)
    with pytest.raises(UsageError, match=r"certainty 1.2 is outside \[0, 1\]"):
        UncertaintyExit(certainty=1.2)
    with pytest.raises(UsageError, match=r"similarity -0.1 is outside \[0, 1\]"):
        SaturationExit(similarity=-0.1)
    with pytest.raises(UsageError, match="threshold=None and thresholds=None; give one of them"):
        UncertaintyExit()
    with pytest.raises(UsageError, match=r"threshold=0.1 and thresholds=\[0.2\]; give one of them"):
        UncertaintyExit(0.1, thresholds=[0.2])
    with pytest.raises(UsageError, match=r"threshold 7 is outside \[0, 1\]"):
        UncertaintyExit(thresholds=[0.1, 7])
    with pytest.raises(UsageError, match=r"thresholds=\[\] has none; give one per bin"):
        UncertaintyExit(thresholds=[])
    for value in (None, "a", True):
        with pytest.raises(UsageError, match="is no number; give one in"):
            UncertaintyExit(thresholds=[0.1, value])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="3 bins need 2 edges"):
        UncertaintyExit(thresholds=[0.1, 0.2, 0.3], edges=[500.0])


# Thresholds by noise level -------------------------------------------------------------------------------------------


def test_every_call_has_the_threshold_of_its_bin() -> None:
    process = Discrete(DiscreteConfig("linear"))
    calls = DDIM(DDIMConfig(steps=10, spacing="linspace")).calls(process)
    run = RunInfo(calls, build("exits-isotropic"), 4, 1)
    policy = UncertaintyExit(thresholds=[0.1, 0.2, 0.3, 0.4], edges=[100.0, 400.0, 800.0])
    policy.check(run)
    state = policy.begin(run)
    for call in calls:
        rule = policy.plan(state, call).exit
        assert isinstance(rule, BelowThreshold)
        index = call.training_index
        assert rule.threshold == (0.1 if index < 100 else 0.2 if index < 400 else 0.3 if index < 800 else 0.4)
    equal = UncertaintyExit(thresholds=[0.3] * 4)
    for call in calls:
        one, many = UncertaintyExit(0.3).plan(state, call).exit, equal.plan(state, call).exit
        assert isinstance(one, BelowThreshold) and isinstance(many, BelowThreshold)
        assert one.threshold == many.threshold
    assert equal.name == "uncertainty < 0.3, 0.3, 0.3, 0.3"


# Patience ------------------------------------------------------------------------------------------------------------


def by_hand(hits: list[bool], patience: int, until: int, consecutive: bool) -> int:
    count = 0
    for depth, hit in enumerate(hits, 1):
        count = count + 1 if hit else 0 if consecutive else count
        if hit and (depth > until or count >= patience):
            return depth
    return len(hits) + 1


@pytest.mark.parametrize("consecutive", [False, True])
def test_patience_against_the_rule_in_words(consecutive: bool) -> None:
    """Random hits of 40 rows at eight exits; rows that left are not shown again."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for patience in (1, 2, 3):
        for until in (0, 3, 8):
            values = torch.rand(40, 8, generator=generator)
            rule = BelowThreshold(
                lambda view: view.hidden[:, 0],
                0.5, "sample", False, 40, patience=patience, patience_depth=(until,), consecutive=consecutive,
            )  # fmt: skip
            state, left = rule.begin(40), torch.full((40,), 9)
            for depth in range(1, 9):
                here = (left == 9).nonzero().flatten()
                column = values[here, depth - 1][:, None]
                view = ExitView(depth, 0, tuple(range(1, 10)), Rows(40, here), column, None, column.clone)
                left[here[rule.leaves(view, state)]] = depth
            wanted = [by_hand((row < 0.5).tolist(), patience, until, consecutive) for row in values]
            assert left.tolist() == wanted
            seen.add(tuple(wanted))
    assert len(seen) == 9


def test_the_encoder_half_is_where_long_skips_are_left() -> None:
    backbone = EarlyExit(ExitsConfig(), build("long-skips"))
    pushing = [d for d, block in enumerate(backbone.paths[0], 1) if block in backbone.pushes]
    rule = UncertaintyExit(0.1, patience=2, patience_depth="encoder").rule(RunInfo((), backbone, 2, 1), 0.1)
    assert rule.patience_depth == (max(pushing),)
    flat = UncertaintyExit(0.1, patience=2, patience_depth="encoder").rule(
        RunInfo((), EarlyExit(ExitsConfig(), Isotropic()), 2, 1), 0.1
    )
    assert flat.patience_depth == (0,)
    with pytest.raises(UsageError, match="patience_depth 'decoder' at least 0, or encoder"):
        UncertaintyExit(0.1, patience_depth="decoder")


@pytest.mark.parametrize("joint", [False, True])
def test_a_batch_decides_branch_by_branch_unless_jointly(joint: bool) -> None:
    """Three branches of four rows (the official code runs them one after the other), also where some rows have left."""
    values = torch.rand(12, generator=torch.Generator().manual_seed(1))
    rule = BelowThreshold(lambda view: view.hidden[:, 0], 0.5, "batch", joint, 4)
    for here in (torch.arange(12), torch.tensor([0, 1, 2, 3, 9, 10]), torch.tensor([5, 6])):
        column = values[here][:, None]
        left = rule.leaves(ExitView(1, 0, (1, 2), Rows(12, here), column, None, column.clone), rule.begin(12))
        for row, leaves in zip(here.tolist(), left.tolist(), strict=True):
            group = here if joint else here[here // 4 == row // 4]
            assert leaves == bool(values[group].mean() < 0.5)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_policy_from_a_file_is_that_policy(tmp_path: Path) -> None:
    file = tmp_path / "found.yaml"
    file.write_text("_target_: gearshift.policies.UncertaintyExit\nthreshold: 0.4\ndepths: [2]\n")
    policy = build_policy(str(file))
    wanted = UncertaintyExit(0.4, depths=[2])
    assert isinstance(policy, FromFile) and repr(policy) == repr(wanted) and policy.name == wanted.name
    s = subject()
    run = RunInfo((), s.backbone, s.rows, 1)
    policy.check(run)
    both = [s.run(one.plan(one.begin(run), None)) for one in (policy, wanted)]  # type: ignore[arg-type]
    assert torch.equal(both[0].prediction, both[1].prediction) and torch.equal(both[0].depth, both[1].depth)
    with pytest.raises(UsageError, match=r"depth 2, but Other can be read out at depths \[4\]"):
        policy.check(RunInfo((), Other(), 2, 1))
    for text, message in (
        ("threshold: 0.4", "holds no policy, which would say what it is by _target_"),
        ("a: [", "is not readable as YAML"),
        ("_target_: gearshift.diffusion.solvers.ddim.DDIM", "holds DDIM, which is no policy"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            FromFile(file)
    with pytest.raises(UsageError, match="there is no file"):
        FromFile(tmp_path / "gone.yaml")


class Other(Isotropic):
    """With heads, readable at the end only."""

    has_uncertainty = True

    def exits(self, path: int = 0) -> tuple[int, ...]:
        return (4,)


# Saturation ----------------------------------------------------------------------------------------------------------


def changes(s: Subject) -> Tensor:
    """1 - mean cosine similarity of consecutive states, [blocks, R], in plain operations."""
    stream = s.backbone.embed(s.x, s.time, s.cond)
    hidden, found = stream.hidden, []
    for block in range(4):
        after = s.backbone.blocks[block](hidden, stream.cond)
        dot = (after * hidden).sum(-1) / (after.norm(dim=-1) * hidden.norm(dim=-1))
        found.append(1 - dot.mean(1))
        hidden = after
    return torch.stack(found)


def test_saturation_leaves_where_the_state_stops_changing() -> None:
    s = Subject.of("isotropic", rows=8)
    values = changes(s)
    seen = set()
    for threshold in torch.linspace(float(values[:3].min()), float(values[:3].max()), 9)[1:-1].tolist():
        wanted = [next((d + 1 for d in range(3) if values[d, r] < threshold), 4) for r in range(8)]
        for packing in (EAGER, SIMULATE):
            outputs = s.run(plan(SaturationExit(threshold), s), packing=packing)
            assert outputs.depth.tolist() == wanted
            replayed = s.run(StepPlan(depth=torch.tensor(wanted))).prediction
            torch.testing.assert_close(outputs.prediction, replayed, **TOLERANCE)
        seen |= set(wanted)
    assert len(seen) >= 2


def test_saturation_off_is_full_compute_bit_for_bit() -> None:
    s = Subject.of("isotropic", rows=8)
    for policy in (SaturationExit(0.0), SaturationExit(similarity=1.0)):
        outputs = s.run(plan(policy, s))
        assert torch.equal(outputs.prediction, s.run().prediction) and outputs.depth.tolist() == [4] * 8


def test_states_of_different_shape_have_changed() -> None:
    rule = SaturationExit(0.5)
    hidden = torch.randn(3, 4, 2, 2)
    for before in (None, torch.randn(3, 8, 2, 2)):
        view = ExitView(2, 0, (1, 2, 3), Rows(3), hidden, before, lambda: hidden)
        assert rule.measure(view).tolist() == [1.0, 1.0, 1.0]
    same = ExitView(2, 0, (1, 2, 3), Rows(3), hidden, 3 * hidden, lambda: hidden)
    torch.testing.assert_close(rule.measure(same), torch.zeros(3), atol=1e-6, rtol=0)
    turned = ExitView(2, 0, (1, 2, 3), Rows(3), hidden, -hidden, lambda: hidden)
    assert rule.measure(turned).tolist() == [1.0, 1.0, 1.0]  # 2, kept within [0, 1]


# The learned exit ----------------------------------------------------------------------------------------------------


def test_the_learned_exit_asks_its_one_head() -> None:
    s = subject(per="network", uncertainty="token_mean")
    u = s.run(StepPlan(taps=s.exits)).uncertainty
    values = torch.stack([u[d] for d in s.exits])
    threshold = float(values[:3].median())
    outputs = s.run(plan(LearnedExit(threshold), s))
    assert outputs.depth.tolist() == [next((d + 1 for d in range(3) if values[d, r] < threshold), 4) for r in range(8)]
    LearnedExit(0.1).check(RunInfo((), s.backbone, 2, 1))
    with pytest.raises(UsageError, match=r"one head for all depths, and Isotropic has exits.per=layer"):
        LearnedExit(0.1).check(RunInfo((), subject().backbone, 2, 1))
    with pytest.raises(UsageError, match="policy LearnedExit needs uncertainty heads"):
        LearnedExit(0.1).check(RunInfo((), build("isotropic"), 2, 1))


# What the last call teaches ------------------------------------------------------------------------------------------


def test_where_nobody_left_nobody_is_expected_to_leave() -> None:
    """After a call the exits at which no row left are quiet; a call without the network teaches nothing."""
    s = subject(uncertainty="token_mean")
    denoiser = Denoiser(s.backbone, Discrete(DiscreteConfig("linear")))
    run = RunInfo((), s.backbone, 8, 1)
    seen = set()
    for threshold in (0.3, 0.45, 0.5, 0.55, 0.7):
        policy = UncertaintyExit(threshold)
        state = policy.begin(run)
        first = policy.plan(state, None)  # type: ignore[arg-type]
        assert first.exit is not None and list(first.exit.quiet((1, 2, 3, 4))) == []  # type: ignore[attr-defined]
        prediction = denoiser.predict(s.x, 300.0, s.cond, plan=first)
        state = policy.observe(state, None, s.x, s.x, prediction)  # type: ignore[arg-type]
        left = set(prediction.depth.tolist())
        quiet = policy.plan(state, None).exit.quiet((1, 2, 3, 4))  # type: ignore[arg-type,union-attr]
        assert list(quiet) == [depth for depth in (1, 2, 3) if depth not in left and depth < max(left)]
        held = denoiser.predict(s.x, 300.0, s.cond, plan=StepPlan(call=False), held=prediction.held)
        assert policy.observe(state, None, s.x, s.x, held) is state  # type: ignore[arg-type]
        seen.add(tuple(quiet))
    assert len(seen) >= 2


def test_images_do_not_depend_on_what_was_expected() -> None:
    s = subject(uncertainty="token_mean")
    u = s.run(StepPlan(taps=s.exits)).uncertainty
    threshold = float(torch.stack([u[d] for d in (1, 2, 3)]).median())
    policy = UncertaintyExit(threshold)
    run = RunInfo((), s.backbone, 8, 1)
    plain = s.run(StepPlan(exit=policy.rule(run, threshold)))
    for left in (frozenset(), frozenset({2}), frozenset({1, 2, 3})):
        late = s.run(StepPlan(exit=policy.rule(run, threshold, left)), packing=Packing(0.0, overlap=True))
        assert late.depth.tolist() == plain.depth.tolist()
        torch.testing.assert_close(late.prediction, plain.prediction, **TOLERANCE)


def test_networks_that_run_as_a_whole_are_refused() -> None:
    class Whole(Isotropic):
        takes_exit_rules = False

    with pytest.raises(UsageError, match="policy SaturationExit decides within a call, which Whole does not allow"):
        SaturationExit(0.1).check(RunInfo((), Whole(), 2, 1))


def test_processes_without_times_of_a_table_have_bins_too() -> None:
    calls = DDIM(DDIMConfig(steps=5, spacing="linspace")).calls(VPSDE(VPSDEConfig()))
    run = RunInfo(calls, build("exits-isotropic"), 4, 1)
    policy = UncertaintyExit(thresholds=[0.0, 1.0], domain="log_snr", edges=[0.0])
    policy.check(run)
    found = [policy.plan(policy.begin(run), call).exit.threshold for call in calls]  # type: ignore[union-attr]
    assert found == [1.0 if call.log_snr <= 0 else 0.0 for call in calls] and len(set(found)) == 2
