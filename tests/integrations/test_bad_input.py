"""What cannot be done is said in one line that names both sides, and leaves the pipeline as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch import nn

from gearshift.integrations.diffusers import attach
from gearshift.policies import (
    AdaptiveSkip,
    AttentionReuse,
    BypassSchedule,
    DeepFeatureReuse,
    ExitSchedule,
    FixedDepth,
    Full,
    Planned,
    Policy,
    SaturationExit,
    SkipEvery,
    UncertaintyExit,
)
from gearshift.runtime.errors import UsageError

from .tiny import CASES, Case, with_scheduler

SKIP = SkipEvery(2)
OUTPUT = AttentionReuse(operator="output", interval=2)
QK = AttentionReuse(operator="qk", interval=2)
DEEP = DeepFeatureReuse(interval=2)


def fingerprint(pipe: Any) -> list[Any]:
    """What attaching could leave on a pipeline: attributes of modules and of the scheduler, hooks and processors."""
    found: list[Any] = [sorted(vars(pipe.scheduler))]
    for name, component in sorted(pipe.components.items()):
        for module in component.modules() if isinstance(component, nn.Module) else ():
            hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            found.append((name, sorted(vars(module)), sorted(hooks), id(getattr(module, "processor", None))))
    return found


def refused(pipe: Any, policy: Any) -> str:
    """The one line with which a policy is refused; the pipeline is as it was."""
    before = fingerprint(pipe)
    with pytest.raises(UsageError) as raised:
        attach(pipe, policy)
    assert fingerprint(pipe) == before
    line = str(raised.value)
    assert "\n" not in line
    return line


@functools.cache
def shared(name: str) -> tuple[Case, Any]:
    """A pipeline that every test leaves as it was."""
    return CASES[name], CASES[name].build()


# Pipelines -----------------------------------------------------------------------------------------------------------


def test_pipelines_without_a_denoiser_or_a_scheduler() -> None:
    _, pipe = shared("sd")
    before = fingerprint(pipe)
    for other, line in (
        (SimpleNamespace(scheduler=pipe.scheduler, unet="unet", vae=pipe.vae), "has no denoiser that is called unet"),
        (SimpleNamespace(unet=pipe.unet), "has no scheduler with set_timesteps and step"),
        (SimpleNamespace(unet=pipe.unet, scheduler=object()), "has no scheduler with set_timesteps and step"),
    ):
        with pytest.raises(UsageError, match=f"^SimpleNamespace {line}"):
            attach(other, SKIP)
    assert fingerprint(pipe) == before


def test_a_second_policy() -> None:
    """On the same pipeline, and on others that have its denoiser or its scheduler."""
    from diffusers import StableDiffusionImg2ImgPipeline

    case, pipe = shared("sd")
    sibling = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    another = CASES["sd"].build()
    another.scheduler = pipe.scheduler
    kind = "StableDiffusionPipeline"
    with attach(pipe, SKIP) as handle:
        expected = case.run(pipe, steps=2)
        for other, name in ((pipe, kind), (sibling, "StableDiffusionImg2ImgPipeline"), (another, kind)):
            assert refused(other, OUTPUT) == (
                f"{name} already has the policy 'skip every 2', and 'attention output 1:2' is to be attached; detach "
                "the first, or attach both at once: attach(pipe, [first, second])"
            )
        assert torch.equal(case.run(pipe, steps=2), expected)
        assert handle.ledger.mask == [True, True]
    for other in (sibling, pipe, another):
        attach(other, OUTPUT).detach()


def test_a_denoiser_is_free_again_after_the_first_was_detached() -> None:
    case, pipe = shared("sd")
    plain = case.run(pipe, steps=2)
    before = fingerprint(pipe)
    for policy in (SKIP, DEEP, QK, [SKIP, OUTPUT], Full()):
        handle = attach(pipe, policy)
        case.run(pipe, steps=2)
        handle.detach()
        handle.detach()
        assert not handle.attached
        assert repr(handle).endswith("on StableDiffusionPipeline, detached)")
        assert torch.equal(case.run(pipe, steps=2), plain)
    assert fingerprint(pipe) == before


def caches() -> list[Any]:
    from diffusers import FasterCacheConfig, FirstBlockCacheConfig
    from diffusers.hooks import MagCacheConfig

    return [
        ("wan", FirstBlockCacheConfig(threshold=0.1)),
        (
            "wan",
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            ),
        ),
        (
            "flux",
            FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                current_timestep_callback=lambda: 500,
                tensor_format="BCHW",
                is_guidance_distilled=True,
            ),
        ),
        ("flux", MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4))),
    ]


@pytest.mark.parametrize(("name", "config"), caches(), ids=lambda value: getattr(value, "__class__", value).__name__)
def test_another_cache(name: str, config: Any) -> None:
    """And none is left when it was disabled."""
    case, pipe = CASES[name], CASES[name].build()
    pipe.transformer.enable_cache(config)
    assert refused(pipe, SKIP) == (
        f"{type(pipe).__name__}.transformer already has the cache {type(config).__name__}, and 'skip every 2' would "
        "reuse on top of it; take one of them away (pipe.transformer.disable_cache())"
    )
    pipe.transformer.disable_cache()
    with attach(pipe, SKIP) as handle:
        case.run(pipe, steps=4)
        assert handle.ledger.fired


def test_hooks_of_another_cache_that_were_put_there_by_hand() -> None:
    from diffusers.hooks import apply_pyramid_attention_broadcast

    pipe = CASES["sd"].build()
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_block_identifiers=("attn2",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)
    line = refused(pipe, DEEP)
    assert line.startswith(
        "StableDiffusionPipeline.unet already has the cache pyramid_attention_broadcast, and 'deep features 1:2"
    )


# Policies ------------------------------------------------------------------------------------------------------------

UNFIT: list[tuple[str, Callable[[], Any], tuple[str, ...]]] = [
    ("wan", lambda: AttentionReuse(operator="map", interval=2), ("operator=map", "[0, 1, 2, 3]", "WanTransformer3D")),
    ("flux", lambda: AttentionReuse(operator="map", interval=2), ("operator=map", "FluxTransformer2DModel", "output")),
    ("dit", lambda: DEEP, ("DeepFeatureReuse", "DiTTransformer2DModel", "has none", "AttentionReuse")),
    ("wan2", lambda: DEEP, ("DeepFeatureReuse", "WanTransformer3DModel", "long skips")),
    ("sd", lambda: DeepFeatureReuse(interval=2, branch=6), ("branch=6", "UNet2DConditionModel", "branches 0..5")),
    ("sd", lambda: FixedDepth(3), ("FixedDepth(depth=3)", "UNet2DConditionModel", "depths [13]")),
    ("dit", lambda: FixedDepth(5), ("depth 5", "DiTTransformer2DModel", "depths [1, 2, 3, 4]")),
    ("dit", lambda: FixedDepth(0), ("depth 0", "DiTTransformer2DModel", "depths [1, 2, 3, 4]")),
    ("sd", lambda: ExitSchedule([13, 4]), ("ExitSchedule", "depth 4", "UNet2DConditionModel")),
    ("dit", lambda: BypassSchedule([1, 0]), ("BypassSchedule", "DiTTransformer2DModel", "ExitSchedule")),
    ("sd", lambda: UncertaintyExit(0.5), ("UncertaintyExit", "UNet2DConditionModel", "uncertainty heads")),
    ("dit", lambda: UncertaintyExit(0.5), ("UncertaintyExit", "DiTTransformer2DModel", "uncertainty heads")),
    ("dit", lambda: SaturationExit(0.1), ("SaturationExit", "DiTTransformer2DModel", "within a call", "a fixed depth")),
    ("wan", lambda: AdaptiveSkip(decision="per_sample"), ("per_sample", "WanTransformer3DModel", "batch_mean")),
    ("sd", lambda: AttentionReuse(operator="qk", interval=2, layers=[0, 99]), ("layers [99]", "UNet2D", "[0, 1, 5,")),
    ("sd", lambda: AttentionReuse(operator="qk", interval=2, layers=[2]), ("layers [2]", "UNet2D", "no attention")),
    ("dit", lambda: AttentionReuse(operator="qk", interval=2, layers=[-1]), ("layers [-1]", "DiT", "[0, 1, 2, 3]")),
    ("dit", lambda: AttentionReuse(operator="qk", interval=2, attention="cross"), ("cross-attention", "DiT")),
    ("sd", lambda: [SKIP, FixedDepth(3)], ("FixedDepth(depth=3)", "UNet2DConditionModel")),
    ("sd", lambda: [SKIP, [OUTPUT]], ("Compose", "list is not a policy")),
    ("sd", lambda: [], ("Compose has no parts",)),
    ("sd", lambda: "SkipEvery", ("str is not a policy",)),
]


@pytest.mark.parametrize(("name", "make", "named"), UNFIT, ids=[f"{name} {named[0]}" for name, _, named in UNFIT])
def test_policies_that_do_not_fit_the_model(name: str, make: Callable[[], Any], named: tuple[str, ...]) -> None:
    _, pipe = shared(name)
    line = refused(pipe, make())
    assert all(part in line for part in named), line


UNFIT_RUNS: list[tuple[str, Callable[[], Policy], str]] = [
    ("sd", lambda: AttentionReuse(operator="output", last=6), "reuses at the last 6 calls of a run of 6"),
    ("sd", lambda: DeepFeatureReuse(computed=[0, 9]), "computes at call 9 of a run of 6 calls"),
    ("sd", lambda: BypassSchedule([1, 0]), r"drops blocks \[12\] of UNet2DConditionModel.* take DeepFeatureReuse"),
]


@pytest.mark.parametrize(("name", "make", "line"), UNFIT_RUNS, ids=[line[:20] for _, _, line in UNFIT_RUNS])
def test_policies_that_do_not_fit_the_run(name: str, make: Callable[[], Policy], line: str) -> None:
    """Said when the pipeline is called; it can be called again, otherwise or without the policy."""
    case, pipe = shared(name)
    plain = case.run(pipe, steps=2)
    before = fingerprint(pipe)
    handle = attach(pipe, make())
    for _ in range(2):
        with pytest.raises(UsageError, match=line) as raised:
            case.run(pipe)
        assert "\n" not in str(raised.value)
    handle.detach()
    assert fingerprint(pipe) == before
    assert torch.equal(case.run(pipe, steps=2), plain)


def plan_of(case: Case, pipe: Any, guidance: float = 5.0, **what: Any) -> Planned:
    """A plan for six steps of a pipeline, half of them skipped."""
    with attach(pipe, SKIP) as handle:
        case.run(pipe, guidance=guidance)
        levels = [step.call.log_snr for step in handle.ledger.steps]
        network = handle.network
    branches = 2 if guidance > 1 else 1
    fields = dict(
        network=network.name,
        blocks=len(network.blocks),
        solver="ddim",
        log_snr=levels,
        branches=branches,
        call=[branches, 0] * 3,
        depth=[0] * 6,
        reuse=[{} for _ in range(6)],
    )
    return Planned(**fields | what)  # type: ignore[arg-type]


def run_refused(case: Case, pipe: Any, policy: Policy, **call: Any) -> str:
    with attach(pipe, policy), pytest.raises(UsageError) as raised:
        case.run(pipe, **call)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_plans_belong_to_a_run() -> None:
    case, pipe = shared("sd")
    plan = plan_of(case, pipe)
    with attach(pipe, plan) as handle:
        case.run(pipe)
        assert handle.ledger.mask == [True, False] * 3
    assert "made for 6 calls of ddim, and this run has 4;" in run_refused(case, pipe, plan, steps=4)
    line = run_refused(case, pipe, plan, guidance=1.0)
    assert "made with guidance (2 branches), and this run is without guidance (1)" in line
    line = run_refused(case, pipe, plan_of(case, pipe, guidance=1.0))
    assert "made without guidance (1 branches), and this run is with guidance (2)" in line


def test_plans_belong_to_noise_levels() -> None:
    case = CASES["sd"]
    pipe = case.build()
    plan = plan_of(case, pipe)
    line = run_refused(case, with_scheduler(pipe, "dpmpp"), plan)
    assert "made for calls of ddim, call " in line
    assert "take the same solver, spacing and process" in line


def test_plans_belong_to_a_model() -> None:
    """Of the same class but another make, of another class, and one with other parts."""
    case, pipe = shared("sd")
    plan = plan_of(case, pipe)
    for name in ("sdxl", "dit", "sd_inpaint"):
        _, other = shared(name)
        line = refused(other, plan)
        assert line.startswith(f"policy Planned was made for {plan.network} with 13 blocks, and this run has ")
    for part, block in (("output", 2), ("cross.qk", 4)):
        line = refused(pipe, plan_of(case, pipe, reuse=[{}, {}, {block: part}, {}, {}, {}]))
        assert line.startswith(f"policy Planned takes {part} of block {block} from memory, which {plan.network} lacks")
    assert "asks for depth 5, but" in refused(pipe, plan_of(case, pipe, depth=[0, 5, 0, 0, 0, 0]))


def test_plans_that_call_one_branch_alone() -> None:
    case, pipe = shared("sd")
    line = refused(pipe, plan_of(case, pipe, call=[2, 1, 0, 2, 1, 2]))
    assert "one branch of guidance alone" in line


# Detaching -----------------------------------------------------------------------------------------------------------


def wrapped(module: nn.Module) -> Callable[[], None]:
    """Another library goes before a module, as offloading does; what is returned takes it away."""
    own, before = "forward" in vars(module), module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs)

    def undo() -> None:
        module.forward = before
        if not own:
            del module.forward

    return undo


def accelerated(module: nn.Module) -> Callable[[], None]:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())
    return lambda: hooks.remove_hook_from_module(module)


def denoiser(pipe: Any) -> nn.Module:
    found: nn.Module = pipe.unet
    return found


def inside(pipe: Any) -> nn.Module:
    found: nn.Module = pipe.unet.up_blocks[0].resnets[1]
    return found


@pytest.mark.parametrize("wrap", [wrapped, accelerated])
@pytest.mark.parametrize("where", [denoiser, inside])
def test_detaching_below_another_wrapper(where: Callable[[Any], nn.Module], wrap: Callable[..., Any]) -> None:
    """Is refused until that is gone; until then everything works."""
    case = CASES["sd"]
    pipe = case.build()
    plain = case.run(pipe)
    with attach(pipe, [DEEP, QK]):
        expected = case.run(pipe)
    before = fingerprint(pipe)
    handle = attach(pipe, [DEEP, QK])
    case.run(pipe)
    undo = wrap(where(pipe))
    assert torch.equal(case.run(pipe), expected)
    for _ in range(2):
        with pytest.raises(UsageError) as raised:
            handle.detach()
        line = str(raised.value)
        assert line.startswith(f"{type(where(pipe)).__name__} got another wrapper after the policy was attached")
        assert "\n" not in line
        assert handle.attached
    undo()
    handle.detach()
    assert not handle.attached
    assert torch.equal(case.run(pipe), plain)
    after = fingerprint(pipe)
    if wrap is wrapped:  # accelerate leaves what it found as an attribute
        assert after == before


def test_a_wrapper_that_was_there_before_stays() -> None:
    case = CASES["sd"]
    pipe = case.build()
    plain = case.run(pipe)
    undo = wrapped(pipe.unet)
    wrapper = pipe.unet.forward
    with attach(pipe, DEEP) as handle:
        case.run(pipe)
        assert handle.ledger.fired
        assert handle.ledger.macs_saved > 0
    assert pipe.unet.forward is wrapper
    assert torch.equal(case.run(pipe), plain)
    undo()


OFFLOADED = [("sd", SKIP), ("sd", OUTPUT), ("sd", DEEP), ("wan", SKIP), ("wan", QK), ("wan", FixedDepth(2))]


@pytest.mark.parametrize(("name", "policy"), OFFLOADED, ids=[f"{name} {policy.name}" for name, policy in OFFLOADED])
def test_offloaded_groups(name: str, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of the library itself stand before ours."""
    from diffusers.hooks import apply_group_offloading, group_offloading

    if not hasattr(group_offloading, "send_to_device"):  # imported from accelerate, and here everything is in place
        monkeypatch.setattr(group_offloading, "send_to_device", lambda values, *_, **__: values, raising=False)
    case = CASES[name]
    pipe = case.build()
    with attach(pipe, policy):
        expected = case.run(pipe)
    cpu = torch.device("cpu")
    model = getattr(pipe, case.denoisers[0])
    apply_group_offloading(model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    plain = case.run(pipe)
    hooks = fingerprint(pipe)
    assert any("group_offloading" in entry[2] for entry in hooks[1:])
    with attach(pipe, policy) as handle:
        assert torch.equal(case.run(pipe), expected)
        assert handle.ledger.fired
        assert not handle.ledger.notes
    assert fingerprint(pipe) == hooks
    assert torch.equal(case.run(pipe), plain)


def test_an_error_of_the_body_detaches() -> None:
    case, pipe = shared("sd")
    before = fingerprint(pipe)
    handle = attach(pipe, [DEEP, QK])

    def body() -> None:
        with handle:
            case.run(pipe, steps=2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert not handle.attached
    assert fingerprint(pipe) == before
