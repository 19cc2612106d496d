"""Everything that is private to `diffusers` and `torch.nn`, in one place.

Held against the two latest minor releases of `diffusers`. Other modules of this package use what the library documents:
pipelines, schedulers, `HookRegistry`, `ModelHook` and attention processors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

from gearshift.runtime.errors import UsageError

Forward = Callable[..., Any]
HOOK = "gearshift"
"""Name of our hooks in the library's registries."""
CACHES = (
    "faster_cache",
    "first_block_cache",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
    "text_kv_cache",
)
"""Modules of `diffusers.hooks` whose hooks reuse things over steps."""


class _Nothing(BaseState):
    """Of a state manager that keeps none."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Context(StateManager):
    """Listens to the name of the branch that a pipeline says it is about to call."""

    def __init__(self) -> None:
        super().__init__(_Nothing)  # type: ignore[arg-type]  # annotated as an instance
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        # 0.41 and later hand over an object, earlier ones its name.
        self.name = getattr(context, "name", context)


class Hook(ModelHook):
    """A hook in the place of a module's forward. `inner` is what it stands before."""

    _is_stateful = True  # only such hooks are told the branch

    def __init__(self) -> None:
        super().__init__()
        self.context = _Context()
        self._compiled: Any = None

    @property
    def inner(self) -> Any:
        """The module's own forward, or its compiled call."""
        if self._compiled is not None:
            return self._compiled
        inner: Any = self.fn_ref.original_forward
        return inner

    @property
    def branch(self) -> str | None:
        """What the pipeline calls the branch it is in, where it says so."""
        return self.context.name

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.context.name = None
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Interposed:
    """A hook before one module, until `withdraw`.

    Of a module that is compiled the hook stands outside of the graph: before the compiled call, and not before the
    forward that is traced.
    """

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self.module, self.hook = module, hook
        self._outside: Any = None
        self._own_forward: Any = None
        self._settle()

    def settle(self) -> None:
        """Follow a module that has been compiled since, or whose compiled call was taken away."""
        compiled = self.module._compiled_call_impl
        self._mend()
        moved = compiled is not None if self._outside is None else compiled is not self._outside
        if moved:
            self.withdraw()
            self._settle()

    def _settle(self) -> None:
        module, hook = self.module, self.hook
        if module._compiled_call_impl is not None:
            hook._compiled = module._compiled_call_impl
            self._outside = functools.partial(hook.new_forward, module)
            module._compiled_call_impl = self._outside
            return
        hook._compiled = None
        self._had_forward = "forward" in vars(module)
        self._had_registry = hasattr(module, "_diffusers_hook")
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
        self._own_forward = vars(module)["forward"]
        self._stands = hook.fn_ref.forward

    def _mend(self) -> None:
        """When a hook that was there before ours is removed, the library puts what was before it in *our* place."""
        hook: Any = self.hook
        if self._outside is None and hook.fn_ref is not None and hook.fn_ref.forward is not self._stands:
            hook.fn_ref.original_forward, hook.fn_ref.forward = hook.fn_ref.forward, self._stands

    def withdraw(self) -> None:
        """Put everything back as it was.

        Raises:
            UsageError: something else was put before the module since, which this would throw away.
        """
        module, hook = self.module, self.hook
        if self._outside is not None:
            if module._compiled_call_impl is self._outside:
                module._compiled_call_impl = hook._compiled
            self._outside, hook._compiled = None, None
            return
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None or HOOK not in registry.hooks:
            return
        last = list(registry.hooks)[-1] == HOOK
        if last and vars(module).get("forward") is not self._own_forward:
            raise UsageError(
                f"{type(module).__name__} got another wrapper after the policy was attached (offloading?), which "
                "detaching would throw away; undo that first, then detach, or attach after it"
            )
        self._mend()
        following = None if last else registry._fn_refs[list(registry.hooks).index(HOOK) + 1]
        stands = None if following is None else following.forward
        before = hook.fn_ref.original_forward
        registry.remove_hook(HOOK, recurse=False)
        if following is not None and following.original_forward is not None:
            # And when ours is removed, in that of the hook that came after it.
            following.forward, following.original_forward = stands, before
        if not registry.hooks:
            if not self._had_forward:
                vars(module).pop("forward", None)
            if not self._had_registry:
                del module._diffusers_hook


def renew(root: nn.Module) -> None:
    """Tell a model that hooks were added or taken away below it."""
    registry = getattr(root, "_diffusers_hook", None)
    if registry is not None and hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()


def hook_names(root: nn.Module) -> Iterator[tuple[str, str]]:
    """Every hook below a model: its name, and the module of its class."""
    for module in root.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name, hook in ({} if registry is None else registry.hooks).items():
            yield name, type(hook).__module__


def enabled_cache(root: nn.Module) -> str | None:
    """What another cache on a model is called, or None."""
    config = getattr(root, "_cache_config", None)
    if config is not None:
        return type(config).__name__
    for name, module in hook_names(root):
        if module.startswith("diffusers.hooks.") and module.rsplit(".", 1)[-1] in CACHES:
            return name
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled in place."""
    return module._compiled_call_impl is not None


def is_wholly_compiled(root: nn.Module) -> bool:
    """Whether a model is compiled as one, so that nothing can be decided inside of it."""
    return root._compiled_call_impl is not None or type(root).__name__ == "OptimizedModule"


def is_wrapped_by_compiler(root: nn.Module) -> bool:
    """Whether this is not the model but what `torch.compile(model)` gave."""
    return type(root).__name__ == "OptimizedModule"


class Passed:
    """How a transformer block is passed by: it returns what it was given.

    Args:
        block: of a class that the library describes.

    Raises:
        KeyError: it does not describe the class.
    """

    def __init__(self, block: nn.Module) -> None:
        try:
            about = TransformerBlockRegistry.get(type(block))
        except ValueError as error:
            raise KeyError(type(block).__name__) from error
        names = [name for name in inspect.signature(type(block).forward).parameters if name != "self"]
        self._hidden = about.hidden_states_argument_name, names.index(about.hidden_states_argument_name)
        self._place, self._text_place = about.return_hidden_states_index, about.return_encoder_hidden_states_index
        self._text: tuple[str, int] | None = None
        if self._text_place is not None:
            name = about.encoder_hidden_states_argument_name
            self._text = name, names.index(name)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = _argument(self._hidden, args, kwargs)
        if self._text is None:
            return hidden
        both = [hidden, hidden]
        both[self._text_place] = _argument(self._text, args, kwargs)
        return tuple(both)


def _argument(which: tuple[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, place = which
    return kwargs[name] if name in kwargs else args[place]


def compile_repeated(model: nn.Module, mode: str | None) -> bool:
    """Compile the blocks of a model that repeat; False where it says of none that they do."""
    if not getattr(model, "_repeated_blocks", None):
        return False
    whole: Any = model
    whole.compile_repeated_blocks(mode=mode)
    return True


def begin_index(scheduler: Any) -> int | None:
    """Position in its timesteps at which a scheduler was told to begin."""
    index = getattr(scheduler, "begin_index", None)
    return index if isinstance(index, int) else None


def private_to_hooks(module: nn.Module) -> list[Any]:
    """What hooks (ours, the library's, those of offloading) have left on a module: not to be copied with it."""
    own = vars(module)
    names = ("forward", "_diffusers_hook", "_hf_hook", "_old_forward", "_compiled_call_impl")
    return [own[name] for name in names if own.get(name) is not None]


def strip_hooks(module: nn.Module) -> None:
    """Take from a copied module what `private_to_hooks` lists."""
    for name in ("forward", "_diffusers_hook", "_hf_hook", "_old_forward"):
        vars(module).pop(name, None)
    module._compiled_call_impl = None
