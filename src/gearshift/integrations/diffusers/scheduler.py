"""The scheduler of a pipeline as a solver of our configuration: which class, how many steps.

The pipeline steps by itself; what is here says beforehand which calls it will make.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers.base import Call, Solver, State
from gearshift.runtime.errors import UsageError

if TYPE_CHECKING:
    from gearshift.integrations.diffusers.model import PipelineProcess


@dataclass(frozen=True)
class PipelineSolverConfig:
    """Schema of `PipelineSolver`.

    Attributes:
        steps: `num_inference_steps` of the pipeline.
        scheduler: a class of `diffusers` that takes the place of the pipeline's own, made from its configuration; null
            keeps the pipeline's.
        options: of that class, instead of those in the configuration.
    """

    steps: int = 50
    scheduler: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"solver PipelineSolver: steps={self.steps} must be at least 1")
        if self.options and self.scheduler is None:
            raise UsageError(
                f"solver PipelineSolver: options={dict(self.options)} are of a scheduler class; name it by scheduler"
            )


class PipelineSolver(Solver):
    """See the module."""

    Config = PipelineSolverConfig

    def __init__(self, config: PipelineSolverConfig | None = None) -> None:
        self.config = PipelineSolverConfig() if config is None else config
        self.name = self.config.scheduler or "pipeline"

    def __repr__(self) -> str:
        return f"PipelineSolver({self.config})"

    def build(self, own: Any) -> Any:
        """A scheduler of its own, made from `own`, that of the pipeline.

        Raises:
            UsageError: there is no such class, or it refuses the options.
        """
        import diffusers

        name = self.config.scheduler
        kind = type(own) if name is None else getattr(diffusers, name, None)
        if kind is None or not hasattr(kind, "set_timesteps"):
            raise UsageError(f"solver.scheduler={name} is no scheduler of diffusers {diffusers.__version__}")
        options: Mapping[str, Any] = dict(self.config.options)
        known = set(inspect.signature(kind.__init__).parameters)
        unknown = sorted(set(options) - known)
        if unknown:
            raise UsageError(f"solver.options={dict(options)}: {name} has no {', '.join(unknown)}")
        try:
            return kind.from_config(own.config, **options)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UsageError(f"solver.scheduler={name} cannot be made for this pipeline ({error})") from error

    def check(self, process: Process) -> None:
        if not hasattr(process, "pipeline_calls"):
            raise UsageError(
                f"solver PipelineSolver is the scheduler of a pipeline, and {process.name!r} is the process of a "
                "network of ours; take another solver"
            )

    def calls(self, process: Process | PipelineProcess) -> tuple[Call, ...]:
        self.check(process)  # type: ignore[arg-type]
        found: tuple[Call, ...] = process.pipeline_calls(self)  # type: ignore[union-attr]
        return found

    def _step(
        self, state: State, call: Call, eps: Tensor, variance: Tensor | None, noise: Tensor | None, fresh: bool | Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        raise NotImplementedError("a pipeline steps by itself")
