"""A policy that leaves nothing out changes nothing, and detaching puts everything back."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.integrations.diffusers import attach
from gearshift.integrations.diffusers.compat import hook_names
from gearshift.policies import (
    AdaptiveSkip,
    AttentionReuse,
    Compose,
    DeepFeatureReuse,
    FixedDepth,
    Full,
    Policy,
    SkipEvery,
)
from gearshift.runtime.errors import UsageError

from .tiny import CASES, Case

NO_LONG_SKIPS = {"dit", "pixart", "wan", "wan2", "sd3", "flux", "flux_cfg"}
STEPS = 3
OTHER_PROCESSORS = {"wan", "wan2", "sd3", "flux", "flux_cfg"}
"""Their attention forms no map of its own."""
IDLE: dict[str, Policy] = {
    "full": Full(),
    "adaptive": AdaptiveSkip(0.0),
    "output": AttentionReuse(operator="output", last=0),
    "qk": AttentionReuse(operator="qk", last=0),
    "map": AttentionReuse(operator="map", last=0),
    "deep": DeepFeatureReuse(last=0),
}


@functools.cache
def built(name: str) -> tuple[Any, Tensor]:
    """A pipeline, and what it generates without us."""
    pipe = CASES[name].build()
    return pipe, CASES[name].run(pipe, STEPS)


def components(pipe: Any) -> dict[str, nn.Module]:
    """Every module of a pipeline by its path."""
    found: dict[str, nn.Module] = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            found |= {f"{name}.{path}": module for path, module in component.named_modules()}
    return found


def state(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that attaching might leave something on."""
    modules, scheduler = components(pipe), pipe.scheduler
    return {
        "pipe": set(vars(pipe)),
        "modules": {path: set(vars(module)) for path, module in modules.items()},
        "hooks": {
            path: [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
            for path, module in modules.items()
        },
        "forwards": {path: (function(module.forward), type(module)) for path, module in modules.items()},
        "processors": {path: id(getattr(module, "processor", None)) for path, module in modules.items()},
        "parameters": {path: [id(p) for p in module.parameters(recurse=False)] for path, module in modules.items()},
        "scheduler": set(vars(scheduler)),
        "scheduler's": [type(scheduler), function(scheduler.step), function(scheduler.set_timesteps)],
    }


def function(method: Any) -> Any:
    """What is behind a method; what is no method is itself."""
    return getattr(method, "__func__", method)


def assert_bare(pipe: Any) -> None:
    """Asserts that nothing of ours is on a pipeline."""
    for module in components(pipe).values():
        # Some pipelines of the library leave an empty registry of hooks on their model.
        assert not {"forward", "_gearshift"} & set(vars(module))
        assert module._compiled_call_impl is None
        assert not hasattr(getattr(module, "processor", None), "stock")
    models = [component for component in pipe.components.values() if isinstance(component, nn.Module)]
    assert [name for model in models for name in hook_names(model)] == []
    registries = [vars(module).get("_diffusers_hook") for module in components(pipe).values()]
    for registry in registries:
        # The library finds hooks below a model once, and goes by what it found.
        assert all(any(child is other for other in registries) for child in known_below(registry))
    assert not {"step", "set_timesteps", "_gearshift"} & set(vars(pipe.scheduler))


def known_below(registry: Any) -> list[Any]:
    """The registries below its module that a registry of the library remembers."""
    return getattr(registry, "_child_registries_cache", None) or []


def reaching(name: str) -> Policy:
    """A policy that reaches as far into a pipeline as any can, and leaves something out."""
    inside = AttentionReuse(operator="output", computed=[0])
    return Compose([inside, FixedDepth(2) if name in NO_LONG_SKIPS else DeepFeatureReuse(interval=2)])


@pytest.mark.parametrize("policy", IDLE)
@pytest.mark.parametrize("name", CASES)
def test_a_policy_that_leaves_nothing_out_changes_nothing(name: str, policy: str) -> None:
    """Bit for bit, while it is attached and afterwards."""
    (pipe, plain), case = built(name), CASES[name]
    before = state(pipe)
    refused = policy == "deep" and name in NO_LONG_SKIPS
    refused |= policy == "map" and name in OTHER_PROCESSORS
    if refused:
        with pytest.raises(UsageError, match="long skips" if policy == "deep" else "operator=map"):
            attach(pipe, IDLE[policy])
        assert state(pipe) == before
        return
    with attach(pipe, IDLE[policy]) as handle:
        assert torch.equal(case.run(pipe, STEPS), plain)
    ledger = handle.ledger
    assert not ledger.fired
    assert ledger.complete
    assert all(ledger.mask)
    assert ledger.calls_per_sample == ledger.full_calls_per_sample > 0
    # What is decided as the run goes may be to skip, so the last prediction is kept.
    assert ledger.extra_bytes == 0 or policy == "adaptive"
    assert ledger.notes == []
    assert state(pipe) == before
    assert_bare(pipe)
    assert torch.equal(case.run(pipe, STEPS), plain)


@pytest.mark.parametrize("name", CASES)
def test_two_prompts_another_size_and_no_guidance_change_nothing_either(name: str) -> None:
    pipe, case = built(name)[0], CASES[name]
    calls: list[dict[str, Any]] = [dict(prompts=2), dict(size=case.sizes[1]), dict(guidance=1.0)]
    plain = [case.run(pipe, STEPS, **call) for call in calls]
    with attach(pipe, [AdaptiveSkip(0.0), AttentionReuse(operator="output", last=0)]):
        for call, expected in zip(calls, plain, strict=True):
            assert torch.equal(case.run(pipe, STEPS, **call), expected)


@pytest.mark.parametrize("name", CASES)
def test_detaching_restores_everything(name: str) -> None:
    """After a policy that reached inside and fired; the ledger stays."""
    (pipe, plain), case = built(name), CASES[name]
    before = state(pipe)
    with attach(pipe, reaching(name)) as handle:
        assert handle.attached
        assert not torch.equal(case.run(pipe, STEPS), plain)
        assert handle.ledger.fired
        assert state(pipe) != before
    assert not handle.attached
    assert handle.ledger.fired
    assert state(pipe) == before
    assert_bare(pipe)
    assert torch.equal(case.run(pipe, STEPS), plain)
    handle.detach()
    assert state(pipe) == before


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", CASES)
def test_detaching_restores_everything_after_an_exception(name: str) -> None:
    """The third call of a denoiser fails in its last module, in the middle of what the policy had armed."""
    (pipe, plain), case = built(name), CASES[name]
    before = state(pipe)
    calls = []

    def fail(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(module)
        if len(calls) == 3:
            raise Stop

    last = [module for module in getattr(pipe, case.denoisers[0]).modules() if not list(module.children())][-1]
    watch = last.register_forward_pre_hook(fail)
    with pytest.raises(Stop), attach(pipe, reaching(name)) as handle:
        case.run(pipe, 4)
    watch.remove()
    assert not handle.attached
    assert not handle.ledger.complete
    assert state(pipe) == before
    assert_bare(pipe)
    assert torch.equal(case.run(pipe, STEPS), plain)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.callback])
def test_detaching_in_the_middle_of_a_generation(name: str) -> None:
    """A callback that detaches after a step that left something out: from there on everything is computed."""
    (pipe, plain), case = built(name), CASES[name]
    before = state(pipe)
    handle = attach(pipe, [SkipEvery(2), reaching(name)])

    def leave(_: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            handle.detach()
        return tensors

    case.run(pipe, callback_on_step_end=leave)
    assert handle.ledger.mask == [True, False]
    assert not handle.ledger.complete
    assert state(pipe) == before
    assert torch.equal(case.run(pipe, STEPS), plain)


def test_attaching_leaves_alone_what_was_there() -> None:
    """Hooks of torch and processors of others are where they were, and act as they did."""
    case: Case = CASES["sd"]
    pipe = case.build()
    attention: Any = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    stock, seen = attention.processor, []

    class Mine:
        def __call__(self, attn: Any, hidden_states: Tensor, **more: Any) -> Tensor:
            seen.append(len(hidden_states))
            result: Tensor = stock(attn, hidden_states, **more)
            return result

    own = Mine()
    attention.set_processor(own)
    block = pipe.unet.mid_block
    watch = block.register_forward_hook(lambda module, args, output: output + 1)
    plain = case.run(pipe)
    assert len(seen) == 6
    before = state(pipe)
    with attach(pipe, [AttentionReuse(operator="output", last=0), DeepFeatureReuse(last=0)]):
        assert torch.equal(case.run(pipe), plain)
        assert len(seen) == 12
    with attach(pipe, AttentionReuse(operator="output", interval=2)):
        case.run(pipe)
        assert len(seen) == 15
    assert attention.processor is own
    assert state(pipe) == before
    watch.remove()


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_that_never_ran_is_as_it_was_built(name: str) -> None:
    pipe = CASES[name].build()
    before = state(pipe)
    with attach(pipe, reaching(name)):
        assert state(pipe) != before
    assert state(pipe) == before
    assert all("_diffusers_hook" not in vars(module) for module in components(pipe).values())
