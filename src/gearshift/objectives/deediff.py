"""DeeDiff's layer-wise, uncertainty-aware objective (arXiv 2309.17074, Eqs. 5-9 of v1).

    L = l_M + lambda * L_u + beta * L_UAL
    l_i   = mean over pixels of (eps_i - eps)^2 at exit i, M the full depth
    L_u   = mean or sum over exits of (u_i - sg[tanh|eps_i - eps|])^2, averaged over pixels
    L_UAL = sum over exits of w_i l_i

The official code and the paper differ in the weights: `normalized` w_i = c_i / sum_j c_j with c = 1 - u averaged over
pixels and batch (code), `paper` w_i = 1 - u_i per sample, `uniform` w_i = 1/M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.execution.plan import StepPlan
from gearshift.objectives.base import Batch, Draws, drop_condition, noised
from gearshift.runtime.errors import UsageError


@dataclass
class DeeDiffConfig:
    """Schema of `DeeDiff`; the defaults are the official code's, but for the scope of the weights.

    Attributes:
        uncertainty_weight: lambda.
        layer_weight: beta.
        layer_reduction: of L_u over exits, mean (code) | sum (paper).
        ual_weighting: normalized (code) | paper | uniform.
        weight_scope: batch (code: certainty averaged over the batch, which couples samples) | sample.
        detach_weight: no gradient from L_UAL into the uncertainty heads (code: False; the un-normalised paper form
            pushes u upwards without end unless it is detached).
        include_final: the full depth is one of the exits of L_u and L_UAL (code: True).
        label_dropout: probability of the null condition.
    """

    uncertainty_weight: float = 1.0
    layer_weight: float = 1.0
    layer_reduction: str = "mean"
    ual_weighting: str = "normalized"
    weight_scope: str = "sample"
    detach_weight: bool = False
    include_final: bool = True
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("layer_reduction", ("mean", "sum")),
            ("ual_weighting", ("normalized", "paper", "uniform")),
            ("weight_scope", ("batch", "sample")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"objective.{name}={getattr(self, name)!r} is not one of {list(allowed)}")


class DeeDiff:
    """The objective over every exit of the network."""

    Config = DeeDiffConfig
    may_leave_unused = False

    def __init__(self, config: DeeDiffConfig) -> None:
        self.config = config

    def check(self, network: Backbone) -> None:
        """Raises UsageError where the network has no exits or no uncertainty heads, or several paths."""
        if not network.has_uncertainty:
            raise UsageError(
                f"objective DeeDiff needs uncertainty heads, and this {network.name} has none; "
                "set exits.uncertainty=pixel_map (official code) or token_mean (paper), or objective=simple"
            )
        if len(network.paths) > 1:
            raise UsageError(
                f"objective DeeDiff needs one path through the network; {network.name} has {len(network.paths)}"
            )
        if len(network.exits()) < 2:
            raise UsageError(
                f"objective DeeDiff needs exits before the full depth; {network.name} has only {list(network.exits())}"
            )
        if self.config.label_dropout > 0 and network.cond_kind != "none":
            network.null_cond(1, next(network.parameters()).device)

    def loss(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Terms: `loss`, and `simple`, `uncertainty`, `layers` before their weights."""
        time, noise, noisy = noised(denoiser, batch, draws)
        cond = drop_condition(denoiser.network, batch.cond, draws, self.config.label_dropout)
        exits = denoiser.network.exits()
        outputs = denoiser.rows(noisy, time, cond, StepPlan(taps=exits))
        predictions = torch.stack([outputs.taps[depth] for depth in exits])[:, :, : noise.shape[1]].float()
        uncertainties = torch.stack([outputs.uncertainty[depth] for depth in exits])
        return self.terms(predictions, uncertainties, noise)

    def terms(self, predictions: Tensor, uncertainties: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The closed form.

        Args:
            predictions: eps at every exit [M, B, C, H, W], the full depth last.
            uncertainties: in [0, 1], maps [M, B, C, H, W] or one number per row [M, B].
            noise: [B, C, H, W].
        """
        error = predictions - noise
        per_exit = error.square().flatten(2).mean(2)  # l_i, [M, B]
        simple = per_exit[-1].mean()
        if not self.config.include_final:
            error, per_exit, uncertainties = error[:-1], per_exit[:-1], uncertainties[:-1]
        target = error.detach().abs().tanh()
        if uncertainties.ndim == 2:
            target = target.flatten(2).mean(2)
            mean_uncertainty = uncertainties
        else:
            mean_uncertainty = uncertainties.flatten(2).mean(2)  # [M, B]
        fit = (uncertainties - target).square().flatten(1).mean(1)  # per exit
        uncertainty = fit.mean() if self.config.layer_reduction == "mean" else fit.sum()
        layers = (self._weights(mean_uncertainty) * per_exit).sum(0).mean()
        loss = simple + self.config.uncertainty_weight * uncertainty + self.config.layer_weight * layers
        return {
            "loss": loss,
            "simple": simple.detach(),
            "uncertainty": uncertainty.detach(),
            "layers": layers.detach(),
        }

    def _weights(self, mean_uncertainty: Tensor) -> Tensor:
        """w_i, [M, B], from the mean uncertainty [M, B]."""
        if self.config.ual_weighting == "uniform":
            return torch.full_like(mean_uncertainty, 1 / len(mean_uncertainty))
        certainty = 1 - mean_uncertainty
        if self.config.weight_scope == "batch":
            certainty = certainty.mean(1, keepdim=True).expand_as(certainty)
        if self.config.detach_weight:
            certainty = certainty.detach()
        return certainty if self.config.ual_weighting == "paper" else certainty / certainty.sum(0)
