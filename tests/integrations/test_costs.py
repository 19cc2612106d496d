"""What the ledger says was computed and kept, against counters of real calls and against closed forms."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gearshift.integrations.diffusers import Attached, Generation, attach
from gearshift.policies import AttentionReuse, DeepFeatureReuse, FixedDepth, Full, Policy, SkipEvery
from gearshift.runtime.errors import RunError

from .tiny import CASES, Case

STEPS = 2
"""The second reuses what the first has kept."""
UNETS = ["sd", "sdxl", "ddim", "text_to_video", "animatediff", "svd"]
TRANSFORMERS = ["dit", "pixart", "wan", "wan2", "sd3", "flux", "flux_cfg"]


@functools.cache
def prepared(name: str) -> tuple[Case, Any]:
    """A pipeline, shared: every test leaves it as it was."""
    return CASES[name], CASES[name].build()


def executed(case: Case, pipe: Any, steps: int = STEPS, **call: Any) -> int:
    """MACs that the denoisers of a pipeline, and what runs beside them, compute in a generation."""
    roots = {type(getattr(pipe, name)).__name__ for name in (*case.denoisers, *case.helpers)}
    # The fused kernel of the CPU is not known to the counter.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        case.run(pipe, steps=steps, **call)
    return sum(sum(counter.flop_counts[root].values()) for root in roots) // 2


def check(name: str, policy: Policy | list[Policy], **call: Any) -> None:
    """What was executed is what the ledger says, row by row in its entries."""
    case, pipe = prepared(name)
    with attach(pipe, policy) as handle:
        real = executed(case, pipe, **call)
        data = handle.ledger.data()
        assert int(data.macs.sum()) == real
        assert data.macs_per_image * handle.ledger.batch == real
        assert not handle.ledger.notes


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS, "sd_multicontrolnet"])
def test_a_plain_generation(name: str) -> None:
    check(name, Full())


@pytest.mark.parametrize("call", [dict(prompts=2), dict(guidance=1.0), dict(size=32)], ids=str)
@pytest.mark.parametrize("name", ["sd_controlnet", "pixart", "wan"])
def test_rows_and_sizes(name: str, call: dict[str, Any]) -> None:
    check(name, Full(), **call)


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "pixart", "wan"])
def test_a_row_of_the_full_network(name: str) -> None:
    """One call with the arguments of the pipeline, outside of it."""
    case, pipe = prepared(name)
    model = getattr(pipe, case.denoisers[0])
    seen: list[tuple[Any, Any]] = []
    watch = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with attach(pipe, Full()) as handle:
        case.run(pipe, steps=2, prompts=2)
        full = handle.ledger.costs.full(handle.network)
    watch.remove()
    args, kwargs = seen[0]
    rows = len(args[0] if args else kwargs["hidden_states"])
    assert rows == (2 if case.sequential else 4)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*args, **kwargs)
    assert full.macs * rows == counter.get_total_flops() // 2
    assert 0 < full.attention < full.linear


def layers_and_attention(model: nn.Module, case: Case, pipe: Any) -> tuple[int, int]:
    """MACs of two steps in layers and in attention, by their formulas; all rows."""
    layers = products = 0

    def layer(module: Any, args: Any, output: Tensor) -> None:
        nonlocal layers
        inputs = module.in_features if isinstance(module, nn.Linear) else math.prod(module.weight.shape[1:])
        layers += output.numel() * inputs

    def attention(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal products
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
        source = hidden if text is None else text
        products += 2 * hidden.shape[0] * hidden.shape[1] * source.shape[1] * module.to_q.out_features

    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            handles.append(module.register_forward_hook(layer))
        elif hasattr(module, "set_processor"):
            handles.append(module.register_forward_pre_hook(attention, with_kwargs=True))
    case.run(pipe, steps=2)
    for handle in handles:
        handle.remove()
    return layers, products


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "pixart", "animatediff", "ddim"])
def test_formulas_of_layers_and_attention(name: str) -> None:
    case, pipe = prepared(name)
    with attach(pipe, Full()) as handle:
        case.run(pipe, steps=2)
        full = handle.ledger.costs.full(handle.network)
        rows = sum(len(branch.called) for step in handle.ledger.steps for branch in step.branches)
    layers, products = layers_and_attention(getattr(pipe, case.denoisers[0]), case, pipe)
    assert full.macs * rows == layers + products
    if name not in ("ddim", "sdxl"):  # layers whose input is not contiguous are counted with the products
        assert (full.linear * rows, full.attention * rows) == (layers, products)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", ["sd_controlnet", "wan2"])
def test_skipped_calls_are_saved_whole(name: str, k: int) -> None:
    """The network is the same at every call, so their share of the calls is their share of the MACs."""
    case, pipe = prepared(name)
    with attach(pipe, SkipEvery(k, keep_last=False)) as handle:
        case.run(pipe, steps=6)
        skipped = handle.ledger.mask.count(False)
        # The second denoiser of two has no prediction yet when it takes over.
        assert skipped == {("wan2", 2): 2}.get((name, k), 6 // k)
        assert handle.ledger.macs_saved == pytest.approx(skipped / 6, abs=1e-12)
    if k == 3:
        check(name, SkipEvery(3, keep_last=False), steps=3)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("sd", "output"),
        ("sd", "qk"),
        ("sd", "map"),
        ("pixart", "output"),
        ("pixart", "map"),
        ("dit", "qk"),
        ("sdxl", "qk"),
        ("wan", "qk"),
        ("flux", "qk"),
        ("sd3", "qk"),
    ],
)
def test_attention_that_is_reused(name: str, operator: str) -> None:
    check(name, AttentionReuse(operator=operator, interval=2))


@pytest.mark.parametrize("name", ["ddim", "wan2", "flux_cfg", "sd_controlnet"])
def test_outputs_that_are_reused(name: str) -> None:
    check(name, AttentionReuse(operator="output", interval=2))


@functools.cache
def shapes_of(name: str) -> list[tuple[str, int, int, int, int, int]]:
    """Kind, sequences per row, tokens, source tokens, heads and width of every attention operator, by what it is
    called with."""
    case, pipe = prepared(name)
    model = getattr(pipe, case.denoisers[0])
    found: dict[str, tuple[str, int, int, int, int, int]] = {}
    rows = 2 if case.guided and not case.sequential else 1

    def look(site: str, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
        source = hidden if text is None else text
        kind = "self" if text is None else "cross"
        width = module.to_q.out_features
        found[site] = (kind, len(hidden) // rows, hidden.shape[1], source.shape[1], module.heads, width)

    handles = [
        module.register_forward_pre_hook(functools.partial(look, site), with_kwargs=True)
        for site, module in model.named_modules()
        if hasattr(module, "set_processor") and not site.startswith("transformer_in")
    ]
    case.run(pipe, steps=2)
    for handle in handles:
        handle.remove()
    return list(found.values())


@pytest.mark.parametrize("operator", ["output", "qk", "map"])
@pytest.mark.parametrize(("name", "kind"), [("sd", "all"), ("sd", "self"), ("pixart", "all"), ("pixart", "cross")])
def test_savings_of_attention_have_closed_forms(name: str, operator: str, kind: str) -> None:
    """N D^2 and M D C for the projections, N M D for scores and for mixing."""
    case, pipe = prepared(name)
    with attach(pipe, AttentionReuse(operator=operator, interval=2, attention=kind)) as handle:
        case.run(pipe, steps=STEPS)
        full = handle.ledger.costs.full(handle.network).macs
        saved = handle.ledger.macs_saved
        inputs = {site.name: site.module.to_k.in_features for site in handle.network.sites}
    expected = 0
    model = getattr(pipe, case.denoisers[0])
    names = [site for site, module in model.named_modules() if hasattr(module, "set_processor")]
    assert set(names) == set(inputs)
    # Operators come in the order in which they are called, modules in the order in which they are declared.
    called = dict(zip(order_of(name), shapes_of(name), strict=True))
    for site, (this, _, tokens, source, _, width) in called.items():
        if kind not in ("all", this):
            continue
        queries, keys = tokens * width * width, source * inputs[site] * width
        expected += queries + keys
        if operator in ("map", "output"):
            expected += tokens * source * width
        if operator == "output":
            expected += tokens * source * width + keys + queries  # mixing, values, and what follows
    # Half of the steps reuse.
    assert saved == pytest.approx(expected / full / 2, rel=1e-9)


@functools.cache
def order_of(name: str) -> list[str]:
    """Names of the attention operators in the order in which they are called."""
    case, pipe = prepared(name)
    found: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, site=site: None if site in found else found.append(site))
        for site, module in getattr(pipe, case.denoisers[0]).named_modules()
        if hasattr(module, "set_processor")
    ]
    case.run(pipe, steps=2)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("sd", 0),
        ("sd", 1),
        ("sd", 2),
        ("sd", 3),
        ("sd", 4),
        ("sd", 5),
        ("sdxl", 3),
        ("ddim", 5),
        ("text_to_video", 0),
        ("svd", 1),
    ],
)
def test_deep_features_save_what_does_not_run(name: str, branch: int) -> None:
    check(name, DeepFeatureReuse(interval=2, branch=branch))


@pytest.mark.parametrize("branch", [0, 4, 5])
def test_a_controlnet_is_saved_with_its_blocks(branch: int) -> None:
    """At the deepest cut its middle is read, so all of it runs."""
    check("sd_controlnet", DeepFeatureReuse(interval=2, branch=branch))
    check("sd_multicontrolnet", DeepFeatureReuse(interval=2, branch=branch))
    check("sd_controlnet", DeepFeatureReuse(interval=2, branch=branch), control_guidance_end=0.5)


def test_a_controlnet_that_is_called_for_half_the_rows() -> None:
    check("sd_controlnet", DeepFeatureReuse(interval=2), guess_mode=True)


def test_layers_of_two_denoisers_are_told_apart() -> None:
    case, pipe = prepared("wan2")
    with attach(pipe, AttentionReuse(operator="output", interval=2)) as handle:
        case.run(pipe)
        assert len({site.name for site in handle.network.sites}) == len(handle.network.sites) == 16
        assert set(handle.ledger.hits) == {site.name for site in handle.network.sites}


@pytest.mark.parametrize(
    ("name", "depth"), [("dit", 4), ("pixart", 3), ("wan", 1), ("wan2", 2), ("sd3", 3), ("flux", 1), ("flux", 3)]
)
def test_depths(name: str, depth: int) -> None:
    check(name, FixedDepth(depth))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sd", [SkipEvery(3), DeepFeatureReuse(interval=2, branch=1)]),
        ("sd", [AttentionReuse(operator="qk", interval=2), DeepFeatureReuse(interval=2, branch=2)]),
        ("sd", [AttentionReuse(operator="map", last=1, attention="self"), AttentionReuse(operator="output", last=2)]),
        ("sd_controlnet", [SkipEvery(4), DeepFeatureReuse(interval=2)]),
        ("pixart", [FixedDepth(2), AttentionReuse(operator="output", interval=2, attention="cross")]),
        ("wan", [SkipEvery(4), FixedDepth(3), AttentionReuse(operator="output", interval=2)]),
    ],
    ids=str,
)
def test_compositions(name: str, parts: list[Policy]) -> None:
    check(name, parts, steps=4)


# Other models --------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A layer and an adapter beside it."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        self.weight, self.in_features = layer.weight, layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Weighted(nn.Module):
    """A processor with a layer of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.extra = nn.Linear(width, width, bias=False)

    def forward(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Tensor:
        return self.extra(AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states))


def full_macs(case: Case, pipe: Any) -> int:
    with attach(pipe, SkipEvery(2)) as handle:
        case.run(pipe, steps=2)
        return handle.ledger.costs.full(handle.network).macs


def test_adapters_and_processors_with_weights_are_counted() -> None:
    case = CASES["sd"]
    pipe = case.build()
    sites = [module for _, module in pipe.unet.named_modules() if hasattr(module, "set_processor")]
    plain = full_macs(case, pipe)
    shapes = dict(zip(order_of("sd"), shapes_of("sd"), strict=True))
    names = [name for name, module in pipe.unet.named_modules() if hasattr(module, "set_processor")]
    for site in sites:
        site.to_q = LowRank(site.to_q, 3)
    adapted = full_macs(case, pipe)
    assert adapted - plain == sum(3 * 2 * shapes[name][2] * shapes[name][5] for name in names)
    for site, name in zip(sites, names, strict=True):
        if name.endswith("attn2"):
            site.set_processor(Weighted(shapes[name][5]))
    extra = [shapes[name][2] * shapes[name][5] ** 2 for name in names if name.endswith("attn2")]
    assert full_macs(case, pipe) - adapted == sum(extra)
    with attach(pipe, DeepFeatureReuse(interval=2, branch=1)) as handle:
        real = executed(case, pipe)
        assert int(handle.ledger.data().macs.sum()) == real


def test_lora_is_counted() -> None:
    peft = pytest.importorskip("peft")
    case = CASES["sd"]
    pipe = case.build()
    plain = full_macs(case, pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    shapes = dict(zip(order_of("sd"), shapes_of("sd"), strict=True))
    expected = 0
    for name, module in pipe.unet.named_modules():
        if hasattr(module, "set_processor"):
            _, _, tokens, source, _, width = shapes[name]
            expected += 4 * (2 * tokens * width + source * (module.to_k.in_features + width))
    assert full_macs(case, pipe) - plain == expected
    with attach(pipe, AttentionReuse(operator="output", interval=2)) as handle:
        real = executed(case, pipe)
        assert int(handle.ledger.data().macs.sum()) == real


def test_costs_come_from_a_copy() -> None:
    """Nothing of the model is touched, not even while a policy reaches into it."""
    case = CASES["sd"]
    pipe = case.build()
    plain = case.run(pipe)
    before = {name: value.data_ptr() for name, value in pipe.unet.state_dict().items()}
    with attach(pipe, AttentionReuse(operator="qk", interval=2)) as handle:
        found = case.run(pipe)
        assert handle.ledger.macs_saved > 0
        processors = dict(pipe.unet.attn_processors)
        assert torch.equal(case.run(pipe), found)
        assert handle.ledger.macs_saved > 0
        assert pipe.unet.attn_processors == processors
    assert {name: value.data_ptr() for name, value in pipe.unet.state_dict().items()} == before
    assert all(type(one) is AttnProcessor2_0 for one in pipe.unet.attn_processors.values())
    assert torch.equal(case.run(pipe), plain)


def failing(case: Case, pipe: Any) -> Attached:
    """A handle of a generation with a model that looks at numbers."""
    forward = pipe.unet.conv_in.forward

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x * (1.0 if float(x.sum()) < 1e9 else 0.0))

    pipe.unet.conv_in = Looks()
    handle = attach(pipe, SkipEvery(2))
    case.run(pipe, steps=2)
    return handle


def test_models_that_need_numbers_cannot_be_counted() -> None:
    """Everything but the MACs is there."""
    case = CASES["sd"]
    handle = failing(case, case.build())
    ledger = handle.ledger
    name = handle.network.name
    for ask in (lambda: ledger.costs, lambda: ledger.macs_saved, ledger.data, lambda: ledger.macs_per_sample):
        with pytest.raises(RunError) as raised:
            ask()
        line = str(raised.value)
        assert line.startswith(f"the MACs of {name} cannot be counted: it does not run on the meta device (")
        assert "\n" not in line
    assert ledger.mask == [True, True]
    assert "of 4 evaluations per sample" in ledger.summary()
    handle.detach()


def test_nothing_to_count() -> None:
    _, pipe = prepared("sd")
    with attach(pipe, SkipEvery(2)) as handle:
        with pytest.raises(RunError, match="nothing was generated yet"):
            _ = handle.ledger
        begun = Generation(handle.network, "skip every 2")
    with pytest.raises(RunError, match="no denoiser was evaluated in this generation"):
        _ = begun.costs
    with pytest.raises(RunError, match="nothing was generated yet"):
        begun.data()
