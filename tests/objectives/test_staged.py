"""Training of networks with stages: which stages and times are drawn, and what is learned from them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.edm import EDM, VE, EDMConfig, VEConfig
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.objectives.base import Batch, Draws, noised
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.objectives.stage_order import point
from gearshift.objectives.staged import HALF_STEP, Staged, StagedConfig
from gearshift.objectives.variational import noise_losses
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir

from ..contract import build
from .staircase import PUBLISHED, SIDE, Staircase

SDE, LINEAR, LATENT = VPSDE(VPSDEConfig()), Discrete(DiscreteConfig()), Discrete(DiscreteConfig("scaled_linear"))
PROCESSES: list[Process] = [EDM(EDMConfig()), VE(VEConfig()), SDE, LINEAR, LATENT]
NAMES = [process.name for process in PROCESSES]
EDM_PROCESS = PROCESSES[0]
MASS = [0.9614, 0.0351, 0.0035]
"""multistage.md, section 0: shares of EDM's stages by mass."""


def ratio(process: Process, t: float) -> float:
    return math.exp(-0.5 * float(process.log_snr(t)))


PAPER_VP = (ratio(SDE, 0.4420), ratio(SDE, 0.6308))


def objective(**settings: Any) -> Staged:
    return Staged(StagedConfig(**settings))


def batch_of(slot: Tensor, micro_batch: int = 2, labels: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(256, 1, SIDE, SIDE, generator=generator) * 2 - 1)[slot]
    return Batch(images, slot % 3 if labels else None, slot, micro_batch)


def drawn(made: Staged, network: Backbone, process: Process, count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Times and stages of many micro-batches, [count, size] each."""
    slot = torch.arange(size)
    batches = [Batch(torch.zeros(size, 1, 1, 1), None, slot, m, slot) for m in range(count)]
    pairs = [made.draw(network, process, Draws(5, batch)) for batch in batches]
    return torch.stack([times for times, _ in pairs]), torch.stack([stage for _, stage in pairs])


def distance(values: Tensor, expected: Tensor) -> float:
    """Kolmogorov-Smirnov statistic of `values` times sqrt(n), given the CDF at them; 1.95 is the 0.1 % level."""
    order = values.argsort()
    below = torch.arange(len(values)) / len(values)
    high = (expected[order] - below).abs().max()
    return float(torch.maximum(high, (expected[order] - below - 1 / len(values)).abs().max())) * len(values) ** 0.5


ALL_SETTINGS: list[dict[str, Any]] = [
    {**choice, **batching}
    for choice in ({}, {"choice": "uniform"}, {"choice": "custom", "shares": [0.2, 0.5, 0.3]})
    for batching in ({}, {"batching": "mixed"}, {"batching": "per_group", "group_size": 4})
]


# Shares and times ----------------------------------------------------------------------------------------------------


def test_shares_of_the_edm_stages_by_mass() -> None:
    stages = objective().stages(Staircase(), EDM_PROCESS)
    assert [round(share, 4) for share in stages.mass.tolist()] == MASS
    assert torch.equal(stages.shares, stages.mass)


def test_densities_of_the_vp_stages_under_uniform_choice() -> None:
    """Interval lengths 0.442, 0.189 and 0.369 of the paper, each chosen a third of the time."""
    stages = objective(choice="uniform").stages(Staircase(PAPER_VP), SDE)
    assert stages.mass.tolist() == pytest.approx([0.4420, 0.1888, 0.3692], abs=1e-12)
    assert [round(value, 2) for value in (stages.shares / stages.mass).tolist()] == [0.75, 1.77, 0.90]


def test_truncated_draws_in_their_shares_are_the_untruncated_distribution() -> None:
    """Chosen by their shares and then drawn within the stage, levels are log-normal again; and so within each stage."""
    network, shares = Staircase(), [0.961, 0.0355, 0.0035]
    for settings in ({"shares": shares}, {"shares": [1 / 3] * 3}):
        made = objective(choice="custom", batching="mixed", **settings)
        times, stage = (x.flatten() for x in drawn(made, network, EDM_PROCESS, 20, 2000))
        edges = made.stages(network, EDM_PROCESS).edges
        for k in range(3):
            inside = times[stage == k]
            expected = (EDM_PROCESS.cdf(inside) - edges[k]) / (edges[k + 1] - edges[k])
            assert len(inside) > 100 and distance(inside, expected) < 1.95
    by_mass = objective(
        choice="custom", shares=objective().stages(network, EDM_PROCESS).mass.tolist(), batching="mixed"
    )
    times, _ = drawn(by_mass, network, EDM_PROCESS, 20, 2000)
    assert distance(times.flatten(), EDM_PROCESS.cdf(times.flatten())) < 1.95
    normal = (times.flatten().log() + 1.2) / 1.2  # not by the cdf of the process alone
    assert abs(float(normal.mean())) < 3.5 / 200 and abs(float(normal.std()) - 1) < 3.5 / 200 / 2**0.5


@pytest.mark.parametrize("boundary", [1e-3, 0.02, 79.0])
def test_tails_are_drawn_with_all_their_digits(boundary: float) -> None:
    """A stage of 7e-6 or less of the mass has as many levels as any other, and keeps within its ends."""
    process = EDM(EDMConfig(sigma_min=1e-4))
    stages = objective().stages(Staircase((boundary,)), process)
    stage = int(stages.mass.argmin())
    assert float(stages.mass[stage]) < 0.02
    uniform = torch.tensor([0.0, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24])
    times = stages.levels(process, torch.full((6,), stage), uniform)
    assert bool(((times <= boundary) if stage == 0 else (times > boundary)).all()) and bool(times.isfinite().all())
    assert bool((times.diff() < 0).all())
    # By the complement, which is exact in the upper tail: P(level above) = mass * (u + half a step), less below.
    z = (times.log() + 1.2) / 1.2
    tail = torch.special.ndtr(z if stage == 0 else -z)
    wanted = (1 - uniform.double() - HALF_STEP) if stage == 0 else uniform.double() + HALF_STEP
    torch.testing.assert_close(tail / stages.mass[stage], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "default")
@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_levels_are_of_the_stage_that_runs_them(process: Process, settings: dict[str, Any]) -> None:
    network = Staircase()
    times, stage = drawn(objective(**settings), network, process, 60)
    assert torch.equal(network.route(process.log_snr(times.flatten())), stage.flatten())
    if settings.get("batching", "per_batch") == "per_batch":
        assert bool((stage == stage[:, :1]).all())
    if not process.continuous:
        assert torch.equal(times, times.round())


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_the_outermost_draws_stay_in_their_stage(process: Process) -> None:
    network = Staircase((ratio(process, process.t_min) * 1.5, 1.0, ratio(process, process.t_max) / 1.5))
    made = objective()
    stages = made.stages(network, process)
    for k in range(4):
        times = stages.levels(process, torch.full((2,), k), torch.tensor([0.0, 1 - 2.0**-24]))
        assert network.route(process.log_snr(times)).tolist() == [k, k]


def test_stages_of_a_table_are_their_indices_equally_often() -> None:
    """The LDM split [0, 442), [442, 631), [631, 1000), its boundaries being levels of the table themselves."""
    network = Staircase((ratio(LATENT, 441), ratio(LATENT, 630)))
    stages = objective().stages(network, LATENT)
    assert stages.mass.tolist() == pytest.approx([0.442, 0.189, 0.369], abs=1e-12)
    for k, indices in enumerate((range(442), range(442, 631), range(631, 1000))):
        uniform = torch.arange(0, 1, 1 / (4 * len(indices)), dtype=torch.float64)[: 4 * len(indices)]
        times = stages.levels(LATENT, torch.full(uniform.shape, k), uniform)
        found, counts = times.unique(return_counts=True)
        assert found.tolist() == [float(i) for i in indices] and set(counts.tolist()) == {4}


# Order of the stages -------------------------------------------------------------------------------------------------


def test_equal_shares_come_once_per_lap_in_an_order_of_their_own() -> None:
    _, stage = drawn(objective(choice="uniform"), Staircase(), SDE, 120, size=1)
    laps = stage.reshape(40, 3)
    assert bool((laps.sort(dim=1).values == torch.arange(3)).all())
    assert len({tuple(lap.tolist()) for lap in laps}) == 6


@pytest.mark.parametrize("group", [0, 3])
def test_shares_are_exact_at_any_time(group: int) -> None:
    """After any number of micro-batches a share is right but for a few; a rare stage comes at nearly even distances."""
    count, shares = 6000, torch.tensor(MASS, dtype=torch.float64)
    points = torch.tensor([point(7, number, group, 3) for number in range(count)], dtype=torch.float64)
    assert float(points.min()) >= 0 and float(points.max()) < 1
    stage = torch.bucketize(points, shares.cumsum(0)[:-1], right=True)
    seen = torch.nn.functional.one_hot(stage, 3).cumsum(0)
    assert float((seen - torch.arange(1, count + 1)[:, None] * shares).abs().max()) < 3
    distances = (stage == 2).nonzero().flatten().diff()
    assert len(distances) >= 19 and int(distances.min()) > 140 and int(distances.max()) < 600
    assert distance(points, points) < 0.2  # far more even than independent draws, whose median is 0.83


def test_over_seeds_every_micro_batch_draws_every_stage_with_its_share() -> None:
    points = torch.tensor([point(seed, 4, 1, 3) for seed in range(600)], dtype=torch.float64)
    assert distance(points, points) < 1.95


def test_groups_take_turns() -> None:
    """Next to each other they train different stages; each goes through all of them; so do all together."""
    made = objective(choice="uniform", batching="per_group", group_size=4)
    _, stage = drawn(made, Staircase(), SDE, 60, size=12)
    groups = stage.reshape(60, 3, 4)
    assert bool((groups == groups[:, :, :1]).all())
    assert bool((groups[:, :, 0].sort(dim=1).values == torch.arange(3)).all())
    laps = groups[:, :, 0].reshape(20, 3, 3)
    assert bool((laps.sort(dim=1).values == torch.arange(3)[:, None]).all())
    rare = [[point(1, number, group, 3) > 1 - MASS[2] for group in range(4)] for number in range(3000)]
    assert all(sum(row) <= 1 for row in rare)  # a rare stage does not come to several groups at a time


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "default")
def test_draws_do_not_depend_on_the_layout(settings: dict[str, Any]) -> None:
    network, made = Staircase(), objective(**settings)
    for number in range(6):
        whole = batch_of(torch.arange(12), number)
        times, stage = made.draw(network, EDM_PROCESS, Draws(3, whole))
        for part in (torch.arange(6, 12), torch.tensor([9, 2])):
            mine = made.draw(network, EDM_PROCESS, Draws(3, batch_of(part, number)))
            assert torch.equal(mine[0], times[part]) and torch.equal(mine[1], stage[part])


# The loss ------------------------------------------------------------------------------------------------------------


def gradients(loss: Tensor, network: Backbone) -> list[Tensor]:
    given = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(given, network.parameters(), strict=True)]


@pytest.mark.parametrize("name", ["isotropic", "dit-class", "long-skips"])
def test_on_one_stage_it_is_the_plain_loss_bit_for_bit(name: str) -> None:
    network = build(name).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(7, network.in_channels, network.image_size, network.image_size, generator=generator) * 2 - 1
    slot = torch.arange(7)
    batch = Batch(images, slot % 3 if network.cond_kind == "class" else None, slot, 4)
    for process in (SDE, LINEAR):
        denoiser = Denoiser(network, process)
        for reduction in ("mean", "sum"):
            settings = {"label_dropout": 0.3, "reduction": reduction}
            ours = objective(batching="mixed", **settings).loss(denoiser, batch, Draws(3, batch))
            plain = Simple(SimpleConfig(**settings)).loss(denoiser, batch, Draws(3, batch))  # type: ignore[arg-type]
            assert all(torch.equal(ours[name], plain[name]) for name in plain)
            for a, b in zip(gradients(ours["loss"], network), gradients(plain["loss"], network), strict=True):
                assert torch.equal(a, b)
    network.requires_grad_(False)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_mixed_by_mass_is_plain_training_of_the_network(process: Process) -> None:
    network = Staircase((0.3, 1.0), labels=True, variance=process is LINEAR)
    denoiser, batch = Denoiser(network, process), batch_of(torch.arange(40), labels=True)
    ours = objective(batching="mixed", label_dropout=0.4).loss(denoiser, batch, Draws(3, batch))
    plain = Simple(SimpleConfig(label_dropout=0.4)).loss(denoiser, batch, Draws(3, batch))
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name])
    for a, b in zip(gradients(ours["loss"], network), gradients(plain["loss"], network), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "default")
def test_it_is_the_mean_over_samples_alone(settings: dict[str, Any]) -> None:
    """Every sample alone in its batch, by the path of its stage; importance is p / q of that stage."""
    network = Staircase(labels=True)
    denoiser = Denoiser(network, EDM_PROCESS)
    made = objective(**settings, importance=True, label_dropout=0.3)
    for number in range(4):
        batch = batch_of(torch.arange(13), number, labels=True)
        times, stage = made.draw(network, EDM_PROCESS, Draws(3, batch))
        stages = made.stages(network, EDM_PROCESS)
        losses = []
        for row in range(13):
            one = batch.take(torch.tensor([row]))
            time, noise, noisy = noised(denoiser, one, Draws(3, one), times[row : row + 1])
            dropped = Draws(3, one).uniform("label_dropout") < 0.3
            output = denoiser.rows(noisy, time, torch.where(dropped, 3, one.cond)).prediction  # type: ignore[arg-type]
            squared, _ = noise_losses(EDM_PROCESS, time, one.images, noise, output)
            weight = float(stages.mass[stage[row]] / stages.shares[stage[row]])
            losses.append(weight * EDM_PROCESS.loss_weight(time) * squared)
        terms = made.loss(denoiser, batch, Draws(3, batch))
        torch.testing.assert_close(terms["loss"], torch.cat(losses).mean())
        wanted = gradients(torch.cat(losses).mean(), network)
        for a, b in zip(gradients(terms["loss"], network), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for k in range(3):
            mine = torch.cat(losses)[stage == k].sum() / 13
            torch.testing.assert_close(terms[f"loss_stage{k}"], mine)
            assert float(terms[f"share_stage{k}"]) == pytest.approx(float((stage == k).double().mean()))
            assert bool(terms[f"loss_stage{k}"].isfinite()) and not terms[f"loss_stage{k}"].requires_grad


def test_importance_keeps_the_expected_loss() -> None:
    """Sum over stages of q (p / q) E_k: the loss of a stage of share q comes with weight p / q."""
    network = Staircase()
    denoiser = Denoiser(network, EDM_PROCESS)
    mass = objective().stages(network, EDM_PROCESS).mass
    for number in range(3):
        batch = batch_of(torch.arange(9), number)
        with_weight = objective(choice="uniform", importance=True).loss(denoiser, batch, Draws(3, batch))
        without = objective(choice="uniform").loss(denoiser, batch, Draws(3, batch))
        stage = max(range(3), key=lambda k: float(without[f"share_stage{k}"]))
        torch.testing.assert_close(with_weight["loss"], without["loss"] * float(3 * mass[stage]))
        by_mass = objective(importance=True).loss(denoiser, batch, Draws(3, batch))
        assert torch.equal(by_mass["loss"], objective().loss(denoiser, batch, Draws(3, batch))["loss"])


def test_the_sum_over_values_is_that_many_times_the_mean() -> None:
    network = Staircase(variance=True)
    denoiser, batch = Denoiser(network, LINEAR), batch_of(torch.arange(9))
    mean, total = (
        objective(reduction=reduction, batching="mixed").loss(denoiser, batch, Draws(3, batch))
        for reduction in ("mean", "sum")
    )
    for name, value in mean.items():
        factor = 1 if name.startswith("share") else SIDE * SIDE
        torch.testing.assert_close(total[name], factor * value)


def test_a_mixed_batch_gives_every_path_a_view_of_what_they_share() -> None:
    network = Staircase()
    seen: list[Tensor] = []
    shared: list[Tensor] = []
    network.blocks[0].register_forward_hook(lambda _m, _i, out: shared.append(out))
    for block in network.blocks[1:]:
        block.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    batch = batch_of(torch.arange(30))
    made = objective(choice="uniform", batching="mixed")
    terms = made.loss(Denoiser(network, EDM_PROCESS), batch, Draws(3, batch))
    [whole] = shared
    assert len(whole) == 30 and [len(part) for part in seen] == [
        round(30 * float(terms[f"share_stage{k}"])) for k in range(3)
    ]
    assert len(seen) == 3
    assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in seen)


def test_what_the_augmentation_did_is_passed_on() -> None:
    told: list[Tensor | None] = []

    class Listening(Denoiser):
        def rows(self, *arguments: Any, augment: Tensor | None = None, **more: Any) -> Any:
            told.append(augment)
            return super().rows(*arguments, **more)

    slot = torch.arange(8)
    labels = torch.rand(8, 9)
    batch = Batch(batch_of(slot).images, None, slot, 0, slot, labels)
    made = objective(choice="uniform", batching="mixed")
    denoiser = Listening(Staircase(), EDM_PROCESS)
    made.loss(denoiser, batch, Draws(3, batch))
    Simple(SimpleConfig()).loss(denoiser, batch, Draws(3, batch))
    _, stage = made.draw(denoiser.network, EDM_PROCESS, Draws(3, batch))
    assert told[0] is not None and torch.equal(told[0], labels[torch.sort(stage, stable=True).indices])
    assert told[1] is labels


# What a step leaves alone --------------------------------------------------------------------------------------------


@pytest.fixture
def stepped() -> tuple[Staircase, torch.optim.AdamW]:
    """A network after steps that have given every parameter momentum."""
    network = Staircase()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    batch = batch_of(torch.arange(30))
    for _ in range(3):
        optimizer.zero_grad()
        terms = objective(choice="uniform", batching="mixed").loss(
            Denoiser(network, EDM_PROCESS), batch, Draws(3, batch)
        )
        terms["loss"].backward()
        optimizer.step()
    return network, optimizer


def test_unused_stages_are_left_alone_bit_for_bit(stepped: tuple[Staircase, torch.optim.AdamW]) -> None:
    """Neither momentum nor decay of the weights moves them, and their momentum does not fade."""
    network, optimizer = stepped
    trained: set[int] = set()
    for number in range(3):
        before = {p: p.detach().clone() for p in network.parameters()}
        state = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in network.parameters()}
        optimizer.zero_grad()
        batch = batch_of(torch.arange(8), number)
        terms = objective(choice="uniform").loss(Denoiser(network, EDM_PROCESS), batch, Draws(3, batch))
        terms["loss"].backward()
        optimizer.step()
        [mine] = [k for k in range(3) if float(terms[f"share_stage{k}"]) == 1]
        trained.add(mine)
        for k in range(3):
            for parameter in network.of_stage(k):
                same = torch.equal(parameter, before[parameter])
                assert same is (k != mine) and (parameter.grad is None) is (k != mine)
                for name, value in optimizer.state[parameter].items():
                    assert torch.equal(value, state[parameter][name]) is (k != mine)
        for shared in (network.inlet, network.blocks[0]):
            assert all(not torch.equal(p, before[p]) for p in shared.parameters())
    assert trained == {0, 1, 2}


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(choice="mean"), r"objective.choice='mean' is not one of \['mass', 'uniform', 'custom'\]"),
        (dict(batching="per_rank"), r"objective.batching='per_rank' is not one of"),
        (dict(reduction="max"), r"objective.reduction='max' is not one of \['mean', 'sum'\]"),
        (dict(shares=[0.5, 0.5]), r"objective.shares=\[0.5, 0.5\] with objective.choice=mass; set choice=custom"),
        (dict(choice="custom"), r"objective.shares=\[\] add up to 0; give shares"),
        (dict(choice="custom", shares=[0.5, 0.6]), r"objective.shares=\[0.5, 0.6\] add up to 1.1; give shares"),
        (dict(choice="custom", shares=[1.5, -0.5]), "give shares of at least 0"),
        (dict(choice="custom", shares=[1.0, 0.0], importance=True), "of which one is 0; make it greater"),
        (
            dict(batching="per_group"),
            "objective.group_size=None with objective.batching=per_group; set group_size=a num",
        ),
        (dict(group_size=4), "objective.group_size=4 with objective.batching=per_batch; set group_size=null"),
        (dict(batching="per_group", group_size=0), "objective.group_size=0 must be at least 1"),
    ],
)
def test_settings_that_say_nothing_sensible(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective(**settings)
    with pytest.raises(UsageError, match=r"objective.reduction='no' is not one of"):
        SimpleConfig(reduction="no")


def test_networks_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"Isotropic has 1 path and boundaries=\[\]; choose a backbone with stages"):
        objective().check(build("isotropic"))
    network = Staircase()
    network.boundaries = (1.0,)
    with pytest.raises(UsageError, match=r"Staircase has 3 paths and boundaries=\[1.0\]; choose"):
        objective().check(network)
    made = objective(choice="custom", shares=[0.5, 0.5])
    with pytest.raises(
        UsageError, match=r"shares=\[0.5, 0.5\] are 2 shares; Staircase has 3 stages \(boundaries=\[2.51"
    ):
        made.check(Staircase())
    objective(choice="custom", shares=[1.0, 0.0, 0.0]).check(Staircase())
    objective(label_dropout=0.1).check(Staircase(labels=True))


@pytest.mark.parametrize("batching", ["per_batch", "mixed"])
def test_boundaries_outside_the_noise_levels_of_the_process(batching: str) -> None:
    made, batch = objective(batching=batching), batch_of(torch.arange(4))
    for boundaries in ((1.0, 90.0), (1e-3, 1.0)):
        with pytest.raises(
            UsageError, match=rf"boundaries=\[{boundaries[0]}, .* process edm, 0.002 to 80; choose other"
        ):
            made.loss(Denoiser(Staircase(boundaries), EDM_PROCESS), batch, Draws(0, batch))
    close = (ratio(LINEAR, 500.2), ratio(LINEAR, 500.7))
    with pytest.raises(UsageError, match="leave stage 1 without a noise level of process linear; move them apart"):
        made.loss(Denoiser(Staircase(close), LINEAR), batch, Draws(0, batch))


def test_what_was_worked_out_for_one_process_is_not_taken_for_another() -> None:
    made, network = objective(), Staircase((1.0,))
    first, second = made.stages(network, EDM_PROCESS), made.stages(network, SDE)
    assert not torch.equal(first.mass, second.mass) and torch.equal(made.stages(network, EDM_PROCESS).mass, first.mass)
    assert not torch.equal(made.stages(Staircase((2.0,)), EDM_PROCESS).mass, first.mass)


def shipped(name: str) -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return config.build(compose("train", overrides=[f"objective={name}"]).objective)


def test_shipped_objectives() -> None:
    for name, choice in (("staged", "uniform"), ("staged_mass", "mass")):
        made = shipped(name)
        assert isinstance(made, Staged) and made.config == StagedConfig(choice=choice)
        made.check(Staircase(PUBLISHED))
    edm = shipped("edm")
    assert isinstance(edm, Simple) and edm.config == SimpleConfig(reduction="sum")


def test_edm_by_hand() -> None:
    """lambda (D - y)^2 summed over the values of an image, lambda = (s^2 + d^2) / (s d)^2 (arXiv 2206.00364, eq. 8)."""
    denoiser, batch = Denoiser(Staircase((1.0,)), EDM_PROCESS), batch_of(torch.arange(6))
    loss = shipped("edm").loss(denoiser, batch, Draws(3, batch))["loss"]
    time, _, noisy = noised(denoiser, batch, Draws(3, batch))
    s = time[:, None, None, None]
    x = noisy.double() * (1 + s**2).sqrt()
    clean = x - s * denoiser.rows(noisy, time, None).prediction.double()
    weight = (s**2 + 0.25) / (s * 0.5) ** 2
    wanted = (weight * (clean - batch.images.double()) ** 2).flatten(1).sum(1).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=0)
