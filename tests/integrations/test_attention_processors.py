"""Attention that is taken apart, against the library's processors and against closed forms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from gearshift.integrations.diffusers.attention import PARTS, Separable, attention_map, reusing

BATCH, WIDTH, TEXT = 2, 32, 5

KINDS: dict[str, dict[str, Any]] = {
    "self": {},
    "cross": dict(cross_attention_dim=24),
    "bias": dict(bias=True, rescale_output_factor=1.7),
    "cross_layer_norm": dict(cross_attention_dim=24, cross_attention_norm="layer_norm"),
    "cross_group_norm": dict(
        cross_attention_dim=24, cross_attention_norm="group_norm", cross_attention_norm_num_groups=4
    ),
    "unet": dict(
        norm_num_groups=4, residual_connection=True, bias=True, rescale_output_factor=2**0.5, upcast_softmax=True
    ),
    "upcast": dict(upcast_attention=True, upcast_softmax=True),
    "normed": dict(qk_norm="layer_norm"),
    "rms": dict(cross_attention_dim=24, qk_norm="rms_norm"),
    "spatial": dict(spatial_norm_dim=8, residual_connection=True),
}
"""Arguments of an attention module."""
PLAIN = {"fused": AttnProcessor2_0, "classic": AttnProcessor}
MASKS = ("none", "additive", "boolean")


def case_names() -> Iterator[tuple[str, str, str]]:
    """Kind, processor and mask, as far as the library runs them."""
    for kind in KINDS:
        for plain in PLAIN:
            if plain == "classic" and kind in ("normed", "rms"):  # it ignores these norms
                continue
            for mask in MASKS if kind in ("self", "cross") else ("none",):
                if (plain, mask) != ("classic", "boolean"):  # it adds its mask
                    yield kind, plain, mask


class Setting:
    """An attention module with random weights, and inputs for it.

    Attributes:
        site: the module, with its plain processor.
    """

    def __init__(self, kind: str, plain: str, mask: str = "none", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        made = Attention(query_dim=WIDTH, heads=4, dim_head=8, processor=PLAIN[plain](), **KINDS[kind])
        self.site: Any = made.to(dtype).eval().requires_grad_(False)
        self.kind, self.mask, self.dtype = kind, mask, dtype

    def inputs(self, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        four = self.kind in ("unet", "spatial")
        cross = "cross_attention_dim" in KINDS[self.kind]
        found: dict[str, Any] = dict(
            hidden_states=noise(BATCH, WIDTH, 3, 4) if four else noise(BATCH, 12, WIDTH),
            encoder_hidden_states=noise(BATCH, TEXT, 24) if cross else None,
        )
        if self.kind == "spatial":
            found["temb"] = noise(BATCH, 8, 3, 4)
        source = TEXT if cross else 12
        keep = torch.arange(source).expand(BATCH, 1, source) < torch.tensor([source - 1, source - 3])[:, None, None]
        if self.mask != "none":
            found["attention_mask"] = keep if self.mask == "boolean" else (~keep).to(self.dtype) * -10000.0
        return found

    def plainly(self, **inputs: Any) -> Tensor:
        out: Tensor = self.site(**inputs)
        return out

    @contextlib.contextmanager
    def replaced(self) -> Iterator[Separable]:
        """With our processor in the module."""
        made = reusing(self.site.processor)
        assert isinstance(made, Separable)
        before, self.site.processor = self.site.processor, made
        yield made
        self.site.processor = before


@pytest.mark.parametrize(("kind", "plain", "mask"), list(case_names()))
def test_keeping_changes_nothing(kind: str, plain: str, mask: str) -> None:
    """Maps cannot come out of a fused kernel, so that only there the operations are others."""
    setting = Setting(kind, plain, mask)
    inputs = setting.inputs(1)
    expected = setting.plainly(**inputs)
    with setting.replaced() as ours:
        assert torch.equal(setting.plainly(**inputs), expected)
        for keeps in (("qk",), ("output",), ("output", "qk"), ("map",), PARTS):
            ours.keeps = keeps
            found = setting.plainly(**inputs)
            assert all((ours.kept(part) is not None) == (part in keeps) for part in PARTS)
            if "map" in keeps and plain == "fused":
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            else:
                assert torch.equal(found, expected)
            ours.reset()
            assert all(ours.kept(part) is None for part in PARTS)
    assert torch.equal(setting.plainly(**inputs), expected)


@pytest.mark.parametrize(("kind", "plain", "mask"), list(case_names()))
def test_what_was_kept_gives_what_was_computed(kind: str, plain: str, mask: str) -> None:
    setting = Setting(kind, plain, mask)
    inputs = setting.inputs(1)
    expected = setting.plainly(**inputs)
    with setting.replaced() as ours:
        for part in PARTS:
            ours.keeps = (part,)
            setting.plainly(**inputs)
            kept = ours.kept(part)
            assert kept is not None
            ours.reset()
            ours.takes, ours.given = part, kept
            found = setting.plainly(**inputs)
            if part == "map" and plain == "fused":
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            else:
                assert torch.equal(found, expected)
            ours.reset()


def taken(setting: Setting, ours: Separable, part: str, early: dict[str, Any], late: dict[str, Any]) -> Tensor:
    """The output for `late`, with a part that was kept at `early`."""
    ours.reset()
    ours.keeps = (part,)
    setting.plainly(**early)
    kept = ours.kept(part)
    assert kept is not None
    ours.reset()
    ours.takes, ours.given = part, kept
    found = setting.plainly(**late)
    ours.reset()
    return found


@pytest.mark.parametrize(("kind", "plain", "mask"), list(case_names()))
def test_maps_and_queries_with_keys_are_one(kind: str, plain: str, mask: str) -> None:
    setting = Setting(kind, plain, mask)
    early, late = setting.inputs(1), setting.inputs(2)
    fresh = setting.plainly(**late)
    with setting.replaced() as ours:
        by_map, by_qk, by_output = (taken(setting, ours, part, early, late) for part in ("map", "qk", "output"))
    torch.testing.assert_close(by_map, by_qk, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(by_map, fresh, atol=1e-3)
    assert not torch.allclose(by_map, by_output, atol=1e-3)


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("part", PARTS)
def test_a_residual_is_fresh(plain: str, part: str) -> None:
    """What lies on it is scaled with it."""
    setting = Setting("unet", plain)
    early, late = setting.inputs(1), setting.inputs(2)
    with setting.replaced() as ours:
        with_residual = taken(setting, ours, part, early, late)
        setting.site.residual_connection = False
        alone = taken(setting, ours, part, early, late)
        early_alone = setting.plainly(**early)
    scale = setting.site.rescale_output_factor
    torch.testing.assert_close(with_residual, alone + late["hidden_states"] / scale, rtol=1e-5, atol=1e-5)
    if part == "output":
        assert torch.equal(alone, early_alone)


@pytest.mark.parametrize("plain", PLAIN)
def test_half_precision_is_bit_identical_too(plain: str) -> None:
    """With scores in full precision where the module asks for it."""
    setting = Setting("upcast", plain, dtype=torch.bfloat16)
    inputs = setting.inputs(1)
    expected = setting.plainly(**inputs)
    assert expected.dtype == torch.bfloat16
    with setting.replaced() as ours:
        for part in PARTS:
            ours.keeps = (part,)
            found = setting.plainly(**inputs)
            assert found.dtype == torch.bfloat16
            if part == "map" and plain == "fused":
                torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
            else:
                assert torch.equal(found, expected)


def explicit_map(site: Any, hidden: Tensor, source: Tensor) -> Tensor:
    """The softmax map of an attention module, written out."""
    heads = site.heads
    query, key = site.to_q(hidden), site.to_k(source)
    query, key = (x.unflatten(-1, (heads, -1)) for x in (query, key))
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
    exponents = torch.exp(scores - scores.amax(-1, keepdim=True))
    return exponents / exponents.sum(-1, keepdim=True)


def explicit_mixed(site: Any, weights: Tensor, source: Tensor) -> Tensor:
    """A map applied to the values of a source, and what follows it."""
    value = site.to_v(source).unflatten(-1, (site.heads, -1))
    return site.to_out[0](torch.einsum("bhnm,bmhd->bnhd", weights, value).flatten(-2))


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_the_error_is_that_of_maps_alone_or_of_values_too(kind: str, plain: str) -> None:
    """P_s V_s - P_t V_t = (P_s - P_t) V_t + P_s (V_s - V_t): `map` and `qk` carry the first part, `output` both."""
    setting = Setting(kind, plain)
    setting.site.to_out[0].bias.zero_()
    early, late = setting.inputs(1), setting.inputs(2)
    sources = [one["encoder_hidden_states"] for one in (early, late)]
    sources = [one["hidden_states"] if text is None else text for one, text in zip((early, late), sources, strict=True)]
    maps = [explicit_map(setting.site, one["hidden_states"], s) for one, s in zip((early, late), sources, strict=True)]
    fresh = explicit_mixed(setting.site, maps[1], sources[1])
    of_maps = explicit_mixed(setting.site, maps[0] - maps[1], sources[1])
    of_values = explicit_mixed(setting.site, maps[0], sources[0]) - explicit_mixed(setting.site, maps[0], sources[1])
    assert min(of_maps.abs().max(), of_values.abs().max()) > 0.05
    torch.testing.assert_close(setting.plainly(**late), fresh, rtol=0, atol=1e-5)
    with setting.replaced() as ours:
        for part, error in (("map", of_maps), ("qk", of_maps), ("output", of_maps + of_values)):
            found = taken(setting, ours, part, early, late)
            torch.testing.assert_close(found - fresh, error, rtol=0, atol=1e-5)


def test_maps_of_boolean_and_of_additive_masks_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 8, generator=generator) for n in (6, 4))
    keep = torch.tensor([True, True, False, True]).expand(2, 1, 1, 4)
    masked = attention_map(query, key, keep)
    assert torch.equal(masked[..., 2], torch.zeros(2, 3, 6))
    torch.testing.assert_close(masked.sum(-1), torch.ones(2, 3, 6))
    torch.testing.assert_close(masked, attention_map(query, key, (~keep).float() * -10000.0))
    assert torch.equal(attention_map(query, key, torch.ones_like(keep)), attention_map(query, key, None))
