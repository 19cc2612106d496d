"""Hooks before single modules: they are seen, they follow compilation, and they go without a trace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from gearshift.integrations.diffusers import attach, compat
from gearshift.integrations.diffusers.compat import (
    HOOK,
    Hook,
    Interposed,
    enabled_cache,
    hook_names,
    is_wholly_compiled,
    is_wrapped_by_compiler,
    private_to_hooks,
    strip_hooks,
)
from gearshift.policies import AttentionReuse, FixedDepth, SkipEvery
from gearshift.runtime.errors import UsageError

from .tiny import CASES

X = torch.ones(2, 3)


class Counting(Hook):
    """Counts calls, and adds something to the output."""

    def __init__(self, plus: float = 0.0) -> None:
        super().__init__()
        self.calls, self.plus = 0, plus
        self.branches: list[str | None] = []

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.branches.append(self.branch)
        return self.inner(*args, **kwargs) + self.plus


class Before(ModelHook):
    """Of another library: looks at what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


class Instead(ModelHook):
    """Of another library: stands in the place of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.fixture
def fresh() -> Iterator[None]:
    import torch._dynamo as dynamo

    dynamo.reset()
    yield
    dynamo.reset()


class Layer(nn.Module):
    """Of a class that is compiled like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(9.0).view(3, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def layer() -> Layer:
    return Layer()


def untouched(module: nn.Module) -> bool:
    return not {"forward", "_diffusers_hook"} & set(vars(module))


def foreign(module: nn.Module, hook: ModelHook, name: str = "foreign") -> ModelHook:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    return hook


# Plain modules -------------------------------------------------------------------------------------------------------


def test_a_plain_module() -> None:
    module, hook = layer(), Counting(plus=2.0)
    expected = module(X)
    one = Interposed(module, hook)
    assert torch.equal(module(X), expected + 2)
    assert torch.equal(module(x=X), expected + 2)
    assert torch.equal(hook.inner(X), expected)
    assert hook.calls == 2
    one.settle()
    assert torch.equal(module(X), expected + 2)
    for _ in range(2):
        one.withdraw()
        assert untouched(module)
        assert torch.equal(module(X), expected)
    assert hook.calls == 3
    again = Interposed(module, hook)
    assert torch.equal(module(X), expected + 2)
    again.withdraw()
    assert untouched(module)


def test_the_forward_of_the_instance_comes_back() -> None:
    """Where it is not that of its class."""
    module, hook = layer(), Counting()

    def own(x: Tensor) -> Tensor:
        return x * 5

    module.forward = own  # type: ignore[method-assign]
    one = Interposed(module, hook)
    assert torch.equal(module(X), X * 5)
    one.withdraw()
    assert vars(module)["forward"] is own
    assert not hasattr(module, "_diffusers_hook")
    assert hook.calls == 1


def test_an_empty_registry_that_was_there_stays() -> None:
    module = layer()
    registry = HookRegistry.check_if_exists_or_initialize(module)
    one = Interposed(module, Counting())
    assert list(hook_names(module)) == [(HOOK, __name__)]
    one.withdraw()
    assert module._diffusers_hook is registry
    assert not registry.hooks
    assert "forward" not in vars(module)


def test_the_signature_is_that_of_the_module() -> None:
    """Pipelines of the library look at it to know what a model takes."""
    import inspect

    pipe = CASES["sd"].build()
    before = inspect.signature(pipe.unet.forward)
    one = Interposed(pipe.unet, Counting())
    assert inspect.signature(pipe.unet.forward) == before
    one.withdraw()
    assert inspect.signature(pipe.unet.forward) == before


# Other hooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Before, Instead])
def test_a_hook_that_was_there_before(kind: Any) -> None:
    """Ours goes first, as when a policy is attached to a pipeline that is offloaded."""
    module = layer()
    expected = module(X)
    other: Any = foreign(module, kind())
    inner = module.forward
    hook = Counting(plus=1.0)
    one = Interposed(module, hook)
    assert torch.equal(module(X), expected + 1)
    assert (hook.calls, other.calls) == (1, 1)
    one.withdraw()
    assert torch.equal(module(X), expected)
    assert (hook.calls, other.calls) == (1, 2)
    assert module.forward == inner
    assert list(module._diffusers_hook.hooks) == ["foreign"]
    module._diffusers_hook.remove_hook("foreign")
    assert torch.equal(module(X), expected)
    assert other.calls == 2


@pytest.mark.parametrize("kind", [Before, Instead])
def test_a_hook_that_came_after_and_goes_before(kind: Any) -> None:
    module = layer()
    expected = module(X)
    hook = Counting(plus=1.0)
    one = Interposed(module, hook)
    other: Any = foreign(module, kind())
    assert torch.equal(module(X), expected + 1)
    assert (hook.calls, other.calls) == (1, 1)
    module._diffusers_hook.remove_hook("foreign")
    assert torch.equal(module(X), expected + 1)
    assert (hook.calls, other.calls) == (2, 1)
    one.withdraw()
    assert untouched(module)
    assert torch.equal(module(X), expected)


def test_a_hook_that_came_after_and_stays() -> None:
    """One that looks at inputs, as those of offloading and of casting do."""
    module = layer()
    expected = module(X)
    hook = Counting(plus=1.0)
    one = Interposed(module, hook)
    other: Any = foreign(module, Before())
    module(X)
    one.withdraw()
    assert torch.equal(module(X), expected)
    assert (hook.calls, other.calls) == (1, 2)
    assert list(module._diffusers_hook.hooks) == ["foreign"]


def test_another_wrapper_is_not_thrown_away() -> None:
    module, hook = layer(), Counting(plus=1.0)
    expected = module(X)
    one = Interposed(module, hook)
    ours = module.forward
    module.forward = lambda x: ours(x) * 2  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"^Layer got another wrapper after the policy was attached"):
        one.withdraw()
    assert torch.equal(module(X), (expected + 1) * 2)
    module.forward = ours  # type: ignore[method-assign]
    one.withdraw()
    assert untouched(module)
    assert torch.equal(module(X), expected)


def test_two_of_ours_on_one_module() -> None:
    """Are one too many: which of them would be the first?"""
    module = layer()
    one = Interposed(module, Counting())
    with pytest.raises(ValueError, match="already exists"):
        Interposed(module, Counting())
    one.withdraw()
    assert untouched(module)


def test_caches_are_recognised() -> None:
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_layerwise_casting

    pipe = CASES["wan"].build()
    assert enabled_cache(pipe.transformer) is None
    apply_layerwise_casting(pipe.vae, torch.float16, torch.float32)
    assert list(hook_names(pipe.vae))
    assert enabled_cache(pipe.vae) is None
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert enabled_cache(pipe.transformer) == "FirstBlockCacheConfig"
    pipe.transformer._cache_config = None  # as where hooks were put there by hand
    assert enabled_cache(pipe.transformer) == "fbc_leader_block_hook"


# Compiled modules ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_a_compiled_module() -> None:
    """The hook is outside of the graph: nothing of it is traced, so that it may count."""
    from torch._dynamo.utils import counters

    module, hook = layer(), Counting(plus=1.0)
    expected = module(X)
    module.compile(backend="eager", fullgraph=True)
    compiled = module._compiled_call_impl
    counters.clear()
    one = Interposed(module, hook)
    assert untouched(module)
    for _ in range(3):
        assert torch.equal(module(X), expected + 1)
    assert hook.calls == 3
    assert counters["stats"]["unique_graphs"] == 1
    one.settle()
    assert torch.equal(module(X), expected + 1)
    one.withdraw()
    assert module._compiled_call_impl is compiled
    assert torch.equal(module(X), expected)
    assert hook.calls == 4
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fresh")
def test_a_module_that_is_compiled_later() -> None:
    """And again, and then no longer."""
    module, hook = layer(), Counting(plus=1.0)
    expected = module(X)
    one = Interposed(module, hook)
    module.compile(backend="eager")
    first = module._compiled_call_impl
    one.settle()
    assert untouched(module)
    assert torch.equal(module(X), expected + 1)
    module.compile(backend="eager")
    second = module._compiled_call_impl
    assert second is not first
    one.settle()
    assert torch.equal(module(X), expected + 1)
    assert hook._compiled is second
    module._compiled_call_impl = None
    one.settle()
    assert not untouched(module)
    assert torch.equal(module(X), expected + 1)
    assert hook.calls == 3
    one.withdraw()
    assert untouched(module)
    assert torch.equal(module(X), expected)


@pytest.mark.usefixtures("fresh")
def test_a_module_that_is_compiled_and_withdrawn_from_at_once() -> None:
    module, hook = layer(), Counting(plus=1.0)
    expected = module(X)
    one = Interposed(module, hook)
    module.compile(backend="eager")
    one.withdraw()
    assert untouched(module)
    assert torch.equal(module(X), expected)
    assert hook.calls == 0


@pytest.mark.usefixtures("fresh")
def test_a_compiled_call_that_was_exchanged_is_not_taken_back() -> None:
    module, hook = layer(), Counting(plus=1.0)
    module.compile(backend="eager")
    one = Interposed(module, hook)
    module.compile(backend="eager")
    last = module._compiled_call_impl
    one.withdraw()
    assert module._compiled_call_impl is last


@pytest.mark.usefixtures("fresh")
def test_what_is_compiled_is_recognised() -> None:
    module = layer()
    assert not is_wholly_compiled(module)
    wrapped: Any = torch.compile(module, backend="eager")
    assert is_wrapped_by_compiler(wrapped)
    assert is_wholly_compiled(wrapped)
    assert not is_wrapped_by_compiler(module)
    module.compile(backend="eager")
    assert is_wholly_compiled(module)
    assert not is_wrapped_by_compiler(module)
    assert not is_wholly_compiled(nn.Sequential(module))


@pytest.mark.usefixtures("fresh")
def test_copies_can_be_freed_of_hooks() -> None:
    import copy

    module = layer()
    expected = module(X)
    foreign(module, Before())
    one = Interposed(module, Counting(plus=1.0))
    things = private_to_hooks(module)
    assert len(things) == 2
    twin = copy.deepcopy(module, {id(thing): None for thing in things})
    strip_hooks(twin)
    assert untouched(twin)
    assert torch.equal(twin(X), expected)
    module.compile(backend="eager")
    one.settle()
    twin = copy.deepcopy(module, {id(thing): None for thing in private_to_hooks(module)})
    strip_hooks(twin)
    assert twin._compiled_call_impl is None
    assert torch.equal(twin(X), expected)


def test_a_cache_that_came_after_the_policy_outlives_it() -> None:
    """The library, when a hook is removed, puts what was before it in the place of the one after it."""
    from diffusers import FirstBlockCacheConfig

    case, pipe = CASES["wan"], CASES["wan"].build()
    plain = case.run(pipe)
    config = FirstBlockCacheConfig(threshold=10.0)
    pipe.transformer.enable_cache(config)
    cached = case.run(pipe)
    pipe.transformer.disable_cache()
    assert not torch.equal(cached, plain)
    handle = attach(pipe, FixedDepth(3))
    case.run(pipe)
    pipe.transformer.enable_cache(config)
    with pytest.raises(UsageError, match="already has the cache"):
        case.run(pipe)
    handle.detach()
    assert torch.equal(case.run(pipe), cached)
    pipe.transformer.disable_cache()
    assert torch.equal(case.run(pipe), plain)


class Looking(ModelHook):  # type: ignore[misc]
    """Looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        return args, kwargs


def test_a_hook_that_was_there_before_can_be_removed_first() -> None:
    case, pipe = CASES["sd"], CASES["sd"].build()
    looking = Looking()
    registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
    registry.register_hook(looking, "looking")
    with attach(pipe, SkipEvery(2)) as handle:
        registry.remove_hook("looking")
        case.run(pipe)
        assert handle.ledger.fired
    looking.seen = 0
    case.run(pipe)
    assert looking.seen == 0


def test_what_cannot_be_put_in_leaves_nothing_behind() -> None:
    """Projections in compiled blocks; and a helper that another pipeline has a policy on."""
    case, pipe = CASES["wan"], CASES["wan"].build()
    for block in pipe.transformer.blocks:
        block.compile(backend="eager")
    handle = attach(pipe, AttentionReuse(operator="qk", interval=2))
    with pytest.raises(UsageError, match="is compiled; take operator=output"):
        case.run(pipe)
    handle.detach()
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())
    one, other = CASES["sd_controlnet"].build(), CASES["sd_controlnet"].build()
    other.controlnet = one.controlnet
    with attach(one, SkipEvery(2)):
        with pytest.raises(UsageError, match="already has the policy 'skip every 2'"):
            attach(other, SkipEvery(3))
        assert "forward" not in vars(other.unet) and not hasattr(other.unet, "_gearshift")


def test_what_is_private_is_touched_in_one_module() -> None:
    """Names of the library and of torch that begin with an underscore, outside of `compat`."""
    names = "_diffusers_hook _compiled_call_impl _fn_refs _cache_config _repeated_blocks _hf_hook _old_forward _helpers"
    for file in Path(compat.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        found = [name for name in names.split() if re.search(rf"\b(?<!self\.){name}\b", text)]
        assert not found or file.name == "compat.py", (file.name, found)
        assert "hooks.hooks" not in text or file.name == "compat.py"
