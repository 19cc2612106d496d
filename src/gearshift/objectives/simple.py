"""The plain noise-prediction loss (DDPM, arXiv 2006.11239, Eq. 14), weighted by the process."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.objectives.base import Batch, Draws, drop_condition, noised


@dataclass
class SimpleConfig:
    """Schema of `Simple`. `label_dropout`: probability of the null condition."""

    label_dropout: float = 0.0


class Simple:
    """mean ||eps_hat - eps||^2 at a random noise level."""

    Config = SimpleConfig
    may_leave_unused = True  # uncertainty heads, where there are any

    def __init__(self, config: SimpleConfig) -> None:
        self.config = config

    def check(self, network: Backbone) -> None:
        if self.config.label_dropout > 0 and network.cond_kind != "none":
            network.null_cond(1, next(network.parameters()).device)

    def loss(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Terms: `loss`."""
        time, noise, noisy = noised(denoiser, batch, draws)
        cond = drop_condition(denoiser.network, batch.cond, draws, self.config.label_dropout)
        predicted = denoiser.rows(noisy, time, cond).prediction[:, : noise.shape[1]].float()
        per_sample = (predicted - noise).square().flatten(1).mean(1)
        return {"loss": (denoiser.process.loss_weight(time).to(per_sample) * per_sample).mean()}
