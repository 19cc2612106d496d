"""The latent-diffusion U-Net: parity with an independent reference, stages, and the contract."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gearshift.backbones.ldm_unet import LdmUNet, LdmUNetConfig
from gearshift.backbones.ldm_unet_blocks import STEM, TIME, Block, GroupNorm, SpatialAttention
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.execution.executor import execute
from gearshift.execution.memory import Slot
from gearshift.execution.plan import FULL, StepPlan
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError

from . import reference_ldm_unet as reference

SMALL = LdmUNetConfig(
    image_size=8,
    in_channels=3,
    model_channels=16,
    channel_mult=(1, 2, 3),
    num_res_blocks=2,
    attention_downsamplings=(2, 4),
    head_dim=8,
    num_groups=8,
)
VARIANTS = {
    "plain": SMALL,
    "class": replace(SMALL, num_classes=5, null_class=True),
    "shallow": replace(SMALL, channel_mult=(1, 1), num_res_blocks=1, attention_downsamplings=(1,)),
    "one_wide": replace(SMALL, decoders=(24,)),
    "decoders": replace(
        SMALL, decoders=(24, 16, 8), decoder_attention=(True, False, True), boundaries=(0.5, 3.0), num_classes=5
    ),
}


def build(config: LdmUNetConfig, dtype: torch.dtype = torch.float32) -> LdmUNet:
    """A network whose every weight, norms and biases included, is a fixed function of its place in the state dict."""
    network = LdmUNet(config).eval()
    state = {}
    for position, (name, tensor) in enumerate(network.state_dict().items()):
        draw = keys.normal(7, "weights", torch.tensor([position]), 0, tensor.shape)[0]
        if tensor.ndim > 1:
            state[name] = draw * tensor[0].numel() ** -0.5
        else:
            norm = name.endswith("weight")
            state[name] = 0.1 * draw + (1.0 if norm else 0.0)
    network.load_state_dict(state)
    return network.to(dtype)


def inputs(network: LdmUNet, rows: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    index = torch.arange(rows)
    size = network.image_size
    x = keys.normal(7, "images", index, 0, (network.in_channels, size, size)).to(dtype)
    time = 999 * keys.uniform(7, "time", index, 0)
    labels = keys.integers(7, "labels", index, 0, network.num_classes) if network.num_classes else None
    return x, time, labels


def run(network: LdmUNet, x: Tensor, time: Tensor, cond: Tensor | None, path: int = 0) -> Tensor:
    plan = StepPlan(expert=path) if len(network.paths) > 1 else FULL
    return execute(network, network.embed(x, time, cond), plan).prediction


def prefix(network: LdmUNet, path: int) -> str:
    return f"decoders.{path}." if len(network.paths) > 1 else ""


PATHS = [(name, path) for name, config in VARIANTS.items() for path in range(len(config.widths))]


# Parity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_equals_reference(name: str, path: int) -> None:
    """The reference reads official weights, so the two orders of `qkv` are compared, too."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        network = build(VARIANTS[name], dtype)
        config = network.config
        x, time, labels = inputs(network, dtype=dtype)
        # The sinusoid is always made in fp32: its own test compares it, and the tight comparison is given it.
        features = network.time_features(time) if dtype == torch.float64 else reference.time_features(time, 16)
        state, up = network.to_official(), prefix(network, path)
        with torch.no_grad():
            wanted = reference.ldm_unet(state, x, features.to(dtype), labels, config.head_dim, config.num_groups, up)
            got = run(network, x, time, labels, path)
        assert wanted.std() > 0.1  # the comparison is not between zeros
        assert (got - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


def test_time_features() -> None:
    network = build(SMALL)
    time = torch.tensor([0.0, 1.0, 17.5, 999.0])
    assert torch.allclose(network.time_features(time).double(), reference.time_features(time, 16), atol=1e-4)
    assert network.time_width == 16


def test_official_rows_are_needed() -> None:
    """In the wrong order the same rows are another network: nothing but the converter tells the two apart."""
    network = build(SMALL)
    other = copy.deepcopy(network)
    other.load_state_dict(network.to_official())
    args = inputs(network)
    with torch.no_grad():
        assert (run(network, *args) - run(other, *args)).abs().max() > 1e-3
        other.load_state_dict(other.from_official(network.to_official()))
        assert torch.equal(run(network, *args), run(other, *args))


# Stages --------------------------------------------------------------------------------------------------------------


def test_one_stage_is_the_plain_network_bit_for_bit() -> None:
    plain, one = build(SMALL), build(replace(SMALL, decoders=(16,)))
    assert list(plain.state_dict()) == list(one.state_dict())
    args = inputs(plain)
    with torch.no_grad():
        assert torch.equal(run(plain, *args), run(one, *args))


def test_every_stage_of_the_plain_width_is_the_plain_network_bit_for_bit() -> None:
    plain = build(SMALL)
    staged = build(replace(SMALL, decoders=(16, 24, 16), boundaries=(0.5, 3.0)))
    own = ("output_blocks.", "out.")
    state = staged.state_dict()
    for name, tensor in plain.state_dict().items():
        for stage in (0, 2):
            state[f"decoders.{stage}.{name}" if name.startswith(own) else name] = tensor
    staged.load_state_dict(state)
    args = inputs(plain)
    with torch.no_grad():
        wanted = run(plain, *args)
        assert torch.equal(run(staged, *args, path=0), wanted)
        assert torch.equal(run(staged, *args, path=2), wanted)
        assert not torch.equal(run(staged, *args, path=1), wanted)


def test_rows_go_to_the_decoder_of_their_own_level() -> None:
    """A mixed batch is each row alone, whatever stands first; boundaries belong to the stage below them."""
    network = build(VARIANTS["decoders"], torch.float64)
    assert network.boundaries == (0.5, 3.0)
    process = VPSDE(VPSDEConfig())
    ratios = torch.tensor([4.0, 0.01, 3.0, 0.5, 0.5001, 3.1], dtype=torch.float64)
    stages = [2, 0, 1, 0, 1, 2]
    assert network.route(-2 * ratios.log()).tolist() == stages
    time = process.time_of_log_snr(-2 * ratios.log())
    x, _, labels = inputs(network, 6, torch.float64)
    assert labels is not None
    denoiser = Denoiser(network, process)
    with torch.no_grad():
        outputs = denoiser.rows(x, time, labels)
        fed = process.network_time(time)
        for row, stage in enumerate(stages):
            alone = run(network, x[row : row + 1], fed[row : row + 1], labels[row : row + 1], stage)
            assert (outputs.prediction[row] - alone[0]).abs().max() < 1e-12
        order = torch.tensor([3, 5, 1, 0, 4, 2])
        permuted = denoiser.rows(x[order], time[order], labels[order]).prediction
    assert (permuted - outputs.prediction[order]).abs().max() < 1e-12
    ran = {event.index: len(event.rows) for event in outputs.trace if event.kind == "block"}
    shared = len(network.input_blocks)  # the first convolution is none, the middle is one
    assert [ran[block] for block in range(len(network.blocks))] == [6] * shared + [2] * (len(ran) - shared)


def test_a_stage_alone_leaves_the_other_decoders_untouched() -> None:
    network = build(VARIANTS["decoders"])
    run(network, *inputs(network), path=1).square().sum().backward()
    for name, parameter in network.named_parameters():
        idle = name.startswith(("decoders.0.", "decoders.2."))
        assert (parameter.grad is None) == idle, name
        assert idle or parameter.grad.any(), name  # type: ignore[union-attr]


def test_decoders_share_nothing() -> None:
    network = build(VARIANTS["decoders"])
    parameters = [{id(p) for p in decoder.parameters()} for decoder in network.decoders]
    assert all(parameters) and not set.intersection(parameters[0], parameters[1] | parameters[2])
    has = [any(isinstance(m, SpatialAttention) for m in decoder.modules()) for decoder in network.decoders]
    assert has == [True, False, True]
    assert [network.width(network.num_blocks(path), path) for path in range(3)] == [24, 16, 8]


# Details -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "decoders"])
def test_a_new_network_predicts_zero(name: str) -> None:
    """Every residual branch, every attention and the last convolution end in zeros."""
    network = LdmUNet(VARIANTS[name]).eval()
    with torch.no_grad():
        assert not run(network, *inputs(network)).any()
        x, time, cond = inputs(network)
        stream = network.embed(x, time, cond)
        for index, block in enumerate(network.blocks[: len(network.input_blocks)]):
            dropped = network.bypass(index, stream.hidden, stream.cond, None)
            kept = block(stream.hidden, stream.cond)
            if isinstance(block, Block) and not hasattr(block[0], "op"):
                assert torch.equal(kept, dropped)
            stream.hidden = kept


def test_images_lie_channels_last_all_the_way() -> None:
    network = build(SMALL)
    stream = network.embed(*inputs(network))
    for index, block in enumerate(network.blocks):
        assert stream.hidden.is_contiguous(memory_format=torch.channels_last), index
        skip = stream.pop() if index in network.pops else None
        stream.hidden = block(stream.hidden, stream.cond, skip)
        if index in network.pushes:
            stream.push()
    assert not stream.skips
    assert stream.hidden.is_contiguous(memory_format=torch.channels_last)
    assert network.readout(stream.hidden, stream.cond, len(network.blocks)).is_contiguous()


def test_group_norm_computes_in_fp32() -> None:
    norm = GroupNorm(4, 8)
    assert norm.eps == 1e-5
    x = 100 + keys.normal(1, "x", torch.arange(2), 0, (8, 4, 4))
    for dtype in (torch.bfloat16, torch.float16):
        half = norm(x.to(dtype))
        assert half.dtype == dtype
        assert torch.equal(half, norm(x.to(dtype).float()).to(dtype))
    double = copy.deepcopy(norm).double()
    assert torch.allclose(double(x.double()), F.group_norm(x.double(), 4), atol=1e-12, rtol=0)


def test_what_remains_of_a_dropped_block() -> None:
    network = build(SMALL)
    stream = network.embed(*inputs(network))
    assert torch.equal(network.bypass(0, stream.hidden, stream.cond, None), stream.hidden)
    down = network.bypass(2, stream.hidden, stream.cond, None)
    assert torch.equal(down, F.avg_pool2d(stream.hidden, 2))
    last = network.output_blocks[-1]
    both = torch.cat([stream.hidden, stream.cond[STEM]], 1)
    assert torch.equal(
        network.bypass(len(network.blocks) - 1, stream.hidden, stream.cond, None), last[0].skip_connection(both)
    )
    first_up = next(i for i, block in enumerate(network.output_blocks) if hasattr(block[-1], "conv"))
    up = network.output_blocks[first_up]
    hidden, skip = torch.randn(2, 48, 2, 2), torch.randn(2, up[0].in_layers[0].num_channels - 48, 2, 2)
    index = len(network.input_blocks) + first_up
    left = network.bypass(index, hidden, stream.cond, skip)
    wanted = up[0].skip_connection(torch.cat([hidden, skip], 1))
    assert torch.equal(left, wanted.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("part", ["map", "qk", "output"])
def test_parts_of_attention_can_be_kept(part: str) -> None:
    network = build(SMALL)
    attention = network.middle_block[1]
    hidden = keys.normal(3, "hidden", torch.arange(2), 0, (48, 2, 2)).contiguous(memory_format=torch.channels_last)
    slot = Slot(wanted=frozenset({part}))
    with torch.no_grad():
        first = attention(hidden, slot)
        held = dict(slot.stored)
        assert torch.allclose(attention(hidden, Slot(part, frozenset(), held)), first, atol=1e-6)
        other = attention(2 * hidden.flip(0), Slot(part, frozenset(), held))
    assert (other - attention(2 * hidden.flip(0))).abs().max() > 1e-3
    if part == "map":
        assert slot.stored["map"][0].shape == (2, 6, 4, 4)


def test_label_is_added_to_the_time() -> None:
    network = build(VARIANTS["class"])
    x, time, labels = inputs(network)
    stream = network.embed(x, time, labels)
    embedded = network.time_embed(network.time_features(time)) + network.label_emb.weight[labels]
    assert torch.equal(stream.cond[TIME], F.silu(embedded))
    null = network.null_cond(2, torch.device("cpu"))
    assert null is not None and null.tolist() == [5, 5]
    with pytest.raises(UsageError, match="null_class=false"):
        build(VARIANTS["decoders"]).null_cond(2, torch.device("cpu"))
    with pytest.raises(UsageError, match="null condition"):
        build(SMALL).null_cond(2, torch.device("cpu"))


@pytest.mark.parametrize("name", ["class", "shallow"])
def test_every_parameter_learns(name: str) -> None:
    network = build(VARIANTS[name])
    run(network, *inputs(network)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize("name", ["class", "shallow"])
def test_half_precision(name: str) -> None:
    """Under autocast and with the weights cast: close to fp32, and no mixture that fails."""
    network = build(VARIANTS[name])
    x, time, cond = inputs(network)
    with torch.no_grad():
        exact = run(network, x, time, cond)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = run(network, x, time, cond)
        pure = run(network.to(torch.bfloat16), x.bfloat16(), time, cond)
    assert pure.dtype == torch.bfloat16
    for close in (mixed, pure):
        assert (close - exact).abs().max() < 0.1 * exact.abs().max()


def test_dropout_is_inside_the_residual_blocks() -> None:
    network = build(replace(SMALL, dropout=0.5))
    args = inputs(network)
    with torch.no_grad():
        assert torch.equal(run(network, *args), run(build(SMALL), *args))
        network.train()
        assert (run(network, *args) - run(network, *args)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("plain", {"x": torch.zeros(3, 1, 8, 8)}, r"images must be \[n, 3, 8, 8\], got \[3, 1, 8, 8\]"),
        ("plain", {"x": torch.zeros(3, 8, 8)}, r"images must be \[n, 3, 8, 8\], got \[3, 8, 8\]"),
        ("plain", {"time": torch.zeros(())}, r"time must be \[3\], one value per image, got \[\]"),
        ("plain", {"cond": torch.zeros(3, dtype=torch.int64)}, "unconditional, got conditioning of shape"),
        ("class", {"cond": None}, "needs class conditioning, got none"),
        ("class", {"cond": torch.zeros(3)}, r"labels must be integers \[3\], got torch.float32 \[3\]"),
        ("class", {"cond": torch.zeros(2, dtype=torch.int64)}, r"labels must be integers \[3\], got torch.int64 \[2\]"),
    ],
)
def test_bad_inputs(name: str, change: dict[str, Tensor | None], message: str) -> None:
    network = build(VARIANTS[name])
    x, time, cond = inputs(network)
    with pytest.raises(UsageError, match=message):
        network.embed(**{"x": x, "time": time, "cond": cond, **change})  # type: ignore[arg-type]
