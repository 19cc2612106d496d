"""Averages over stages under every weighting, with the published numbers; and what a network of stages stores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from gearshift.backbones.separate import SeparateConfig, SeparateNetworks
from gearshift.backbones.staging import StageRouter
from gearshift.diffusion.edm import EDM, EDMConfig
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.diffusion.solvers.base import Call
from gearshift.diffusion.solvers.dpm_singlestep import DPMSinglestep, DPMSinglestepConfig
from gearshift.diffusion.solvers.edm_heun import EDMHeun, EDMHeunConfig
from gearshift.evaluation.stage_costs import (
    account,
    calls_mix,
    calls_per_stage,
    given_mix,
    interval,
    interval_mix,
    mass_mix,
    stages_of,
    uniform_mix,
)
from gearshift.execution.cost import CostTable
from gearshift.runtime.errors import UsageError

from ..contract import build, cost_table
from ..toys import Isotropic, TwoDecoders

# GMACs of one image per stage, of the released networks: conv+linear (VP, LDM) and in all (EDM).
VP_COSTS, EDM_COSTS, LDM_COSTS = [29.93, 17.64, 6.31], [35.75, 21.19, 7.73], [105.79, 72.94, 48.15]
VP, EDM_PROCESS = VPSDE(VPSDEConfig()), EDM(EDMConfig())
LDM = Discrete(DiscreteConfig(schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195))
VP_BOUNDARIES = [math.exp(-0.5 * float(VP.log_snr(t))) for t in (0.4420, 0.6308)]
EDM_BOUNDARIES = [2.5103, 7.6577]
# Stage k holds the indices below these.
LDM_BOUNDARIES = [math.exp(-0.5 * float(LDM.log_snr(t))) for t in (441, 630)]


class Routed(TwoDecoders):
    """Says where levels go, and is never run."""

    def __init__(self, boundaries: Sequence[float]) -> None:
        torch.nn.Module.__init__(self)
        self.boundaries, self.paths = tuple(boundaries), ((),) * (len(boundaries) + 1)

    def route(self, log_snr: torch.Tensor) -> torch.Tensor:
        return StageRouter(self.boundaries).route(log_snr)


def test_boundaries_are_the_published_times() -> None:
    assert pytest.approx([2.51027, 7.405], rel=1e-3) == VP_BOUNDARIES
    assert pytest.approx([2.15, 5.32], rel=1e-2) == LDM_BOUNDARIES


@pytest.mark.parametrize(
    ("boundaries", "process", "costs", "wanted"),
    [
        (VP_BOUNDARIES, VP, VP_COSTS, 18.89),
        (EDM_BOUNDARIES, EDM_PROCESS, EDM_COSTS, 22.7),
        (LDM_BOUNDARIES, LDM, LDM_COSTS, 78.3),
    ],
)
def test_by_interval_length(boundaries: list[float], process: Process, costs: list[float], wanted: float) -> None:
    mix = interval_mix(boundaries, process)
    assert mix.average(costs) == pytest.approx(wanted, rel=2e-3)
    assert sum(mix.shares) == pytest.approx(1)
    # Ratios have no length of their own: then the axis is that of the VP-SDE, and the average says so.
    assert mix.of == f"length in t of {'vp_sde' if process is not LDM else 'scaled_linear'}"


def test_uniformly() -> None:
    assert uniform_mix(3).average(VP_COSTS) == pytest.approx(17.96, abs=5e-3)
    assert uniform_mix(3).average(EDM_COSTS) == pytest.approx(21.56, abs=5e-3)
    assert uniform_mix(3).average(LDM_COSTS) == pytest.approx(75.6, abs=5e-2)


def test_by_training_times_of_edm() -> None:
    mix = mass_mix(EDM_BOUNDARIES, EDM_PROCESS)
    assert [round(100 * share, 2) for share in mix.shares] == pytest.approx([96.1, 3.5, 0.35], abs=0.06)
    assert mix.average(EDM_COSTS) == pytest.approx(35.1, abs=0.05)


def test_mass_is_length_where_times_are_uniform() -> None:
    for boundaries, process in ((VP_BOUNDARIES, VP), (LDM_BOUNDARIES, LDM)):
        assert mass_mix(boundaries, process).shares == interval_mix(boundaries, process).shares
    assert mass_mix(LDM_BOUNDARIES, LDM).shares == pytest.approx([0.442, 0.189, 0.369], abs=1e-12)


def test_by_solver_calls() -> None:
    singlestep = DPMSinglestep(DPMSinglestepConfig(steps=20, order=3, spacing="log_snr", t_end=1e-4, denoise=False))
    heun = EDMHeun(EDMHeunConfig(steps=18))
    for boundaries, calls, costs, counts, wanted in (
        (VP_BOUNDARIES, singlestep.calls(VP), VP_COSTS, [12, 2, 6], 21.6),
        (EDM_BOUNDARIES, heun.calls(EDM_PROCESS), EDM_COSTS, [18, 4, 13], 23.7),
    ):
        network = Routed(boundaries)
        assert calls_per_stage(network, calls) == counts
        mix = calls_mix(network, calls, "solver")
        assert mix.average(costs) == pytest.approx(wanted, abs=0.05)
        assert mix.of == f"calls of solver: {' / '.join(map(str, counts))} of {sum(counts)}"


def test_given_weights_in_any_scale() -> None:
    assert given_mix("training", "x", [1, 3]).shares == (0.25, 0.75)
    for wrong in ([], [0.0, 0.0], [1.0, -0.5]):
        with pytest.raises(UsageError, match="weights of the stages"):
            given_mix("training", "x", wrong)


def test_stages_of_a_shared_encoder() -> None:
    """Everything but the other decoder and its heads; earlier heads are no part of a full-depth prediction."""
    network = TwoDecoders()
    stages, shared = stages_of(network, CostTable.measure(network))

    def size(*names: str) -> int:
        return sum(p.numel() for name in names for p in network.get_submodule(name).parameters())

    encoder = size("stem", "blocks.0", "blocks.1", "blocks.2")
    decoders = [size("blocks.3", "blocks.4", "blocks.5", "heads.0_6")]
    decoders.append(size("blocks.6", "blocks.7", "blocks.8", "blocks.9", "heads.1_7"))
    assert shared == encoder
    assert [stage.params_own for stage in stages] == decoders
    assert [stage.params for stage in stages] == [encoder + decoder for decoder in decoders]
    assert all(stage.sigma is None for stage in stages), "it names no boundaries"


def test_separate_networks_share_nothing() -> None:
    network = build("separate")
    found = account(network, cost_table(network), VP, {})
    sizes = [sum(p.numel() for p in own.parameters()) for own in network.networks]  # type: ignore[union-attr]
    assert found["params_shared"] == 0
    assert [stage["params_active"] for stage in found["stages"]] == sizes == [s["params_own"] for s in found["stages"]]
    assert found["params_stored"] == sum(sizes)
    assert [stage["sigma"] for stage in found["stages"]] == [[0.0, 1.0], [1.0, None]]


def test_separate_networks_of_one_kind_cost_what_one_costs() -> None:
    network = SeparateNetworks(SeparateConfig([Isotropic(), Isotropic(), Isotropic()], tuple(VP_BOUNDARIES)))
    one = Isotropic()
    wanted = CostTable.measure(one).full(one)
    calls: tuple[Call, ...] = EDMHeun(EDMHeunConfig(steps=18)).calls(VP)
    found = account(network, CostTable.measure(network), VP, {"heun": calls}, given_mix("training", "x", [5, 1, 1]))
    assert set(found["averages"]) == {"uniform", "mass", "interval_length", "training", "solver_calls"}
    for average in found["averages"].values():
        assert average["gmacs"] == pytest.approx(wanted.macs / 1e9)
        assert average["gmacs_conv_linear"] == pytest.approx(wanted.linear / 1e9)
    assert found["params_stored"] == 3 * sum(p.numel() for p in one.parameters())
    several = account(network, CostTable.measure(network), VP, {"heun": calls, "again": calls})
    assert {"solver_calls: heun", "solver_calls: again"} <= set(several["averages"])


def test_buffers_are_told_apart_from_parameters() -> None:
    network = Isotropic()
    params = sum(p.numel() for p in network.parameters())
    network.register_buffer("filter", torch.ones(4, 4))
    network.register_buffer("scratch", torch.ones(7), persistent=False)
    two = SeparateNetworks(SeparateConfig([network, Isotropic()], (1.0,)))
    found = account(two, CostTable.measure(two), VP, {})
    assert (found["params_stored"], found["buffers_stored"]) == (2 * params, 16)


def test_intervals_in_words() -> None:
    assert [interval(s) for s in ([0.0, 2.51], [2.51, None], None)] == ["0 to 2.51", "above 2.51", "by the network"]
