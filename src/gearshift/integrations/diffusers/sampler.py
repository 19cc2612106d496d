"""A pipeline as a sampler: images of an index under a policy, as `sampling.loop.Sampler` gives them of our own runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.data.decoding import ToPixels
from gearshift.data.pixels import to_u8
from gearshift.diffusion.solvers.base import Call
from gearshift.execution.cost import CostTable
from gearshift.execution.memory import Key
from gearshift.execution.outputs import PACK, Packing
from gearshift.integrations.diffusers.model import Asked, PipelineModel
from gearshift.integrations.diffusers.replay import PipelineStepper
from gearshift.integrations.diffusers.scheduler import PipelineSolver
from gearshift.policies.base import Policy, RunInfo
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Chunk, check_labels, chunks_of, labels_of
from gearshift.sampling.prompts import Texts


@dataclass(frozen=True)
class PipelineSampler:
    """Everything that fixes the images of an index; the fields are those of `sampling.loop.Sampler`.

    Every image has noise of its own, drawn on the host by its index. `latents`: give the latents and decode nothing.
    """

    denoiser: PipelineModel
    solver: PipelineSolver
    policy: Policy
    seed: int = 0
    chunk: int = 4
    guidance: float = 1.0
    labels: str | int = "balanced"
    dtype: torch.dtype = torch.float32
    packing: Packing = PACK
    guidance_channels: int | None = None
    guidance_interval: tuple[float, float] | None = None
    prompts: Texts | None = None
    latents: bool = False

    def check(self) -> None:
        """Raises UsageError where solver, policy, guidance or prompts do not fit the pipeline."""
        kind = type(self.denoiser.pipe).__name__
        if self.chunk < 1:
            raise UsageError(f"chunk={self.chunk} images per pass; it must be at least 1")
        if not isinstance(self.solver, PipelineSolver):
            raise UsageError(
                f"{kind} steps with a scheduler of diffusers, and solver {self.solver.name!r} is one of ours; take "
                "solver=pipeline, with solver.scheduler=CLASS for another than its own"
            )
        for name in ("guidance_channels", "guidance_interval"):
            if getattr(self, name) is not None:
                raise UsageError(f"{name}={getattr(self, name)}: {kind} guides by itself; leave it out")
        if self.denoiser.takes == "text" and self.prompts is None:
            raise UsageError(f"{kind} takes text; give prompts=FILE (a prompt per line), or prompts=data")
        if self.denoiser.takes != "text" and self.prompts is not None:
            raise UsageError(f"{kind} takes no text, and prompts were given")
        if self.denoiser.takes == "class":
            check_labels(self.labels, self.denoiser.num_classes, kind)
        self.denoiser.example(self.asked(torch.zeros(1, dtype=torch.int64)))
        self.policy.check(self.info(self.calls()))

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def branches(self) -> int:
        self.denoiser.learn(self.asked(torch.zeros(1, dtype=torch.int64)), self.solver)
        return self.denoiser.branches(self.guidance)

    def calls(self) -> tuple[Call, ...]:
        self.denoiser.example(self.asked(torch.zeros(1, dtype=torch.int64)))
        return self.solver.calls(self.denoiser.process)

    def info(self, calls: tuple[Call, ...], index: Tensor | None = None) -> RunInfo:
        """What a policy is told of a run over the images `index`; None is a whole chunk."""
        batch = self.chunk if index is None else len(index)
        network: Any = self.denoiser.network
        return RunInfo(calls, network, batch, self.branches, *self._frame())

    def _frame(self) -> tuple[bool, str, str]:
        in_sigma_frame, held = self.denoiser.frame(self.solver)
        return in_sigma_frame, self.device.type, held

    def cond(self, index: Tensor) -> Tensor | None:
        """Labels [B] of a pipeline that takes classes, otherwise None."""
        if self.denoiser.takes != "class":
            return None
        return labels_of(self.labels, self.seed, index, self.denoiser.num_classes)

    def asked(self, index: Tensor) -> Asked:
        """What a generation of the images `index` is asked for."""
        index = index.cpu()
        seeds = keys.integers(self.seed, "init_noise", index, 0, 2**31 - 1).tolist()
        labels = self.cond(index)
        texts = None if self.prompts is None else [self.prompts.text(int(i)) for i in index]
        return Asked(seeds, texts, None if labels is None else labels.tolist(), self.guidance)

    def chunks(self, start: int, stop: int) -> list[Tensor]:
        """As of `sampling.loop.Sampler`."""
        return chunks_of(self.chunk, start, stop, self.device)

    def cost_table(self) -> CostTable:
        """What calls cost; one step is made to see what they are called with."""
        self.denoiser.learn(self.asked(torch.zeros(1, dtype=torch.int64)), self.solver)
        return self.denoiser.network.measure_costs()

    def stepper(self, index: Tensor, keys: frozenset[Key]) -> PipelineStepper:
        """Takes `index` through schedules."""
        self.denoiser.learn(self.asked(index[:1]), self.solver)
        return PipelineStepper(self, index, keys)

    def generate(
        self,
        index: Tensor,
        table: CostTable,
        *,
        cond: Tensor | None = None,
        on_call: Callable[[Call], None] | None = None,
        on_prediction: Any = None,
    ) -> Chunk:
        """Images of `index` (int64 [B]), see `sampling.loop.sample_chunk`."""
        calls = self.calls()
        done = [0]
        last: list[Tensor] = []

        def step() -> None:
            if on_call is not None:
                on_call(calls[min(done[0], len(calls) - 1)])
            done[0] += 1

        def enough(record: Any, latents: Tensor) -> bool:
            last[:] = [latents]
            return done[0] >= len(calls)

        asked = self.asked(index)
        until = enough if self.latents else None
        output, record = self.denoiser.run(asked, self.solver, self.policy, until=until, on_step=step)
        images = self.flat(last[0], len(index)) if self.latents else self.denoiser.images_of(output)
        self.denoiser.image_shape = tuple(images.shape[1:])
        return Chunk(index, images, self.cond(index), record.data(), record.record)

    @staticmethod
    def flat(latents: Tensor, batch: int) -> Tensor:
        """Latents fp32 [B, C, H, W]: whatever lies beside height and width is laid into the channels."""
        if len(latents) != batch:  # frames of all samples in a row
            latents = latents.reshape(batch, -1, *latents.shape[1:])
        while latents.ndim > 4:
            latents = latents.flatten(1, 2)
        while latents.ndim < 4:
            latents = latents.unsqueeze(1)
        return latents.float()


@dataclass(frozen=True)
class PipelinePixels(ToPixels):
    """Images of a pipeline are decoded already."""

    model: PipelineModel | None = None

    @property
    def samples_pixels(self) -> bool:
        return False  # plans compare latents, and decode nothing

    def __call__(self, samples: Tensor) -> Tensor:
        return to_u8(samples)

    def shape(self, channels: int, size: int) -> tuple[int, int, int]:
        assert self.model is not None
        found: Any = self.model.shape_of_images()
        return found
