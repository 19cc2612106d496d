"""The shared attention operator."""

from __future__ import annotations

import math

import pytest
import torch

from gearshift.backbones.attention import Attention
from gearshift.execution.memory import Slot


def operator(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Attention, torch.Tensor]:
    torch.manual_seed(0)
    return Attention(12, 3, qkv_bias=bias).to(dtype).requires_grad_(False), torch.randn(2, 5, 12, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_written_out_by_loops(bias: bool) -> None:
    """Against sums over heads and tokens, with q, k, v as consecutive blocks of the fused projection."""
    attention, x = operator(bias)
    weight, offset = attention.qkv.weight, attention.qkv.bias
    wanted = torch.zeros(2, 5, 12, dtype=torch.float64)
    for n in range(2):
        for head in range(3):
            q, k, v = (
                x[n] @ weight[12 * part + 4 * head : 12 * part + 4 * head + 4].T
                + (0 if offset is None else offset[12 * part + 4 * head : 12 * part + 4 * head + 4])
                for part in range(3)
            )
            for i in range(5):
                scores = torch.tensor([math.exp(float(q[i] @ k[j]) / 2) for j in range(5)], dtype=torch.float64)
                wanted[n, i, 4 * head : 4 * head + 4] = (scores / scores.sum()) @ v
    wanted = wanted @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", ["qk", "map", "output"])
def test_parts_come_back(part: str, bias: bool) -> None:
    attention, x = operator(bias)
    kept = Slot(wanted=frozenset({part}))
    plain = attention(x)
    torch.testing.assert_close(attention(x, kept), plain, rtol=0, atol=1e-12)
    assert list(kept.stored) == [part]
    assert [tuple(t.shape) for t in kept.stored[part]] == {
        "qk": [(2, 3, 5, 4)] * 2,
        "map": [(2, 3, 5, 5)],
        "output": [(2, 5, 12)],
    }[part]
    torch.testing.assert_close(attention(x, Slot(part, frozenset(), kept.stored)), plain, rtol=0, atol=1e-12)


def test_a_map_mixes_the_values_of_now() -> None:
    attention, x = operator()
    kept = Slot(wanted=frozenset({"map"}))
    attention(x, kept)
    weights = kept.stored["map"][0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    new = torch.randn_like(x)
    wanted = attention.out(weights @ attention.value(new))
    assert torch.equal(attention(new, Slot("map", frozenset(), kept.stored)), wanted)


def test_reused_parts_still_leave_the_output_behind() -> None:
    """A plan may take the map at one step and the whole output at the next."""
    attention, x = operator()
    kept = Slot(wanted=frozenset({"map"}))
    attention(x, kept)
    slot = Slot("map", frozenset({"map", "output"}), kept.stored.copy())
    output = attention(x, slot)
    assert list(slot.stored) == ["output"] and torch.equal(slot.stored["output"][0], output)


def test_nothing_wanted_nothing_stored() -> None:
    attention, x = operator(dtype=torch.float32)
    slot = Slot()
    assert torch.equal(attention(x, slot), attention(x))
    assert slot.stored == {}


def test_width_must_divide() -> None:
    with pytest.raises(ValueError, match="width 10 does not divide by 3 heads"):
        Attention(10, 3)
