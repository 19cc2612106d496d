"""ASE's fine-tuning objective: times, depths, weights, and what one sample at a time would give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.assembly import named
from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.diffusion.solvers.base import make_calls
from gearshift.execution.plan import StepPlan
from gearshift.objectives.base import Batch, Draws, noised
from gearshift.objectives.scheduled import UNIT, Scheduled, ScheduledConfig
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.objectives.variational import noise_losses
from gearshift.policies import BypassSchedule, ExitSchedule, Full, RunInfo
from gearshift.runtime import config, keys
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir

from ..contract import build

LINEAR, SDE = Discrete(DiscreteConfig()), VPSDE(VPSDEConfig())
PROCESSES = [LINEAR, SDE, Discrete(DiscreteConfig(schedule="scaled_linear", first_index=1))]
SCHEDULES = {
    "index": ExitSchedule(depths=[4, 3, 2, 1]),
    "log_snr": ExitSchedule(depths=[3, 4, 1], domain="log_snr", edges=[2.0, -1.5]),
    "uneven": ExitSchedule(depths=[4, 2, 3], edges=[50.0, 700.5]),
}


def batch_of(network: Backbone, slot: Tensor, micro_batch: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (64, network.in_channels, network.image_size, network.image_size)
    images = (torch.rand(shape, generator=generator) * 2 - 1)[slot]
    return Batch(images, slot % 3 if network.cond_kind == "class" else None, slot, micro_batch)


def objective(schedule: Any = SCHEDULES["index"], **settings: Any) -> Scheduled:
    return Scheduled(ScheduledConfig(schedule=schedule, **settings))


@contextmanager
def block_rows(network: Backbone) -> Iterator[list[int]]:
    """Rows of every call of a block, in order."""
    rows: list[int] = []
    handles = [
        block.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0]))) for block in network.blocks
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def gradients(loss: Tensor, network: Backbone) -> list[Tensor]:
    parameters = list(network.parameters())
    given = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(given, parameters, strict=True)]


@pytest.fixture(params=["isotropic", "dit-class", "uvit-class", "long-skips", "exits-dit"])
def network(request: pytest.FixtureRequest) -> Any:
    found = build(request.param).requires_grad_(True)
    yield found
    found.requires_grad_(False)


# The loss ------------------------------------------------------------------------------------------------------------


def test_at_full_depth_it_is_the_plain_loss_bit_for_bit(network: Backbone) -> None:
    batch, denoiser = batch_of(network, torch.arange(7)), Denoiser(network, LINEAR)
    made = objective(ExitSchedule(depths=[network.num_blocks()] * 3))
    made.check(network)
    ours = made.loss(denoiser, batch, Draws(3, batch))
    plain = Simple(SimpleConfig()).loss(denoiser, batch, Draws(3, batch))
    assert ours.pop("depth") == network.num_blocks()
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)
    for a, b in zip(gradients(ours["loss"], network), gradients(plain["loss"], network), strict=True):
        assert torch.equal(a, b)


def one_at_a_time(
    denoiser: Denoiser, policy: ExitSchedule | BypassSchedule, batch: Batch, seed: int, weights: list[float]
) -> Tensor:
    """mean of lambda (MSE + VLB), every sample alone in its batch and under the policy's own plan for its level."""
    network, process = denoiser.network, denoiser.process
    terms = []
    for row in range(len(batch.slot)):
        one = batch.take(torch.tensor([row]))
        time, noise, noisy = noised(denoiser, one, Draws(seed, one))
        [call] = make_calls(process, time.tolist())
        plan = policy.plan(RunInfo((call,), network, 1, 1), call)
        output = denoiser.rows(noisy, time, one.cond, plan).prediction
        squared, bound = noise_losses(process, time, one.images, noise, output)
        total = squared if bound is None else squared + bound
        terms.append(weights[policy.bins.of(call.training_index, call.log_snr)] * total)
    return torch.cat(terms).mean()


@pytest.mark.parametrize("process", [LINEAR, SDE], ids=lambda p: p.name)
def test_it_is_the_mean_over_samples_alone(network: Backbone, process: Process) -> None:
    """Loss and every gradient; the weights multiply both parts of the loss, before the mean."""
    denoiser = Denoiser(network, process)
    exits = network.exits()
    cases: list[ExitSchedule | BypassSchedule] = [
        ExitSchedule(depths=[exits[-1], exits[-2], exits[0], exits[-2], exits[0]]),
        ExitSchedule(depths=[exits[-2], exits[0], exits[0], exits[0], exits[0]]),  # the last block is never used
    ]
    if network.pops:
        cases.append(BypassSchedule(dropped=[0, 0, 1, 2, 1]))
    weights = [3.0, 1.0, 0.5, 2.0, 0.0]
    for policy in cases:
        made = objective(policy, weighting="per_bin", weights=weights)
        made.check(network)
        for slots in (torch.arange(9), torch.tensor([5])):
            batch = batch_of(network, slots)
            got = made.loss(denoiser, batch, Draws(3, batch))["loss"]
            wanted = one_at_a_time(denoiser, policy, batch, 3, weights)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
            for a, b in zip(gradients(got, network), gradients(wanted, network), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_every_block_runs_on_the_samples_that_need_it() -> None:
    network = build("dit-class")
    batch = batch_of(network, torch.arange(40))
    made = objective()
    with block_rows(network) as calls:
        terms = made.loss(Denoiser(network, LINEAR), batch, Draws(3, batch))
    run = made.blocks_run(network, 4)[made.bins_of(LINEAR, made.times(LINEAR, Draws(3, batch)))]
    assert calls == [int((run > block).sum()) for block in range(4)]
    assert 10 < calls[3] < calls[0] == 40 and float(terms["depth"]) == pytest.approx(sum(calls) / 40)


# Times and depths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p.name}-{p.t_min:g}")
def test_times_are_those_of_every_other_objective(process: Process) -> None:
    network = build("isotropic")
    batch = batch_of(network, torch.tensor([3, 60, 11, 4, 0]))
    time, _, _ = noised(Denoiser(network, process), batch, Draws(3, batch))
    assert torch.equal(objective().times(process, Draws(3, batch)), time)
    known = replace(batch, slot=torch.full_like(batch.slot, -1), host_slot=batch.slot)  # nothing is asked of `slot`
    assert torch.equal(objective().times(process, Draws(3, known)), time)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p.name}-{p.t_min:g}")
def test_depths_are_those_that_are_sampled_with(process: Process, name: str) -> None:
    network, policy = build("isotropic"), SCHEDULES[name]
    made = objective(policy)
    times = process.times_from_uniform(torch.linspace(0, 1 - 2.0**-24, 500))
    times = torch.cat([times, process.time_of_training_index(torch.tensor([0.0, 50, 250, 499.5, 700.5, 750, 999]))])
    plan = made.plan(network, made.bins_of(process, times))
    assert isinstance(plan.depth, Tensor)
    calls = make_calls(process, times.tolist())
    info = RunInfo(calls, network, 1, 1)
    assert plan.depth.tolist() == [policy.plan(info, call).depth for call in calls]


def test_a_schedule_for_another_depth_is_scaled_as_the_policy_scales_it() -> None:
    network = build("isotropic")
    made = Scheduled(config.build(_shipped()).config)
    made.check(network)
    demo = config.build(named("policy", "ase_demo"))
    assert made.blocks_run(network, 4).tolist() == demo.depths_on(network) == [4, 4, 3, 3, 3, 3, 2, 2, 2, 2]


def _shipped() -> dict[str, Any]:
    from omegaconf import OmegaConf

    node: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "objective" / "ase.yaml"))
    [group, _] = node.pop("defaults")
    assert group == {"/policy@schedule": "ase_demo"}
    return {**node, "schedule": config.plain(named("policy", "ase_demo"))}


# Weights -------------------------------------------------------------------------------------------------------------


def test_tables_of_weights() -> None:
    run = torch.tensor([4, 3, 2, 1])
    assert objective().table(run, 4, 7).tolist() == [1, 1, 1, 1]
    inverse = objective(weighting="inverse_depth").table(run, 4, 7)
    torch.testing.assert_close(inverse, torch.tensor([1, 4 / 3, 2, 4]))
    first, second = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
    cyclic = objective(weighting="cycle", weights=first, other_weights=second, cycle=6)
    turns = [cyclic.table(run, 4, micro_batch).tolist() for micro_batch in range(12)]
    assert turns == ([first] * 3 + [second] * 3) * 2


def test_inverse_depth_gives_every_block_the_same_expected_weight() -> None:
    """Sum over the samples that reach a block of lambda / blocks they run: L / S is what evens out S."""
    made = objective(weighting="inverse_depth")
    run = made.blocks_run(build("isotropic"), 4)
    assert torch.equal(made.table(run, 4, 0) * run, torch.full((4,), 4.0))


def test_the_cycle_turns_in_the_loss() -> None:
    network = build("isotropic")
    denoiser = Denoiser(network, LINEAR)
    made = objective(weighting="cycle", weights=[1.0] * 4, other_weights=[0.5] * 4)
    for micro_batch, factor in ((0, 1.0), (1, 0.5), (2, 1.0)):
        batch = batch_of(network, torch.arange(5), micro_batch)
        plain = objective().loss(denoiser, batch, Draws(3, batch))["loss"]
        torch.testing.assert_close(made.loss(denoiser, batch, Draws(3, batch))["loss"], factor * plain)


# One bin per micro-batch ---------------------------------------------------------------------------------------------


def micro_batches(made: Scheduled, process: Process, count: int, size: int = 16) -> Tensor:
    """Times of many micro-batches, [count, size]."""
    slot = torch.arange(size)
    images = torch.zeros(size, 1, 1, 1)
    return torch.stack([made.times(process, Draws(5, Batch(images, None, slot, m, slot))) for m in range(count)])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p.name}-{p.t_min:g}")
def test_one_bin_per_micro_batch_and_uniform_over_training(process: Process, name: str) -> None:
    made = objective(SCHEDULES[name], one_bin_per_micro_batch=True)
    times = micro_batches(made, process, count=240)
    bins = made.bins_of(process, times.flatten()).reshape(times.shape)
    assert bool((bins == bins[:, :1]).all()) and len(bins.unique()) == len(made.schedule.bins.keys) + 1
    # As often as uniform times fall into it: stratified, so by less than one micro-batch per lap and edge.
    expected = made.bins_of(process, process.times_from_uniform(torch.arange(100_000) / 100_000))
    for number in bins.unique().tolist():
        share = float((expected == number).double().mean())
        assert abs(float((bins[:, 0] == number).double().mean()) - share) < 3.5 * (share * (1 - share) / 240) ** 0.5
        # Within it, as uniform times are: both samples have one distribution (Kolmogorov-Smirnov, 0.1 %).
        inside = times[bins == number].sort().values
        reference = process.times_from_uniform(torch.arange(100_000) / 100_000)[expected == number].sort().values
        below = torch.searchsorted(reference, inside, right=True).double() / len(reference)
        here = torch.searchsorted(inside, inside, right=True).double() / len(inside)
        assert float((below - here).abs().max()) < 1.95 / len(inside) ** 0.5


def test_equal_bins_come_once_per_lap() -> None:
    made = objective(one_bin_per_micro_batch=True)
    bins = made.bins_of(LINEAR, micro_batches(made, LINEAR, 80, size=1).flatten()).reshape(20, 4)
    assert bool((bins.sort(dim=1).values == torch.arange(4)).all())
    assert len({tuple(lap.tolist()) for lap in bins}) > 10  # in an order of their own


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p.name}-{p.t_min:g}")
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_spans_of_the_bins_share_out_all_draws(process: Process, name: str) -> None:
    made = objective(SCHEDULES[name])
    spans = made._all_spans(process)
    assert int((spans[:, 1] - spans[:, 0]).sum()) == UNIT and int(spans.min()) == 0 and int(spans.max()) == UNIT
    for number, (start, stop) in enumerate(spans.tolist()):
        ends = process.times_from_uniform(torch.tensor([start, stop - 1]).double() / UNIT)
        assert made.bins_of(process, ends).tolist() == [number, number]


def test_one_bin_is_the_same_in_all_processes_and_shapes_never_change() -> None:
    network = build("dit-class")
    made = objective(one_bin_per_micro_batch=True)
    for micro_batch in range(6):
        whole, half = (batch_of(network, torch.arange(first, 12), micro_batch) for first in (0, 6))
        times = made.times(LINEAR, Draws(3, whole))
        assert torch.equal(made.times(LINEAR, Draws(3, half)), times[6:])
        with block_rows(network) as sizes:
            terms = made.loss(Denoiser(network, LINEAR), whole, Draws(3, whole))
        assert sizes == [12] * int(terms["depth"])
        wanted = one_at_time_in(made, network, whole, times)
        torch.testing.assert_close(terms["loss"], wanted, rtol=1e-5, atol=1e-6)


def one_at_time_in(made: Scheduled, network: Backbone, batch: Batch, times: Tensor) -> Tensor:
    denoiser = Denoiser(network, LINEAR)
    time, noise, noisy = noised(denoiser, batch, Draws(3, batch), times)
    depth = int(made.blocks_run(network, 4)[made.bins_of(LINEAR, times)][0])
    output = denoiser.rows(noisy, time, batch.cond, StepPlan(depth=depth)).prediction
    squared, bound = noise_losses(LINEAR, time, batch.images, noise, output)
    assert bound is not None
    return (squared + bound).mean()


def test_the_bin_is_drawn_from_a_purpose_of_its_own() -> None:
    """So that switching it on shifts no other draw: noise and dropped labels stay those of the seed."""
    network = build("isotropic")
    batch = batch_of(network, torch.arange(5))
    before = keys.normal(3, "noise", batch.slot, 2, (2, 8, 8))
    time = objective(one_bin_per_micro_batch=True).times(LINEAR, Draws(3, batch))
    _, noise, _ = noised(Denoiser(network, LINEAR), batch, Draws(3, batch), time)
    assert torch.equal(noise, before)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(schedule=None), "objective.schedule is NoneType, which sets no depth"),
        (dict(schedule=Full()), "objective.schedule is Full, which sets no depth"),
        (dict(weighting="linear"), r"objective.weighting='linear' is not one of"),
        (dict(weighting="per_bin", weights=[1.0]), "objective.weights has 1 entries; .* 4 bins takes 4"),
        (dict(weights=[1.0] * 4), "objective.weights has 4 entries; weighting=constant .* takes none"),
        (dict(weighting="cycle", weights=[1.0] * 4), "objective.other_weights has 0 entries; .* takes 4"),
        (dict(weighting="per_bin", weights=[1, 1, 1, -1]), "every weight must be at least 0"),
        (dict(cycle=3), "objective.cycle=3 must be even"),
    ],
)
def test_settings_that_say_nothing_sensible(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective(**settings)


def test_networks_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="asks for depth 9, but Isotropic can be read out at depths"):
        objective(ExitSchedule(depths=[9, 1])).check(build("isotropic"))
    with pytest.raises(UsageError, match="drops decoder blocks, but Isotropic has none"):
        objective(BypassSchedule(dropped=[0, 1])).check(build("isotropic"))
    with pytest.raises(UsageError, match="drops 5 decoder blocks, but LongSkips has 2"):
        objective(BypassSchedule(dropped=[0, 5])).check(build("long-skips"))
    with pytest.raises(UsageError, match="null label"):
        objective(label_dropout=0.1).check(build("exits-dit"))
