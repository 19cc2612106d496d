"""The plain noise-prediction loss (DDPM, arXiv 2006.11239, Eq. 14), weighted by the process.

Networks that also predict a variance learn it from the variational bound, added with weight 1 (DiT, arXiv 2212.09748).
On the EDM process, whose weight makes it the error of F, this is the loss of EDM (arXiv 2206.00364, eq. 8).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.objectives.base import Batch, Draws, drop_condition, noised
from gearshift.objectives.variational import noise_losses
from gearshift.runtime.errors import UsageError

REDUCTIONS = ("mean", "sum")


@dataclass
class SimpleConfig:
    """Schema of `Simple`.

    Attributes:
        label_dropout: probability of the null condition.
        reduction: over pixels and channels, mean or sum (what official EDM computes and logs: C * H * W times as much).
            Over the batch it is the mean in both. AdamW does not see the difference; clip_norm does.
    """

    label_dropout: float = 0.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_reduction(self.reduction)


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
        output = denoiser.rows(noisy, time, cond, augment=batch.augment).prediction
        squared, bound = reduced(
            noise_losses(denoiser.process, time, batch.images, noise, output), self.config.reduction, batch.images
        )
        return weighted(denoiser.process.loss_weight(time), squared, bound)


def check_reduction(reduction: str) -> None:
    """Raises UsageError unless it is one of `REDUCTIONS`."""
    if reduction not in REDUCTIONS:
        raise UsageError(f"objective.reduction={reduction!r} is not one of {list(REDUCTIONS)}")


def reduced(losses: tuple[Tensor, Tensor | None], reduction: str, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Squared error and bound [B], which are means over the values of an image, as `reduction` wants them."""
    if reduction == "mean":
        return losses
    squared, bound = losses
    values = images[0].numel()
    return squared * values, None if bound is None else bound * values


def per_sample(weight: Tensor, squared: Tensor, bound: Tensor | None) -> Tensor:
    """weight times the sum of both parts, [B]."""
    return weight.to(squared) * (squared if bound is None else squared + bound)


def weighted(weight: Tensor, squared: Tensor, bound: Tensor | None) -> dict[str, Tensor]:
    """Terms `loss`, the mean over the batch of weight [B] times the sum of both parts, and the parts by themselves."""
    loss = per_sample(weight, squared, bound).mean()
    return (
        {"loss": loss}
        if bound is None
        else {"loss": loss, "mse": squared.detach().mean(), "vlb": bound.detach().mean()}
    )
