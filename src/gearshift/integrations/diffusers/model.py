"""A pipeline that was loaded to be evaluated: its denoisers as a network, what its calls cost, how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gearshift.diffusion.solvers.base import Call
from gearshift.execution.cost import CostTable
from gearshift.integrations.diffusers.attach import Attached, network_of
from gearshift.integrations.diffusers.costs import measure
from gearshift.integrations.diffusers.levels import meaning, timeline
from gearshift.integrations.diffusers.record import Generation
from gearshift.integrations.diffusers.replay import Listed
from gearshift.integrations.diffusers.scheduler import PipelineSolver, PipelineSolverConfig
from gearshift.policies import Full, Policy
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline is.

    Attributes:
        pipeline: a folder, or an id on the hub.
        revision, variant: of the hub's files.
        dtype: of the weights: fp32, bf16 or fp16.
        call: further arguments of every call (height, width, negative_prompt, ...).
    """

    pipeline: str
    revision: str | None = None
    variant: str | None = None
    dtype: str = "fp32"
    call: dict[str, Any] = field(default_factory=dict)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(config: PipelineConfig, device: torch.device | str = "cpu") -> Any:
    """The pipeline on a device, in evaluation mode.

    Raises:
        UsageError: nothing of that name can be loaded, or the type is unknown.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import is_accelerate_available

    if config.dtype not in DTYPES:
        raise UsageError(f"dtype={config.dtype} of a pipeline is not one of {', '.join(DTYPES)}")
    more: dict[str, Any] = {n: getattr(config, n) for n in ("revision", "variant") if getattr(config, n) is not None}
    try:
        more["low_cpu_mem_usage"] = is_accelerate_available()  # elsewhere the library warns that it cannot
        pipe = DiffusionPipeline.from_pretrained(config.pipeline, dtype=DTYPES[config.dtype], **more)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"pipeline={config.pipeline} is no folder that a pipeline was saved to, and cannot be fetched from the hub "
            f"({reason[:300]})"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


IMAGES = ("image", "control_image", "mask_image")
"""Arguments that are images, and may be given as files."""


class Enough(Exception):
    """Ends a generation whose images nobody will look at."""


@dataclass(frozen=True)
class Asked:
    """What a generation is asked for: image i with prompt or label i and noise of its own."""

    seeds: Sequence[int]
    texts: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    guidance: float | None = None

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class PipelineProcess:
    """What stands where our own runs have a process: it knows the calls of a pipeline."""

    config: PipelineConfig
    pipeline_calls: Callable[[PipelineSolver], tuple[Call, ...]] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.config.pipeline


class PipelineModel:
    """A pipeline with what is known of it.

    Args:
        config: what it is.
        pipe: as `load_pipeline` gives it.

    Attributes:
        network: its denoisers, as policies see them.
        process: knows its calls.

    Raises:
        UsageError: it has no denoiser or needs more than prompts (an image) that `call` does not give.
    """

    def __init__(self, config: PipelineConfig, pipe: Any) -> None:
        self.config, self.pipe = config, pipe
        self.network = network_of(pipe)
        others = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self.network.beside = {name: part for name, part in others.items() if name not in self.network.denoisers}
        self.attached = self._attach(Full())
        self.process = PipelineProcess(config, self._calls)
        self._parameters_of_call = inspect.signature(type(pipe).__call__).parameters
        self._own_scheduler = pipe.scheduler
        self._known_calls: dict[str, tuple[Call, ...]] = {}
        self._branches: dict[float | None, int] = {}
        self._scheduler_made: tuple[str, str] | None = None
        self._example: Asked | None = None
        self.table: CostTable | None = None
        self.latent_shape: tuple[int, ...] = ()
        self.image_shape: tuple[int, ...] = ()
        missing = [
            name
            for name, parameter in self._parameters_of_call.items()
            if name not in ("self", "prompt", "class_labels", *config.call)
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and (parameter.default is parameter.empty or name in IMAGES)
        ]
        if missing:
            raise UsageError(
                f"{type(pipe).__name__} takes {', '.join(missing)} beside prompts; name it by +call.{missing[0]}=FILE"
                ", the same for all images"
            )

    @property
    def outputs(self) -> dict[int, Any]:
        """What each denoiser returns, on the meta device."""
        return self.attached.outputs

    @property
    def helper_outputs(self) -> dict[int, Any]:
        """The same of the models beside them."""
        return self.attached.helper_outputs

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return DTYPES[self.config.dtype]

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    @property
    def takes(self) -> str:
        """What images are made from: "text", "class" or "none"."""
        if "prompt" in self._parameters_of_call:
            return "text"
        return "class" if "class_labels" in self._parameters_of_call else "none"

    @property
    def num_classes(self) -> int:
        first = next(iter(self.network.denoisers.values()))
        return int(first.config.get("num_embeds_ada_norm") or 1000)

    # Calling ---------------------------------------------------------------------------------------------------------

    def run(
        self,
        asked: Asked,
        solver: PipelineSolver,
        policy: Policy,
        *,
        until: Callable[[Generation, Tensor], bool] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> tuple[Any, Generation]:
        """Generate under a policy; the pipeline's output and the ledger.

        Args:
            until: looked at after each step, with the latents; the generation ends where it says so, without output.
        """
        self._use(solver, policy)
        handle = self.attached
        handle.table = self.table

        def stepped(record: Generation, latents: Tensor) -> None:
            if on_step is not None:
                on_step()
            if until is not None and until(record, latents):
                raise Enough

        handle.on_step = stepped
        output = None
        try:
            with torch.inference_mode():
                output = self.pipe(**self._arguments(asked, solver.config.steps))
        except Enough:
            pass
        finally:
            handle.on_step = None
        return output, handle.ledger

    def _arguments(self, asked: Asked, steps: int) -> dict[str, Any]:
        known = self._parameters_of_call
        given: dict[str, Any] = {}
        for name, value in self.config.call.items():
            given[name] = [self._picture(value)] * len(asked) if name in IMAGES and isinstance(value, str) else value
        given["num_inference_steps"] = steps
        given["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in asked.seeds]
        if "output_type" in known:
            given["output_type"] = "pt" if "callback_on_step_end" in known or "prompt" in known else "np"
        if asked.texts is not None:
            given["prompt"] = list(asked.texts)
        elif asked.labels is not None:
            given["class_labels"] = list(asked.labels)
        elif "batch_size" in known:
            given["batch_size"] = len(asked)
        if asked.guidance is not None and "guidance_scale" in known:
            given["guidance_scale"] = asked.guidance
        return given

    def _picture(self, where: str) -> Any:
        from diffusers.utils import load_image

        try:
            return load_image(where)
        except (OSError, ValueError) as error:
            raise UsageError(f"call names the image {where}, which cannot be read ({error})") from error

    def _use(self, solver: PipelineSolver, policy: Policy) -> None:
        """Put a scheduler and a policy on the pipeline, unless they are there."""
        wanted = repr(solver.config.scheduler), repr(sorted(solver.config.options.items()))
        if self._scheduler_made != wanted:
            self.attached.detach()
            self.pipe.scheduler = solver.build(self._own_scheduler)
            self._scheduler_made = wanted
            self.attached = self._attach(policy)
        elif policy is not self.attached.policy:
            # Schedules that a search tries need the same places inside of the model, one after the other.
            self.attached.exchange(policy, stay=isinstance(policy, Listed))

    def _attach(self, policy: Policy) -> Attached:
        attached = Attached(self.pipe, policy, self.network)
        attached.tells = False  # reports say what every row saved
        return attached

    def images_of(self, output: Any) -> Tensor:
        """Images fp32 [B, C, H, W] in [-1, 1]; the frames of a video one below the other."""
        images = output[0]
        if isinstance(images, list):
            images = torch.stack(images) if isinstance(images[0], Tensor) else np.stack(images)
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images).movedim(-1, -3)
        images = images.float()
        if images.ndim == 5:  # [B, F, C, H, W]
            images = images.movedim(2, 1).flatten(2, 3)
        found: Tensor = images * 2 - 1
        return found

    def shape_of_images(self) -> tuple[int, ...]:
        """(C, H, W); one image is made in two steps where none was made before."""
        if not self.image_shape:
            output, _ = self.run(self._asked_before(), PipelineSolver(PipelineSolverConfig(steps=2)), Full())
            self.image_shape = tuple(self.images_of(output).shape[1:])
        return self.image_shape

    # What is known before --------------------------------------------------------------------------------------------

    def learn(self, asked: Asked, solver: PipelineSolver) -> None:
        """Make one step, to see how many branches guidance has, what the latents are, and what calls cost."""
        if asked.guidance in self._branches and self.table is not None:
            return
        shapes = []

        def first(record: Generation, latents: Tensor) -> bool:
            shapes.append(tuple(latents.shape))
            return True

        _, record = self.run(asked, _at_least_two(solver), Full(), until=first)
        [shape] = shapes
        self._branches[asked.guidance] = max(1, int(record.full_calls_per_sample))
        self.latent_shape = (shape[0] // record.batch, *shape[1:]) if shape[0] != record.batch else shape[1:]
        if self.table is None:
            seen = dict(record.seen)
            for name, model in self.network.denoisers.items():  # not called yet, and alike
                if name not in seen:
                    seen[name] = replace(next(iter(record.seen.values())), model=model)
            self.table = measure(self.network, seen, list(record.helpers.values()))
            self.network.table = self.table

    def branches(self, guidance: float | None) -> int:
        """Rows per sample."""
        return self._branches[guidance]

    def _calls(self, solver: PipelineSolver) -> tuple[Call, ...]:
        key = repr(solver)
        if key not in self._known_calls:
            found = self._stated_calls(solver)
            if found is None:
                _, record = self.run(self._asked_before(), solver, Full(), until=lambda record, latents: True)
                found = record.calls
            self._known_calls[key] = found
        return self._known_calls[key]

    def _stated_calls(self, solver: PipelineSolver) -> tuple[Call, ...] | None:
        """What the scheduler says by itself; None where that depends on the pipeline: on where it begins, or on the
        size of its images."""
        if "strength" in self._parameters_of_call:
            return None
        scheduler = solver.build(self._own_scheduler)
        try:
            scheduler.set_timesteps(solver.config.steps)
        except (ValueError, TypeError):
            return None
        return timeline(scheduler).calls

    def example(self, asked: Asked) -> None:
        """What to ask for where a call is needed to know more."""
        self._example = asked

    def _asked_before(self) -> Asked:
        if self._example is None:
            raise ValueError("no sampler of this pipeline was checked yet, so nothing says what to ask for")
        return self._example

    def frame(self, solver: PipelineSolver) -> tuple[bool, str]:
        """`sigma_frame` and `held` of `policies.base.RunInfo`."""
        scheduler = solver.build(self._own_scheduler)
        return meaning(scheduler)


def _at_least_two(solver: PipelineSolver) -> PipelineSolver:
    """Some pipelines cannot make one step only."""
    return PipelineSolver(replace(solver.config, steps=max(2, solver.config.steps)))


def pipeline_config(config: Mapping[str, Any]) -> PipelineConfig:
    """From the configuration of a run."""
    names = PipelineConfig.__dataclass_fields__
    return PipelineConfig(**{name: config[name] for name in names if config.get(name) is not None})
