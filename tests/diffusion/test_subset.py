"""Some of a run's rows through a network whose embedding already pushes a skip, on paths of their own."""

from __future__ import annotations

import pytest
import torch

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.execution.stream import Rows

from ..contract import build


@pytest.mark.parametrize("name", ["unet-decoders", "unet-shared-middle", "ldm-decoders"])
def test_rows_of_a_subset_that_part_ways_keep_their_own_skips(name: str) -> None:
    network = build(name)
    denoiser = Denoiser(network, VPSDE(VPSDEConfig()))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, network.in_channels, network.image_size, network.image_size, generator=draw)
    subset = torch.tensor([1, 2, 4, 5])
    time = torch.tensor([0.05, 0.9, 0.1, 0.8])
    with torch.no_grad():
        together = denoiser.rows(x[subset], time, None, subset=Rows(6, subset)).prediction
        for place, row in enumerate(subset.tolist()):
            alone = denoiser.rows(x[row : row + 1], time[place : place + 1], None).prediction
            torch.testing.assert_close(together[place : place + 1], alone, rtol=1e-5, atol=1e-5)
