"""U-ViT: parity with an independent reference, the details that released weights depend on, and the contract."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gearshift.backbones.base import Backbone
from gearshift.backbones.layers import sinusoid
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.execution.executor import execute
from gearshift.execution.memory import NO_SLOT, Slot
from gearshift.execution.plan import FULL, StepPlan
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError

from . import reference_uvit

SMALL = UViTConfig(image_size=8, in_channels=3, patch_size=2, embed_dim=32, depth=4, num_heads=4)
VARIANTS = {
    "none": SMALL,
    "class": replace(SMALL, num_classes=5, null_class=True),
    "text": replace(SMALL, context_dim=6, context_tokens=3),
    "no_conv": replace(SMALL, in_channels=4, num_classes=5, conv=False),
    "biases": replace(SMALL, qkv_bias=True, mlp_time_embed=True, mlp_ratio=2.0),
}


def build(config: UViTConfig) -> UViT:
    """A network whose every weight, norms and biases included, is a fixed function of its place in the state dict."""
    network = UViT(config).eval()
    state = {}
    for position, (name, tensor) in enumerate(network.state_dict().items()):
        draw = keys.normal(7, "weights", torch.tensor([position]), 0, tensor.shape)[0]
        state[name] = 0.1 * draw + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    network.load_state_dict(state)
    return network


def inputs(network: UViT, rows: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    index = torch.arange(rows)
    size = network.image_size
    x = keys.normal(7, "images", index, 0, (network.in_channels, size, size))
    time = 999 * keys.uniform(7, "time", index, 0)
    if network.cond_kind == "class":
        return x, time, keys.integers(7, "labels", index, 0, network.num_classes or 1)
    if network.cond_kind == "text":
        return x, time, keys.normal(7, "text", index, 0, (network.config.context_tokens, network.config.context_dim))
    return x, time, None


def plain(network: Backbone, x: Tensor, time: Tensor, cond: Tensor | None, slot: Slot = NO_SLOT) -> Tensor:
    """The network as the paper draws it, without an executor."""
    stream = network.embed(x, time, cond)
    hidden, skips = stream.hidden, []
    for index, block in enumerate(network.blocks):
        hidden = block(hidden, stream.cond, skips.pop() if index in network.pops else None, slot)
        if index in network.pushes:
            skips.append(hidden)
    assert not skips
    return network.readout(hidden, stream.cond, len(network.blocks))


# Parity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_reference_at_every_depth(name: str) -> None:
    network = build(VARIANTS[name])
    x, time, cond = inputs(network)
    config = network.config
    with torch.no_grad():
        wanted = reference_uvit.uvit(network.state_dict(), x, time, cond, config.num_heads, config.patch_size)
        out = execute(network, network.embed(x, time, cond), StepPlan(taps=network.exits()))
        assert network.exits() == tuple(range(1, config.depth + 2)) == tuple(out.taps)
        for depth, image in enumerate(wanted, start=1):
            assert (out.taps[depth] - image).abs().max() <= 1e-5, depth
        assert (plain(network, x, time, cond) - wanted[-1]).abs().max() <= 1e-5
    assert wanted[-1].std() > 0.1  # the comparison is not between zeros


GOLDEN = {
    "none": [0.03285, -0.1223, -0.22362, -0.01265, 0.17428, -0.55713, -0.08595, 0.14294, -0.28568],
    "class": [0.12372, -0.01599, 0.15533, 0.13066, 0.11224, -0.09648, 0.02335, -0.07438, 0.29618],
    "text": [-0.0188, 0.54481, 0.26845, 0.10803, 0.06758, 0.39745, -0.06308, -0.17236, 0.08724],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_output(name: str) -> None:
    """Fixed weights and inputs give the numbers they have always given (also those of the official code)."""
    network = build(VARIANTS[name])
    with torch.no_grad():
        image = plain(network, *inputs(network))
    assert image[:, :, 1, 6].flatten().tolist() == pytest.approx(GOLDEN[name], abs=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_executor_equals_plain_loop_bit_for_bit(name: str) -> None:
    network = build(VARIANTS[name])
    x, time, cond = inputs(network)
    with torch.no_grad():
        assert torch.equal(
            execute(network, network.embed(x, time, cond), FULL).prediction, plain(network, x, time, cond)
        )


@pytest.mark.parametrize("name", ["none", "class", "text"])
def test_attention_paths_agree(name: str) -> None:
    """Fused, explicit softmax (a slot that keeps the map), and PyTorch's unfused kernel."""
    network = build(VARIANTS[name])
    args = inputs(network)
    slot = Slot(wanted=frozenset({"map"}))
    with torch.no_grad():
        fused = plain(network, *args)
        explicit = plain(network, *args, slot)
        with sdpa_kernel(SDPBackend.MATH):
            unfused = plain(network, *args)
    (weights,) = slot.stored["map"]
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert (fused - explicit).abs().max() <= 1e-5
    assert (fused - unfused).abs().max() <= 1e-5


def test_batched_readout_equals_single_ones() -> None:
    network = build(VARIANTS["class"])
    hiddens = [network.embed(*inputs(network, rows)).hidden for rows in (2, 2, 3)]
    batched = network.readouts(hiddens, {}, (1, 2, 5))
    assert [image.shape[0] for image in batched] == [2, 2, 3]
    for hidden, image in zip(hiddens, batched, strict=True):
        assert torch.allclose(network.readout(hidden, {}, 1), image, atol=1e-6)


def test_copied_readout_is_the_readout() -> None:
    network = build(VARIANTS["class"])
    hidden = network.embed(*inputs(network)).hidden
    head = copy.deepcopy(network.readout_modules(2))
    assert torch.equal(network.readout_with(head, hidden, {}, 2), network.readout(hidden, {}, 2))
    nn.init.zeros_(head["norm"].weight)  # the copy is its own
    assert not torch.equal(network.readout_with(head, hidden, {}, 2), network.readout(hidden, {}, 2))


# Details -------------------------------------------------------------------------------------------------------------


def test_token_order_is_label_time_patches() -> None:
    network = build(VARIANTS["class"])
    x, time, cond = inputs(network)
    hidden = network.embed(x, time, cond).hidden - network.pos_embed
    assert torch.allclose(hidden[:, 0], network.label_emb(cond), atol=1e-6)
    assert torch.allclose(hidden[:, 1], sinusoid(time, 32), atol=1e-6)
    text = build(VARIANTS["text"])
    x, time, cond = inputs(text)
    hidden = text.embed(x, time, cond).hidden - text.pos_embed
    assert torch.allclose(hidden[:, 0], sinusoid(time, 32), atol=1e-6)
    assert torch.allclose(hidden[:, 1:4], text.context_embed(cond), atol=1e-6)


def test_label_and_time_have_positions_of_their_own() -> None:
    network = build(VARIANTS["class"])
    with torch.no_grad():
        before = plain(network, *inputs(network))
        network.pos_embed[:, [0, 1]] = network.pos_embed[:, [1, 0]].clone()
        after = plain(network, *inputs(network))
    assert (before - after).abs().max() > 1e-3


def test_unpatchify_order_is_p1_p2_channel() -> None:
    network = build(VARIANTS["none"])
    x, _, _ = inputs(network)
    patches = [patch for row in reference_uvit.patchify(x, 2) for patch in row]
    channel_last = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches], 1)
    channel_first = torch.stack([patch.flatten(1) for patch in patches], 1)
    assert torch.equal(network.assemble(channel_last, 3, 1), x)
    assert not torch.equal(network.assemble(channel_first, 3, 1), x)


def test_sinusoid() -> None:
    assert torch.equal(sinusoid(torch.zeros(2), 8), torch.tensor([[1.0] * 4 + [0.0] * 4] * 2))
    angles = 500.0 * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    wanted = torch.cat([angles.cos(), angles.sin()]).float()
    for time in (torch.tensor([500]), torch.tensor([500.0], dtype=torch.bfloat16), torch.tensor([500.0]).double()):
        features = sinusoid(time, 8)
        assert features.dtype == torch.float32
        assert torch.allclose(features[0], wanted, atol=1e-4)


def test_skips_are_last_in_first_out() -> None:
    """Zeroing only the pushed copy of block 0's output reaches no skip input but that of the last decoder block."""
    network = build(VARIANTS["none"])
    x, time, _ = inputs(network)

    def skip_inputs(zero: int | None) -> list[Tensor]:
        stream = network.embed(x, time, None)
        taken = []
        for index, block in enumerate(network.blocks):
            skip = stream.pop() if index in network.pops else None
            if skip is not None:
                taken.append(skip)
            stream.hidden = block(stream.hidden, {}, skip, NO_SLOT)
            if index in network.pushes:
                kept = stream.hidden
                stream.hidden = torch.zeros_like(kept) if index == zero else kept
                stream.push()
                stream.hidden = kept
        return taken

    with torch.no_grad():
        before, after = skip_inputs(None), skip_inputs(0)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False]
    assert not after[-1].any()


def test_norms_and_biases_are_the_official_ones() -> None:
    network = UViT(VARIANTS["class"])
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * 5 + 1
    assert {norm.eps for norm in norms} == {1e-5}
    assert all(block.attn.qkv.bias is None for block in network.blocks)
    assert [block.skip_linear is not None for block in network.blocks] == [False, False, False, True, True]
    assert not any(name.startswith("final_layer") for name in UViT(VARIANTS["no_conv"]).state_dict())


def test_initialisation() -> None:
    network = UViT(replace(SMALL, embed_dim=256))
    for name, parameter in network.named_parameters():
        if name.endswith("bias") and "proj" not in name and "final" not in name:
            assert not parameter.any(), name
    assert network.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert network.mid_block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)


# Contract ------------------------------------------------------------------------------------------------------------


def test_bypass_leaves_the_merge() -> None:
    network = build(VARIANTS["none"])
    hidden = network.embed(*inputs(network)).hidden
    skip = hidden.flip(0)
    assert network.bypass(0, hidden, {}, None) is hidden
    merged = network.out_blocks[0].skip_linear(torch.cat([hidden, skip], -1))
    assert torch.equal(network.bypass(3, hidden, {}, skip), merged)


def test_heads_see_image_tokens() -> None:
    network = build(VARIANTS["text"])
    stream = network.embed(*inputs(network))
    assert network.tokens(stream.hidden, 1).shape == (3, 16, 32)
    assert torch.equal(network.tokens(stream.hidden, 1), stream.hidden[:, 4:])
    assert (network.width(1), network.patch(1), network.time_width) == (32, 2, 32)
    assert torch.equal(network.time_features(stream.time), sinusoid(stream.time, 32))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns(name: str) -> None:
    network = build(VARIANTS[name])
    plain(network, *inputs(network)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize("name", ["class", "biases", "text"])
def test_half_precision(name: str) -> None:
    """Under autocast and with the weights cast: close to fp32, and no mixture that fails."""
    network = build(VARIANTS[name])
    x, time, cond = inputs(network)
    with torch.no_grad():
        exact = plain(network, x, time, cond)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = plain(network, x, time, cond)
        half = network.to(torch.bfloat16)
        text = cond.bfloat16() if cond is not None and cond.is_floating_point() else cond
        pure = plain(half, x.bfloat16(), time, text)
    assert pure.dtype == torch.bfloat16
    for close in (mixed, pure):
        assert (close - exact).abs().max() < 0.05 * exact.abs().max()


def test_null_conditions() -> None:
    cpu = torch.device("cpu")
    labels = build(VARIANTS["class"]).null_cond(2, cpu)
    assert labels is not None and labels.tolist() == [5, 5]
    text = build(VARIANTS["text"])
    empty = torch.randn(3, 6)
    with pytest.raises(UsageError, match="set_null_context"):
        text.null_cond(2, cpu)
    text.set_null_context(empty)
    features = text.null_cond(2, cpu)
    assert features is not None and torch.equal(features, torch.stack([empty, empty]))
    assert "null_context" not in text.state_dict()
    with pytest.raises(UsageError, match=r"must be \[3, 6\], got \[2, 6\]"):
        text.set_null_context(empty[:2])
    with pytest.raises(UsageError, match="null_class=false"):
        build(VARIANTS["no_conv"]).null_cond(2, cpu)
    with pytest.raises(UsageError, match="null condition"):
        build(VARIANTS["none"]).null_cond(2, cpu)
    with pytest.raises(UsageError, match="cond_kind=none"):
        build(VARIANTS["none"]).set_null_context(empty)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("none", {"x": torch.zeros(3, 1, 8, 8)}, r"images must be \[n, 3, 8, 8\], got \[3, 1, 8, 8\]"),
        ("none", {"x": torch.zeros(3, 8, 8)}, r"images must be \[n, 3, 8, 8\], got \[3, 8, 8\]"),
        ("none", {"time": torch.zeros(())}, r"time must be \[3\], one value per image, got \[\]"),
        ("none", {"cond": torch.zeros(3, dtype=torch.int64)}, "unconditional, got conditioning of shape"),
        ("class", {"cond": None}, "needs class conditioning, got none"),
        ("class", {"cond": torch.zeros(3)}, r"labels must be integers \[3\], got torch.float32 \[3\]"),
        ("class", {"cond": torch.zeros(2, dtype=torch.int64)}, r"labels must be integers \[3\], got torch.int64 \[2\]"),
        ("text", {"cond": torch.zeros(3, 4, 6)}, r"text features must be \[3, 3, 6\], got \[3, 4, 6\]"),
    ],
)
def test_bad_inputs(name: str, change: dict[str, Tensor | None], message: str) -> None:
    network = build(VARIANTS[name])
    x, time, cond = inputs(network)
    with pytest.raises(UsageError, match=message):
        network.embed(**{"x": x, "time": time, "cond": cond, **change})
