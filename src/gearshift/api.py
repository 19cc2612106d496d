"""From Python: `gearshift.load(run).sample(n, policy=...)`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from omegaconf import DictConfig

from gearshift.assembly import build_denoiser, build_policy, build_solver, device_of, dtype_of
from gearshift.backbones.null_context import NullContext
from gearshift.backbones.separate import SeparateConfig, SeparateNetworks
from gearshift.backbones.weights import load_strict
from gearshift.data.decoding import ToPixels
from gearshift.data.latents import Latents
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.solvers.base import Solver
from gearshift.evaluation.conditions import is_compiled
from gearshift.evaluation.prompting import find_prompts
from gearshift.execution.compiling import compile_blocks
from gearshift.policies.base import Policy
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError, UserError
from gearshift.runtime.run import RunFolder, refuse_pipeline
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Sampler, Samples, sample
from gearshift.sampling.prompts import Prompts

if TYPE_CHECKING:
    from gearshift.integrations.diffusers.loaded import LoadedPipeline

PolicyLike = Policy | DictConfig | Mapping[str, Any] | str
SolverLike = Solver | DictConfig | Mapping[str, Any] | str


@dataclass(frozen=True)
class LoadedRun:
    """A run with its weights in memory.

    Attributes:
        ema: whether they are the averaged ones.
    """

    folder: RunFolder
    config: DictConfig
    denoiser: Denoiser
    ema: bool = True
    # Runs that policies named, and networks side by side with this one's: loaded once, whoever asks.
    _others: dict[Path, Denoiser] = field(default_factory=dict, repr=False, compare=False)
    _beside: dict[tuple[Path, ...], Denoiser] = field(default_factory=dict, repr=False, compare=False)

    def sampler(
        self, policy: PolicyLike = "full", solver: SolverLike = "ddim", precision: str = "fp32", **settings: Any
    ) -> Sampler:
        """A `Sampler` of this run, checked. `settings` are the fields of `Sampler` (seed, guidance, labels, chunk).

        Runs that take text need `prompts`: what `prompts` gives, or what it takes. Further runs that the policy names
        (`Policy.others`) are loaded as this one was.
        """
        given = settings.get("prompts")
        if given is not None and not isinstance(given, Prompts):
            settings["prompts"] = self.prompts(given)
        if given is None and self.denoiser.network.cond_kind == "text":
            raise UsageError(
                f"{self.folder.path} is conditioned on text; give prompts=FILE (a prompt per line), prompts=data "
                "(captions it was trained on) or prompts=FOLDER (others, as gearshift encode left them)"
            )
        own = build_policy(policy)
        denoiser = self.beside(own.others())
        made = Sampler(denoiser, build_solver(solver), own, dtype=dtype_of(precision), **settings)
        made.check()
        settled = made.policy.resolved(made.info(made.calls()))
        return made if settled is made.policy else replace(made, policy=settled)

    def beside(self, others: Sequence[str]) -> Denoiser:
        """The denoiser whose networks are this run's (full compute) and those of the run folders `others`, as paths 0,
        1, ...; this run's own denoiser where there are none.

        Raises:
            UsageError, RunError: no such run, a pipeline, or one that does not go together with this one.
        """
        folders = tuple(Path(other).resolve() for other in others)
        if not folders:
            return self.denoiser
        if folders not in self._beside:
            for named, folder in zip(others, folders, strict=True):
                if folder not in self._others:
                    self._others[folder] = self._other(named, folder)
            found = {named: self._others[folder] for named, folder in zip(others, folders, strict=True)}
            self._beside[folders] = side_by_side(self.denoiser, f"run={self.folder.path}", found)
        return self._beside[folders]

    def _other(self, named: str, folder: Path) -> Denoiser:
        if folder == self.folder.path.resolve():
            return self.denoiser
        network = self.denoiser.network
        device = next(network.parameters()).device
        path = other_run(named).path
        return load_run(path, ema=self.ema, device=str(device), compile=is_compiled(network)).denoiser

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
        for denoiser in {id(one): one for one in (self.denoiser, *self._others.values())}.values():
            compile_blocks(denoiser.network, mode)
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
            policy, solver: an object, a configuration node, or the name of a file under conf/policy or conf/solver; a
                policy also by the path of its file (.yaml).
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
    return LoadedRun(folder, cfg, denoiser, ema)


# Several networks ----------------------------------------------------------------------------------------------------


def other_run(named: str) -> RunFolder:
    """The folder of a run whose network a policy names. Raises UsageError or RunError where it is none of ours."""
    try:
        folder = RunFolder.open(named)
        refuse_pipeline(folder.config)
    except UserError as error:
        raise type(error)(f"the other network that the policy names: {error}") from error
    return folder


def side_by_side(denoiser: Denoiser, name: str, others: Mapping[str, Denoiser]) -> Denoiser:
    """One denoiser of the networks of several runs, each a path: that of `denoiser` first, then `others` in order.

    The modules are shared, not copied. Rows that no plan routes take path 0, so full compute is `denoiser`'s own.

    Args:
        name: of the first, for messages.
        others: by run folder.

    Raises:
        UsageError: another process, images, conditioning or prediction, or a network of several paths.
    """
    network = denoiser.network
    for named, other in others.items():
        pair = f"{name} and the other network's run {named} do not go together"
        ours, theirs = (_process(one) for one in (denoiser, other))
        if ours != theirs:
            raise UsageError(f"{pair}: the processes are {ours} and {theirs}; train both on one")
        if network.in_channels == other.network.in_channels and network.out_channels != other.network.out_channels:
            says = ["a variance" if one.out_channels > one.in_channels else "none" for one in (network, other.network)]
            raise UsageError(
                f"{pair}: they predict {' and '.join(says)} ({network.out_channels} and {other.network.out_channels} "
                f"channels of {network.in_channels}); train both alike"
            )
        try:
            SeparateNetworks(SeparateConfig([network, other.network], None))
        except UsageError as error:
            raise UsageError(f"{pair} (as networks.0 and networks.1): {error}") from error
    networks = [network, *(other.network for other in others.values())]
    joined = Denoiser(SeparateNetworks(SeparateConfig(networks, None)), denoiser.process)
    return joined.train(denoiser.training)


def _process(denoiser: Denoiser) -> str:
    """A process as messages show it; equal for processes that are the same."""
    config = getattr(denoiser.process, "config", None)
    return type(denoiser.process).__name__ if config is None else str(config)
