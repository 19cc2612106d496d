"""Blocks that are left out: against pipelines that compute everything and exchange tensors by hand."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.plan import StepPlan
from gearshift.integrations.diffusers import attach, beside, ports
from gearshift.integrations.diffusers.layout import blocks_of
from gearshift.policies import (
    AttentionReuse,
    DeepFeatureReuse,
    SkipEvery,
)
from gearshift.policies.base import Policy, RunInfo

from .tiny import CASES, Case, liven, pictures, sd_parts

UNETS = [
    "sd",
    "sdxl",
    "ldm",
    "ddim",
    "text_to_video",
    "animatediff",
    "svd",
    "sd_controlnet",
    "sd_multicontrolnet",
]
BRANCHES = range(6)
TRANSFORMERS = ["dit", "pixart", "wan", "sd3", "flux"]
STEPS = 4


@functools.cache
def prepared(name: str) -> tuple[Case, Any, Tensor]:
    """A pipeline, and what it generates in so many steps. It is shared: every test leaves it as it was."""
    case = CASES[name]
    pipe = case.build()
    return case, pipe, case.run(pipe, steps=STEPS)


def odd(step: int) -> bool:
    return step % 2 == 1


# Deep features -------------------------------------------------------------------------------------------------------


def merging(unet: Any) -> list[tuple[Any, int]]:
    """Layers that begin with torch.cat of features and a long skip, and how many channels the features have."""
    before = unet.config.block_out_channels[-1]
    found = []
    for stage in unet.up_blocks:
        for layer in stage.resnets:
            found.append((layer, before))
            before = getattr(layer, "spatial_res_block", layer).out_channels
    return found


@contextlib.contextmanager
def cut(unet: Any, branch: int, reuses: Callable[[int], bool]) -> Iterator[None]:
    """Everything is computed; what enters the merge of a branch is that of the last step that does not reuse.

    Before the first merge a ControlNet adds to what is kept, so there it is taken where it leaves the middle.
    """
    layers = merging(unet)
    layer, channels = layers[-1 - branch]
    if branch == len(layers) - 1:
        layer, channels = unet.mid_block, 0
    forward, kept, steps = layer.forward, [], 0

    def merged(input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if not channels:
            middle = forward(input_tensor, *args, **kwargs)
            if not reuses(steps - 1):
                kept[:] = [middle.clone()]
            return kept[0].clone()
        if not reuses(steps - 1):
            kept[:] = [input_tensor[:, :channels].clone()]
        return forward(torch.cat([kept[0], input_tensor[:, channels:]], dim=1), *args, **kwargs)

    layer.forward = merged if channels else functools.partial(_middle, merged)
    try:
        yield
    finally:
        del vars(layer)["forward"]
    assert steps > 0


def _middle(merged: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return merged(hidden_states, *args, **kwargs)


def nan(like: Tensor, device: torch.device, length: int | None = None) -> Tensor:
    """What spoils everything that reads it."""
    shape = like.shape if length is None else (length, *like.shape[1:])
    return torch.full(shape, torch.nan, dtype=like.dtype, device=device)


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "filler", nan)
    monkeypatch.setattr(beside, "filler", nan)


def convolutions(block: Any) -> Iterator[nn.Module]:
    """Layers inside of a block."""
    for module in block.modules:
        yield from (part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d | nn.Linear))


@contextlib.contextmanager
def counted(blocks: list[Any]) -> Iterator[Counter[str]]:
    """How often each block ran: any of its layers."""
    found: Counter[str] = Counter()
    handles = []
    for block in blocks:
        for layer in convolutions(block):
            name = block.name
            handles.append(layer.register_forward_pre_hook(lambda module, _args, name=name: found.update([name])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def helpers_of(pipe: Any) -> list[nn.Module]:
    helper = getattr(pipe, "controlnet", None)
    return [] if helper is None else list(getattr(helper, "nets", [helper]))


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("name", UNETS)
def test_deep_features_are_those_that_were_kept(name: str, branch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody reads what stands in the place of what is left out."""
    case, pipe, plain = prepared(name)
    # In a batch of one the strides say less, and kernels that differ in the last bit may be chosen.
    prompts = 1 if case.guided else 2
    with cut(pipe.unet, branch, odd):
        expected = case.run(pipe, steps=STEPS, prompts=prompts)
    assert not torch.equal(plain, expected[: len(plain)])
    spoil(monkeypatch)
    with attach(pipe, DeepFeatureReuse(interval=2, branch=branch)) as handle:
        found = case.run(pipe, steps=STEPS, prompts=prompts)
        assert handle.ledger.mask == [True] * STEPS
        assert not handle.ledger.notes
        assert [step.forced for step in handle.ledger.steps] == [None] * STEPS
    assert found.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", UNETS)
def test_several_prompts_and_a_detached_pipeline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe, plain = prepared(name)
    with cut(pipe.unet, 2, odd):
        expected = case.run(pipe, steps=STEPS, prompts=2)
    spoil(monkeypatch)
    with attach(pipe, DeepFeatureReuse(interval=2, branch=2)):
        assert torch.equal(case.run(pipe, steps=STEPS, prompts=2), expected)
    assert torch.equal(case.run(pipe, steps=STEPS), plain)


@pytest.mark.parametrize("branch", [0, 2, 5])
@pytest.mark.parametrize("name", ["sd", "sdxl", "ddim", "text_to_video", "animatediff", "svd"])
def test_what_lies_inside_the_cut_does_not_run(name: str, branch: int) -> None:
    """Outside are the layers that merge the outermost skips, and those whose skips they merge."""
    case, pipe, _ = prepared(name)
    with attach(pipe, DeepFeatureReuse(interval=2, branch=branch)) as handle:
        blocks = handle.network.blocks
        names = [block.name for block in blocks]
        layers = {block.name: sum(1 for _ in convolutions(block)) for block in blocks}
        with counted(blocks) as full:
            case.run(pipe, steps=1)
        with counted(blocks) as made:
            case.run(pipe, steps=STEPS)
        hits = dict(handle.ledger.hits)
    pushes = [block for block in names if block.startswith("down")]
    merges = [block for block in names if block.startswith("up") and not block.endswith("sampler")]
    first = names.index(merges[-1 - branch])
    # The input of the model is the outermost skip.
    outside = {*pushes[:branch], *names[first:]}
    assert set(hits) == set(names) - outside
    assert set(hits.values()) == {2}
    assert all(layers.values())
    assert made == {block: full[block] * (STEPS if block in outside else 2) for block in names}


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("name", ["sd_controlnet", "sd_multicontrolnet"])
def test_a_controlnet_runs_as_far_as_it_is_read(name: str, branch: int) -> None:
    """The middle of a ControlNet is added to what is taken from memory where the cut lies behind the middle."""
    case, pipe, _ = prepared(name)
    nets = helpers_of(pipe)
    with attach(pipe, DeepFeatureReuse(interval=2, branch=branch)):
        for net in nets:
            blocks = [block for block, _ in blocks_of(net)]
            with counted(blocks) as full:
                case.run(pipe, steps=1)
            with counted(blocks) as made:
                case.run(pipe, steps=STEPS)
            names = [block.name for block in blocks]
            outside = set(names) if branch == 5 else set(names[:branch])
            assert made == {block: full[block] * (STEPS if block in outside else 2) for block in names}


def test_left_out_controlnets_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe, plain = prepared("sd_controlnet")
    spoil(monkeypatch)
    with attach(pipe, [SkipEvery(3), DeepFeatureReuse(interval=2)]) as handle:
        blocks = [block for block, _ in blocks_of(pipe.controlnet)]
        with counted(blocks[:1]) as made:
            found = case.run(pipe, steps=8)
        assert handle.ledger.mask == [True, True, False, True, True, False, True, True]
        assert handle.ledger.hits["controlnet"] == 2
        # Computed at 0, 4 and 6.
        assert made[blocks[0].name] == 3 * sum(1 for _ in convolutions(blocks[0]))
    assert found.isfinite().all()
    assert torch.equal(case.run(pipe, steps=STEPS), plain)


def test_computed_steps_may_be_named() -> None:
    case, pipe, _ = prepared("sd")
    for policy, reuses in (
        (DeepFeatureReuse(computed=[0, 2], branch=1), lambda step: step not in (0, 2)),
        (DeepFeatureReuse(last=3, branch=1), lambda step: step >= 1),
        (DeepFeatureReuse(interval=3, branch=1), lambda step: step % 3 > 0),
    ):
        with attach(pipe, policy):
            found = case.run(pipe, steps=STEPS)
        with cut(pipe.unet, 1, reuses):
            assert torch.equal(case.run(pipe, steps=STEPS), found)


@pytest.mark.parametrize("branch", [0, 3])
def test_shapes_may_change_between_generations(branch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placeholders have the shapes of the generation under way."""
    case, pipe, _ = prepared("sd")
    spoil(monkeypatch)
    calls = ({}, dict(size=case.sizes[1]), dict(prompts=3), dict(guidance=1.0), {})
    expected = []
    for call in calls:
        with cut(pipe.unet, branch, odd):
            expected.append(case.run(pipe, steps=STEPS, **call))
    with attach(pipe, DeepFeatureReuse(interval=2, branch=branch)) as handle:
        for call, image in zip(calls, expected, strict=True):
            assert torch.equal(case.run(pipe, steps=STEPS, **call), image)
            assert not handle.ledger.notes


@pytest.mark.parametrize("branch", BRANCHES)
def test_adapters_that_add_inside_of_stages(branch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A T2I-Adapter adds to the output of a stage in place, which must not reach what is kept."""
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    pipe: Any = StableDiffusionAdapterPipeline(**sd_parts(), adapter=adapter)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            liven(component).eval()
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        found: Tensor = pipe(
            prompt="a cat",
            image=pictures(1, 16),
            height=16,
            width=16,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )[0]
        return found

    with cut(pipe.unet, branch, odd):
        expected = run()
    spoil(monkeypatch)
    with attach(pipe, DeepFeatureReuse(interval=2, branch=branch)) as handle:
        assert torch.equal(run(), expected)
        assert handle.ledger.hits["mid"] == 2
        assert not handle.ledger.notes


@pytest.mark.parametrize("operator", ["output", "qk"])
def test_attention_and_blocks_at_once(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that lies inside the cut is left out with its block."""
    case, pipe, _ = prepared("sd")
    spoil(monkeypatch)
    with attach(pipe, AttentionReuse(operator=operator, interval=2)):
        attention = case.run(pipe, steps=STEPS)
    with attach(pipe, DeepFeatureReuse(interval=2, branch=1)):
        deep = case.run(pipe, steps=STEPS)
    with attach(
        pipe, [AttentionReuse(operator=operator, interval=2), DeepFeatureReuse(interval=2, branch=1)]
    ) as handle:
        found = case.run(pipe, steps=STEPS)
        hits = handle.ledger.hits
        outside = [block for block in handle.network.blocks if block.name not in hits]
        assert {name for name in hits if "attn" in name} == {site.name for block in outside for site in block.sites}
    assert found.isfinite().all()
    assert not torch.equal(found, attention)
    assert not torch.equal(found, deep)
    with attach(pipe, AttentionReuse(operator=operator, interval=2)), cut(pipe.unet, 1, odd):
        assert torch.equal(case.run(pipe, steps=STEPS), found)


class Some(Policy):
    """Calls the network for some samples of three at the steps that reuse."""

    def plan(self, state: RunInfo, call: Call) -> StepPlan:
        chosen = [call.position != 3, call.position == 3, True]
        return StepPlan(call=torch.tensor(chosen * (state.num_rows // 3))) if odd(call.position) else StepPlan()


@pytest.mark.parametrize("branch", [0, 1, 5])
@pytest.mark.parametrize("name", ["sd", "sd_controlnet"])
def test_some_samples_alone_take_their_own(name: str, branch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others hold their predictions."""
    case, pipe, _ = prepared(name)
    held: list[Tensor] = []
    forward = pipe.unet.forward

    def denoise(*args: Any, **kwargs: Any) -> Any:
        step = len(held)
        output = forward(*args, **kwargs)[0]
        if odd(step):
            chosen = torch.tensor([step != 3, step == 3, True] * 2)
            output = torch.where(chosen[:, None, None, None], output, held[-1])
        held.append(output)
        return (output.clone(),)

    with cut(pipe.unet, branch, odd):
        pipe.unet.forward = denoise
        expected = case.run(pipe, steps=STEPS, prompts=3)
        del vars(pipe.unet)["forward"]
    spoil(monkeypatch)
    with attach(pipe, [Some(), DeepFeatureReuse(interval=2, branch=branch)]) as handle:
        found = case.run(pipe, steps=STEPS, prompts=3)
        assert not handle.ledger.notes
        assert handle.ledger.calls_per_sample == pytest.approx(2 * (1 + 2 / 3 + 1 + 2 / 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * float(expected.std()))
