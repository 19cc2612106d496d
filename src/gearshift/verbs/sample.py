"""`gearshift sample`: images (one .npz, or a PNG each), a grid (.png), the ledger, and what a policy decided on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift import api
from gearshift.data.decoding import ToPixels
from gearshift.diffusion.denoiser import Prediction
from gearshift.diffusion.solvers.base import Call
from gearshift.diffusion.solvers.switches import switches
from gearshift.evaluation.sample_files import AdmWriter, PngFolder
from gearshift.runtime import config, launch, peers
from gearshift.runtime.errors import UsageError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.progress import Progress, note
from gearshift.runtime.run import RunFolder
from gearshift.sampling.gather import gather_chunks
from gearshift.sampling.ledger import LedgerData
from gearshift.sampling.loop import Chunk, Sampler, sample
from gearshift.sampling.prompts import Prompts

FORMATS = ("npz", "png")
_SHOWN = 100


@dataclass(frozen=True)
class Written:
    """What the main process has when all is sampled.

    Attributes:
        images: where they are.
        shown: the first of them, uint8 [n, C, H, W].
        decisions: arrays of `decisions.npz`; empty where the policy has nothing to say.
    """

    images: Path
    ledger: LedgerData
    shown: Tensor
    decisions: dict[str, np.ndarray]


def guidance_scale(w: float | None, s: float | None) -> float:
    """w from either convention, s = w - 1. Raises UsageError where both are given and differ."""
    if w is not None and s is not None and w != 1 + s:
        raise UsageError(f"guidance={w} and s={s} contradict each other (guidance = 1 + s); give one of them")
    return w if w is not None else 1.0 if s is None else 1 + s


def interval(value: Sequence[float] | None) -> tuple[float, float] | None:
    """[least, greatest] as a pair. Raises UsageError for another number of values."""
    if value is None:
        return None
    if len(value) != 2:
        raise UsageError(f"guidance_interval={list(value)} is not a pair; give the least and the greatest log-SNR")
    return float(value[0]), float(value[1])


def label_setting(value: str | int) -> str | int:
    """Class numbers may come as text."""
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def run(cfg: DictConfig) -> dict[str, Any] | None:
    if cfg.num_images < 1 or cfg.chunk < 1:
        raise UsageError(f"num_images={cfg.num_images} and chunk={cfg.chunk} must be at least 1")
    layout, devices = cfg.format, cfg.devices
    if layout not in FORMATS:
        raise UsageError(f"format={layout} is not one of {', '.join(FORMATS)}")
    RunFolder.open(cfg.run)  # what cannot be found is said once, before several processes start
    if devices is not None:
        launch.ensure_processes(devices, ["sample", *sys.argv[1:]], multirun=_in_sweep(), name="devices")
    loaded: Any = api.load(cfg.run, ema=cfg.ema, device=cfg.device, compile=cfg.compile)
    sampler = loaded.sampler(
        cfg.policy,
        cfg.solver,
        precision=cfg.precision,
        seed=cfg.seed,
        guidance=guidance_scale(cfg.guidance, cfg.s),
        guidance_channels=cfg.guidance_channels,
        guidance_interval=interval(cfg.guidance_interval),
        labels=label_setting(cfg.labels),
        chunk=cfg.chunk,
        prompts=None if cfg.prompts is None else loaded.prompts(cfg.prompts),
    )
    folder = Path(cfg.out) if cfg.out is not None else loaded.folder.path / "samples" / _name(cfg, sampler.prompts)
    pixels = loaded.to_pixels()
    channels, *_ = pixels.shape(sampler.denoiser.network.in_channels, 1)
    if channels not in (1, 3):
        raise UsageError(
            f"run={cfg.run} samples {channels} channels, which are no image, and names no data to decode them with; "
            "import it with the latents it was made for (data=imagenet_latents data.path=DIR)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = _write(sampler, pixels, cfg.start, cfg.num_images, folder, layout)
    if written is None:  # another process has the rest
        return None
    ledger = written.ledger
    from gearshift.evaluation.plots import sample_grid

    atomic_write(folder / "grid.png", sample_grid(written.shown.numpy()))
    ledger.save(folder / "ledger.npz")
    decisions = folder / "decisions.npz"
    decisions.unlink(missing_ok=True)  # of an earlier command
    if written.decisions:
        atomic_write(decisions, lambda file: np.savez_compressed(file, **written.decisions))  # type: ignore[arg-type]
    if sampler.prompts is not None:
        asked = [sampler.prompts.text(index) for index in range(cfg.start, cfg.start + cfg.num_images)]
        atomic_write(folder / "prompts.txt", "".join(f"{text}\n" for text in asked))
    more: dict[str, Any] = {"decisions": str(decisions)} if written.decisions else {}
    if cfg.switches:
        more["switches"] = _switches(sampler, cfg.start)
    longest, span = ledger.longest_skip()
    return {
        "run": str(loaded.folder.path),
        "images": str(written.images),
        "grid": str(folder / "grid.png"),
        "ledger": str(folder / "ledger.npz"),
        "num_images": cfg.num_images,
        "policy": sampler.policy.name,
        "solver": sampler.solver.name,
        "calls": ledger.calls_per_image,
        "macs_per_image": ledger.macs_per_image,
        "macs_saved": ledger.macs_saved,
        "longest_skip": longest,
        "longest_skip_log_snr": span if math.isfinite(span) else None,
        "kept_bytes_per_image": ledger.kept_bytes,
        "decode_macs_per_image": pixels.macs(sampler.denoiser.network.image_size),
        **more,
    }


def _switches(sampler: Sampler, start: int) -> list[dict[str, Any]]:
    """How visible each switch of depth is in the trajectory of the first chunk; rows that switch apart count by the
    depth most of them have."""
    calls: list[Call] = []
    x0: list[Tensor] = []
    depths: list[int] = []

    def record(call: Call, prediction: Prediction) -> None:
        calls.append(call)
        x0.append(prediction.x0.cpu())
        depths.append(int(prediction.depth.mode().values))

    [index, *_] = sampler.chunks(start, start + 1)
    sampler.generate(index, sampler.cost_table(), on_prediction=record)
    found = [dataclasses.asdict(switch) for switch in switches(calls, x0, depths)]
    for one in found:
        note(f"call {one['position']}: depth {one['before']} to {one['after']}, jump {one['jump']:.2f} (1: invisible)")
    return found


def _write(sampler: Sampler, pixels: ToPixels, start: int, count: int, folder: Path, layout: str) -> Written | None:
    """Samples and writes chunk by chunk.

    None on all but the main process. Collective where several processes are at work: they take whole chunks in turn,
    and the main one writes a turn while it holds no other.
    """
    network = sampler.denoiser.network
    shape = pixels.shape(network.in_channels, network.image_size)
    target = folder / ("images.npz" if layout == "npz" else "images")
    chunks = len(sampler.chunks(start, start + count))
    rank, processes = launch.rank(), launch.world_size()
    own = len(range(rank, chunks, processes))
    ledgers: list[LedgerData] = []
    labels: list[Tensor] = []
    shown: list[Tensor] = []
    records: list[tuple[int, int, Mapping[str, Tensor]]] = []
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(own * len(sampler.calls()), "sample", unit="calls"))
        made = sample(
            sampler,
            count,
            start=start,
            rank=rank,
            world_size=processes,
            on_call=lambda _: progress.update(1),
        )
        npz = stack.enter_context(AdmWriter(target, count, shape)) if layout == "npz" and rank == 0 else None
        pngs = PngFolder(target) if layout == "png" else None
        for _ in range(0, chunks, processes):
            mine = [_looked_at(chunk, pixels) for chunk in itertools.islice(made, 1)]
            records += [(int(chunk.index[0]), len(chunk.index), chunk.record) for chunk in mine]
            if pngs is not None:
                for chunk in mine:
                    pngs.write(chunk.images, start=int(chunk.index[0]))
                # The main process needs no more of them than the grid shows.
                mine = [replace(chunk, images=chunk.images[chunk.index < start + _SHOWN]) for chunk in mine]
            turn = gather_chunks(mine)
            for chunk in () if turn is None else turn.chunks:
                if npz is not None:
                    npz.write(chunk.images)
                ledgers.append(chunk.ledger)
                labels += [] if chunk.cond is None else [chunk.cond]
                missing = _SHOWN - sum(map(len, shown))
                shown += [chunk.images[:missing]] if missing > 0 else []
        recorded = peers.gather(records, "its chunks were sampled")
        if recorded is None:
            return None
        index = np.arange(start, start + count)
        if npz is not None:
            npz.array("index", index)
            if labels:
                npz.labels(torch.cat(labels))
    if pngs is not None:
        pngs.clear_others(range(start, start + count))
    if pngs is not None and labels:
        classes = torch.cat(labels).numpy()
        atomic_write(folder / "labels.npz", lambda file: np.savez(file, index=index, arr_1=classes))
    ordered = sorted((one for part in recorded for one in part), key=lambda one: one[0])
    return Written(target, LedgerData.merge(ledgers), torch.cat(shown), decisions_of(ordered))


def decisions_of(records: Sequence[tuple[int, int, Mapping[str, Tensor]]]) -> dict[str, np.ndarray]:
    """The records of chunks in order, as arrays; empty where there are none.

    Args:
        records: first image, number of images, and record of every chunk.

    Returns:
        What is said of every sample [K, ..., N], what is said of a batch [K, ..., chunks], and `first`, the first image
        of each chunk, int64 [chunks].
    """
    if not any(record for _, _, record in records):
        return {}
    arrays: dict[str, np.ndarray] = {"first": np.array([first for first, _, _ in records], dtype=np.int64)}
    for name in records[0][2]:
        values = [record[name] for _, _, record in records]
        each = all(
            value.ndim > 1 and value.shape[-1] == count for value, (_, count, _) in zip(values, records, strict=True)
        )
        arrays[name] = (torch.cat(values, dim=-1) if each else torch.stack(values, dim=-1)).numpy()
    return arrays


def _looked_at(chunk: Chunk, pixels: ToPixels) -> Chunk:
    """With images to look at, and labels; features of text, which are larger than the images, stay where they are."""
    labels = chunk.cond if chunk.cond is not None and chunk.cond.ndim == 1 else None
    return replace(chunk, images=pixels(chunk.images), cond=labels)


def _name(cfg: DictConfig, prompts: Prompts | None) -> str:
    """One folder per setting, so that two policies never overwrite each other."""
    import hashlib
    import json

    plain = config.plain(cfg)
    keys = ("policy", "solver", "num_images", "start", "seed", "guidance", "s", "labels", "chunk", "ema", "precision")
    later = ("guidance_channels", "guidance_interval")  # absent from the names of folders made before they existed
    named = {key: plain[key] for key in keys} | {key: plain[key] for key in later if plain[key] is not None}
    if prompts is not None:
        named["prompts"] = prompts.digest
    text = json.dumps(named, sort_keys=True)
    policy = str(plain["policy"]["_target_"]).rsplit(".", 1)[-1]
    return f"{policy}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _in_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.initialized() and "MULTIRUN" in str(HydraConfig.get().mode)
