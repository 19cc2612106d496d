"""Attention that is reused inside of pipelines, against modules patched by hand and a softmax written out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from gearshift.integrations.diffusers import attach
from gearshift.integrations.diffusers.attention import reusing
from gearshift.policies import AttentionReuse, SkipEvery
from gearshift.runtime.errors import UsageError

from .test_attention_processors import explicit_mixed
from .tiny import CASES

# Pipelines -----------------------------------------------------------------------------------------------------------

When = Callable[[int], bool]
"""Whether a step takes attention from memory."""


@contextlib.contextmanager
def by_hand(sites: list[Any], reuses: When, branches: int = 1, step: Callable[[], int] | None = None) -> Iterator[None]:
    """Attention modules give again what they gave last, at the steps that `reuses` names.

    Args:
        branches: calls of a module in a step.
        step: says which step it is; otherwise calls are counted.
    """
    patched: list[tuple[Any, str]] = []
    for site in sites:
        # What a module adds of its own is not part of what is kept.
        target = site.to_out[1] if getattr(site, "residual_connection", False) else site
        patched.append((target, "forward"))
        target.forward = _again(target.forward, reuses, branches, step)
    yield
    for target, name in patched:
        del vars(target)[name]


def _again(forward: Any, reuses: When, branches: int, step: Callable[[], int] | None) -> Any:
    kept: dict[int, Any] = {}
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        now, branch = divmod(calls, branches)
        calls += 1
        if not reuses(now if step is None else step()):
            kept[branch] = forward(*args, **kwargs)
        return kept[branch]

    return call


@contextlib.contextmanager
def explicit(sites: list[Any], reuses: When, kinds: tuple[bool, ...] = (False, True)) -> Iterator[None]:
    """Attention of plain modules as one softmax after the other, with the maps of the last computed step."""
    for site in sites:
        site.forward = _softmax(site, reuses if site.is_cross_attention in kinds else lambda _step: False)
    yield
    for site in sites:
        del vars(site)["forward"]


def _softmax(site: Any, reuses: When) -> Any:
    kept: list[Tensor] = []
    calls = 0

    def call(hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **_: Any) -> Tensor:
        nonlocal calls
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if not reuses(calls):
            query, key = (x.unflatten(-1, (site.heads, -1)) for x in (site.to_q(hidden_states), site.to_k(source)))
            scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
            kept[:] = [(scores if attention_mask is None else scores + attention_mask[:, None]).softmax(-1)]
        calls += 1
        return explicit_mixed(site, kept[0], source)

    return call


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, on the scale of what is generated."""
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * float(expected.std()))


def odd(step: int) -> bool:
    return step % 2 == 1


def sites_of(handle: Any, kind: str | None = None) -> list[Any]:
    return [site.module for site in handle.network.sites if kind in (None, site.kind)]


OUTPUT = [
    ("sd", 1),
    ("sdxl", 1),
    ("ldm", 1),
    ("ddim", 1),
    ("dit", 1),
    ("pixart", 1),
    ("text_to_video", 1),
    ("animatediff", 1),
    ("svd", 1),
    ("sd_controlnet", 1),
    ("sd3", 1),
    ("flux", 1),
    ("flux_cfg", 2),
    ("wan", 2),
]
"""Pipelines, and how often each calls its denoiser in a step."""


@pytest.mark.parametrize(("name", "branches"), OUTPUT)
def test_outputs_are_those_of_patched_modules(name: str, branches: int) -> None:
    case = CASES[name]
    pipe = case.build()
    plain = case.run(pipe, prompts=2, steps=4)
    with attach(pipe, AttentionReuse(operator="output", interval=2)) as handle:
        found = case.run(pipe, prompts=2, steps=4)
        sites = sites_of(handle)
        assert set(handle.ledger.hits) == {site.name for site in handle.network.sites}
        assert set(handle.ledger.hits.values()) == {2 * branches}
        assert handle.ledger.mask == [True] * 4
        assert not handle.ledger.notes
    assert sites
    with by_hand(sites, odd, branches):
        expected = case.run(pipe, prompts=2, steps=4)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(case.run(pipe, prompts=2, steps=4), plain)


PROJECTIONS = ("to_q", "to_k", "add_q_proj", "add_k_proj")


@pytest.mark.parametrize(("name", "branches"), [("sd3", 1), ("flux", 1), ("flux_cfg", 2), ("wan", 2)])
def test_other_attention_keeps_queries_and_keys_where_they_are_projected(name: str, branches: int) -> None:
    """Before norms and rotations, which its processor puts on them."""
    case = CASES[name]
    pipe = case.build()
    plain = case.run(pipe, steps=4)
    with attach(pipe, AttentionReuse(operator="qk", interval=2)) as handle:
        found = case.run(pipe, steps=4)
        sites = sites_of(handle)
        assert set(handle.ledger.hits) == {site.name for site in handle.network.sites}
        assert set(handle.ledger.hits.values()) == {2 * branches}
    projections = [getattr(site, part, None) for site in sites for part in PROJECTIONS]
    with by_hand([one for one in projections if one is not None], odd, branches):
        assert torch.equal(case.run(pipe, steps=4), found)
    assert not torch.equal(found, plain)
    assert torch.equal(case.run(pipe, steps=4), plain)


def test_two_denoisers_keep_to_themselves() -> None:
    """Wan 2.2: the second begins with nothing to take, in the middle of the steps."""
    case = CASES["wan2"]
    pipe = case.build()
    with attach(pipe, AttentionReuse(operator="output", interval=2)) as handle:
        found = case.run(pipe)
        sites = sites_of(handle)
        hits = handle.ledger.hits
    first = len(sites) // 2
    # Steps 0, 1, 2 are the first's and 3, 4, 5 the second's, which computes at 3 instead: 3 has nothing to take.
    with by_hand(sites[:first], odd, 2), by_hand(sites[first:], lambda step: step == 2, 2):
        expected = case.run(pipe)
    assert torch.equal(found, expected)
    assert sum(hits.values()) == 2 * first + 2 * first


@pytest.mark.parametrize("operator", ["qk", "map"])
@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_maps_are_those_of_one_softmax_written_out(name: str, operator: str) -> None:
    case = CASES[name]
    pipe = case.build()
    plain = case.run(pipe, prompts=2)
    with attach(pipe, AttentionReuse(operator=operator, interval=2)) as handle:
        found = case.run(pipe, prompts=2)
        sites = sites_of(handle)
        assert set(handle.ledger.hits.values()) == {3}
    with explicit(sites, lambda _step: False):
        close(case.run(pipe, prompts=2), plain)
    with explicit(sites, odd):
        expected = case.run(pipe, prompts=2)
    close(found, expected)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sdxl", "dit", "ddim", "text_to_video", "animatediff", "svd"])
def test_both_ways_to_take_maps_agree(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    plain = case.run(pipe, steps=4)
    found = []
    for operator in ("qk", "map"):
        with attach(pipe, AttentionReuse(operator=operator, interval=2)) as handle:
            found.append(case.run(pipe, steps=4))
            assert set(handle.ledger.hits.values()) == {2}
    close(found[0], found[1])
    assert (found[0] - plain).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize(
    ("name", "operator"), [("sd", "qk"), ("sd", "output"), ("pixart", "qk"), ("pixart", "output"), ("wan", "output")]
)
def test_one_kind_of_attention_alone(name: str, kind: str, operator: str) -> None:
    case = CASES[name]
    pipe = case.build()
    with attach(pipe, AttentionReuse(operator=operator, interval=2, attention=kind)) as handle:
        found = case.run(pipe)
        sites = sites_of(handle, kind)
        assert set(handle.ledger.hits) == {site.name for site in handle.network.sites if site.kind == kind}
        everything = sites_of(handle)
    assert 0 < len(sites) < len(everything)
    if operator == "output":
        with by_hand(sites, odd, 2 if case.sequential else 1):
            assert torch.equal(case.run(pipe), found)
    else:
        with explicit(everything, odd, (kind == "cross",)):
            close(case.run(pipe), found)


@pytest.mark.parametrize("name", ["sd", "dit", "wan"])
def test_layers_that_are_not_named_compute(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    with attach(pipe, AttentionReuse(operator="output", interval=2, layers=[1])) as handle:
        found = case.run(pipe)
        sites = handle.network.blocks[1].sites
        assert sites
        assert set(handle.ledger.hits) == {site.name for site in sites}
    with by_hand([site.module for site in sites], odd, 2 if case.sequential else 1):
        assert torch.equal(case.run(pipe), found)


@pytest.mark.parametrize("last", [0, 2, 5])
def test_the_last_steps_reuse(last: int) -> None:
    """All of them what the last computed step has kept."""
    case = CASES["sd"]
    pipe = case.build()
    with attach(pipe, AttentionReuse(operator="output", last=last)) as handle:
        found = case.run(pipe)
        sites = sites_of(handle)
        reused = [bool(step.branches[0].plan.reuse) for step in handle.ledger.steps]
        assert reused == [False] * (6 - last) + [True] * last
        assert set(handle.ledger.hits.values()) == ({last} if last else set())
        # Nothing is kept that no later step reads.
        kept = [step.kept_bytes > 0 for step in handle.ledger.steps]
        assert kept == [6 - last - 1 <= k < 5 and last > 0 for k in range(6)]
    with by_hand(sites, lambda step: step >= 6 - last):
        assert torch.equal(case.run(pipe), found)


@pytest.mark.parametrize("name", ["flux_cfg", "wan"])
def test_branches_that_are_called_apart_have_a_memory_each(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    bytes_kept = []
    for guidance in (5.0, 1.0):
        with attach(pipe, AttentionReuse(operator="output", interval=2)) as handle:
            found = case.run(pipe, guidance=guidance)
            sites = sites_of(handle)
            bytes_kept.append(handle.ledger.extra_bytes)
        with by_hand(sites, odd, 2 if guidance > 1 else 1):
            assert torch.equal(case.run(pipe, guidance=guidance), found)
        with by_hand(sites, (lambda call: call % 4 > 1) if guidance > 1 else odd):
            mixed = case.run(pipe, guidance=guidance)  # one memory for both
        assert torch.equal(mixed, found) == (guidance == 1)
    assert bytes_kept[0] == 2 * bytes_kept[1]


@pytest.mark.parametrize("operator", ["output", "qk"])
def test_a_step_that_is_left_out_changes_no_attention(operator: str) -> None:
    """Reuse at 3 takes from 0, across the step 2 that calls nothing."""
    case = CASES["sd"]
    pipe = case.build()
    with attach(pipe, [SkipEvery(3), AttentionReuse(operator=operator, interval=2)]) as handle:
        found = case.run(pipe, steps=8)
        sites = sites_of(handle)
        assert handle.ledger.mask == [True, True, False, True, True, False, True, True]
        assert set(handle.ledger.hits.values()) == {3}
        kept = [step.kept_bytes for step in handle.ledger.steps]
        assert kept[0] == kept[1] == kept[2] > kept[3]
    calls: list[int] = []
    held: list[Any] = []
    forward = pipe.unet.forward

    def denoise(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] not in (2, 5):
            held[:] = [tuple(x.clone() for x in forward(*args, **kwargs))]
        return held[0]

    pipe.unet.forward = denoise
    if operator == "output":
        with by_hand(sites, odd, step=lambda: calls[-1]):
            assert torch.equal(case.run(pipe, steps=8), found)
    else:
        # Attention modules count their own calls, which are those of steps 0, 1, 3, 4, 6 and 7.
        with explicit(sites, lambda call: odd((0, 1, 3, 4, 6, 7)[call])):
            close(case.run(pipe, steps=8), found)


# Other processors ----------------------------------------------------------------------------------------------------


class Weighted(nn.Module):
    """A processor with weights, as IP-Adapters bring."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.extra = nn.Linear(width, width)
        self.calls = 0

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        self.calls += 1
        mixed = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        return mixed + 0.1 * self.extra(mixed)


class Boosted:
    """A processor with an argument of its own."""

    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        boost: float | None = None,
    ) -> Tensor:
        self.seen.append(boost)
        mixed = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        return mixed * (1.0 if boost is None else boost)


def test_processors_with_weights_are_left_alone() -> None:
    """They are modules of the model, which cannot be exchanged for what is none."""
    case = CASES["sd"]
    pipe = case.build()
    weighted = []
    torch.manual_seed(0)
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            weighted.append(Weighted(module.to_q.in_features))
            module.set_processor(weighted[-1])
    assert weighted
    assert reusing(weighted[0]) is None
    with attach(pipe, AttentionReuse(operator="output", interval=2, attention="self")) as handle:
        found = case.run(pipe)
        sites = sites_of(handle, "self")
        assert set(handle.ledger.hits) == {site.name for site in handle.network.sites if site.kind == "self"}
    assert {one.calls for one in weighted} == {6}
    with by_hand(sites, odd):
        assert torch.equal(case.run(pipe), found)
    for one in weighted:
        one.calls = 0
    with attach(pipe, AttentionReuse(operator="output", interval=2)) as handle:
        assert torch.equal(case.run(pipe), found)
        assert handle.ledger.hits and not any(name.endswith("attn2") for name in handle.ledger.hits)
    assert {one.calls for one in weighted} == {6}
    with pytest.raises(UsageError, match=r"operator=output cannot be taken .* whose attention gives qk; take"):
        attach(pipe, AttentionReuse(operator="output", interval=2, attention="cross"))
    assert all(
        isinstance(module.processor, Weighted) for name, module in pipe.unet.named_modules() if name.endswith("attn2")
    )


def test_arguments_of_other_processors_arrive() -> None:
    case = CASES["sd"]
    pipe = case.build()
    pipe.unet.set_attn_processor(Boosted())
    processors = list(pipe.unet.attn_processors.values())
    call: dict[str, Any] = dict(cross_attention_kwargs={"boost": 1.5})
    plain = case.run(pipe, **call)
    assert not torch.equal(plain, case.run(pipe))
    seen = processors[0].seen
    seen.clear()
    with attach(pipe, AttentionReuse(operator="output", interval=2)) as handle:
        found = case.run(pipe, **call)
        sites = sites_of(handle)
        assert set(handle.ledger.hits.values()) == {3}
    assert seen == [1.5] * len(seen)
    assert len(seen) == 3 * len(sites)
    with by_hand(sites, odd):
        assert torch.equal(case.run(pipe, **call), found)
    assert list(pipe.unet.attn_processors.values()) == processors
    with attach(pipe, AttentionReuse(operator="output", last=0)):
        assert torch.equal(case.run(pipe, **call), plain)


def test_the_plain_processors_of_the_library_are_taken_apart_wherever_they_stand() -> None:
    case = CASES["sd"]
    pipe = case.build()
    fused = {}
    for classic in (False, True):
        if classic:
            pipe.unet.set_attn_processor(AttnProcessor())
        for operator in ("map", "qk", "output"):
            with attach(pipe, AttentionReuse(operator=operator, interval=2)) as handle:
                found = case.run(pipe)
                assert set(handle.ledger.hits.values()) == {3}
            close(found, fused.setdefault(operator, found))
        kinds = {type(one) for one in pipe.unet.attn_processors.values()}
        assert kinds == {AttnProcessor if classic else AttnProcessor2_0}
