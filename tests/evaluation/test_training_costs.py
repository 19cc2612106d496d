"""What a training image costs under each objective, against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gearshift.backbones.base import Backbone
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.evaluation.training_costs import FROZEN_RULE, RULE, TrainedBy, shares_of, training_cost, training_mix
from gearshift.execution.cost import Cost
from gearshift.objectives.deediff import DeeDiff, DeeDiffConfig
from gearshift.objectives.scheduled import Scheduled, ScheduledConfig
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.objectives.staged import Staged, StagedConfig
from gearshift.policies import BypassSchedule, ExitSchedule

from ..contract import build, cost_table

SDE, LINEAR = VPSDE(VPSDEConfig()), Discrete(DiscreteConfig())
SIMPLE = Simple(SimpleConfig())


def full(network: Backbone, path: int = 0) -> Cost:
    return cost_table(network).full(network, path)


def cost_of(network: Backbone, objective: Any, process: Any = SDE, frozen: tuple[str, ...] = ()) -> Any:
    return training_cost(network, cost_table(network), process, objective, frozen)


@pytest.mark.parametrize("name", ["uvit-class", "dit-class", "isotropic"])
def test_plain_training_is_three_forwards(name: str) -> None:
    network = build(name)
    found = cost_of(network, SIMPLE)
    assert (found.forward, found.macs) == (full(network).macs, 3 * full(network).macs)
    assert (found.forward_linear, found.backward_linear) == (full(network).linear, 2 * full(network).linear)
    assert (found.rule, found.mix) == (RULE, None)


def test_stages_by_the_mix_of_the_objective() -> None:
    network = build("separate")
    costs = [full(network, path).macs for path in (0, 1)]
    mass = float(SDE.cdf(SDE.time_of_log_snr(torch.tensor(0.0))))
    for objective, share in (
        (SIMPLE, mass),
        (Staged(StagedConfig()), mass),
        (Staged(StagedConfig(choice="uniform")), 0.5),
        (Staged(StagedConfig(choice="custom", shares=[0.9, 0.1])), 0.9),
    ):
        found = cost_of(network, objective)
        assert found.mix.shares == pytest.approx((share, 1 - share))
        assert found.forward == pytest.approx(share * costs[0] + (1 - share) * costs[1])
        assert found.macs == pytest.approx(3 * found.forward)
    assert 0.2 < mass < 0.4


def test_stages_without_boundaries_are_counted_by_routing() -> None:
    """`TwoDecoders` routes by the sign of log-SNR and names no boundary."""
    network = build("two-decoders")
    mix = training_mix(network, SDE, SIMPLE)
    assert mix is not None
    assert mix.shares[0] == pytest.approx(float(SDE.cdf(SDE.time_of_log_snr(torch.tensor(0.0)))), abs=1e-4)


def test_a_schedule_pays_for_the_depths_it_reads() -> None:
    network, table = build("dit-class"), cost_table(build("dit-class"))
    for process in (SDE, LINEAR):
        found = cost_of(network, Scheduled(ScheduledConfig(schedule=ExitSchedule(depths=[4, 3, 2, 1]))), process)
        wanted = [table.path_cost(0, depth, blocks=network.paths[0]).macs for depth in (4, 3, 2, 1)]
        assert found.forward == pytest.approx(sum(wanted) / 4, rel=2e-3)  # bins are quarters but for one index
        assert found.macs == pytest.approx(3 * found.forward)
        shares = shares_of(network, process, Scheduled(ScheduledConfig(schedule=ExitSchedule(depths=[4, 3, 2, 1]))))
        assert shares is not None
        assert sorted(share.depth or 0 for share in shares) == [1, 2, 3, 4]
        assert sum(share.weight for share in shares) == pytest.approx(1)


def test_a_schedule_of_dropped_blocks_pays_for_what_remains() -> None:
    network, table = build("uvit-class"), cost_table(build("uvit-class"))
    found = cost_of(network, Scheduled(ScheduledConfig(schedule=BypassSchedule(dropped=[0, 2]))), LINEAR)
    saved = sum(
        table.entries["block", 0, block, "full"].macs - table.entries["block", 0, block, "bypass"].macs
        for block in (3, 4)
    )
    assert found.forward == pytest.approx(full(network).macs - saved / 2, rel=2e-3)


def test_every_exit_and_head_is_paid_in_deediff() -> None:
    network, table = build("exits-uvit"), cost_table(build("exits-uvit"))
    found = cost_of(network, DeeDiff(DeeDiffConfig()))
    heads = [cost for (kind, *_), cost in table.entries.items() if kind in ("readout", "uncertainty")]
    blocks = full(network).macs - table.entries["readout", 0, 5, "full"].macs
    assert len(heads) == 2 * len(network.exits())
    assert found.forward == blocks + sum(cost.macs for cost in heads)
    assert found.macs == 3 * found.forward


def test_frozen_parts_cost_what_passes_through_them() -> None:
    network, table = build("uvit-class"), cost_table(build("uvit-class"))

    def block(index: int) -> Cost:
        return table.entries["block", 0, index, "full"]

    everything = full(network)
    # The last block is frozen, but gradients of the earlier ones pass through it.
    late = cost_of(network, SIMPLE, frozen=("out_blocks.1.*",))
    assert late.rule == FROZEN_RULE
    assert late.forward == everything.macs
    assert late.backward == 2 * everything.macs - block(4).linear
    # All that comes before the middle block is frozen: nothing flows there.
    first = ("patch_embed.*", "label_emb.*", "pos_embed", "in_blocks.*")
    early = cost_of(network, SIMPLE, frozen=first)
    before = table.entries["embed", 0, 0, "full"] + block(0) + block(1)
    assert early.backward == 2 * (everything.macs - before.macs)
    assert early.backward_linear == 2 * (everything.linear - before.linear)


def test_what_is_not_known_is_not_guessed() -> None:
    class Other:
        may_leave_unused = False

    assert cost_of(build("uvit-class"), Other()) is None


def test_entry_of_a_run() -> None:
    network = build("uvit-class")
    objective = {"_target_": "gearshift.objectives.simple.Simple"}
    cfg = OmegaConf.create({"objective": objective, "trainer": {"freeze": ["in_blocks.*"]}, "pretrain": "digits"})
    by = TrainedBy.of(cfg, network, 1000)
    assert by is not None
    assert (by.images, by.frozen, by.before) == (1000, ("in_blocks.*",), "digits")
    cost = cost_of(network, by.objective)
    entry = cost.as_json(by)
    assert entry["pmacs"] == pytest.approx(1000 * 3 * full(network).macs / 1e15)
    assert (entry["objective"], entry["images"], entry["before"]) == ("Simple", 1000, "digits")
    assert cost.as_json(TrainedBy(by.objective, None))["pmacs"] is None
    assert TrainedBy.of(OmegaConf.create({"backbone": {}}), network, None) is None, "imported weights"
