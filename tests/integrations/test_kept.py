"""Bytes that a policy keeps on a pipeline, against closed forms."""

from __future__ import annotations

import pytest
import torch

from gearshift.integrations.diffusers import attach
from gearshift.policies import AttentionReuse, DeepFeatureReuse, SkipEvery

from .test_costs import STEPS, prepared, shapes_of
from .tiny import CASES

# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["output", "qk", "map"])
@pytest.mark.parametrize("name", ["sd", "ddim", "pixart", "text_to_video", "svd"])
def test_what_attention_keeps(name: str, operator: str) -> None:
    """B N D b for outputs, B (N + M) D b for queries and keys, B h N M b for maps, over all operators."""
    case, pipe = prepared(name)
    with attach(pipe, AttentionReuse(operator=operator, interval=2)) as handle:
        case.run(pipe, steps=4, prompts=2)
        found = handle.ledger
        kept = [step.kept_bytes for step in found.steps]
    rows = 4 if case.guided else 2
    expected = 0
    for _, sequences, tokens, source, heads, width in shapes_of(name):
        entry = {"output": tokens * width, "qk": (tokens + source) * width, "map": heads * tokens * source}[operator]
        expected += rows * sequences * entry * 4
    assert found.extra_bytes == expected
    assert kept == [expected, 0, expected, 0]


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_one_kind_keeps_its_own(attention: str) -> None:
    case, pipe = prepared("sd")
    with attach(pipe, AttentionReuse(operator="qk", interval=2, attention=attention)) as handle:
        case.run(pipe, steps=STEPS)
        found = handle.ledger.extra_bytes
    assert found == sum(
        2 * (tokens + source) * width * 4 for kind, _, tokens, source, _, width in shapes_of("sd") if kind == attention
    )


def test_half_precision_keeps_half() -> None:
    pipe = CASES["sd"].build()
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe.to(dtype)
        for policy in (AttentionReuse(operator="output", interval=2), SkipEvery(2, keep_last=False)):
            with attach(pipe, policy) as handle:
                CASES["sd"].run(pipe, steps=STEPS)
                kept.append(handle.ledger.extra_bytes)
    assert kept[0] == 2 * kept[2] > 0
    assert kept[1] == 2 * kept[3] > 0


@pytest.mark.parametrize(("name", "branches"), [("sd", 2), ("wan", 2), ("flux", 1), ("dit", 2)])
def test_skipping_keeps_predictions(name: str, branches: int) -> None:
    """One of every branch; extrapolation keeps the one before too."""
    case, pipe = prepared(name)
    model = getattr(pipe, case.denoisers[0])
    sizes: list[int] = []
    watch = model.register_forward_hook(lambda _, __, output: sizes.append(output[0].numel() * 4))
    case.run(pipe, steps=2)
    watch.remove()
    sizes = sizes[: len(sizes) // 2]
    for extrapolate in (False, True):
        with attach(pipe, SkipEvery(2, extrapolate=extrapolate)) as handle:
            case.run(pipe, steps=4)
            kept = handle.ledger.extra_bytes
        if not extrapolate:
            assert kept == sum(sizes)
        else:
            assert sum(sizes) < kept <= 2 * sum(sizes)
    assert len(sizes) == (branches if case.sequential else 1)


@pytest.mark.parametrize("branch", [0, 5])
def test_deep_features_keep_one_tensor(branch: int) -> None:
    case, pipe = prepared("sd")
    with attach(pipe, DeepFeatureReuse(interval=2, branch=branch)) as handle:
        case.run(pipe, steps=STEPS)
        size = 16 * 8 * 8 if branch == 0 else 32 * 4 * 4
        assert handle.ledger.extra_bytes == 2 * size * 4
