"""DeeDiff's layer-wise, uncertainty-aware objective (arXiv 2309.17074, Eqs. 5-9 of v1).

    L = l_M + lambda * L_u + beta * L_UAL + gamma * sum over exits of l_i
    l_i   = mean over pixels of (eps_i - eps)^2 at exit i, M the full depth
    L_u   = mean or sum over exits of (u_i - sg[tanh|eps_i - eps|])^2, averaged over pixels and batch
    L_UAL = sum over exits of w_i l_i

The official code and the paper differ in the weights: `normalized` w_i = c_i / sum_j c_j with c = 1 - u averaged over
pixels and batch (code), `paper` w_i = 1 - u_i per sample, `uniform` w_i = 1/M. gamma is 0 in both; the reproduction
that came with DuoDiff (arXiv 2410.09633) tried it. That one also sums L_u over the batch, which is lambda = B here,
takes 1 minus the true error for the weights of the layers, and lets its gradient through: `weight_from` and
`detach_target`.
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
        weight_from: certainty is 1 minus the predicted error (code, paper) | target: 1 minus the true one.
        detach_weight: no gradient from L_UAL through the weights (code: False; the un-normalised paper form pushes u
            upwards without end unless it is detached).
        detach_target: no gradient from L_u, nor from weights of `weight_from: target`, through the true error (code:
            True). Otherwise a head is rewarded for errors beyond 1.1 that grow: (1 - tanh e) e^2 falls there.
        include_final: the full depth is one of the exits of L_u and L_UAL (code: True).
        label_dropout: probability of the null condition.
        unweighted_layers: gamma.
    """

    uncertainty_weight: float = 1.0
    layer_weight: float = 1.0
    layer_reduction: str = "mean"
    ual_weighting: str = "normalized"
    weight_scope: str = "sample"
    detach_weight: bool = False
    include_final: bool = True
    label_dropout: float = 0.0
    weight_from: str = "predicted"
    detach_target: bool = True
    unweighted_layers: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("layer_reduction", ("mean", "sum")),
            ("ual_weighting", ("normalized", "paper", "uniform")),
            ("weight_scope", ("batch", "sample")),
            ("weight_from", ("predicted", "target")),
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
                "take exits=adadiff (official code) or exits=deediff (paper), or objective=simple"
            )
        if self.config.include_final and not network.predicts_error(network.num_blocks()):
            raise UsageError(
                "objective.include_final=true needs an uncertainty head at the full depth, which "
                "exits.points=block_inputs does not have; set objective.include_final=false"
            )
        if len(network.paths) > 1:
            raise UsageError(
                f"objective DeeDiff needs one path through the network; {network.name} has {len(network.paths)}"
            )
        if len(network.exits()) < 2:
            inner: Backbone = getattr(network, "backbone", network)
            own = list(inner.readable(own=True))
            how = f"; exits.head=per_exit gives each of the depths {own} a head of its own" if len(own) > 1 else ""
            raise UsageError(
                f"objective DeeDiff needs exits before the full depth; {network.name} has only {list(network.exits())}"
                + how
            )
        if self.config.label_dropout > 0 and network.cond_kind != "none":
            network.null_cond(1, next(network.parameters()).device)

    def loss(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Terms: `loss`, and `simple`, `uncertainty`, `layers` before their weights."""
        time, noise, noisy = noised(denoiser, batch, draws)
        cond = drop_condition(denoiser.network, batch.cond, draws, self.config.label_dropout)
        exits = denoiser.network.exits()
        outputs = denoiser.rows(noisy, time, cond, StepPlan(taps=exits), augment=batch.augment)
        predictions = torch.stack([outputs.taps[depth] for depth in exits])[:, :, : noise.shape[1]].float()
        uncertainties = torch.stack([outputs.uncertainty[depth] for depth in exits if depth in outputs.uncertainty])
        return self.terms(predictions, uncertainties, noise)

    def terms(self, predictions: Tensor, uncertainties: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The closed form.

        Args:
            predictions: eps at every exit [M, B, C, H, W], the full depth last.
            uncertainties: in [0, 1], maps [M, B, C, H, W] or one number per row [M, B]; M - 1 of them will do without
                `include_final`.
            noise: [B, C, H, W].
        """
        error = predictions - noise
        per_exit = error.square().flatten(2).mean(2)  # l_i, [M, B]
        simple = per_exit[-1].mean()
        if not self.config.include_final:
            error, per_exit = error[:-1], per_exit[:-1]
            uncertainties = uncertainties[: len(per_exit)]
        target = (error.detach() if self.config.detach_target else error).abs().tanh()
        if uncertainties.ndim == 2:
            target = target.flatten(2).mean(2)
            mean_uncertainty = uncertainties
        else:
            mean_uncertainty = uncertainties.flatten(2).mean(2)  # [M, B]
        fit = (uncertainties - target).square().flatten(1).mean(1)  # per exit
        uncertainty = fit.mean() if self.config.layer_reduction == "mean" else fit.sum()
        if self.config.weight_from == "target":
            mean_uncertainty = target if target.ndim == 2 else target.flatten(2).mean(2)
        layers = (self._weights(mean_uncertainty) * per_exit).sum(0).mean()
        loss = simple + self.config.uncertainty_weight * uncertainty + self.config.layer_weight * layers
        if self.config.unweighted_layers:
            loss = loss + self.config.unweighted_layers * per_exit.sum(0).mean()
        return {
            "loss": loss,
            "simple": simple.detach(),
            "uncertainty": uncertainty.detach(),
            "layers": layers.detach(),
        }

    def _weights(self, mean_uncertainty: Tensor) -> Tensor:
        """w_i, [M, B], from the mean uncertainty or true error [M, B]."""
        if self.config.ual_weighting == "uniform":
            return torch.full_like(mean_uncertainty, 1 / len(mean_uncertainty))
        certainty = 1 - mean_uncertainty
        if self.config.weight_scope == "batch":
            certainty = certainty.mean(1, keepdim=True).expand_as(certainty)
        if self.config.detach_weight:
            certainty = certainty.detach()
        return certainty if self.config.ual_weighting == "paper" else certainty / certainty.sum(0)
