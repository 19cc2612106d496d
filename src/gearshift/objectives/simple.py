"""The plain noise-prediction loss (DDPM, arXiv 2006.11239, Eq. 14), weighted by the process.

Networks that also predict a variance learn it from the variational bound, added with weight 1 (DiT, arXiv 2212.09748).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.objectives.base import Batch, Draws, drop_condition, noised
from gearshift.objectives.variational import noise_losses


@dataclass
class SimpleConfig:
    """Schema of `Simple`. `label_dropout`: probability of the null condition."""

    label_dropout: float = 0.0


class Simple:
    """mean ||eps_hat - eps||^2 at a random noise level, and the bound in bits per dimension of a learned variance."""

    Config = SimpleConfig
    may_leave_unused = True  # uncertainty heads, where there are any

    def __init__(self, config: SimpleConfig) -> None:
        self.config = config

    def check(self, network: Backbone) -> None:
        if self.config.label_dropout > 0 and network.cond_kind != "none":
            network.null_cond(1, next(network.parameters()).device)

    def loss(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Terms: `loss`; of networks with a learned variance also `mse` and `vlb`, its two parts."""
        time, noise, noisy = noised(denoiser, batch, draws)
        cond = drop_condition(denoiser.network, batch.cond, draws, self.config.label_dropout)
        output = denoiser.rows(noisy, time, cond).prediction
        squared, bound = noise_losses(denoiser.process, time, batch.images, noise, output)
        return weighted(denoiser.process.loss_weight(time), squared, bound)


def weighted(weight: Tensor, squared: Tensor, bound: Tensor | None) -> dict[str, Tensor]:
    """Terms `loss`, the mean over the batch of weight [B] times the sum of both parts, and the parts by themselves."""
    if bound is None:
        return {"loss": (weight.to(squared) * squared).mean()}
    loss = (weight.to(squared) * (squared + bound)).mean()
    return {"loss": loss, "mse": squared.detach().mean(), "vlb": bound.detach().mean()}
