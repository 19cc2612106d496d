"""Compiled models: policies decide outside of the graphs, and bring no new graph per block or per generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from gearshift.integrations.diffusers import attach
from gearshift.policies import AttentionReuse, DeepFeatureReuse, FixedDepth, Policy, SkipEvery
from gearshift.runtime.errors import UsageError

from .tiny import CASES, Case

pytestmark = [
    # Compilers import what warns about itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STEPS = 4
QK = AttentionReuse(operator="qk", interval=2)
OUTPUT = AttentionReuse(operator="output", interval=2)
DEEP = DeepFeatureReuse(interval=2)
DEPTH = FixedDepth(2)
SKIP = SkipEvery(2, keep_last=False)
EARLY = [
    ("dit", SKIP, True),
    ("sd", DEEP, True),
    ("sd", OUTPUT, True),
    ("sd", QK, True),
    ("dit", DEPTH, True),
    ("dit", QK, True),
    ("pixart", OUTPUT, True),
    ("wan", OUTPUT, True),
]
LATE = [("sd", DEEP, False), ("dit", QK, False), ("wan", OUTPUT, False)]
"""Pipelines, policies, and whether the blocks are compiled before the policy is attached."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before counts, and running into the limit of graphs is an error."""
    import torch._dynamo as dynamo
    import torch._dynamo.config as settings
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    with settings.patch(fail_on_recompile_limit_hit=True):
        yield
    dynamo.reset()


def graphs() -> int:
    from torch._dynamo.utils import counters

    assert not counters["graph_break"], dict(counters["graph_break"])
    return int(counters["stats"]["unique_graphs"])


def denoiser(case: Case, pipe: Any) -> Any:
    return getattr(pipe, case.denoisers[0])


def compile_blocks(model: Any, backend: str = "eager") -> int:
    """As `compile_repeated_blocks`, also for models that do not say which blocks are alike; how many there are.

    Graphs are traced and guarded as they always are, and then run by torch: no compiler is needed.
    """
    names = getattr(model, "_repeated_blocks", None)
    if names:
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend=backend)
    return sum(module._compiled_call_impl is not None for module in model.modules())


@pytest.mark.parametrize(
    ("name", "policy", "early"), [*EARLY, *LATE], ids=lambda value: getattr(value, "name", str(value))
)
def test_compiled_blocks_are_what_they_are_plainly(name: str, policy: Policy, early: bool) -> None:
    case = CASES[name]
    pipe = case.build()
    plain = case.run(pipe, steps=STEPS)
    with attach(pipe, policy) as handle:
        expected = case.run(pipe, steps=STEPS)
        hits, mask = dict(handle.ledger.hits), handle.ledger.mask
    assert not torch.equal(expected, plain)
    blocks = 0
    if early:
        blocks = compile_blocks(denoiser(case, pipe), "aot_eager" if policy is QK and name == "sd" else "eager")
    with attach(pipe, policy) as handle:
        if not early:
            case.run(pipe, steps=STEPS)
            blocks = compile_blocks(denoiser(case, pipe))
        torch.testing.assert_close(case.run(pipe, steps=STEPS), expected, rtol=0, atol=1e-5)
        assert (handle.ledger.hits, handle.ledger.mask) == (hits, mask)
        assert not handle.ledger.notes
        warm = graphs()
        # One per class of blocks, with other flags or shapes one more each, and not one per block.
        assert 0 < warm <= 4
        assert blocks >= 4
        for _ in range(2):
            torch.testing.assert_close(case.run(pipe, steps=STEPS), expected, rtol=0, atol=1e-5)
        assert graphs() == warm
    torch.testing.assert_close(case.run(pipe, steps=STEPS), plain, rtol=0, atol=1e-5)
    assert sum(module._compiled_call_impl is not None for module in denoiser(case, pipe).modules()) == blocks


@pytest.mark.parametrize("policy", [QK, DEPTH], ids=lambda policy: policy.name)
def test_deeper_models_bring_no_more_graphs(policy: Policy) -> None:
    """Graphs are of a class of blocks."""
    from diffusers import DiTTransformer2DModel

    case = CASES["dit"]
    pipe = case.build()
    counted = []
    for layers in (3, 6):
        pipe.transformer = DiTTransformer2DModel.from_config({**pipe.transformer.config, "num_layers": layers}).eval()
        before = graphs()
        compile_blocks(pipe.transformer)
        with attach(pipe, policy) as handle:
            case.run(pipe, steps=STEPS)
            assert handle.ledger.fired
        counted.append(graphs() - before)
    assert counted[1] <= counted[0]


def test_compiled_controlnets() -> None:
    """Both models by their layers, before which ports stand."""
    case = CASES["sd_controlnet"]
    pipe = case.build()
    for policy in (DEEP, SkipEvery(3, keep_last=False)):
        with attach(pipe, policy) as handle:
            expected = case.run(pipe, steps=STEPS)
            hits = dict(handle.ledger.hits)
        for module in (*pipe.unet.modules(), *pipe.controlnet.modules()):
            if type(module).__name__ == "ResnetBlock2D":
                module.compile(fullgraph=True, backend="eager")
        with attach(pipe, policy) as handle:
            torch.testing.assert_close(case.run(pipe, steps=STEPS), expected, rtol=0, atol=1e-5)
            assert handle.ledger.hits == hits
        for module in (*pipe.unet.modules(), *pipe.controlnet.modules()):
            module._compiled_call_impl = None


@pytest.mark.parametrize(("name", "early"), [("dit", True), ("dit", False)])
def test_a_model_that_is_compiled_as_a_whole_can_be_skipped(name: str, early: bool) -> None:
    case = CASES[name]
    pipe = case.build()
    model = denoiser(case, pipe)
    with attach(pipe, SKIP):
        expected = case.run(pipe, steps=STEPS)
    if early:
        model.compile(backend="eager")
    with attach(pipe, SKIP) as handle:
        if not early:
            model.compile(backend="eager")
        torch.testing.assert_close(case.run(pipe, steps=STEPS), expected, rtol=0, atol=1e-5)
        assert handle.ledger.mask == [True, False] * (STEPS // 2)
        warm = graphs()
        assert warm > 0
        case.run(pipe, steps=STEPS)
        assert graphs() == warm
        assert handle.ledger.macs_saved == pytest.approx(0.5)  # counted on a copy that is not compiled
    compiled = model._compiled_call_impl
    assert compiled is not None
    assert not hasattr(compiled, "func")  # ours was a partial


@pytest.mark.parametrize(("name", "policy"), [("sd", DEEP), ("sd", QK), ("dit", DEPTH), ("dit", OUTPUT)])
def test_nothing_reaches_into_a_model_that_is_compiled_as_a_whole(name: str, policy: Policy) -> None:
    case = CASES[name]
    pipe = case.build()
    model = denoiser(case, pipe)
    model.compile(backend="eager")
    component = case.denoisers[0]
    with attach(pipe, policy), pytest.raises(UsageError) as raised:
        case.run(pipe, steps=STEPS)
    assert str(raised.value) == (
        f"policy {policy.name} reaches into {component}, which is compiled as a whole; compile its blocks instead "
        f"(pipe.{component}.compile_repeated_blocks())"
    )
    assert graphs() == 0


@pytest.mark.parametrize("early", [True, False], ids=["compiled first", "attached first"])
def test_projections_inside_of_compiled_blocks_are_not_kept(early: bool) -> None:
    """Each would bring a graph of its own."""
    case = CASES["wan"]
    pipe = case.build()
    plain = case.run(pipe, steps=2)
    if early:
        compile_blocks(pipe.transformer)
    with attach(pipe, QK) as handle:
        if not early:
            case.run(pipe, steps=2)
            compile_blocks(pipe.transformer)
        with pytest.raises(UsageError) as raised:
            case.run(pipe, steps=2)
        name = handle.network.name
    assert str(raised.value) == (
        f"operator=qk keeps what blocks.0 of {name} projects, and blocks.0 is compiled; take operator=output, or "
        "leave it uncompiled"
    )
    for module in pipe.transformer.modules():
        module._compiled_call_impl = None
    assert torch.equal(case.run(pipe, steps=2), plain)


@pytest.mark.parametrize("policy", [SKIP, DEEP], ids=lambda policy: policy.name)
def test_what_torch_compile_returns_is_refused(policy: Policy) -> None:
    case = CASES["sd"]
    pipe = case.build()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(UsageError) as raised:
        attach(pipe, policy)
    line = str(raised.value)
    assert line.startswith("StableDiffusionPipeline.unet is what torch.compile returned")
    assert "pipe.unet.compile_repeated_blocks()" in line
    assert "\n" not in line
    assert not hasattr(pipe.unet, "_gearshift")
    assert not any(getattr(module, "_diffusers_hook", None) for module in pipe.unet.modules())


def test_copies_of_compiled_models_are_plain() -> None:
    """Costs are counted on a copy, whose blocks must not be those of the model."""
    from gearshift.integrations.diffusers.costs import meta_copy

    pipe = CASES["sd"].build()
    compile_blocks(pipe.unet)
    with attach(pipe, DEEP) as handle:
        CASES["sd"].run(pipe, steps=2)
        twin: nn.Module = meta_copy(pipe.unet)
        assert handle.ledger.macs_saved > 0
    assert all(module._compiled_call_impl is None for module in twin.modules())
    assert not any("forward" in vars(module) or hasattr(module, "_diffusers_hook") for module in twin.modules())
    assert all(parameter.device.type == "meta" for parameter in twin.parameters())
