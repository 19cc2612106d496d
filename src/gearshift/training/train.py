"""Training from end to end: checks, resume, Lightning, the answer.

The same call again resumes; a finished run answers at once. How a run is cut into pieces (by a kill at any moment, by
SIGTERM, by a full disk) does not change its weights: on a CPU they are the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy, Strategy

from gearshift.backbones.base import check_text
from gearshift.data.augment import AugmentPipe
from gearshift.data.dataset import ImageDataset
from gearshift.diffusion.denoiser import Denoiser
from gearshift.execution.compiling import compile_blocks
from gearshift.objectives.base import Objective
from gearshift.objectives.staged import Staged
from gearshift.runtime import launch
from gearshift.runtime.errors import UsageError, UserError
from gearshift.runtime.loggers import MetricLogger
from gearshift.runtime.progress import Progress, note
from gearshift.runtime.run import RunFolder
from gearshift.training import checkpoint
from gearshift.training.boundary import Boundary, say_stopped
from gearshift.training.config import TrainerConfig
from gearshift.training.metrics import MetricsFile
from gearshift.training.module import DiffusionTraining
from gearshift.training.signals import Stopped, StopRequest

_PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def train(
    config: TrainerConfig,
    *,
    denoiser: Denoiser,
    objective: Objective,
    dataset: ImageDataset,
    run: RunFolder,
    config_text: str,
    flip: bool = False,
    augment: AugmentPipe | None = None,
    logger: MetricLogger | None = None,
) -> dict[str, Any]:
    """Trains the denoiser's network and leaves checkpoints and metrics.csv in the run folder.

    Args:
        config: of the trainer.
        denoiser: its network holds the first weights; the same ones again when a run is resumed that has no checkpoint.
        objective: gives the loss.
        dataset: the train split.
        run: the folder, which this locks while it works.
        config_text: what decides the weights, as JSON or YAML; a checkpoint made under another one is refused.
        flip: mirror images with probability one half.
        augment: transforms images, and tells the network how.
        logger: besides metrics.csv.

    Returns:
        `run`, `steps`, `images`, `loss` (mean over the last logged steps), `params`, `seconds`, `checkpoint`.

    Raises:
        UsageError: data, network, objective and devices do not go together.
        Stopped: a signal asked to stop; everything done is saved.
        RunError: a loss that is not finite, a full disk, a damaged or foreign checkpoint, a run folder in use.
    """
    main = launch.is_main()
    with run.lock() if main else contextlib.nullcontext():
        finished = run.result
        if finished is not None:
            return finished
        accelerator = _accelerator(config)
        _check_processes(config)
        check_fit(denoiser, dataset)
        objective.check(denoiser.network)
        if isinstance(objective, Staged):  # which sees the process only here
            objective.stages(denoiser.network, denoiser.process)
        path = checkpoint.latest(run)
        begun = 0
        if path is not None:
            found = checkpoint.read(path)
            checkpoint.check_config(found, config_text, path)
            begun = int(found[checkpoint.KEY]["step"])
            del found
            note(f"resuming {run.path} after step {begun} of {config.max_steps}")
        module = DiffusionTraining(
            config, denoiser, objective, dataset, config_text=config_text, flip=flip, augment=augment
        )
        module.train()
        if config.compile:
            compile_blocks(denoiser.network)
        metrics = MetricsFile(run.metrics_path, begun) if main else None
        stop = StopRequest()
        progress = Progress(config.max_steps, "train", start=begun)
        boundary = Boundary(
            config, run.checkpoints, stop=stop, progress=progress, metrics=metrics, logger=logger if main else None
        )
        exit_code = 1
        with _global_state(config), stop:
            try:
                if logger is not None and main:
                    logger.start(run, _plain(run), begun)
                trainer = _trainer(config, accelerator, objective, run, boundary)
                with progress:
                    trainer.fit(module, _Counter(module), ckpt_path=path, weights_only=True)
                if boundary.stopped_by:
                    raise Stopped(
                        say_stopped(boundary.stopped_by, trainer.global_step, config.max_steps), boundary.stopped_by
                    )
                exit_code = 0
            except UserError as error:
                exit_code = error.exit_code
                raise
            finally:
                module.close()
                if metrics is not None:
                    metrics.close()
                if logger is not None and main:
                    logger.finish(exit_code)
        answer = {
            "run": str(run.path),
            "steps": config.max_steps,
            "images": config.max_steps * config.batch_size,
            "loss": float(metrics.last["loss"]) if metrics is not None else None,
            "params": sum(p.numel() for p in denoiser.network.parameters()),
            "seconds": round(module.seconds, 1),
            "checkpoint": str(run.checkpoints / checkpoint.LAST),
        }
        if main:
            run.finish(answer)
        return answer


def check_fit(denoiser: Denoiser, dataset: ImageDataset) -> None:
    """Raises UsageError unless the images and labels are what the network takes."""
    network = denoiser.network
    has = (dataset.channels, dataset.image_size)
    wants = (network.in_channels, network.image_size)
    if has != wants:
        raise UsageError(
            f"data {dataset.name} has {has[0]}x{has[1]}x{has[1]} images and {network.name} takes "
            f"{wants[0]}x{wants[1]}x{wants[1]}; choose a backbone for these images"
        )
    if network.cond_kind == "text":
        check_text(network, None if dataset.text is None else dataset.text.shape, f"data {dataset.name}")
    if network.cond_kind == "class":
        known = network.num_classes or 0
        if dataset.labels is None or dataset.num_classes is None:
            raise UsageError(
                f"{network.name} is conditioned on {known} classes and data {dataset.name} has no labels; "
                "set backbone.num_classes=null"
            )
        if dataset.num_classes > known:
            raise UsageError(
                f"data {dataset.name} has {dataset.num_classes} classes and {network.name} knows {known}; "
                f"set backbone.num_classes={dataset.num_classes}"
            )


class _Counter:
    """The "data loader": numbers of micro-batches, from the first that was not done yet."""

    def __init__(self, module: DiffusionTraining) -> None:
        self._module = module

    def __iter__(self) -> Iterator[int]:
        number = self._module.micro_batch
        while True:
            yield number
            number += 1


def _trainer(
    config: TrainerConfig, accelerator: str, objective: Objective, run: RunFolder, boundary: Boundary
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="gpu" if accelerator == "cuda" else "cpu",
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config, accelerator, objective),
        precision=_PRECISION[config.precision],
        plugins=[_environment(config), checkpoint.CheckpointFiles()],
        max_epochs=-1,
        max_steps=config.max_steps,
        accumulate_grad_batches=config.accumulate,
        callbacks=[boundary],
        default_root_dir=run.path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic=config.deterministic,
    )
    # Lightning's own handling of signals broadcasts from inside a handler, which can hang several processes, and asks
    # in every step whether one arrived, which waits for the device. `StopRequest` and `Boundary` do both.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _strategy(config: TrainerConfig, accelerator: str, objective: Objective) -> Strategy | str:
    if config.processes == 1:
        return "auto"
    return DDPStrategy(
        process_group_backend="nccl" if accelerator == "cuda" else "gloo",
        find_unused_parameters=objective.may_leave_unused,
        gradient_as_bucket_view=True,
    )


def _environment(config: TrainerConfig) -> ClusterEnvironment:
    """Named, never detected: within a Slurm job Lightning would requeue by itself, which is submitit's business."""
    if config.processes == 1:
        return LightningEnvironment()
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment(auto_requeue=False)


def _accelerator(config: TrainerConfig) -> str:
    cuda = torch.cuda.is_available()
    if config.accelerator == "cuda" and not cuda:
        raise UsageError("trainer.accelerator=cuda, but torch sees no CUDA device; set trainer.accelerator=auto or cpu")
    accelerator = "cuda" if cuda and config.accelerator != "cpu" else "cpu"
    if config.precision == "fp16" and accelerator == "cpu":
        raise UsageError("trainer.precision=fp16 works on CUDA and this run is on the CPU; set trainer.precision=bf16")
    if accelerator == "cuda" and config.devices > torch.cuda.device_count():
        raise UsageError(f"trainer.devices={config.devices}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return accelerator


def _check_processes(config: TrainerConfig) -> None:
    running = launch.world_size()
    if running != config.processes:
        raise UsageError(
            f"trainer.devices={config.devices} and num_nodes={config.num_nodes} need {config.processes} processes, and "
            f"{running} are running; start them with `gearshift train`, torchrun or srun, or make the numbers equal"
        )


def _plain(run: RunFolder) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return dict(OmegaConf.to_container(run.config, resolve=True))  # type: ignore[arg-type]


@contextlib.contextmanager
def _global_state(config: TrainerConfig) -> Iterator[None]:
    """Puts back afterwards what Lightning sets for the whole process."""
    chatter = {name: logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")}
    levels = {name: log.level for name, log in chatter.items()}
    deterministic = torch.are_deterministic_algorithms_enabled()
    for log in chatter.values():
        log.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # True for every network without parts that a step may leave out; an objective cannot know.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        # Lightning speaking to a newer torch in an older way.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        try:
            yield
        finally:
            for name, log in chatter.items():
                log.setLevel(levels[name])
            torch.use_deterministic_algorithms(deterministic)
