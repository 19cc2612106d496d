"""Plans found beforehand: from a file or inline, what they refuse, and the runs that they make."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers import DDIM, Call, DDIMConfig
from gearshift.execution.memory import Memory
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import Rows
from gearshift.policies import Full, Planned, Policy, RunInfo
from gearshift.runtime import keys
from gearshift.runtime.config import build as build_config
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Sampler, sample_chunk

from ..contract import TOLERANCE, build, cost_table

STEPS = 6
INDEX = torch.arange(3)
PROCESS = Discrete(DiscreteConfig())
NAME = "uvit-class"
RUN = dict(rtol=1e-4, atol=1e-4)  # rounding, carried through a run


def calls(steps: int = STEPS, spacing: str = "leading") -> tuple[Call, ...]:
    return DDIM(DDIMConfig(steps=steps, spacing=spacing)).calls(PROCESS)


def run(**other: Any) -> RunInfo:
    return replace(RunInfo(calls(), build(NAME), batch=2, branches=2), **other)


def planned(**other: Any) -> Planned:
    """A plan for `run()` that does a bit of everything."""
    sizes: dict[str, Any] = dict(network="UViT", blocks=5, solver="ddim", branches=2)
    lists: dict[str, Any] = dict(
        log_snr=[call.log_snr for call in calls()],
        call=[2, 2, 1, 2, 0, 2],
        depth=[0, 3, 0, 5, 0, 4],
        reuse=[{}, {1: "map"}, {}, {}, {2: "qk"}, {3: "block", 0: "output"}],
        forecast=[0, 0, 0, 0, 1, 0],
    )
    return Planned(**{**sizes, **lists, **other})


def write(path: Path, policy: Planned, **changes: Any) -> str:
    tree = {"_target_": "gearshift.policies.Planned", **asdict(policy), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    return str(path)


def same(a: Policy, b: Policy) -> bool:
    return all(getattr(a, one.name) == getattr(b, one.name) for one in fields(Planned))


# Plans as data -------------------------------------------------------------------------------------------------------


def test_a_file_is_the_fields_it_holds(tmp_path: Path) -> None:
    inline = planned()
    read = Planned(file=write(tmp_path / "plan.yaml", inline))
    assert read == inline and same(read, inline) and read.file is None
    assert read.reuse[1] == {1: "map"} and [type(key) for key in read.reuse[5]] == [int, int]
    node = {"_target_": "gearshift.policies.Planned", "file": str(tmp_path / "plan.yaml")}
    assert build_config(node) == inline  # as the command line names it
    assert build_config(yaml.safe_load((tmp_path / "plan.yaml").read_text())) == inline
    assert replace(read, solver="other").solver == "other"
    assert read.name == "plan (5 of 6 calls)"
    write(tmp_path / "full.yaml", inline, _target_="gearshift.policies.planned.Planned")
    assert Planned(file=str(tmp_path / "full.yaml")) == inline


def test_what_is_left_out_means_the_last_prediction(tmp_path: Path) -> None:
    """Files without `forecast` are complete."""
    inline = planned(forecast=[])
    assert inline.forecast == [0] * STEPS and not inline.forecasts and planned().forecasts
    file = write(tmp_path / "plan.yaml", inline, forecast=None)
    assert "forecast" not in Path(file).read_text() and Planned(file=file) == inline


def test_plans_of_the_calls() -> None:
    policy, info = planned(), run()
    policy.check(info)
    assert policy.static
    plans = [policy.plan(policy.begin(info), call) for call in info.calls]
    assert [plan.depth for plan in plans] == [None, 3, None, 5, None, 4]  # 0 is all of them
    assert [plan.forecast for plan in plans] == policy.forecast
    taken = [{}, {(1, "map")}, {}, {}, {}, {(3, "block"), (0, "output")}]  # a call that is held takes nothing
    assert [plan.reuse for plan in plans] == [frozenset(keys_) for keys_ in taken]
    assert [plan.call for k, plan in enumerate(plans) if k != 2] == [True, True, True, False, True]
    assert torch.equal(torch.as_tensor(plans[2].call), torch.tensor([True, True, False, False]))
    assert policy.memory_keys(info) == {(1, "map"), (3, "block"), (0, "output")}


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields_", "message"),
    [
        (dict(call=[]), "has no plan; name a file of gearshift plan"),
        (
            dict(depth=[0, 3]),
            "one entry per call in each list, and has log_snr 6, call 6, depth 2, reuse 6",
        ),
        (dict(log_snr=[1.0]), "has log_snr 1, call 6"),
        (dict(reuse=[{}]), "depth 6, reuse 1"),
        (dict(forecast=[0, 1]), "reuse 6, forecast 2"),
        (dict(call=[2, 2, 3, 2, -1, 2]), r"call=\[-1, 3\] branches, but it is a plan for 2"),
        (dict(call=[1, 2, 2, 2, 2, 2]), "the first call must evaluate every branch"),
        (dict(call=[0, 2, 2, 2, 2, 2]), "the first call must evaluate every branch"),
        (dict(reuse=[{}, {1: "values"}, {}, {}, {}, {}]), r"reuses \['values'\]; the parts are qk, map, output, block"),
        (dict(reuse=[{1: "map"}, {}, {}, {}, {}, {}]), "the first call has nothing to reuse"),
    ],
)
def test_what_makes_no_plan(fields_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"policy Planned.*{message}"):
        planned(**fields_)


@pytest.mark.parametrize(
    ("fields_", "info", "message"),
    [
        ({}, dict(calls=calls(5)), "made for 6 calls of ddim, and this run has 5; take the same solver and steps"),
        (
            {},
            dict(calls=calls(spacing="trailing")),
            r"calls of ddim, call 0 at log-SNR -\d\.\d+, and this run has it at -\d+\.\d+; take the same solver, spac",
        ),
        ({}, dict(network=build("dit-class")), "made for UViT with 5 blocks, and this run has DiT with 4; make a plan"),
        (dict(blocks=7), {}, "made for UViT with 7 blocks, and this run has UViT with 5"),
        ({}, dict(branches=1), r"made with guidance \(2 branches\), and this run is without guidance \(1\)"),
        (
            dict(branches=1, call=[1, 1, 0, 1, 1, 1]),
            {},
            r"made without guidance \(1 branches\), and this run is with guidance \(2\)",
        ),
        (dict(depth=[0, 3, 0, 6, 0, 9]), {}, "policy Planned asks for depth 6, but UViT can be read out at"),
        (dict(depth=[0, 3, 0, -1, 0, 4]), {}, "policy Planned asks for depth -1"),
        (dict(reuse=[{}, {5: "map"}, {}, {}, {}, {}]), {}, "takes map of block 5 from memory, which UViT lacks"),
    ],
)
def test_what_does_not_fit_the_run(fields_: dict[str, Any], info: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(**fields_).check(run(**info))


def test_parts_that_a_block_lacks() -> None:
    """Of the blocks of a U-Net only some attend."""
    network = build("unet-class")
    fits = dict(network="UNet", blocks=10, depth=[0] * STEPS)
    planned(**fits, reuse=[{}, {2: "map", 0: "block"}, {}, {}, {}, {}]).check(run(network=network))
    with pytest.raises(UsageError, match="takes map of block 0 from memory, which UNet lacks; make a plan for this"):
        planned(**fits, reuse=[{}, {0: "map"}, {}, {}, {}, {}]).check(run(network=network))


def test_levels_may_differ_by_rounding() -> None:
    levels = [call.log_snr for call in calls()]
    planned(log_snr=[float(f"{level:.6g}") for level in levels]).check(run())
    with pytest.raises(UsageError, match="call 3 at log-SNR"):
        planned(log_snr=[level + 0.01 * (k == 3) for k, level in enumerate(levels)]).check(run())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .*; name a file of gearshift plan"),
        ("", "is no plan: it does not say _target_"),
        ("- 1\n- 2\n", "is no plan: it does not say _target_"),
        ("a: [1, 2\nb: }", "is no YAML"),
        ("call: [1, 2]\n", "is no plan: it does not say _target_: gearshift.policies.Planned"),
        ("_target_: gearshift.policies.Full\n", "is no plan"),
        ("7\n", "cannot be read"),
        ("_target_: gearshift.policies.Planned\nfile: other.yaml\n", "names another plan; name that one"),
        ("_target_: gearshift.policies.Planned\ncals: [1]\n", "cals: unknown key of .*Planned; did you mean call"),
        ("_target_: gearshift.policies.Planned\ncall: [one]\n", "call"),
        ("_target_: gearshift.policies.Planned\nblocks: many\n", "blocks"),
        ("_target_: gearshift.policies.Planned\nsolver: ${nowhere}\n", "solver.*nowhere"),
        ("_target_: gearshift.policies.Planned\n", "has no plan"),
    ],
)
def test_what_is_no_plan_file(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "plan.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        Planned(file=str(path))
    assert "plan.yaml" in str(caught.value) or "solver" in message


def test_bytes_are_no_plan_file(tmp_path: Path) -> None:
    (tmp_path / "plan.pt").write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match=r"plan.pt (cannot be read|is no YAML)"):
        Planned(file=str(tmp_path / "plan.pt"))
    with pytest.raises(UsageError, match="cannot be read"):
        Planned(file=str(tmp_path))


@pytest.mark.parametrize("beside", [dict(call=[1]), dict(network="UViT"), dict(depth=[2]), dict(branches=2)])
def test_a_file_and_fields_are_one_too_many(tmp_path: Path, beside: dict[str, Any]) -> None:
    file = write(tmp_path / "plan.yaml", planned())
    with pytest.raises(UsageError, match=rf"plan.yaml and fields of a plan \({next(iter(beside))}\) are given"):
        Planned(file=file, **beside)


# Runs ----------------------------------------------------------------------------------------------------------------


def sampler(policy: Policy) -> Sampler:
    return Sampler(Denoiser(build(NAME), PROCESS), DDIM(DDIMConfig(steps=STEPS)), policy, chunk=3, guidance=2.0)


def bare(**lists: Any) -> Planned:
    """A plan that says only this."""
    none: dict[str, Any] = dict(call=[2] * STEPS, depth=[0] * STEPS, reuse=[{}] * STEPS, forecast=[])
    return planned(**{**none, **lists})


@torch.no_grad()
def by_hand(policy: Planned) -> Tensor:
    """A guided DDIM run in which each branch is evaluated by itself, or goes on from what it said before."""
    s = sampler(policy)
    network, solver, labels = s.denoiser.network, s.solver, s.cond(INDEX)
    conds = [labels, network.null_cond(3, torch.device("cpu"))]
    state = solver.begin(PROCESS, keys.normal(s.seed, "init_noise", INDEX, 0, (2, 8, 8)))
    said: list[list[tuple[float, Tensor]]] = [[], []]  # of each branch, (sigma / alpha, eps)
    for k, call in enumerate(s.calls()):
        x, ratio, eps = solver.network_input(state, call), call.sigma / call.alpha, []
        # What is mixed is of one kind: no branch is extrapolated while the other has nothing but a last prediction.
        line = policy.forecast[k] and all(b < policy.call[k] or len(said[b]) > 1 for b in range(2))
        for branch, cond in enumerate(conds):
            if branch < policy.call[k]:
                stream = network.embed(x, torch.full((3,), float(PROCESS.network_time(call.time))), cond)
                hidden, skips, depth = stream.hidden, [], policy.depth[k] or 5
                for block in range(depth):
                    skip = skips.pop() if block in network.pops else None
                    hidden = network.blocks[block](hidden, stream.cond, skip)
                    if block in network.pushes:
                        skips.append(hidden)
                said[branch].append((ratio, network.readout(hidden, stream.cond, depth)))
                eps.append(said[branch][-1][1])
            elif line:
                (before, first), (after, second) = said[branch][-2:]
                eps.append(second + (ratio - after) / (after - before) * (second - first))
            else:
                eps.append(said[branch][-1][1])
        state = solver.advance(state, call, torch.lerp(eps[1], eps[0], 2.0), fresh=policy.call[k] > 0)
    return solver.result(state)


def test_the_plan_that_leaves_nothing_out_is_the_plain_run() -> None:
    table = cost_table(build(NAME))
    plain, full = (sample_chunk(sampler(policy), INDEX, table) for policy in (Full(), bare()))
    assert torch.equal(plain.images, full.images) and full.ledger.macs_saved == 0
    torch.testing.assert_close(full.images, by_hand(bare()), **RUN)


@pytest.mark.parametrize(
    "lists",
    [
        dict(call=[2, 1, 1, 2, 1, 2]),
        dict(call=[2, 2, 0, 1, 0, 2]),
        dict(depth=[0, 3, 5, 4, 2, 1]),
        dict(call=[2, 1, 2, 0, 1, 0], depth=[0, 3, 0, 0, 4, 0]),
        dict(call=[2, 2, 1, 1, 2, 1], forecast=[0, 0, 1, 1, 0, 1]),
        dict(call=[2, 2, 0, 1, 0, 2], forecast=[0, 0, 1, 0, 1, 0]),
        dict(call=[2, 1, 0, 2, 0, 1], forecast=[0, 1, 1, 1, 1, 1]),
    ],
)
def test_branches_that_are_not_evaluated(lists: dict[str, Any]) -> None:
    """Against the loop by hand; the ledger has exactly the evaluations that were planned."""
    policy, table = bare(**lists), cost_table(build(NAME))
    chunk = sample_chunk(sampler(policy), INDEX, table)
    torch.testing.assert_close(chunk.images, by_hand(policy), **RUN)
    assert chunk.ledger.called[:, 0, 0].tolist() == [evaluated > 0 for evaluated in policy.call]
    assert chunk.ledger.called[:, 1, 0].tolist() == [evaluated > 1 for evaluated in policy.call]
    full = sum(policy.call[k] * table.path_cost(0, policy.depth[k] or 5, blocks=range(5)).macs for k in range(STEPS))
    assert chunk.ledger.macs_per_image == full
    plain = sample_chunk(sampler(Full()), INDEX, table)
    assert (chunk.images - plain.images).abs().max() > 1e-3


def test_a_forecast_is_not_what_was_held() -> None:
    lists: dict[str, Any] = dict(call=[2, 2, 1, 1, 2, 1])
    held, straight = (
        sample_chunk(sampler(bare(**lists, forecast=forecast)), INDEX, cost_table(build(NAME))).images
        for forecast in ([0] * STEPS, [1] * STEPS)
    )
    assert (held - straight).abs().max() > 1e-3


def test_one_branch_takes_its_own_from_memory() -> None:
    """Call 1 evaluates one branch, so what call 2 takes was written at 1 for it, and at 0 for the other."""
    policy = bare(call=[2, 1, 2, 2, 2, 2], reuse=[{}, {}, {1: "output"}, {}, {}, {}])
    s, memory = sampler(policy), Memory(6, {(1, "output")})
    info, held, labels = s.info(s.calls(), INDEX), None, s.cond(INDEX)
    x = torch.randn(3, 3, 2, 8, 8)
    for k in range(3):
        plan = policy.plan(info, info.calls[k])
        memory.begin_call()
        before = {} if k != 2 else memory.read((1, "output"), Rows(6))
        prediction = s.denoiser.predict(
            x[k], info.calls[k].time, labels, plan=plan, guidance=2.0, memory=memory, held=held
        )
        held = prediction.held
    assert memory.written((1, "output")).tolist() == [1, 1, 1, 0, 0, 0]
    after = memory.read((1, "output"), Rows(6))
    assert all(torch.equal(after[name][0], before[name][0]) for name in before)
    # Each branch by itself, in the same two steps.
    for branch, wrote in ((0, 1), (1, 0)):
        cond = labels if branch == 0 else torch.full((3,), 3)
        alone = Memory(3, {(1, "output")})
        alone.begin_call()
        s.denoiser.rows(x[wrote], info.calls[wrote].time, cond, memory=alone)
        alone.begin_call()
        taking = StepPlan(reuse=frozenset({(1, "output")}))
        wanted = s.denoiser.rows(x[2], info.calls[2].time, cond, taking, memory=alone).prediction
        torch.testing.assert_close(held.eps[3 * branch : 3 * branch + 3], wanted, **TOLERANCE)


def test_a_file_makes_the_run_of_its_fields(tmp_path: Path) -> None:
    policy, table = planned(), cost_table(build(NAME))
    inline, read = (
        sample_chunk(sampler(p), INDEX, table) for p in (policy, Planned(file=write(tmp_path / "plan.yaml", policy)))
    )
    assert torch.equal(inline.images, read.images)
    assert inline.ledger.reused[:, 0, 0].tolist() == [0, 1, 0, 0, 0, 4]  # read out after 3, which is whole
