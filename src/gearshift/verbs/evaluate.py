"""`gearshift evaluate`: policies x solvers of one run, with a report."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gearshift import api
from gearshift.assembly import build_data, dtype_of
from gearshift.data.latents import pixels_behind
from gearshift.runtime import config, launch, peers
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import slug
from gearshift.runtime.progress import Progress, note
from gearshift.runtime.run import RunFolder


def run(cfg: DictConfig) -> dict[str, Any] | None:
    evaluation: Any = config.build(cfg.evaluation)
    RunFolder.open(cfg.run)  # what cannot be found is said once, before several processes start
    if cfg.devices is not None:
        multirun = "MULTIRUN" in str(_hydra("mode"))
        launch.ensure_processes(cfg.devices, ["evaluate", *sys.argv[1:]], multirun=multirun, name="devices")
    from gearshift.evaluation.calibration import held_out
    from gearshift.evaluation.evaluate import Evaluator
    from gearshift.evaluation.instruments import Instruments
    from gearshift.evaluation.report import write_report
    from gearshift.evaluation.results import pictures, results
    from gearshift.evaluation.rows import plan_rows
    from gearshift.evaluation.table import format_table
    from gearshift.evaluation.training_costs import TrainedBy

    settings = evaluation.config
    loaded: Any = api.load(cfg.run, ema=cfg.ema, device=cfg.device, compile=cfg.compile)
    device = next(loaded.denoiser.parameters()).device
    source = loaded.config
    if cfg.data_path is not None:
        source = source.copy()
        OmegaConf.update(source, "data.path", cfg.data_path, force_add=True)
    alone = loaded.is_pipeline and not source.get("data")
    if not source.get("data") and not alone:
        raise UsageError(f"run={cfg.run} was imported without data=; evaluate needs the data to compare with")

    prompts: Any = None
    if cfg.prompts is not None or loaded.takes_text:
        prompts = loaded.prompts(cfg.prompts or "data", source)

    def make(policy: Any, solver: Any, **fields: Any) -> Any:
        return loaded.sampler(policy, solver, precision=cfg.precision, prompts=prompts, **fields)

    plan_rows(settings, make)  # what cannot be is refused before a classifier is trained
    if alone:
        _check_alone(settings, cfg.run)
        from gearshift.integrations.diffusers.loaded import without_data

        own: Any = None
        data, split = None, without_data(loaded.denoiser)
    else:
        own = config.build(source.data) if loaded.is_pipeline else build_data(source, loaded.denoiser.network)
        data = pixels_behind(own)
        split = data.load(settings.split)
        if loaded.is_pipeline:
            _check_size(loaded.denoiser.shape_of_images(), split, cfg.run)
    folder = Path(cfg.out) if cfg.out is not None else loaded.folder.path / "evaluations" / settings.name
    _claim(folder)
    with _alone(folder):  # before the others may write into it
        peers.meet()
        classifier = _classifier(settings, data, split, device)
        instruments = Instruments.prepare(settings, split, classifier, device)
        calibrates = settings.calibration_images and loaded.denoiser.network.has_uncertainty and launch.is_main()
        heads = held_out(own, split) if calibrates else None
        evaluator = Evaluator(settings, make, instruments, split, device, folder, loaded.to_pixels(), heads)
        for missing in evaluator.unavailable:  # before hours of sampling, and again at the end
            note(f"left out: {missing.name} ({missing.reason})")
        evaluator.run()
        if not launch.is_main():
            return None
        found = results(
            evaluator,
            str(loaded.folder.path),
            loaded.denoiser.dtype if loaded.is_pipeline else dtype_of(cfg.precision),
            classifier,
            _overrides(),
            ema=None if loaded.is_pipeline else cfg.ema,
            trained=None if alone else TrainedBy.of(loaded.config, loaded.denoiser.network, _images(loaded)),
        )
        report = write_report(folder, found, pictures(evaluator))
        (folder / "ledgers").mkdir(exist_ok=True)
        for name, done in evaluator.rows.items():
            done.ledger.save(folder / "ledgers" / f"{slug(name)}.npz")
        if cfg.logger:
            figures = {path.stem: path for path in sorted(folder.glob("*.png"))}
            logger = config.build(cfg.logger)
            logger.report(loaded.folder, config.plain(loaded.config), settings.name, found, figures)
    print(format_table(found["rows"], width=shutil.get_terminal_size((160, 24)).columns), file=sys.stderr)
    for line in (*found["warnings"], *found["timing_warnings"]):
        print(f"note: {line}", file=sys.stderr)
    for missing in found["unavailable"]:
        print(f"left out: {missing['name']} ({missing['reason']})", file=sys.stderr)
    print(f"report: {report}", file=sys.stderr)
    return {"run": str(loaded.folder.path), "report": str(report), "rows": found["rows"]}


def _check_alone(settings: Any, run: str) -> None:
    """Raises UsageError where a metric asks for data that a pipeline does not come with."""
    asking = [name for name in settings.metrics if name.partition("@")[0] != "lpips"]
    if asking:
        raise UsageError(
            f"evaluation.metrics={asking} compare with data or labels, and run={run} was imported without data=; "
            "import it with data=..., or take evaluation=pipeline"
        )


def _check_size(made: tuple[int, ...], split: Any, run: str) -> None:
    """Raises UsageError where a pipeline makes other images than those of the data it is compared with."""
    own = (split.channels, split.image_size, split.image_size)
    if made != own:
        shown = " and ".join("x".join(map(str, shape)) for shape in (made, own))
        raise UsageError(
            f"run={run} makes images of, and its data has, {shown}; set data.size, or the pipeline's height and width "
            "(import +call.height=... +call.width=...)"
        )


_claimed: set[tuple[str, Path]] = set()


def _claim(folder: Path) -> None:
    """Raises UsageError where an earlier job of this sweep has its report in the same folder, which would be lost."""
    if "MULTIRUN" not in str(_hydra("mode")):
        return
    claim = (str(_hydra("sweep").dir), folder.resolve())
    if claim in _claimed:
        raise UsageError(
            f"an earlier job of this sweep has its report in {folder}; give every job a folder of its own, as in "
            "evaluation.name='w${evaluation.guidance}'"
        )
    _claimed.add(claim)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else evaluates into the same folder meanwhile. Raises RunError where somebody does, or where it cannot be
    made."""
    with contextlib.ExitStack() as stack:
        if launch.is_main():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(RunFolder(folder).lock())
            except OSError as error:
                reason = error.strerror or error
                raise RunError(f"cannot write into the folder {folder} ({reason}); name another one by out=") from error
            except RunError as error:
                who = str(error).partition(";")[0]
                raise RunError(f"{who}; wait for it, or evaluate into another folder by out=") from error
        yield


def _classifier(settings: Any, data: Any, split: Any, device: Any) -> Any:
    """The classifier that the metrics ask for, trained by the main process where it is not in the cache; None where no
    metric asks or the data has no labels."""
    from gearshift.data.cache import cache_root
    from gearshift.evaluation.batches import all_cores
    from gearshift.evaluation.classifier import get_classifier

    asked = any(name == "label_agreement" or name.endswith("@classifier") for name in settings.metrics)
    if not asked or split.labels is None:
        return None
    train, test = (split if split.split == name else data.load(name) for name in ("train", "test"))
    where = cache_root() / "classifiers"
    if launch.is_main():
        with Progress(0, f"classifier on {train.name}", unit="steps") as progress:

            def tell(done: int, total: int) -> None:
                progress.total = total
                progress.update(done - progress.done)

            with all_cores():  # on another number of threads its weights would differ in their last bits
                classifier = get_classifier(train, test, where, device, tell)
    peers.barrier("the classifier was trained")
    return classifier if launch.is_main() else get_classifier(train, test, where, device)


def _images(loaded: api.LoadedRun) -> int | None:
    """Images that the weights were trained on; None for imported ones."""
    from gearshift.training import checkpoint

    result, newest = loaded.folder.result, checkpoint.latest(loaded.folder)
    if result is not None or newest is None:
        return (result or {}).get("images")
    if not loaded.config.get("trainer"):
        return None
    # Not finished: the checkpoint knows how far it came.
    return int(checkpoint.read(newest)[checkpoint.KEY]["step"]) * int(loaded.config.trainer.batch_size)


def _overrides() -> list[str]:
    """Of this job; the command line of a job that a launcher started elsewhere is the launcher's own."""
    overrides = _hydra("overrides")
    return sys.argv[1:] if overrides is None else [str(override) for override in overrides.task]


def _hydra(name: str) -> Any:
    from hydra.core.hydra_config import HydraConfig

    return getattr(HydraConfig.get(), name) if HydraConfig.initialized() else None
