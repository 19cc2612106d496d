"""A tiny autoencoder with random weights, as a folder like those of the hub."""

import pytest
import torch


def save_autoencoder(folder, seed=0, **changes):
    """4 latent channels at half the size; the log-variances are spread, so that draws differ from means."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = dict(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        )
        AutoencoderKL(**{**settings, **changes}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="session")
def new_autoencoder():
    return save_autoencoder
