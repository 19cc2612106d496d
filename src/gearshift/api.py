"""From Python: `gearshift.load(run).sample(n, policy=...)`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from omegaconf import DictConfig

from gearshift.assembly import build_denoiser, build_policy, build_solver, device_of, dtype_of
from gearshift.backbones.null_context import NullContext
from gearshift.backbones.weights import load_strict
from gearshift.data.decoding import ToPixels
from gearshift.data.latents import Latents
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Solver
from gearshift.evaluation.prompting import find_prompts
from gearshift.execution.compiling import compile_blocks
from gearshift.policies.base import Policy
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.run import RunFolder
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Sampler, Samples, sample
from gearshift.sampling.prompts import Prompts

if TYPE_CHECKING:
    from gearshift.integrations.diffusers.loaded import LoadedPipeline

PolicyLike = Policy | DictConfig | Mapping[str, Any] | str
SolverLike = Solver | DictConfig | Mapping[str, Any] | str


@dataclass(frozen=True)
class LoadedRun:
    """A run with its weights in memory."""

    folder: RunFolder
    config: DictConfig
    denoiser: Denoiser

    def sampler(
        self, policy: PolicyLike = "full", solver: SolverLike = "ddim", precision: str = "fp32", **settings: Any
    ) -> Sampler:
        """A `Sampler` of this run, checked. `settings` are the fields of `Sampler` (seed, guidance, labels, chunk).

        Runs that take text need `prompts`: what `prompts` gives, or what it takes.
        """
        given = settings.get("prompts")
        if given is not None and not isinstance(given, Prompts):
            settings["prompts"] = self.prompts(given)
        if given is None and self.denoiser.network.cond_kind == "text":
            raise UsageError(
                f"{self.folder.path} is conditioned on text; give prompts=FILE (a prompt per line), prompts=data "
                "(captions it was trained on) or prompts=FOLDER (others, as gearshift encode left them)"
            )
        made = Sampler(self.denoiser, build_solver(solver), build_policy(policy), dtype=dtype_of(precision), **settings)
        made.check()
        settled = made.policy.resolved(made.info(made.calls()))
        return made if settled is made.policy else replace(made, policy=settled)

    def prompts(self, named: str | os.PathLike[str] | Sequence[str], cfg: DictConfig | None = None) -> Prompts:
        """Texts with their features, for a run that takes text.

        Args:
            named: the texts; a file with one per line; "data" for the first captions of the latents the run was trained
                on; or the folder of others (`gearshift encode`).
            cfg: the run's configuration, where its data lies elsewhere now.

        Raises:
            UsageError, RunError: no such thing, a run that takes no text, or features of another text encoder.
        """
        return find_prompts(self.denoiser.network, self.folder.path, named, cfg or self.config)

    def compile(self, mode: str | None = None) -> LoadedRun:
        """This run, its blocks compiled from now on (`execution.compiling.compile_blocks`)."""
        compile_blocks(self.denoiser.network, mode)
        return self

    is_pipeline: ClassVar[bool] = False

    @property
    def takes_text(self) -> bool:
        """Whether images are made from prompts."""
        return self.denoiser.network.cond_kind == "text"

    def to_pixels(self) -> ToPixels:
        """How samples become images: latents are decoded by the autoencoder that their data set names.

        Raises UsageError or RunError when that autoencoder is not there.
        """
        data = config.build(self.config.data) if self.config.get("data") else None
        device = next(self.denoiser.parameters()).device
        return ToPixels(data.decoder(device) if isinstance(data, Latents) else None)

    def sample(
        self,
        num_images: int,
        *,
        policy: PolicyLike = "full",
        solver: SolverLike = "ddim",
        start: int = 0,
        **settings: Any,
    ) -> Samples:
        """Images start..start+num_images-1.

        Args:
            policy, solver: an object, a configuration node, or the name of a file under conf/policy or conf/solver.
            settings: seed, guidance (w, 1 = off), labels ("uniform", "balanced" or a class), chunk, precision; prompts
                (texts, or as in `prompts`) of a run that takes text, image i showing number i modulo their count.

        Raises:
            UsageError: policy, solver, guidance or labels do not fit the network.
        """
        chunks = list(sample(self.sampler(policy, solver, **settings), num_images, start=start))
        pixels = self.to_pixels()
        labels = None if chunks[0].cond is None else torch.cat([c.cond for c in chunks if c.cond is not None])
        if labels is not None and labels.ndim != 1:  # text, which is no label
            labels = None
        return Samples(
            images=torch.cat([pixels(chunk.images) for chunk in chunks]),
            labels=labels,
            ledger=LedgerData.merge([chunk.ledger for chunk in chunks]),
        )


def load(
    run: str | os.PathLike[str], *, ema: bool = True, device: str = "auto", compile: bool = False
) -> LoadedRun | LoadedPipeline:
    """What is in a run folder: `load_run`, or a pipeline that was imported.

    Raises:
        UsageError, RunError: no run there, no checkpoint yet, one that does not fit, or a pipeline that is gone.
    """
    folder = RunFolder.open(run)
    if not folder.config.get("pipeline"):
        return load_run(run, ema=ema, device=device, compile=compile)
    from gearshift.integrations.diffusers.loaded import LoadedPipeline  # diffusers takes seconds to import

    loaded = LoadedPipeline.open(folder, device)
    return loaded.compile() if compile else loaded


def load_run(
    run: str | os.PathLike[str], *, ema: bool = True, device: str = "auto", compile: bool = False
) -> LoadedRun:
    """The run in the folder `run`, with its averaged weights (`ema`) or the trained ones; `compile` compiles its blocks
    one by one when they are first called.

    Raises:
        UsageError, RunError: no run there, no checkpoint yet, or one that does not fit.
    """
    from gearshift.training.checkpoint import load_weights

    folder = RunFolder.open(run)
    cfg = folder.config
    denoiser = build_denoiser(cfg)
    load_strict(denoiser.network, load_weights(folder, ema=ema), folder.checkpoints)
    null = NullContext.load(folder.path)
    if null is not None:
        denoiser.network.set_null_context(null.features)
    denoiser.eval().requires_grad_(False)
    denoiser.to(device_of(device))
    if compile:
        compile_blocks(denoiser.network)
    return LoadedRun(folder, cfg, denoiser)
