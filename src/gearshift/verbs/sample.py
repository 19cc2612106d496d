"""`gearshift sample`: images (.npz uint8), a grid (.png) and the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from gearshift import api
from gearshift.data.pixels import to_u8
from gearshift.runtime import config
from gearshift.runtime.errors import UsageError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.launch import rank, world_size
from gearshift.runtime.progress import Progress
from gearshift.sampling.gather import gather_chunks
from gearshift.sampling.loop import Chunk, sample


def guidance_scale(w: float | None, s: float | None) -> float:
    """w from either convention, s = w - 1. Raises UsageError where both are given and differ."""
    if w is not None and s is not None and w != 1 + s:
        raise UsageError(f"guidance={w} and s={s} contradict each other (guidance = 1 + s); give one of them")
    return w if w is not None else 1.0 if s is None else 1 + s


def label_setting(value: str | int) -> str | int:
    """Class numbers may come as text."""
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def run(cfg: DictConfig) -> dict[str, Any] | None:
    if cfg.num_images < 1 or cfg.chunk < 1:
        raise UsageError(f"num_images={cfg.num_images} and chunk={cfg.chunk} must be at least 1")
    loaded = api.load(cfg.run, ema=cfg.ema, device=cfg.device)
    sampler = loaded.sampler(
        cfg.policy,
        cfg.solver,
        precision=cfg.precision,
        seed=cfg.seed,
        guidance=guidance_scale(cfg.guidance, cfg.s),
        labels=label_setting(cfg.labels),
        chunk=cfg.chunk,
    )
    calls = sampler.calls()
    mine = len(sampler.chunks(cfg.start, cfg.start + cfg.num_images)[rank() :: world_size()])
    chunks: list[Chunk] = []
    with Progress(mine * len(calls), "sample", unit="calls") as progress:
        for chunk in sample(
            sampler,
            cfg.num_images,
            start=cfg.start,
            rank=rank(),
            world_size=world_size(),
            on_call=lambda _: progress.update(1),
        ):
            chunks.append(chunk)
    gathered = gather_chunks(chunks)
    if gathered is None:  # another process has them
        return None
    images = torch.cat([to_u8(chunk.images) for chunk in gathered.chunks]).permute(0, 2, 3, 1).numpy()
    folder = Path(cfg.out) if cfg.out is not None else loaded.folder.path / "samples" / _name(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"arr_0": images, "index": np.arange(cfg.start, cfg.start + cfg.num_images)}
    if gathered.labels is not None:
        arrays["arr_1"] = gathered.labels.numpy()
    atomic_write(folder / "images.npz", lambda file: np.savez_compressed(file, **arrays))
    from gearshift.evaluation.plots import sample_grid

    atomic_write(folder / "grid.png", sample_grid(images.transpose(0, 3, 1, 2)[:100]))
    gathered.ledger.save(folder / "ledger.npz")
    return {
        "run": str(loaded.folder.path),
        "images": str(folder / "images.npz"),
        "grid": str(folder / "grid.png"),
        "ledger": str(folder / "ledger.npz"),
        "num_images": cfg.num_images,
        "policy": sampler.policy.name,
        "solver": sampler.solver.name,
        "calls": gathered.ledger.calls_per_image,
        "macs_per_image": gathered.ledger.macs_per_image,
        "macs_saved": gathered.ledger.macs_saved,
    }


def _name(cfg: DictConfig) -> str:
    """One folder per setting, so that two policies never overwrite each other."""
    import hashlib
    import json

    plain = config.plain(cfg)
    keys = ("policy", "solver", "num_images", "start", "seed", "guidance", "s", "labels", "chunk", "ema", "precision")
    text = json.dumps({key: plain[key] for key in keys}, sort_keys=True)
    policy = str(plain["policy"]["_target_"]).rsplit(".", 1)[-1]
    return f"{policy}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
