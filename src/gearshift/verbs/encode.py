"""`gearshift encode`: an image data set to latents in shards, resumable, by any number of processes.

Images are read by index ranges and never lie in memory at once. Processes take whole shards, a shard's batches are
composed and computed in one way whoever computes them, and a shard that is whole is kept; so neither the number of
processes nor a kill in between changes a byte.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from gearshift.assembly import device_of, dtype_of
from gearshift.data.autoencoder import Autoencoder, locate_autoencoder
from gearshift.data.captions import CaptionSet
from gearshift.data.dataset import ImageSource, source_of
from gearshift.data.latent_files import (
    DTYPES,
    FORMAT,
    MANIFEST,
    REQUEST,
    SHARDS,
    Manifest,
    Shard,
    read_shard,
    stored_name,
    write_manifest,
    write_shard,
)
from gearshift.data.latents import Latents
from gearshift.data.text_encoder import TextEncoder, locate_text_encoder
from gearshift.runtime import config, launch, peers
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write
from gearshift.runtime.progress import Progress, note
from gearshift.runtime.run import RunFolder
from gearshift.verbs import encode_text

# Batches read at a time while those before are encoded.
_BLOCK = 8


def run(cfg: DictConfig) -> dict[str, Any] | None:
    began = time.monotonic()
    _check(cfg)
    data = config.build(cfg.data)
    if isinstance(data, Latents):
        raise UsageError(f"data.path={cfg.data.path} holds latents already; encode takes images, e.g. data=imagenet")
    captioned = isinstance(data, CaptionSet)
    if cfg.text_encoder is not None and not captioned:
        raise UsageError(f"text_encoder={cfg.text_encoder}, and the images have no captions; leave it out")
    locate_autoencoder(cfg.autoencoder)  # what cannot be found is said once, before several processes start
    if captioned:
        locate_text_encoder(cfg.text_encoder)
    if cfg.devices is not None:
        launch.ensure_processes(cfg.devices, ["encode", *sys.argv[1:]], multirun=_in_sweep(), name="devices")
    autoencoder = Autoencoder.load(
        cfg.autoencoder, scale=cfg.scale, device=device_of(cfg.device), dtype=dtype_of(cfg.precision)
    )
    text = TextEncoder.load(cfg.text_encoder, device=device_of(cfg.device)) if captioned else None
    folder = Path(cfg.out).expanduser()
    with _alone(folder):  # before the others may write into it
        peers.meet()
        if not launch.is_main():
            peers.barrier("the main process had read the data")  # which may decode it into the cache
        source = source_of(data, cfg.split)
        if launch.is_main():
            peers.barrier("the main process had read the data")
        request = request_of(cfg, source, autoencoder, text)
        if launch.is_main():
            check_request(folder, request)
        encode(folder, source, autoencoder, request, text)
        if not launch.is_main():
            return None
        manifest = finish(folder, request, source, autoencoder, _node(cfg.data), text)
    note(f"{folder}: {manifest.count} latents, {manifest.channels} x {manifest.latent_size} x {manifest.latent_size}")
    return {
        "latents": str(folder),
        "count": manifest.count,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "digest": manifest.digest,
        "seconds": round(time.monotonic() - began, 1),
    }


def request_of(
    cfg: DictConfig, source: ImageSource, autoencoder: Autoencoder, text: TextEncoder | None = None
) -> dict[str, Any]:
    """Everything that decides the bytes of the latents. Raises UsageError where images do not fit the autoencoder."""
    if source.channels not in (1, autoencoder.channels):
        raise UsageError(
            f"{source.name} has images of {source.channels} channels and autoencoder {autoencoder.name} takes "
            f"{autoencoder.channels}; choose another"
        )
    return {
        "format": FORMAT,
        "split": source.split,
        "count": len(source),
        "num_classes": source.num_classes if source.labels is not None else None,
        "image_size": source.image_size,
        "latent_size": autoencoder.latent_size(source.image_size),
        "encoder": autoencoder.encoder,
        "scale": autoencoder.scale,
        "flips": bool(cfg.flips),
        "shard": cfg.shard,
        "batch": cfg.batch,
        "dtype": cfg.dtype,
        "precision": cfg.precision,
        **({} if text is None else {"text_encoder": text.fingerprint}),
        "data": source.digest,  # last, because the others say better what differs
    }


def check_request(folder: Path, request: dict[str, Any]) -> None:
    """Writes the request into a fresh folder. Raises UsageError where the folder holds anything else."""
    file = folder / REQUEST
    if file.is_file():
        try:
            there = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{file} is not readable ({error}); choose another folder or remove {folder}") from error
        for key in request:
            if there.get(key) != request[key]:
                raise UsageError(
                    f"out={folder} holds latents with {key}={there.get(key)}, and this command has "
                    f"{key}={request[key]}; choose another folder or remove it"
                )
        return
    foreign = sorted(p.name for p in folder.iterdir() if p.name != "lock" and not p.name.startswith("."))
    if foreign:
        raise UsageError(f"out={folder} holds {foreign[0]} and no latents; choose another folder")
    atomic_write(file, json.dumps(request, indent=1) + "\n")


def encode(
    folder: Path,
    source: ImageSource,
    autoencoder: Autoencoder,
    request: dict[str, Any],
    text: TextEncoder | None = None,
) -> None:
    """Makes the shards that are not whole; collective. Each process takes every so-many-th of them."""
    total = -(-len(source) // request["shard"])
    missing: list[int] = []
    if launch.is_main():
        (folder / SHARDS).mkdir(exist_ok=True)
        missing = [number for number in range(total) if read_shard(folder, number) is None]
        if len(missing) < total:
            note(f"{folder}: {total - len(missing)} of {total} shards are there")
        if missing:
            (folder / MANIFEST).unlink(missing_ok=True)
    missing = peers.broadcast(missing, "the main process had looked at what is there")
    own = missing[launch.rank() :: launch.world_size()]
    if not missing:
        return
    spans = [(n * request["shard"], min((n + 1) * request["shard"], len(source))) for n in own]
    with Progress(sum(stop - start for start, stop in spans), "encode", unit="images") as progress:
        for number, (start, stop) in zip(own, spans, strict=True):
            arrays = _shard(source, autoencoder, request, start, stop, progress)
            if text is not None:
                arrays |= encode_text.shard_arrays(text, source, request, start, stop)
            write_shard(folder, number, arrays)
    peers.barrier("every shard was written")


def _shard(
    source: ImageSource, autoencoder: Autoencoder, request: dict[str, Any], start: int, stop: int, progress: Progress
) -> dict[str, np.ndarray]:
    from gearshift.evaluation.batches import in_batches

    def both(images: Tensor) -> Tensor:
        sides = [images, images.flip(-1)] if request["flips"] else [images]
        return torch.stack([autoencoder.encode(side).cpu() for side in sides], dim=1)

    size, batch = request["latent_size"], request["batch"]
    shape = (stop - start, 2 if request["flips"] else 1, autoencoder.stored_channels, size, size)
    stored = np.empty(shape, dtype=DTYPES[request["dtype"]])
    for at, images in _blocks(source, start, stop, batch * _BLOCK):
        made = torch.cat(in_batches(both, [images], batch, autoencoder.device)).numpy()
        rows = stored[at - start : at - start + len(images)]
        with np.errstate(over="ignore"):
            rows[...] = made
        if not np.isfinite(rows).all():
            bad = at + int(np.flatnonzero(~np.isfinite(rows).all(axis=(1, 2, 3, 4)))[0])
            raise RunError(
                f"the latent of image {bad} is not finite in {request['dtype']}, computed in {request['precision']}; "
                "use dtype=fp32 and precision=fp32"
            )
        progress.update(len(images))
    arrays = {stored_name(autoencoder.gaussian): stored, "indices": np.arange(start, stop, dtype=np.int64)}
    if source.labels is not None:
        arrays["labels"] = source.labels[start:stop].numpy().astype(np.int64)
    return arrays


def _blocks(source: ImageSource, start: int, stop: int, size: int) -> Iterator[tuple[int, Tensor]]:
    """(first index, images) of each run of `size` images, the next one being read by a thread meanwhile."""
    firsts = range(start, stop, size)
    with ThreadPoolExecutor(1, thread_name_prefix="gearshift-read") as pool:
        coming: list[Future[Tensor]] = [pool.submit(source.read, start, min(start + size, stop))]
        for first in firsts:
            after = first + size
            if after < stop:
                coming.append(pool.submit(source.read, after, min(after + size, stop)))
            yield first, coming.pop(0).result()


def finish(
    folder: Path,
    request: dict[str, Any],
    source: ImageSource,
    autoencoder: Autoencoder,
    node: dict[str, Any],
    text: TextEncoder | None = None,
) -> Manifest:
    """Writes the manifest, whose shards were made or checked just now. Raises RunError when one is gone since."""
    shards: list[Shard] = []
    for number in range(-(-len(source) // request["shard"])):
        shard = read_shard(folder, number, deep=False)
        if shard is None:
            raise RunError(f"shard {number} of {folder} is not whole; run the same command again")
        shards.append(shard)
    manifest = Manifest(
        count=len(source),
        shard=request["shard"],
        orientations=2 if request["flips"] else 1,
        dtype=request["dtype"],
        channels=autoencoder.latent_channels,
        latent_size=request["latent_size"],
        image_size=source.image_size,
        scale=request["scale"],
        num_classes=request["num_classes"],
        class_names=source.class_names,
        data={
            "name": source.name,
            "split": source.split,
            "provenance": source.provenance,
            "digest": source.digest,
        },
        source=node,
        autoencoder={
            "name": autoencoder.name,
            "encoder": autoencoder.encoder,
            "decoder": autoencoder.decoder,
            "precision": request["precision"],
        },
        shards=tuple(shards),
        gaussian=autoencoder.gaussian,
        text=None if text is None else encode_text.manifest_entry(text, source, request, folder),
    )
    write_manifest(folder, manifest)
    return manifest


def _check(cfg: DictConfig) -> None:
    if not cfg.get("data"):
        raise UsageError("encode needs a data set; add e.g. data=imagenet data.path=DIR")
    if cfg.batch < 1 or cfg.shard < 1 or cfg.shard % cfg.batch:
        raise UsageError(f"shard={cfg.shard} must be a multiple of batch={cfg.batch}, and both at least 1")
    if cfg.dtype not in DTYPES:
        raise UsageError(f"dtype={cfg.dtype} is not one of {', '.join(DTYPES)}")
    if cfg.scale is not None and not cfg.scale > 0:
        raise UsageError(f"scale={cfg.scale} must be positive")


def _node(data: DictConfig) -> dict[str, Any]:
    """The configuration of the images, findable from any folder."""
    node = config.plain(data)
    if isinstance(node.get("path"), str):
        node["path"] = str(Path(node["path"]).expanduser().resolve())
    return node


def _alone(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Nobody else encodes into the same folder meanwhile."""
    if not launch.is_main():
        return contextlib.nullcontext()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out={folder} cannot be made ({error.strerror}); choose another folder") from error
    return RunFolder(folder).lock()


def _in_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.initialized() and "MULTIRUN" in str(HydraConfig.get().mode)
