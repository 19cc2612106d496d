"""Small U-Nets with weights worth comparing, for the tests of the U-Net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gearshift.backbones.exits import EarlyExit, ExitsConfig
from gearshift.backbones.unet import UNet
from gearshift.backbones.unet_config import UNetConfig
from gearshift.execution.executor import execute
from gearshift.execution.outputs import Outputs
from gearshift.execution.plan import FULL, StepPlan

STANDARD = UNetConfig(
    image_size=8, in_channels=2, model_channels=64, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,)
)
PYRAMID = UNetConfig(
    image_size=8,
    in_channels=2,
    model_channels=8,
    channel_mult=(1, 2, 2),
    num_blocks=2,
    attention_resolutions=(4,),
    embedding="fourier",
    encoder="residual",
    resample_filter=(1, 3, 3, 1),
)
STAGED = UNetConfig(
    image_size=8,
    in_channels=2,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    decoders=(12, 8, 4),
    boundaries=(1.0, 5.0),
)


def drawn(config: UNetConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> UNet:
    """A network none of whose weights is tiny or trivial: fresh ones end in 1e-5, and would hide most mistakes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet(config)
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return network.to(dtype).eval()


def with_exits(network: UNet, **settings: Any) -> EarlyExit:
    """Exits behind every decoder level, whose heads are not trivial either."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped = EarlyExit(ExitsConfig(head="per_exit", **settings), network)
        for heads in (wrapped.exit_heads, wrapped.uncertainty_heads):
            for parameter in heads.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return wrapped.eval()


def inputs(config: UNetConfig, rows: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and times."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, config.in_channels, config.image_size, config.image_size, generator=generator).to(dtype)
    scale = 1.0 if config.embedding == "fourier" else 900.0
    return x, (torch.rand(rows, generator=generator) * scale).to(dtype)


def run(
    network: UNet,
    x: Tensor,
    time: Tensor,
    cond: Tensor | None = None,
    augment: Tensor | None = None,
    plan: StepPlan = FULL,
) -> Outputs:
    if augment is None:
        stream = network.embed(x, time, cond)
    else:
        stream = network.embed_augmented(x, time, cond, augment)
    return execute(network, stream, plan)
