"""The contract of every backbone: exits, packing, bypass, taps, gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.execution.outputs import PACK, SIMULATE, Packing

from ..contract import CASES, EAGER, TOLERANCE, Impatient, LeaveAt, Subject, build, plain_loop, random_depths
from ..toys import Isotropic, LongSkips, TwoDecoders

PATHS = [(case.name, path) for case in CASES for path in range(len(build(case.name).paths))]


@pytest.fixture(params=PATHS, ids=[f"{name}-{path}" for name, path in PATHS])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject.of(*request.param)


def assert_close(actual: Tensor, expected: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or TOLERANCE))


def test_outputs_are_worth_comparing(subject: Subject) -> None:
    """Rows, exits and inputs give different and moderate numbers; otherwise the suite would prove nothing."""
    outputs = [plain_loop(subject, depth) for depth in subject.exits]
    assert all(0.05 < output.std() < 50 for output in outputs)
    for a, b in pairwise(outputs):
        assert (a - b).abs().mean() > 1e-2
    assert (outputs[-1][0] - outputs[-1][1]).abs().mean() > 1e-2


@pytest.mark.parametrize("kind", [Isotropic, LongSkips, TwoDecoders])
def test_plain_loop_is_the_network_written_by_hand(kind: type) -> None:
    name = {Isotropic: "isotropic", LongSkips: "long-skips", TwoDecoders: "two-decoders"}[kind]
    for path in range(len(build(name).paths)):
        s = Subject.of(name, path)
        assert torch.equal(plain_loop(s), s.backbone(s.x, s.time, s.cond, path))


def test_full_plan_is_the_plain_loop(subject: Subject) -> None:
    outputs = subject.run(subject.plan())
    assert torch.equal(outputs.prediction, plain_loop(subject))
    assert outputs.depth.tolist() == [len(subject.blocks)] * subject.rows
    assert outputs.prediction.shape[1] == subject.backbone.out_channels


def test_static_exit_is_the_truncated_loop(subject: Subject) -> None:
    for depth in subject.exits:
        for packing in (PACK, SIMULATE):
            outputs = subject.run(subject.plan(depth=depth), packing=packing)
            assert torch.equal(outputs.prediction, plain_loop(subject, depth))
            assert outputs.depth.tolist() == [depth] * subject.rows


def test_rows_leave_where_the_plan_says(subject: Subject) -> None:
    """Packed, carried and simulated runs agree with each other and with each row run alone, for random depths."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        depths = random_depths(subject, generator)
        plan = subject.plan(depth=depths)
        packed = subject.run(plan, packing=EAGER)
        assert torch.equal(packed.depth, depths)
        for packing in (PACK, Packing(0.4), Packing(1.0), SIMULATE):
            other = subject.run(plan, packing=packing)
            assert_close(other.prediction, packed.prediction)
            assert torch.equal(other.depth, depths)
        for row, depth in enumerate(depths.tolist()):
            alone = plain_loop(subject, depth, index=torch.tensor([row]))
            assert_close(packed.prediction[row : row + 1], alone)
            some = subject.run_some(torch.tensor([row]), plan)
            assert_close(some.prediction, alone)
            assert some.depth.tolist() == [depth]


def test_rule_lets_rows_leave_at_different_depths(subject: Subject) -> None:
    script = torch.tensor(subject.exits)[torch.arange(subject.rows) % len(subject.exits)]
    by_depth = subject.run(subject.plan(depth=script))
    for packing in (EAGER, PACK, Packing(0.5), SIMULATE):
        by_rule = subject.run(subject.plan(exit=LeaveAt(script)), packing=packing)
        assert torch.equal(by_rule.depth, script)
        assert_close(by_rule.prediction, by_depth.prediction)


def test_rule_never_lets_a_row_pass_its_depth(subject: Subject) -> None:
    """`depth` and `exit` together: the earlier of the two."""
    last, first = subject.exits[-1], subject.exits[0]
    script = torch.full((subject.rows,), last)
    script[::2] = first
    middle = subject.exits[len(subject.exits) // 2]
    outputs = subject.run(subject.plan(depth=middle, exit=LeaveAt(script)))
    assert torch.equal(outputs.depth, script.clamp(max=middle))


def test_replayed_decisions_give_the_same_images(subject: Subject) -> None:
    """What a data-dependent rule with state decided in the packed run, simulated: 1e-5."""
    seen: set[int] = set()
    for seed in range(4):
        s = Subject.of(subject.case, subject.path, rows=9, seed=seed)
        packed = s.run(s.plan(exit=Impatient()), packing=EAGER)
        seen |= set(packed.depth.tolist())
        replayed = s.run(s.plan(depth=packed.depth), packing=SIMULATE)
        assert_close(replayed.prediction, packed.prediction)
        for packing in (Packing(0.5), SIMULATE):  # the rule's state follows the rows whatever the packing
            again = s.run(s.plan(exit=Impatient()), packing=packing)
            assert torch.equal(again.depth, packed.depth)
            assert_close(again.prediction, packed.prediction)
    assert len(seen) > 1 or len(subject.exits) < 3


def test_bypass_keeps_only_what_the_backbone_says(subject: Subject) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        dropped = frozenset(b for b in subject.blocks if torch.rand((), generator=generator) < 0.4)
        outputs = subject.run(subject.plan(bypass=dropped))
        assert torch.equal(outputs.prediction, plain_loop(subject, bypass=dropped))
        depths = random_depths(subject, generator)
        packed = subject.run(subject.plan(bypass=dropped, depth=depths), packing=EAGER)
        simulated = subject.run(subject.plan(bypass=dropped, depth=depths), packing=SIMULATE)
        assert_close(packed.prediction, simulated.prediction)
    assert torch.equal(subject.run(subject.plan(bypass=frozenset())).prediction, plain_loop(subject))


def test_bypass_of_a_decoder_block_keeps_the_skip_merge() -> None:
    s = Subject.of("long-skips")
    b = s.backbone
    assert isinstance(b, LongSkips)
    tokens = b.embed(s.x, s.time, None).hidden
    first = b.encoder[0](tokens, {})
    second = b.encoder[1](first, {})
    hidden = b.decoder[0](b.encoder[2](second, {}), {}, second)
    merged = b.decoder[1].merge(torch.cat([hidden, first], dim=-1))
    assert torch.equal(s.run(s.plan(bypass=frozenset({4}))).prediction, b.readout(merged, {}, 5))


def test_taps_are_static_exits_of_all_rows(subject: Subject) -> None:
    taps = subject.exits
    outputs = subject.run(subject.plan(taps=taps))
    assert set(outputs.taps) == set(taps)
    for depth in taps:
        assert_close(outputs.taps[depth], plain_loop(subject, depth))
    assert_close(outputs.prediction, plain_loop(subject))
    readouts = [event for event in outputs.trace if event.kind == "readout"]
    assert sorted(event.index for event in readouts) == sorted(taps)  # the full depth is read once
    if subject.backbone.has_uncertainty:
        assert set(outputs.uncertainty) == set(taps)
        assert all(float(u.min()) >= 0 and float(u.max()) <= 1 for u in outputs.uncertainty.values())
    else:
        assert outputs.uncertainty == {}


def test_taps_do_not_change_who_leaves(subject: Subject) -> None:
    """Tapped depths are read for all rows, those that have left included."""
    generator = torch.Generator().manual_seed(3)
    depths = random_depths(subject, generator)
    taps = tuple(subject.exits[::2])
    for packing in (EAGER, SIMULATE):
        outputs = subject.run(subject.plan(depth=depths, taps=taps), packing=packing)
        assert torch.equal(outputs.depth, depths)
        assert_close(outputs.prediction, subject.run(subject.plan(depth=depths)).prediction)
        for depth in taps:
            assert_close(outputs.taps[depth], plain_loop(subject, depth))


def test_gradients_of_per_row_exits_are_those_of_the_gathered_full_run(subject: Subject) -> None:
    s = Subject.of(subject.case, subject.path, dtype=torch.float64)
    depths = random_depths(s, torch.Generator().manual_seed(4))
    weight = torch.randn(s.rows, s.backbone.out_channels, *s.x.shape[2:], dtype=torch.float64)
    parameters = list(s.backbone.parameters())
    s.backbone.requires_grad_(True)
    try:
        packed = s.run(s.plan(depth=depths), packing=EAGER).prediction
        simulated = s.run(s.plan(depth=depths), packing=SIMULATE).prediction
        taps = s.run(s.plan(taps=s.exits)).taps
        gathered = torch.stack([taps[depth][row] for row, depth in enumerate(depths.tolist())])
        by_hand = torch.cat(
            [plain_loop(s, depth, index=torch.tensor([row])) for row, depth in enumerate(depths.tolist())]
        )
        wanted = _gradients((by_hand * weight).sum(), parameters)
        assert any(float(g.abs().max()) > 0 for g in wanted)
        for prediction in (packed, simulated, gathered):
            for actual, expected in zip(_gradients((prediction * weight).sum(), parameters), wanted, strict=True):
                assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    finally:
        s.backbone.requires_grad_(False)


def _gradients(loss: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    given = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(given, parameters, strict=True)]
