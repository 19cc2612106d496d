"""An imported pipeline in memory, as `api.load` gives it: what `api.LoadedRun` is for our own runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig

from gearshift.assembly import build_policy, build_solver, device_of
from gearshift.data.dataset import ImageDataset
from gearshift.integrations.diffusers.compat import compile_repeated
from gearshift.integrations.diffusers.model import PipelineModel, load_pipeline, pipeline_config
from gearshift.integrations.diffusers.sampler import PipelinePixels, PipelineSampler
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.run import RunFolder
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Samples, sample
from gearshift.sampling.prompts import Texts, read_prompts


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline of `diffusers` that was imported, in memory; what `LoadedRun` is for our own runs."""

    folder: RunFolder
    config: DictConfig
    denoiser: PipelineModel

    is_pipeline: ClassVar[bool] = True

    @classmethod
    def open(cls, folder: RunFolder, device: str) -> LoadedPipeline:
        """What is in the folder of an imported pipeline. Raises UsageError where the pipeline is gone."""
        about = pipeline_config(config.plain(folder.config))
        return cls(folder, folder.config, PipelineModel(about, load_pipeline(about, device_of(device))))

    @property
    def takes_text(self) -> bool:
        """Whether images are made from prompts."""
        return self.denoiser.takes == "text"

    def sampler(
        self, policy: Any = "full", solver: Any = "pipeline", precision: str = "fp32", **settings: Any
    ) -> PipelineSampler:
        """A `PipelineSampler`, checked. `settings` are its fields (seed, guidance, chunk, prompts)."""
        given = settings.get("prompts")
        if given is not None and not isinstance(given, Texts):
            settings["prompts"] = self.prompts(given)
        if precision != "fp32":
            raise UsageError(
                f"precision={precision}: a pipeline computes in the type of its weights, "
                f"{self.denoiser.config.dtype}; import it with dtype={precision}"
            )
        own: Any = build_solver(solver)
        made = PipelineSampler(self.denoiser, own, build_policy(policy), **settings)
        made.check()
        settled = made.policy.resolved(made.info(made.calls()))
        return made if settled is made.policy else replace(made, policy=settled)

    def prompts(self, named: str | os.PathLike[str] | Sequence[str], cfg: DictConfig | None = None) -> Texts:
        """Texts: a list, a file with one per line, or "data", the first captions of the data it was imported with.

        Raises:
            UsageError: there are none.
        """
        if not isinstance(named, (str, os.PathLike)):
            return Texts.listed(list(named), "a list of texts")
        if str(named) != "data":
            return Texts.listed(read_prompts(named), Path(named).name)
        source = cfg or self.config
        node = source.get("data")
        data: Any = config.build(node) if node else None
        if not hasattr(data, "stream") or not hasattr(data, "most"):
            raise UsageError(
                f"prompts=data, and {self.folder.path} was imported without data that has captions; give prompts=FILE "
                "(a prompt per line), or import it with data=coco or data=captions"
            )
        stream = data.stream("test")
        return Texts.listed([texts[0] for texts in stream.texts], f"the first captions of {stream.name} test")

    def compile(self, mode: str | None = None) -> LoadedPipeline:
        """This run, the repeated blocks of its denoisers compiled from now on."""
        for name, model in self.denoiser.network.denoisers.items():
            if not compile_repeated(model, mode):
                kind = type(model).__name__
                raise UsageError(f"compile=true: {kind} ({name}) says of no blocks that they repeat; compile=false")
        return self

    def to_pixels(self) -> PipelinePixels:
        """Samples are images already."""
        return PipelinePixels(model=self.denoiser)

    def sample(
        self,
        num_images: int,
        *,
        policy: Any = "full",
        solver: Any = "pipeline",
        start: int = 0,
        **settings: Any,
    ) -> Samples:
        """Images start..start+num_images-1; see `LoadedRun.sample`."""
        made: Any = self.sampler(policy, solver, **settings)
        chunks = list(sample(made, num_images, start=start))
        pixels = self.to_pixels()
        ledger = LedgerData.merge([chunk.ledger for chunk in chunks])
        return Samples(torch.cat([pixels(chunk.images) for chunk in chunks]), None, ledger)


def without_data(model: PipelineModel) -> ImageDataset:
    """Stands for the data that a pipeline was not imported with: nothing to compare with but full compute."""
    factor = int(getattr(model.pipe, "vae_scale_factor", 1) or 1)
    first = next(iter(model.network.denoisers.values()))
    size = first.config.get("sample_size")
    side = int(model.config.call.get("height") or factor * (size if isinstance(size, int) else 64))
    return ImageDataset(
        images_u8=torch.zeros(0, 3, side, side, dtype=torch.uint8),
        labels=None,
        num_classes=None,
        class_names=(),
        name=model.config.pipeline,
        split="none",
        digest="",
        provenance="none: images are compared with those of full compute",
    )
