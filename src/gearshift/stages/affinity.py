"""How alike the gradients of a network are at two noise levels: the cosine behind the gradient-affinity split.

Go et al. 2023 (arXiv 2306.00354) average the cosine over the checkpoints of a training; here it is that of one set of
weights, averaged over batches. The split is a baseline of arXiv 2312.09181 (Table 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gearshift.data.dataset import TrainingData
from gearshift.diffusion.denoiser import Denoiser
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.stages.parallel import over_processes

# Gradients longer than this are folded onto it with random signs, which keeps inner products up to 1e-3 of the norms.
_WIDTH = 1 << 20


def affinities(
    denoiser: Denoiser,
    data: TrainingData,
    times: Tensor,
    *,
    batch: int = 64,
    rounds: int = 4,
    seed: int = 0,
    done: Callable[[int], None] | None = None,
) -> Tensor | None:
    """Cosine of the gradients of the noise error at every two of `times` (process times [G]): float64 [G, G].

    Each of `rounds` takes `batch` images and noises, the same ones at all times, at full depth without dropout; the
    cosines are averaged over rounds. A weight of the loss is constant at one time and drops out.

    Collective: processes take every so-many-th pair of time and round; None but on the main process.

    Raises:
        UsageError: the network is conditioned on text, or nothing in it can be trained.
    """
    network = denoiser.network
    if network.cond_kind not in ("none", "class"):
        raise UsageError(f"gradient_affinity does not know the {network.cond_kind} conditions of {network.name}")
    training = network.training
    required = [parameter.requires_grad for parameter in network.parameters()]
    network.eval().requires_grad_(True)
    parameters = list(network.parameters())
    if not parameters:
        raise UsageError(f"{network.name} has no parameters, so it has no gradients; take a trained run")
    device = parameters[0].device
    parts = [(number, place) for number in range(rounds) for place in range(len(times))]

    def work(part: tuple[int, int]) -> Tensor:
        number, place = part
        return _gradient(denoiser, parameters, data, float(times[place]), number, batch, seed).cpu()

    try:
        found = over_processes(work, parts, device, lambda part: done(1) if done is not None else None)
    finally:
        for parameter, was in zip(parameters, required, strict=True):
            parameter.requires_grad_(was)
        network.train(training)
    if found is None:
        return None
    cosine = torch.zeros(len(times), len(times), dtype=torch.float64)
    for number in range(rounds):
        each = torch.stack(found[number * len(times) : (number + 1) * len(times)]).double()
        each = each / each.norm(dim=1, keepdim=True).clamp(min=1e-300)
        cosine += each @ each.T
    return cosine / rounds


def _gradient(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    data: TrainingData,
    time: float,
    number: int,
    batch: int,
    seed: int,
) -> Tensor:
    """Gradient of the mean squared noise error of one batch at one time, folded: float32 [width]."""
    slot = torch.arange(batch)
    taken = data.take(keys.integers(seed, "stages: gradient image", slot, number, len(data)))
    device = parameters[0].device
    clean = taken.floats(
        None if data.noise_shape is None else keys.normal(seed, "stages: latent", slot, number, data.noise_shape)
    ).to(device)
    noise = keys.normal(seed, "stages: gradient noise", slot, number, tuple(clean.shape[1:])).to(device)
    at = torch.full((batch,), time, dtype=torch.float64, device=device)
    cond = taken.labels.to(device) if denoiser.network.cond_kind == "class" and taken.labels is not None else None
    with torch.enable_grad():
        noisy = denoiser.process.add_noise(clean, noise, at)
        predicted = denoiser.rows(noisy, at, cond).prediction[:, : clean.shape[1]]
        loss = (predicted.float() - noise).square().mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return _folded(gradients, seed)


def _folded(gradients: tuple[Tensor | None, ...], seed: int) -> Tensor:
    """The gradients one after another; beyond `_WIDTH` numbers folded with random signs (a count sketch)."""
    present = [(number, gradient) for number, gradient in enumerate(gradients) if gradient is not None]
    length = sum(gradient.numel() for _, gradient in present)
    device = present[0][1].device
    if length <= _WIDTH:
        return torch.cat([gradient.flatten().float() for _, gradient in present])
    folded, place = torch.zeros(_WIDTH, device=device), 0
    for number, gradient in present:
        for turn, piece in enumerate(gradient.flatten().float().split(_WIDTH)):
            index = torch.full((1,), number, dtype=torch.int64, device=device)
            sign = keys.uniform(seed, "stages: sign", index, turn, (len(piece),))[0]
            into = (torch.arange(len(piece), device=device) + place) % _WIDTH
            folded.index_add_(0, into, torch.where(sign < 0.5, -piece, piece))
            place += len(piece)
    return folded
