"""DiT: parity with an independent reference, the details that released weights depend on, and the contract."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gearshift.backbones.attention import Attention
from gearshift.backbones.base import Backbone
from gearshift.backbones.dit import DiT, DiTConfig
from gearshift.backbones.layers import PatchEmbed, sincos_positions
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.execution.executor import execute
from gearshift.execution.memory import NO_SLOT, Slot
from gearshift.execution.plan import FULL, StepPlan
from gearshift.objectives.base import Batch, Draws, drop_condition
from gearshift.objectives.simple import Simple, SimpleConfig
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.training.ema import Ema

from . import reference_dit

SMALL = DiTConfig(image_size=8, in_channels=3, patch_size=2, embed_dim=32, depth=4, num_heads=4)
VARIANTS = {
    "none": SMALL,
    "class": replace(SMALL, num_classes=1000, null_class=True),
    "no-variance": replace(SMALL, num_classes=5, learned_variance=False),
    "patch-4": replace(SMALL, patch_size=4, in_channels=1, num_classes=5, null_class=True, mlp_ratio=2.0),
}
TIMES = (0.0, 1.0, 123.5, 500.0, 999.0)


def build(config: DiTConfig) -> DiT:
    """A network whose every weight that learns is a fixed function of its place in the state dict."""
    network = DiT(config).eval()
    for position, (_, parameter) in enumerate(network.named_parameters()):
        if parameter.requires_grad:
            parameter.data = 0.1 * keys.normal(7, "weights", torch.tensor([position]), 0, parameter.shape)[0]
    return network


def inputs(network: DiT, rows: int = 5) -> tuple[Tensor, Tensor, Tensor | None]:
    index = torch.arange(rows)
    size = network.image_size
    x = keys.normal(7, "images", index, 0, (network.in_channels, size, size))
    time = torch.tensor(TIMES[:rows])
    if network.cond_kind == "none":
        return x, time, None
    last, null = (network.num_classes or 1) - 1, network.config.label_rows - 1
    return x, time, torch.tensor([0, last, null, 1, 3])[:rows]


def plain(network: Backbone, x: Tensor, time: Tensor, cond: Tensor | None, slot: Slot = NO_SLOT) -> Tensor:
    """The network as the paper draws it, without an executor."""
    stream = network.embed(x, time, cond)
    hidden = stream.hidden
    for block in network.blocks:
        hidden = block(hidden, stream.cond, None, slot)
    return network.readout(hidden, stream.cond, len(network.blocks))


# Parity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_reference_at_every_depth(name: str) -> None:
    """At times 0, 1, 123.5, 500, 999 and labels first, last, null."""
    network = build(VARIANTS[name])
    config = network.config
    x, time, cond = inputs(network)
    with torch.no_grad():
        wanted = reference_dit.dit(network.state_dict(), x, time, cond, config.num_heads, config.patch_size)
        out = execute(network, network.embed(x, time, cond), StepPlan(taps=network.exits()))
        assert network.exits() == tuple(range(1, config.depth + 1)) == tuple(out.taps)
        for depth, image in enumerate(wanted, start=1):
            assert image.shape[1] == network.out_channels == config.in_channels * (1 + config.learned_variance)
            assert (out.taps[depth] - image).abs().max() <= 1e-5, depth
        assert (plain(network, x, time, cond) - wanted[-1]).abs().max() <= 1e-5
    assert wanted[-1].std() > 0.1  # the comparison is not between zeros


def test_every_time_and_label_matters() -> None:
    network = build(VARIANTS["class"])
    x = inputs(network)[0][:1].expand(5, -1, -1, -1)
    with torch.no_grad():
        by_time = plain(network, x, torch.tensor(TIMES), torch.zeros(5, dtype=torch.int64))
        by_label = plain(network, x, torch.zeros(5), torch.tensor([0, 1, 2, 999, 1000]))
    for images in (by_time, by_label):
        apart = torch.cdist(images.flatten(1), images.flatten(1)) + 9 * torch.eye(5)
        assert apart.min() > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_executor_equals_plain_loop_bit_for_bit(name: str) -> None:
    network = build(VARIANTS[name])
    args = inputs(network)
    with torch.no_grad():
        assert torch.equal(execute(network, network.embed(*args), FULL).prediction, plain(network, *args))


def test_truncated_copy_is_an_exit() -> None:
    """Leaving after k blocks is the network with k blocks and the same final layer."""
    network = build(VARIANTS["class"])
    args = inputs(network)
    state = network.state_dict()
    for depth in network.exits():
        short = DiT(replace(VARIANTS["class"], depth=depth))
        short.load_state_dict({name: state[name] for name in short.state_dict()})
        with torch.no_grad():
            left = execute(network, network.embed(*args), StepPlan(depth=depth)).prediction
            assert torch.equal(left, plain(short, *args))


def test_rows_at_different_depths_share_one_readout(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(VARIANTS["class"])
    args = inputs(network)
    depths = torch.tensor([1, 4, 2, 3, 1])
    calls: list[int] = []
    read = DiT.readout
    monkeypatch.setattr(DiT, "readout", lambda *a, **k: (calls.append(len(a[1])), read(*a, **k))[1])
    with torch.no_grad():
        out = execute(network, network.embed(*args), StepPlan(depth=depths))
        assert calls == [5]
        for row, depth in enumerate(depths.tolist()):
            alone = [None if value is None else value[row : row + 1] for value in args]
            image = execute(network, network.embed(*alone), StepPlan(depth=depth)).prediction  # type: ignore[arg-type]
            torch.testing.assert_close(out.prediction[row : row + 1], image, rtol=1e-5, atol=1e-5)


def test_batched_readout_equals_single_ones() -> None:
    network = build(VARIANTS["class"])
    stream = network.embed(*inputs(network))
    hiddens = [stream.hidden * factor for factor in (1, 2, 3)]
    for hidden, image in zip(hiddens, network.readouts(hiddens, stream.cond, (1, 2, 4)), strict=True):
        torch.testing.assert_close(network.readout(hidden, stream.cond, 1), image, rtol=0, atol=1e-6)
    assert network.readouts([], stream.cond, ()) == []


def test_copied_readout_is_the_readout() -> None:
    network = build(VARIANTS["class"])
    stream = network.embed(*inputs(network))
    head = copy.deepcopy(network.readout_modules(2))
    own = network.readout(stream.hidden, stream.cond, 2)
    assert torch.equal(network.readout_with(head, stream.hidden, stream.cond, 2), own)
    nn.init.zeros_(head.get_submodule("linear").weight)  # type: ignore[arg-type]  # the copy is its own
    assert not torch.equal(network.readout_with(head, stream.hidden, stream.cond, 2), own)


# Initialisation ------------------------------------------------------------------------------------------------------


def test_a_new_network_predicts_zero_and_its_blocks_do_nothing() -> None:
    network = DiT(VARIANTS["class"])
    stream = network.embed(*inputs(network))
    assert stream.hidden.std() > 0.1
    for block in network.blocks:
        assert torch.equal(block(stream.hidden, stream.cond), stream.hidden)
    assert not plain(network, *inputs(network)).any()


def test_gradient_reaches_only_the_last_linear_first() -> None:
    network = DiT(VARIANTS["class"])
    (plain(network, *inputs(network)) - 1).square().mean().backward()
    reached = {n for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"final_layer.linear.weight", "final_layer.linear.bias"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns_later(name: str) -> None:
    network = build(VARIANTS[name])
    plain(network, *inputs(network)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) != (key == "pos_embed"), key


def test_initialisation() -> None:
    torch.manual_seed(0)
    network = DiT(replace(VARIANTS["class"], embed_dim=256))
    for name, parameter in network.named_parameters():
        if name == "pos_embed":
            continue
        zero = name.endswith("bias") or "adaLN" in name or name.startswith("final_layer")
        assert zero == (not parameter.any()), name
        if zero:
            continue
        rows, fan_in = len(parameter), parameter[0].numel()
        if name.startswith(("t_embedder", "y_embedder")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name
        else:  # Xavier uniform, patches viewed as a matrix
            bound = (6 / (rows + fan_in)) ** 0.5
            assert parameter.abs().max().item() == pytest.approx(bound, rel=0.01), name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


# Positions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "rows", "columns"), [(32, 4, 4), (64, 16, 16), (72, 2, 5)])
def test_positions_are_the_float64_table(width: int, rows: int, columns: int) -> None:
    """Bit for bit against a double-precision table written out token by token; single precision would not be."""
    assert torch.equal(sincos_positions(width, rows, columns), reference_dit.positions(width, rows, columns))


def test_the_column_comes_first() -> None:
    """On a grid of 2 x 5 the first half of the channels tells the column alone, the second the row alone."""
    table = sincos_positions(32, 2, 5).reshape(2, 5, 32)
    assert torch.equal(table[0, :, :16], table[1, :, :16]) and torch.equal(table[:, 0, 16:], table[:, 4, 16:])
    assert len(table[0, :, :16].unique(dim=0)) == 5 and len(table[:, 0, 16:].unique(dim=0)) == 2


def test_tokens_and_positions_run_alike() -> None:
    """Moving the content by one column moves it by one token, to the position whose first half differs."""
    embed = PatchEmbed(2, 1, 32)
    x = torch.zeros(2, 1, 4, 10)
    x[0, 0, 2, 3], x[1, 0, 2, 5] = 1, 1
    tokens = (embed(x) - embed(torch.zeros_like(x))).abs().sum(-1)
    assert tokens.argmax(1).tolist() == [5 + 1, 5 + 2]
    table = sincos_positions(32, 2, 5)[0]
    assert not torch.equal(table[6, :16], table[7, :16]) and torch.equal(table[6, 16:], table[7, 16:])


def test_positions_are_stored_and_never_learn(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from gearshift.training.config import TrainerConfig
    from gearshift.training.optim import make_optimizer

    network = build(VARIANTS["class"])
    assert isinstance(network.pos_embed, nn.Parameter) and "pos_embed" in network.state_dict()
    assert torch.equal(network.pos_embed, sincos_positions(32, 4, 4))
    before = network.pos_embed.clone()
    optimizer = make_optimizer(TrainerConfig(max_steps=3, lr=0.1, weight_decay=0.5), network.parameters())
    ema = Ema(network, 0.5)
    for _ in range(2):
        plain(network, *inputs(network)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    assert network.pos_embed.grad is None
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters())) - 1
    for state in (network.state_dict(), ema.average(), ema.weights()):
        assert torch.equal(state["pos_embed"], before) and not torch.equal(state["blocks.0.attn.qkv.bias"], before)
    with torch.device("meta"):
        empty = DiT(VARIANTS["class"])
    empty.load_state_dict(ema.average(), assign=True)
    assert [n for n, p in empty.named_parameters() if not p.requires_grad] == ["pos_embed"]


# Labels --------------------------------------------------------------------------------------------------------------


def draws(count: int, micro_batch: int = 0) -> Draws:
    return Draws(3, Batch(torch.zeros(count, 1), None, torch.arange(count), micro_batch))


def test_labels_are_dropped_at_the_rate_that_was_asked_for() -> None:
    network, count = build(VARIANTS["class"]), 20_000
    labels = torch.arange(count) % 1000
    dropped = drop_condition(network, labels, draws(count), 0.1)
    assert dropped is not None
    gone = dropped == 1000
    assert torch.equal(dropped[~gone], labels[~gone])
    # Four standard deviations of a binomial draw.
    assert gone.float().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / count) ** 0.5)
    again = drop_condition(network, labels, draws(count, 1), 0.1)
    assert again is not None and not torch.equal(again, dropped)
    assert torch.equal(labels, torch.arange(count) % 1000)


def test_forced_and_forbidden_dropping() -> None:
    network = build(VARIANTS["class"])
    labels = torch.tensor([0, 5, 999])
    every, none = (drop_condition(network, labels, draws(3), p) for p in (1.0, 0.0))
    assert every is not None and every.tolist() == [1000] * 3
    assert none is labels
    null = network.null_cond(3, torch.device("cpu"))
    assert null is not None and torch.equal(null, every)


def test_the_network_itself_never_drops() -> None:
    """Neither in training nor in evaluation: the objective alone does."""
    network = build(VARIANTS["class"])
    args = inputs(network)
    with torch.no_grad():
        assert torch.equal(plain(network.train(), *args), plain(network.eval(), *args))


def test_the_objective_drops_before_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(build(VARIANTS["class"]), Discrete(DiscreteConfig()))
    seen: list[Tensor | None] = []
    embed = DiT.embed
    monkeypatch.setattr(DiT, "embed", lambda *a: (seen.append(a[3]), embed(*a))[1])
    images = keys.normal(7, "images", torch.arange(64), 0, (3, 8, 8))
    batch = Batch(images, torch.zeros(64, dtype=torch.int64), torch.arange(64), 0)
    for rate in (0.25, 0.0):
        Simple(SimpleConfig(label_dropout=rate)).loss(denoiser, batch, Draws(0, batch))["loss"].backward()
    dropped = [int((labels == 1000).sum()) for labels in seen if labels is not None]
    assert 4 <= dropped[0] <= 32 and dropped[1] == 0


def test_null_conditions() -> None:
    cpu = torch.device("cpu")
    assert build(VARIANTS["class"]).null_cond(2, cpu).tolist() == [1000, 1000]  # type: ignore[union-attr]
    assert build(VARIANTS["class"]).y_embedder.embedding_table.weight.shape[0] == 1001
    assert build(VARIANTS["no-variance"]).y_embedder.embedding_table.weight.shape[0] == 5
    with pytest.raises(UsageError, match="null_class=false"):
        build(VARIANTS["no-variance"]).null_cond(2, cpu)
    with pytest.raises(UsageError, match="null condition"):
        build(VARIANTS["none"]).null_cond(2, cpu)


# Details -------------------------------------------------------------------------------------------------------------


def test_time_features_are_the_official_ones() -> None:
    network = build(VARIANTS["none"])
    time = torch.tensor(TIMES)
    assert network.time_width == 256
    assert torch.equal(network.time_features(torch.zeros(1)), torch.tensor([[1.0] * 128 + [0.0] * 128]))
    torch.testing.assert_close(network.time_features(time), reference_dit.time_features(time), rtol=0, atol=1e-7)


def test_norms_and_activations_are_the_official_ones() -> None:
    network = DiT(VARIANTS["class"])
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * 4 + 1
    assert {(norm.eps, norm.elementwise_affine) for norm in norms} == {(1e-6, False)}
    assert {m.approximate for m in network.modules() if isinstance(m, nn.GELU)} == {"tanh"}
    assert all(block.attn.qkv.bias is not None for block in network.blocks)
    assert not list(network.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_width_72_fused_and_explicit(dtype: torch.dtype) -> None:
    """72 is no multiple of 16: the fused operator, the explicit map and PyTorch's plain kernel agree."""
    torch.manual_seed(0)
    attention = Attention(144, 2, qkv_bias=True).to(dtype)
    x = torch.randn(2, 16, 144, dtype=dtype)
    slot = Slot(wanted=frozenset({"map"}))
    with torch.no_grad():
        fused, explicit = attention(x), attention(x, slot)
        with sdpa_kernel(SDPBackend.MATH):
            unfused = attention(x)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for other in (explicit, unfused):
        torch.testing.assert_close(fused, other, rtol=0, atol=tolerance)
    assert fused.float().std() > 0.05


def test_half_precision() -> None:
    """Under autocast and with the weights cast: close to fp32, and no mixture that fails."""
    network = build(VARIANTS["class"])
    x, time, cond = inputs(network)
    with torch.no_grad():
        exact = plain(network, x, time, cond)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = plain(network, x, time, cond)
        pure = plain(network.to(torch.bfloat16), x.bfloat16(), time, cond)
    assert pure.dtype == torch.bfloat16
    for close in (mixed, pure):
        assert (close - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it compiles
def test_a_compiled_block_equals_the_eager_one() -> None:
    """Outputs and gradients, over two numbers of rows."""
    if not any(shutil.which(name) for name in ("g++", "clang++")):
        pytest.skip("no C++ compiler")
    network = build(replace(VARIANTS["class"], depth=1))
    twin = copy.deepcopy(network)
    for block in twin.blocks:
        block.compile(dynamic=True)
    for rows in (5, 3):
        images = [plain(n, *inputs(n, rows)) for n in (network, twin)]
        torch.testing.assert_close(images[1], images[0], rtol=1e-5, atol=1e-5)
        for image in images:
            image.square().mean().backward()
    for (name, own), theirs in zip(network.named_parameters(), twin.parameters(), strict=True):
        if own.requires_grad:
            torch.testing.assert_close(theirs.grad, own.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("none", {"x": torch.zeros(5, 1, 8, 8)}, r"images must be \[n, 3, 8, 8\], got \[5, 1, 8, 8\]"),
        ("none", {"time": torch.zeros(())}, r"time must be \[5\], one value per image, got \[\]"),
        ("none", {"cond": torch.zeros(5, dtype=torch.int64)}, "unconditional, but conditioning was given"),
        ("class", {"cond": None}, "needs class conditioning, got none"),
        ("class", {"cond": torch.zeros(5)}, r"labels must be integers \[5\], got torch.float32 \[5\]"),
    ],
)
def test_bad_inputs(name: str, change: dict[str, Tensor | None], message: str) -> None:
    network = build(VARIANTS[name])
    x, time, cond = inputs(network)
    with pytest.raises(UsageError, match=message):
        network.embed(**{"x": x, "time": time, "cond": cond, **change})  # type: ignore[arg-type]
