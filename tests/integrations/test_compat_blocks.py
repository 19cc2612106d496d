"""What the library says of branches and of blocks, as it reaches hooks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.integrations.diffusers import attach
from gearshift.integrations.diffusers.compat import (
    Interposed,
    Passed,
    renew,
)
from gearshift.policies import SkipEvery

from .test_compat import Counting, layer, untouched
from .tiny import CASES

# Branches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [("wan", ["cond", "uncond"]), ("flux_cfg", ["cond", "uncond"])])
def test_the_names_of_branches_reach_the_hook(name: str, expected: list[str]) -> None:
    case = CASES[name]
    pipe = case.build()

    class Listening(Counting):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.branches.append(self.branch)
            return self.inner(*args, **kwargs)

    hook, inner = Listening(), Listening()
    blocks = getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks
    both = [Interposed(pipe.transformer, hook), Interposed(blocks[1], inner)]
    renew(pipe.transformer)
    case.run(pipe, steps=2)
    assert [branch for branch in hook.branches if branch not in expected] == []
    assert hook.branches == inner.branches
    assert sorted(set(hook.branches), key=str) == expected
    assert len(hook.branches) == 4
    assert hook.branches[:2] == hook.branches[2:]
    assert hook.branch is None
    for one in reversed(both):
        one.withdraw()
    renew(pipe.transformer)
    assert untouched(blocks[1])


def test_contexts_by_name_and_by_object() -> None:
    """As the two latest releases of the library hand them over."""
    from diffusers.hooks.hooks import CacheContext

    hook = Counting()
    assert hook.branch is None
    hook.context.set_context("cond")
    assert hook.branch == "cond"
    hook.context.set_context(CacheContext("uncond", step_index=1))
    assert hook.branch == "uncond"
    hook.context.set_context(None)
    assert hook.branch is None
    hook.context.set_context("cond")
    assert hook.reset_state(nn.Identity()) is not None
    assert hook.branch is None


def test_pipelines_that_name_no_branch() -> None:
    pipe = CASES["sd"].build()
    hook = Counting()

    class First(Counting):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hook.branches.append(self.branch)
            return self.inner(*args, **kwargs)

    one = Interposed(pipe.unet, First())
    CASES["sd"].run(pipe, steps=2)
    one.withdraw()
    assert hook.branches == [None, None]


def test_resetting_the_stateful_hooks_of_a_model_keeps_a_policy() -> None:
    """The library does so after each generation, and between runs of its caches."""
    case = CASES["wan"]
    pipe = case.build()
    with attach(pipe, SkipEvery(2)) as handle:
        expected = case.run(pipe, steps=4)
        pipe.transformer._reset_stateful_cache()
        pipe.transformer._diffusers_hook.reset_stateful_hooks()
        assert torch.equal(case.run(pipe, steps=4), expected)
        assert handle.ledger.mask == [True, False, True, True]


# Blocks that are passed by -------------------------------------------------------------------------------------------


class Unknown(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def test_a_block_that_the_library_does_not_describe() -> None:
    with pytest.raises(KeyError, match="Unknown"):
        Passed(Unknown())
    with pytest.raises(KeyError, match="Layer"):
        Passed(layer())


@functools.cache
def blocks_of(name: str) -> tuple[nn.Module, ...]:
    transformer = CASES[name].build().transformer
    lists = ("transformer_blocks", "single_transformer_blocks", "blocks")
    return tuple(block for some in lists for block in getattr(transformer, some, ()))


@pytest.mark.parametrize("name", ["dit", "pixart", "wan"])
def test_blocks_of_images_alone(name: str) -> None:
    hidden, other = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    for block in blocks_of(name):
        passed = Passed(block)
        assert passed((hidden, other), {}) is hidden
        assert passed((), {"encoder_hidden_states": other, "hidden_states": hidden}) is hidden
        assert passed((hidden,), {"encoder_hidden_states": other}) is hidden


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_blocks_of_images_with_their_text(name: str) -> None:
    """Text comes first in what they return, and second in what they take."""
    hidden, text, third = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 4)
    for block in blocks_of(name):
        passed = Passed(block)
        for args, kwargs in (
            ((hidden, text, third), {}),
            ((hidden,), {"temb": third, "encoder_hidden_states": text}),
            ((), {"encoder_hidden_states": text, "temb": third, "hidden_states": hidden}),
        ):
            first, second = passed(args, kwargs)
            assert first is text
            assert second is hidden


@pytest.mark.parametrize("name", ["dit", "wan", "sd3", "flux"])
def test_what_a_block_is_passed_with_is_what_it_would_return(name: str) -> None:
    """The same structure and shapes as its own output."""
    case = CASES[name]
    pipe = case.build()
    seen: list[tuple[nn.Module, Any, Any, Any]] = []

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((module, args, kwargs, output))

    for some in ("transformer_blocks", "single_transformer_blocks", "blocks"):
        for block in getattr(pipe.transformer, some, ()):
            block.register_forward_hook(look, with_kwargs=True)
    case.run(pipe, steps=2)
    assert seen
    for module, args, kwargs, output in seen:
        found = Passed(module)(args, kwargs)
        assert isinstance(found, tuple) == isinstance(output, tuple)
        pairs = zip(found, output, strict=True) if isinstance(output, tuple) else [(found, output)]
        for one, other in pairs:
            assert other is None or one.shape == other.shape  # the last block of SD 3 returns no text
