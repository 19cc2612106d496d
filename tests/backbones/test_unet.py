"""U-Net: the same numbers as the network written from its definition; conventions; contract details of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_blocks import PyramidBlock, UNetBlock
from gearshift.backbones.unet_config import UNetConfig
from gearshift.backbones.unet_norm import normed
from gearshift.backbones.unet_resample import down, square_filter, up
from gearshift.backbones.unet_weights import to_official
from gearshift.execution.plan import StepPlan
from gearshift.runtime.errors import UsageError

from .reference_unet import RIGHT, Conventions, double, halve, unet
from .unets import PYRAMID, STAGED, STANDARD, drawn, inputs, run

CONFIGS = {
    "standard": STANDARD,
    "pyramid": PYRAMID,
    "heads": replace(STANDARD, num_heads=4, nin=True),
    "class": replace(STANDARD, num_classes=3, null_class=True, augment_dim=9, max_groups=16),
    "pyramid-class": replace(PYRAMID, num_classes=4, augment_dim=9, nin=True),
    "fir": replace(STANDARD, resample_filter=(1, 3, 3, 1), model_channels=16),
    "deep": replace(STANDARD, channel_mult=(1, 2, 2, 2), num_blocks=2, model_channels=8),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_is_the_network_written_by_hand(name: str, dtype: torch.dtype, atol: float) -> None:
    config = CONFIGS[name]
    network = drawn(config, dtype)
    x, time = inputs(config, dtype=dtype)
    cond = torch.tensor([0, 1, 2, 1, 0]) if config.num_classes else None
    if config.null_class:
        cond = torch.tensor([0, 3, 2, 1, 3])
    augment = None
    if config.augment_dim:
        augment = torch.randn(5, 9, generator=torch.Generator().manual_seed(2)).to(dtype)
    how = Conventions(heads=config.num_heads, max_groups=config.max_groups)
    state = to_official(network.state_dict(), network)
    with torch.no_grad():
        ours = run(network, x, time, cond, augment).prediction
        assert ours.std() > 0.1
        torch.testing.assert_close(ours, unet(state, x, time, cond, augment, how), rtol=0, atol=atol)
        if augment is not None:
            plain = run(network, x, time, cond).prediction
            assert (plain - ours).abs().max() > 1e-2
            torch.testing.assert_close(plain, unet(state, x, time, cond, None, how), rtol=0, atol=atol)
            assert torch.equal(run(network, x, time, cond, torch.zeros_like(augment)).prediction, plain)


@pytest.mark.parametrize(
    ("slip", "config"),
    [
        (replace(RIGHT, max_groups=16), STANDARD),
        (replace(RIGHT, eps=1e-5), STANDARD),
        (replace(RIGHT, interleaved=False), STANDARD),
        (replace(RIGHT, sines_first=False), STANDARD),
        (replace(RIGHT, sines_first=False), PYRAMID),
        (replace(RIGHT, half_sum=1.0), STANDARD),
        (replace(RIGHT, half_attention=1.0), STANDARD),
        (replace(RIGHT, half_pyramid=1.0), PYRAMID),
    ],
    ids=["groups", "eps", "qkv", "sine-cosine", "fourier-sine-cosine", "half-sum", "half-attention", "half-pyramid"],
)
def test_conventions_matter(slip: Conventions, config: UNetConfig) -> None:
    """Each slip moves the output by far more than the tolerance above."""
    network = drawn(config)
    x, time = inputs(config)
    state = to_official(network.state_dict(), network)
    with torch.no_grad():
        ours = run(network, x, time).prediction
        assert (ours - unet(state, x, time)).abs().max() < 1e-10
        assert (ours - unet(state, x, time, how=slip)).abs().max() > 1e-7


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
def test_norm_and_its_gradients(active: bool, layout: torch.memory_format) -> None:
    """Those of torch; the mean of a group may be far from zero."""
    norm = torch.nn.GroupNorm(3, 12, eps=1e-6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 12, 5, 5, dtype=torch.float64, generator=generator) + 7).contiguous(memory_format=layout)
    x.requires_grad_()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    inner = norm(x)
    wanted = torch.nn.functional.silu(inner) if active else inner
    ours = normed(x, norm, active)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    weight = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
    sources = (x, *norm.parameters())
    for actual, expected in zip(
        torch.autograd.grad(ours, sources, weight), torch.autograd.grad(wanted, sources, weight), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    far = 100 + torch.randn(1, 12, 16, 16, generator=generator)  # fp32: squares of the values would be too coarse
    plain = torch.nn.GroupNorm(3, 12)
    exact = plain.double()(far.double()).float()
    torch.testing.assert_close(normed(far, plain.float(), False), exact, rtol=0, atol=1e-4)
    assert normed(far.bfloat16(), plain, False).dtype == torch.bfloat16


def test_filters() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for taps in ([1, 1], [1, 3, 3, 1], [1, 5, 10, 10, 5, 1]):
        kernel = square_filter(taps).double()
        torch.testing.assert_close(kernel.sum().item(), 1.0, rtol=0, atol=1e-6)
        torch.testing.assert_close(down(x, kernel), halve(x, kernel[0, 0]), rtol=0, atol=1e-12)
        torch.testing.assert_close(up(x, kernel), double(x, kernel[0, 0]), rtol=0, atol=1e-12)
    constant = torch.ones(1, 1, 8, 8)
    assert torch.equal(up(constant, square_filter([1, 1])), torch.ones(1, 1, 16, 16))
    torch.testing.assert_close(up(constant, square_filter([1, 3, 3, 1]))[:, :, 1:-1, 1:-1], torch.ones(1, 1, 14, 14))


def test_first_weights() -> None:
    """Blocks start as their shortcuts and the prediction near zero, but not at it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(STANDARD)
    x, time = inputs(STANDARD, dtype=torch.float32)
    prediction = run(network, x, time).prediction
    assert 0 < prediction.abs().max() < 1e-3
    for block in network.blocks:
        assert isinstance(block, UNetBlock)
        bound = (6 / (9 * 2 * block.out_channels)) ** 0.5
        assert 0.9 * bound < block.conv1.weight.abs().max() * 1e5 < 1.001 * bound
        assert 0.9 < block.conv0.weight.abs().max() / (6 / 9 / (block.in_channels + block.out_channels)) ** 0.5 < 1.001
        assert not any(block.get_submodule(name).bias.any() for name in ("conv0", "conv1", "affine", "norm0"))
        if block.attends:
            edge = (0.2 * 6 / (4 * block.out_channels)) ** 0.5
            assert 0.9 * edge < block.qkv.weight.abs().max() < 1.001 * edge
            assert 0 < block.proj.weight.abs().max() < 1e-5


def test_where_attention_is() -> None:
    network = UNet(replace(STANDARD, num_blocks=2, model_channels=8))
    names = {id(module): name for name, module in network.named_modules()}
    attending = [names[id(block)] for block in network.blocks if isinstance(block, UNetBlock) and block.attends]
    assert attending == ["enc.4x4_block0", "enc.4x4_block1", "dec.4x4_in0", "dec.4x4_block2"]
    lower = UNet(replace(STANDARD, channel_mult=(1, 2, 2), model_channels=8))  # the middle attends at any side
    names = {id(module): name for name, module in lower.named_modules()}
    attending = [names[id(block)] for block in lower.blocks if isinstance(block, UNetBlock) and block.attends]
    assert attending == ["enc.4x4_block0", "dec.2x2_in0", "dec.4x4_block1"]


def test_skips_are_flags_and_not_widths() -> None:
    """Each decoder block pops, each encoder block pushes, whatever the widths are; pops undo pushes of each path."""
    for config in (STANDARD, PYRAMID, STAGED, replace(PYRAMID, decoders=(16, 4), boundaries=(1.0,), middle="shared")):
        network = UNet(config)
        for path in network.paths:
            pending = 1  # of the embedding
            for block in path:
                assert (block in network.pushes) <= (block not in network.pops)
                pending += (block in network.pushes) - (block in network.pops)
                assert pending >= 0
            assert pending == 0


def test_bypass_leaves_the_shortcut() -> None:
    """Dropping everything leaves the chain of shortcuts, unscaled; blocks that keep their width leave nothing."""
    network = drawn(PYRAMID)
    x, time = inputs(PYRAMID)
    dropped = frozenset(range(len(network.blocks)))
    with torch.no_grad():
        ours = run(network, x, time, plan=StepPlan(bypass=dropped)).prediction
        stream = network.embed(x, time, None)
        hidden, skips = stream.hidden, [stream.hidden]
        for index, block in enumerate(network.blocks):
            if index in network.pops:
                hidden = torch.cat([hidden, skips.pop()], 1)
            if isinstance(block, UNetBlock) and block.skip is not None:
                hidden = block.skip(hidden)
            if index in network.pushes:
                skips.append(hidden)
        by_hand = network.readout(hidden, {}, len(network.blocks))
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-12)
    same = [block for block in network.blocks if isinstance(block, PyramidBlock) or block.skip is None]
    assert len(same) > 3
    hidden = torch.randn(2, 16, 4, 4)
    assert all(block.shortcut(hidden, None) is hidden for block in same)


def test_images_lie_channels_last() -> None:
    """So attention sees their pixels as tokens without a copy; the prediction is as contiguous as any image."""
    for config in (STANDARD, PYRAMID):
        network = drawn(config, torch.float32)
        given: list[torch.Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _m, _i, output, to=given: to.append(output)) for block in network.blocks
        ]
        x, time = inputs(config, dtype=torch.float32)
        prediction = run(network, x, time).prediction
        for hook in hooks:
            hook.remove()
        assert len(given) == len(network.blocks)
        assert all(output.is_contiguous(memory_format=torch.channels_last) for output in given)
        assert prediction.is_contiguous()


def test_dropout_is_torchs_and_only_in_training() -> None:
    config = replace(STANDARD, dropout=0.5, model_channels=8)
    network = drawn(config)
    x, time = inputs(config)

    def masked(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return run(network, x, time).prediction

    assert torch.equal(masked(0), masked(1))
    network.train()
    assert torch.equal(masked(0), masked(0))
    assert (masked(0) - masked(1)).abs().max() > 1e-2


def test_null_label_is_no_label() -> None:
    network = drawn(replace(STANDARD, num_classes=3, null_class=True, model_channels=8))
    null = network.null_cond(2, torch.device("cpu"))
    assert null is not None
    assert null.tolist() == [3, 3]
    with pytest.raises(UsageError, match="null_class=false and only its 3 classes"):
        UNet(replace(STANDARD, num_classes=3, model_channels=8)).null_cond(2, torch.device("cpu"))
    with pytest.raises(UsageError, match="has none"):
        UNet(replace(STANDARD, model_channels=8)).null_cond(2, torch.device("cpu"))


def test_inputs_are_checked() -> None:
    plain = UNet(replace(STANDARD, model_channels=8))
    x, time = inputs(STANDARD, dtype=torch.float32)
    with pytest.raises(UsageError, match=r"images must be \[n, 2, 8, 8\], got \[5, 2, 8, 4\]"):
        plain.embed(x[..., :4], time, None)
    with pytest.raises(UsageError, match=r"time must be \[5\], one value per image, got \[4\]"):
        plain.embed(x, time[:4], None)
    with pytest.raises(UsageError, match="unconditional"):
        plain.embed(x, time, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(UsageError, match="augment_dim=0"):
        plain.embed_augmented(x, time, None, torch.zeros(5, 9))
    told = UNet(replace(STANDARD, model_channels=8, num_classes=3, augment_dim=9))
    with pytest.raises(UsageError, match="needs class conditioning"):
        told.embed(x, time, None)
    with pytest.raises(UsageError, match=r"labels must be integers \[5\]"):
        told.embed(x, time, torch.zeros(5))
    with pytest.raises(UsageError, match=r"augmentation labels must be \[5, 9\], got \[5, 8\]"):
        told.embed_augmented(x, time, torch.zeros(5, dtype=torch.int64), torch.zeros(5, 8))
    with pytest.raises(UsageError, match="depth 3 is not an exit"):
        plain.readout(x, {}, 3)


def test_half_precision_of_the_whole_network() -> None:
    network = drawn(PYRAMID, torch.bfloat16)
    x, time = inputs(PYRAMID, dtype=torch.bfloat16)
    assert run(network, x, time.float()).prediction.dtype == torch.bfloat16
