"""What uncertainty heads say, held against the truth: real images, noised, read out at every exit.

The heads of DeeDiff / AdaDiff (arXiv 2309.17074) are trained to predict u_hat = tanh|eps_hat - eps| at their exit, and
samples leave where the mean of that over the pixels falls below a threshold. A head can be right on average and still
know the noise level only: then all samples leave together, and a schedule would do the same for nothing. So beside the
calibration this says how much of the variance of u lies within times (u of several images at one noise level), how much
there is of the true error, and whether the two go together there.

Times are quantiles of the training times, so averages over them weigh noise levels as the training did. Images, the
draws of latents and noise are keyed by seed and image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gearshift.backbones.base import Backbone
from gearshift.data.dataset import DataSource, ImageDataset
from gearshift.data.latents import LatentDataset, Latents
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Process
from gearshift.evaluation.batches import in_batches
from gearshift.evaluation.calibration_numbers import Array, Records, summarise
from gearshift.execution.plan import StepPlan
from gearshift.policies import Compose, Policy, UncertaintyExit
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.runtime.progress import note

Split = ImageDataset | LatentDataset

BATCH = 32
"""Images per pass, unless fewer are sampled at a time: on the CPU passes are shared out over the threads."""


def held_out(data: DataSource | Latents, loaded: ImageDataset | None = None) -> Split:
    """What the network sees of images that it was not trained on: the test split, or the train split where there is no
    other (latents are those of the split that was encoded). `loaded` is a split that is in memory already.

    Raises RunError where it cannot be read.
    """
    if isinstance(data, Latents):
        return data.load(data.manifest.data["split"])
    if loaded is not None and loaded.split == "test":
        return loaded
    try:
        return data.load("test")
    except UsageError as error:  # a folder of images may have no such split
        note(f"note: uncertainty heads are held against images of the train split ({error})")
        return data.load("train") if loaded is None else loaded


def obstacle(network: Backbone, data: Split) -> str | None:
    """Why the heads of `network` cannot be held against the truth on `data`; None where they can."""
    if not network.has_uncertainty:
        return f"this {network.name} has no uncertainty heads"
    if len(network.paths) > 1:
        return f"{network.name} has {len(network.paths)} paths, and one depth has another head on each of them"
    if not any(network.predicts_error(depth) for depth in network.exits()):
        return f"this {network.name} has no uncertainty head at its only exit"
    if not len(data):
        return f"{data.name} has no images"
    own, wanted = (
        f"{channels} x {size} x {size}"
        for channels, size in ((data.channels, data.image_size), (network.in_channels, network.image_size))
    )
    if own != wanted:
        return f"{data.name} has images of {own}, and {network.name} takes {wanted}"
    if network.cond_kind == "class" and data.labels is None:
        return f"{network.name} is conditioned on classes, and {data.name} has no labels"
    if network.cond_kind == "text" and data.text is None:
        return f"{network.name} is conditioned on text, and {data.name} has no captions with features"
    return None


def thresholds_of(policies: Iterable[Policy]) -> list[float]:
    """Where the exit rules of policies cut the uncertainty, ascending; compositions are looked into."""
    found: set[float] = set()
    for policy in policies:
        if isinstance(policy, Compose):
            found.update(thresholds_of(policy.parts))
        elif isinstance(policy, UncertaintyExit):
            values = policy.thresholds or ([] if policy.threshold is None else [policy.threshold])
            found.update(value for value in values if value > 0)  # 0 cuts nothing
    return sorted(found)


def calibrate(records: Records, data: Split, thresholds: Iterable[float] = ()) -> dict[str, Any]:
    """The entry `calibration` of the results: `protocol` (a line), `split`, `images` (how many), `times` and `log_snr`
    (lists, from data to noise), `thresholds` and `exits`, see `summarise`."""
    count = records.error.shape[2]
    what = "labels" if data.labels is not None else "first captions" if data.text is not None else None
    return {
        "protocol": f"{count} of the {len(data)} {data.split} images of {data.name}"
        f"{f', with their {what} where the network takes them' if what else ''}, noised to {len(records.times)} "
        "quantiles of the training times and run to full depth.",
        "split": data.split,
        "images": count,
        "times": records.times.tolist(),
        "log_snr": records.log_snr.tolist(),
        "thresholds": list(thresholds),
        "exits": summarise(records),
    }


# Measured ------------------------------------------------------------------------------------------------------------


def training_times(process: Process, count: int) -> Array:
    """The middles of `count` equal shares of the training times, float64 and ascending; fewer where a table of noise
    levels has fewer."""
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return np.unique(process.quantile(shares).numpy())


def measure(
    denoiser: Denoiser,
    data: Split,
    images: int,
    times: int,
    *,
    seed: int = 0,
    batch: int = BATCH,
    dtype: torch.dtype = torch.float32,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Records:
    """Run `images` images of a split (all where it has fewer), with their labels or captions, through every exit at
    `times` noise levels.

    Args:
        data: what the network sees, see `held_out`; `obstacle` must find nothing.
        batch: images per pass; records of other sizes agree up to the rounding of kernels. The number of threads does
            not matter.
        dtype: of the network's products, as in sampling.
        on_rows: told after every pass how many rows it had.
    """
    network, process = denoiser.network, denoiser.process
    device = next(denoiser.parameters()).device
    chosen = keys.permutation(seed, "calibration_images", 0, len(data))[:images].sort().values
    levels = training_times(process, times)
    exits = network.exits()
    lock = Lock()

    def work(number: Tensor, clean: Tensor, *cond: Tensor) -> tuple[tuple[int, ...], Tensor]:
        """Depths with a head, and predicted and true errors [2, T, E, n]."""
        columns, depths = [], exits
        for position, time in enumerate(levels.tolist()):
            noise = keys.normal(seed, "calibration_noise", number, position, tuple(clean.shape[1:]))
            noisy = process.add_noise(clean, noise, time)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                outputs = denoiser.rows(noisy, time, _condition(network, *cond), StepPlan(taps=exits))
            depths = tuple(depth for depth in exits if depth in outputs.taps and depth in outputs.uncertainty)
            predicted = torch.stack([_mean(outputs.uncertainty[depth]) for depth in depths])
            true = torch.stack([true_error(outputs.taps[depth], noise) for depth in depths])
            columns.append(torch.stack([predicted, true]))
            with lock:
                on_rows(len(number))
        return depths, torch.stack(columns, dim=1)

    parts = in_batches(work, [chosen, _clean(data.take(chosen), seed, chosen), *_conditions(network, data, chosen)],
                       batch, device)  # fmt: skip
    predictions, errors = torch.cat([found for _, found in parts], dim=3).double().cpu().numpy()
    return Records(parts[0][0], levels, process.log_snr(torch.from_numpy(levels)).numpy(), predictions, errors)


def _clean(rows: Split, seed: int, number: Tensor) -> Tensor:
    """What the network sees of rows without noise, fp32; latents are drawn once for all times, keyed by `number`."""
    if isinstance(rows, ImageDataset):
        return rows.floats()
    drawn = None
    if rows.noise_shape is not None:
        drawn = keys.normal(seed, "calibration_latents", number, 0, rows.noise_shape)
    return rows.floats(drawn)


def true_error(predicted: Tensor, noise: Tensor) -> Tensor:
    """What a head predicts, averaged over channels and pixels: mean of tanh|eps_hat - eps|, [n] fp32 in [0, 1).

    `predicted` [n, C or more, H, W] may have further channels (a variance) behind those of `noise` [n, C, H, W].
    """
    return (predicted[:, : noise.shape[1]].float() - noise).abs().tanh().flatten(1).mean(1)


def _mean(uncertainty: Tensor) -> Tensor:
    """A map [n, C, H, W], or one number per row [n], to [n] fp32."""
    return uncertainty.float().flatten(1).mean(1) if uncertainty.ndim > 1 else uncertainty.float()


def _conditions(network: Backbone, data: Split, index: Tensor) -> list[Tensor]:
    """Labels [n], or features of each image's first caption [n, L, D], as they are stored; nothing where the network
    takes nothing."""
    if network.cond_kind == "class":
        assert data.labels is not None
        return [data.labels[index]]
    if network.cond_kind == "text":
        assert data.text is not None
        return [data.text.take(index)]
    return []


def _condition(network: Backbone, *cond: Tensor) -> Tensor | None:
    if not cond:
        return None
    return cond[0].float() if network.cond_kind == "text" else cond[0]


# Reduced -------------------------------------------------------------------------------------------------------------
