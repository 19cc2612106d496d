"""Cosines of gradients against gradients taken one by one."""

import pytest
import torch

from gearshift.data.dataset import ImageDataset
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.stages import affinity
from gearshift.stages.affinity import affinities

from ..toys import Isotropic

TIMES = torch.tensor([0.05, 0.1, 0.5, 0.95], dtype=torch.float64)


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return Denoiser(Isotropic(depth=2), VPSDE(VPSDEConfig()))


@pytest.fixture
def data(denoiser):
    network = denoiser.network
    shape = (network.in_channels, network.image_size, network.image_size)
    images = keys.integers(0, "image", torch.arange(30), 0, 256, shape).to(torch.uint8)
    return ImageDataset(images, torch.arange(30) % 3, 3, ("a", "b", "c"), "toy", "train", "toy", "made")


def gradient(denoiser, data, time, number, batch, seed=0):
    slot = torch.arange(batch)
    chosen = keys.integers(seed, "stages: gradient image", slot, number, len(data))
    images, labels = data.gather(chosen)
    noise = keys.normal(seed, "stages: gradient noise", slot, number, tuple(images.shape[1:]))
    at = torch.full((batch,), float(time), dtype=torch.float64)
    predicted = denoiser.rows(denoiser.process.add_noise(images, noise, at), at, labels).prediction
    loss = (predicted - noise).square().sum()  # a factor of the loss changes no cosine
    gradients = torch.autograd.grad(loss, list(denoiser.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def test_cosines_of_gradients(denoiser, data):
    denoiser.train()
    denoiser.network.requires_grad_(False)  # as a loaded run is
    done = []
    found = affinities(denoiser, data, TIMES, batch=6, rounds=2, done=done.append)
    assert denoiser.network.training and not any(p.requires_grad for p in denoiser.network.parameters())
    assert len(done) == 8
    denoiser.eval().requires_grad_(True)
    expected = torch.zeros(4, 4)
    for number in range(2):
        each = torch.stack([gradient(denoiser, data, time, number, 6) for time in TIMES])
        expected += torch.nn.functional.cosine_similarity(each[:, None], each[None], dim=2) / 2
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)
    assert found[0, 1] > found[0, 3]


def test_long_gradients_are_folded_and_keep_their_angles(monkeypatch):
    monkeypatch.setattr(affinity, "_WIDTH", 1 << 14)
    one = keys.normal(0, "one", torch.arange(3), 0, (30_000,))
    two = 0.6 * one + 0.8 * keys.normal(0, "two", torch.arange(3), 0, (30_000,))
    split = [tuple(part.split([1, 1, 1])) for part in (one, two)]
    first, second = (affinity._folded(parts, seed=1) for parts in split)
    assert first.shape == (1 << 14,)
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=0)
    exact = torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0)
    assert abs(float(cosine - exact)) < 0.03
    # Numbers that fall together are not all added with one sign.
    ones = affinity._folded((torch.ones(3 << 14),), seed=1)
    assert set(ones.tolist()) == {-3.0, -1.0, 1.0, 3.0}


def test_text_is_refused(denoiser, data):
    denoiser.network.cond_kind = "text"
    with pytest.raises(UsageError, match="does not know the text conditions"):
        affinities(denoiser, data, TIMES)
