"""Exit heads and uncertainty heads."""

from __future__ import annotations

import pytest
import torch

from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.runtime.errors import UsageError

from ..contract import Subject, build, plain_loop
from ..toys import Isotropic, LongSkips, TwoDecoders


def wrap(backbone=None, **config) -> EarlyExit:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return EarlyExit(ExitsConfig(**config), backbone or Isotropic())


def hidden_states(network: EarlyExit, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(rows, network.in_channels, network.image_size, network.image_size)
    time = torch.rand(rows) * 900
    cond = torch.arange(rows) if network.cond_kind == "class" else None
    stream = network.embed(x, time, cond)
    return stream.hidden, time, stream.cond


def test_heads_change_nothing_of_the_backbone() -> None:
    plain = Isotropic()
    network = wrap(plain)
    assert {f"backbone.{k}" for k in plain.state_dict()} < set(network.state_dict())
    s = Subject.of("isotropic")
    wrapped = Subject(s.case, EarlyExit(ExitsConfig(), s.backbone), 0, s.x, s.time, s.cond)
    for depth in wrapped.exits:
        assert torch.equal(wrapped.run(wrapped.plan(depth=depth)).prediction, plain_loop(s, depth))


def test_parameters_of_the_published_model() -> None:
    """U-ViT-S/2 on 32x32x3: 80,028 for pixel maps (official code); one number per token takes 513 for each exit."""
    with torch.device("meta"):
        backbone = UViT(UViTConfig(image_size=32, in_channels=3, patch_size=2, embed_dim=512, depth=12, num_heads=8))
        extra = {
            name: sum(p.numel() for p in EarlyExit(ExitsConfig(**config), backbone).uncertainty_heads.parameters())
            for name, config in (
                ("map", {}),
                ("mean", {"uncertainty": "token_mean"}),
                ("time", {"time_embed": "concat"}),
                ("none", {"uncertainty": "none"}),
            )
        }
    assert extra == {"map": 80028, "mean": 13 * 513, "time": 13 * (1024 * 12 + 12), "none": 0}


def test_pixel_map_is_a_linear_layer_per_token() -> None:
    network = wrap()
    hidden, time, _ = hidden_states(network)
    u = network.uncertainty(hidden, time, 2)
    assert u.shape == (3, 2, 8, 8) and u.min() > 0 and u.max() < 1
    linear = network.uncertainty_heads["0_2"].linear
    token = torch.sigmoid(hidden[1, 6] @ linear.weight.T + linear.bias)  # token 6: row 1, column 2 of 4 x 4
    wanted = token.reshape(2, 2, 2).permute(2, 0, 1)  # (p1, p2, C) to (C, p1, p2)
    torch.testing.assert_close(u[1, :, 2:4, 4:6], wanted)


def test_token_mean_is_one_number_per_row() -> None:
    network = wrap(uncertainty="token_mean")
    hidden, time, _ = hidden_states(network)
    linear = network.uncertainty_heads["0_1"].linear
    wanted = torch.sigmoid(hidden @ linear.weight.T + linear.bias)[..., 0].mean(1)
    torch.testing.assert_close(network.uncertainty(hidden, time, 1), wanted)


def test_concatenated_time_is_the_product_written_in_one() -> None:
    network = wrap(time_embed="concat")
    hidden, time, _ = hidden_states(network)
    linear = network.uncertainty_heads["0_3"].linear
    features = network.time_features(time)[:, None].expand(-1, hidden.shape[1], -1)
    wanted = torch.sigmoid(torch.cat([hidden, features], -1) @ linear.weight.T + linear.bias)
    torch.testing.assert_close(network.uncertainty(hidden, time, 3), network.assemble(wanted, 2, 3))
    assert not torch.equal(network.uncertainty(hidden, time, 3), network.uncertainty(hidden, time + 50, 3))


@pytest.mark.parametrize("detach", [True, False])
def test_detach_input_cuts_the_backbone_off(detach: bool) -> None:
    network = wrap(detach_input=detach)
    hidden, time, _ = hidden_states(network)
    network.uncertainty(hidden, time, 1).sum().backward()
    assert network.uncertainty_heads["0_1"].linear.weight.grad is not None
    assert (network.backbone.position.grad is None) == detach


def test_per_exit_heads_start_as_copies_and_go_their_own_way() -> None:
    network = wrap(head="per_exit", uncertainty="none")
    assert sorted(network.exit_heads) == ["0_1", "0_2", "0_3"]  # the full depth keeps the backbone's own
    hidden, _, cond = hidden_states(network)
    before = [network.readout(hidden, cond, depth) for depth in (1, 2, 4)]
    assert torch.equal(before[0], before[1]) and torch.equal(before[0], before[2])
    with torch.no_grad():
        network.exit_heads["0_2"]["out"].weight.mul_(2)
    assert torch.equal(network.readout(hidden, cond, 1), before[0])
    assert not torch.equal(network.readout(hidden, cond, 2), before[1])
    assert torch.equal(network.readout(hidden, cond, 4), before[2])
    together = network.readouts([hidden] * 3, cond, (1, 2, 4))
    for depth, prediction in zip((1, 2, 4), together, strict=True):
        assert torch.equal(network.readout(hidden, cond, depth), prediction)


def test_heads_of_both_decoders() -> None:
    network = wrap(TwoDecoders())
    assert sorted(network.uncertainty_heads) == ["0_3", "0_4", "0_6", "1_2", "1_3", "1_5", "1_7"]
    assert network.exits(0) == (3, 4, 6) and network.exits(1) == (2, 3, 5, 7)
    assert network.route(torch.tensor([1.0, -1.0])).tolist() == [0, 1]


def test_chosen_depths() -> None:
    assert wrap(depths=[3, 1]).exits() == (1, 3, 4)
    assert wrap(LongSkips()).exits() == (3, 4, 5)
    with pytest.raises(UsageError, match=r"depth 2; LongSkips can be read out at \[3, 4, 5\]"):
        wrap(LongSkips(), depths=[2])
    with pytest.raises(UsageError, match=r"exits.head='own' is not one of \['shared', 'per_exit'\]"):
        ExitsConfig(head="own")


def test_heads_stay_in_full_precision_under_autocast() -> None:
    network = wrap()
    hidden, time, _ = hidden_states(network)
    with torch.autocast("cpu", torch.bfloat16):
        u = network.uncertainty(hidden.bfloat16(), time, 1)
    assert u.dtype == torch.float32
    assert torch.equal(u, network.uncertainty(hidden.bfloat16().float(), time, 1))


def test_a_backbone_without_the_parts_says_so() -> None:
    plain = build("long-skips")
    with pytest.raises(UsageError, match="has none"):
        wrap(plain).null_cond(1, torch.device("cpu"))


@pytest.mark.parametrize("time_embed", ["none", "concat"])
@pytest.mark.parametrize("kind", [Isotropic, LongSkips, TwoDecoders])
def test_mean_uncertainty_is_the_mean_of_the_map(kind: type, time_embed: str) -> None:
    """What exit rules ask for leaves the assembling out; assembling only moves values about."""
    for uncertainty, tolerance in (("pixel_map", 1e-6), ("token_mean", 0.0)):
        network = wrap(kind(), uncertainty=uncertainty, time_embed=time_embed).requires_grad_(False)
        for parameter in network.uncertainty_heads.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        for path in range(len(network.paths)):
            for depth in network.exits(path):
                hidden, time = taps(network, path, depth)
                values = network.uncertainty(hidden, time, depth, path)
                assert values.shape == ((5,) if uncertainty == "token_mean" else (5, *image_shape(network)))
                mean = network.mean_uncertainty(hidden, time, depth, path)
                wanted = values if uncertainty == "token_mean" else values.flatten(1).mean(1)
                torch.testing.assert_close(mean, wanted, rtol=0, atol=tolerance)
                assert len(set(mean.tolist())) == 5


def image_shape(network: EarlyExit) -> tuple[int, int, int]:
    return network.in_channels, network.image_size, network.image_size


def taps(network: EarlyExit, path: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of five rows after `depth` blocks of `path`, and the time they were fed."""
    x, time = torch.randn(5, *image_shape(network)), torch.rand(5) * 900
    stream = network.embed(x, time, torch.arange(5) % 3 if network.cond_kind == "class" else None)
    for block in network.paths[path][:depth]:
        skip = stream.pop() if block in network.pops else None
        stream.hidden = network.blocks[block](stream.hidden, stream.cond, skip)
        if block in network.pushes:
            stream.push()
    return stream.hidden, time
