"""Depth of transformers and plans on pipelines, against blocks patched by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.integrations.diffusers import attach
from gearshift.policies import (
    AttentionReuse,
    DeepFeatureReuse,
    ExitSchedule,
    FixedDepth,
    Planned,
    SkipEvery,
)

from .test_inner_blocks import STEPS, TRANSFORMERS, counted, odd, prepared, spoil
from .tiny import Case

# Depth ---------------------------------------------------------------------------------------------------------------


def blocks_in(transformer: Any) -> list[Any]:
    """Blocks in the order in which they run."""
    lists = [getattr(transformer, name, ()) for name in ("transformer_blocks", "single_transformer_blocks", "blocks")]
    return [block for some in lists for block in some]


def _identity(block: nn.Module) -> Callable[..., Any]:
    """A block that returns what it is given, in the form in which it returns."""
    pair = type(block).__name__ in ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")

    def forward(hidden_states: Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> Any:
        return (encoder_hidden_states, hidden_states) if pair else hidden_states

    return forward


@contextlib.contextmanager
def shallow(transformer: Any, depth: Callable[[], int]) -> Iterator[None]:
    """Blocks beyond a depth do nothing."""
    blocks = blocks_in(transformer)
    for number, block in enumerate(blocks):
        block.forward = _either(number, block.forward, _identity(block), depth)
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


def _either(number: int, forward: Any, identity: Any, depth: Callable[[], int]) -> Callable[..., Any]:
    return lambda *args, **kwargs: (forward if number < depth() else identity)(*args, **kwargs)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_beyond_a_depth_do_nothing(name: str, depth: int) -> None:
    case, pipe, plain = prepared(name)
    with attach(pipe, FixedDepth(depth)) as handle:
        with counted(handle.network.blocks) as made:
            found = case.run(pipe, steps=STEPS)
        names = [block.name for block in handle.network.blocks]
        calls = STEPS * (2 if case.sequential else 1)
        assert handle.ledger.hits == dict.fromkeys(names[depth:], calls)
        assert set(made) == set(names[:depth])
        assert handle.ledger.fired == (depth < 4)
        assert handle.ledger.mask == [True] * STEPS
    with shallow(pipe.transformer, lambda: depth):
        assert torch.equal(case.run(pipe, steps=STEPS), found)
    assert torch.equal(found, plain) == (depth == 4)
    assert torch.equal(case.run(pipe, steps=STEPS), plain)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_depth_follows_the_noise_level(name: str) -> None:
    """Four bins of the training index, the first at the data."""
    case, pipe, _ = prepared(name)
    depths = [1, 4, 2, 3]
    with attach(pipe, ExitSchedule(depths=depths)) as handle:
        found = case.run(pipe, steps=STEPS)
        taken = [int(step.branches[0].plan.depth) for step in handle.ledger.steps]
    times: list[float] = []
    step, sequential = pipe.scheduler.step, 2 if case.sequential else 1

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        place = len(times) // sequential
        times.append(float(pipe.scheduler.timesteps[place]))

    def depth() -> int:
        return depths[min(int(times[-1] / 1000 * 4), 3)]

    handle_ = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    with shallow(pipe.transformer, depth):
        assert torch.equal(case.run(pipe, steps=STEPS), found)
    handle_.remove()
    assert taken == [depths[min(int(time / 1000 * 4), 3)] for time in times[::sequential]]
    assert len(set(taken)) > 1
    assert pipe.scheduler.step == step


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_depth_and_reuse_at_once(name: str) -> None:
    """What lies beyond the depth is passed by, and what lies before takes from memory."""
    case, pipe, _ = prepared(name)
    with attach(pipe, [FixedDepth(2), AttentionReuse(operator="output", interval=2)]) as handle:
        found = case.run(pipe, steps=STEPS)
        names = {site.name for block in handle.network.blocks[:2] for site in block.sites}
        assert {name for name in handle.ledger.hits if "attn" in name} == names
    with attach(pipe, AttentionReuse(operator="output", interval=2)), shallow(pipe.transformer, lambda: 2):
        assert torch.equal(case.run(pipe, steps=STEPS), found)


# Plans ---------------------------------------------------------------------------------------------------------------


def planned(case: Case, pipe: Any, branches: int = 2, **what: Any) -> Planned:
    """A plan for a pipeline, with or without guidance."""
    with attach(pipe, SkipEvery(2)) as handle:
        case.run(pipe, steps=6, guidance=float(branches))
        levels = [step.call.log_snr for step in handle.ledger.steps]
        network = handle.network
    fields: dict[str, Any] = dict(
        network=network.name,
        blocks=len(network.blocks),
        solver="ddim",
        log_snr=levels,
        branches=branches,
        call=[branches] * 6,
        depth=[0] * 6,
        reuse=[{} for _ in range(6)],
    )
    return Planned(**fields | what)


@pytest.mark.parametrize("branches", [1, 2])
def test_a_plan_is_followed(branches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped calls, reuse of attention and of deep features in one run."""
    case, pipe, _ = prepared("sd")
    spoil(monkeypatch)
    inside = 11  # up.1.1, before the last merge
    reuse: list[dict[int, str]] = [{}, {0: "qk", 10: "cross.output"}, {}, {inside: "block"}, {}, {1: "self.map"}]
    call = [branches * computed for computed in (1, 1, 0, 1, 1, 1)]
    with attach(pipe, planned(case, pipe, branches, call=call, reuse=reuse)) as handle:
        found = case.run(pipe, steps=6, guidance=float(branches))
        ledger = handle.ledger
        blocks = handle.network.blocks
        assert handle.network.block("up.1.1") == inside
        hits = {site.name for site in blocks[0].sites}
        hits |= {site.name for site in blocks[10].sites if site.kind == "cross"}
        hits |= {site.name for site in blocks[1].sites if site.kind == "self"}
        hits |= {block.name for block in blocks[:12]}
        assert ledger.hits == dict.fromkeys(hits, 1)
        assert ledger.mask == [True, True, False, True, True, True]
        assert [dict(step.branches[0].plan.reuse) for step in ledger.steps] == [
            reuse[k] if ledger.mask[k] else {} for k in range(6)
        ]
        assert not ledger.notes
        assert ledger.calls_per_sample == 5 * branches
    assert found.isfinite().all()


@pytest.mark.parametrize("branches", [1, 2])
def test_plans_are_what_schedules_are(branches: int) -> None:
    case, pipe, _ = prepared("sd")
    for policy, what in (
        (DeepFeatureReuse(interval=2), dict(reuse=[{11: "block"} if odd(k) else {} for k in range(6)])),
        (
            AttentionReuse(operator="qk", last=2, layers=[0, 5]),
            dict(reuse=[{0: "qk", 5: "qk"} if k >= 4 else {} for k in range(6)]),
        ),
        (
            SkipEvery(3, extrapolate=True),
            dict(call=[branches * (k != 2) for k in range(6)], forecast=[int(k == 2) for k in range(6)]),
        ),
    ):
        with attach(pipe, policy) as handle:
            expected = case.run(pipe, steps=6, guidance=float(branches))
            hits = handle.ledger.hits
        with attach(pipe, planned(case, pipe, branches, **what)) as handle:
            assert torch.equal(case.run(pipe, steps=6, guidance=float(branches)), expected)
            assert handle.ledger.hits == hits


def test_plans_choose_depths() -> None:
    case, pipe, _ = prepared("dit")
    depths = [0, 2, 4, 1, 0, 3]
    with attach(pipe, planned(case, pipe, 1, depth=depths)) as handle:
        found = case.run(pipe, steps=6, guidance=1.0)
        assert sum(handle.ledger.hits.values()) == sum(4 - (depth or 4) for depth in depths)
    calls: list[int] = []
    watch = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(0))
    with shallow(pipe.transformer, lambda: depths[len(calls) - 1] or 4):
        assert torch.equal(case.run(pipe, steps=6, guidance=1.0), found)
    watch.remove()
