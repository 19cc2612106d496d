"""Latents as a data set: what `gearshift encode` left, drawn anew for every sample of every micro-batch.

An image's latent is a Gaussian. Training on one frozen draw of it, and on one frozen orientation, is training on fewer
data than there are; so both moments of both orientations are stored, and a training draws orientation and noise where
it draws everything else: latents = (mean + std * noise) * scale, noise keyed by seed, micro-batch and sample. The same
with captions, where there are any: features of all are stored, one of an image's own is drawn per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from gearshift.data.autoencoder import Autoencoder
from gearshift.data.dataset import DataSource, check_split
from gearshift.data.latent_files import open_shards, read_manifest
from gearshift.data.text_files import open_text, read_captions, read_null
from gearshift.data.text_rows import TextRows
from gearshift.runtime import config as configuration
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.progress import note

MODES = ("sample", "mean")


@dataclass(frozen=True)
class LatentDataset:
    """One split of latents.

    Attributes:
        moments: pieces [n, O, 2C, h, w] (fp16 or fp32, often memory-mapped; all but the last of one length) of mean and
            log-variance, in O = 1 or 2 orientations: as it is, and mirrored before it was encoded. [n, O, C, h, w]
            where the latents themselves are stored.
        labels: int64 [N], or None without classes.
        scale: factor of the latents.
        mode: "sample" to draw from the Gaussian, "mean" for its mean.
        digest: of the moments, the labels, the scale and the text.
        text: features of the captions of every row; None without captions, and of rows that were taken.
        gaussian: moments are stored; else latents, whatever the mode.
    """

    moments: tuple[Tensor, ...]
    labels: Tensor | None
    num_classes: int | None
    class_names: tuple[str, ...]
    name: str
    split: str
    digest: str
    provenance: str
    scale: float
    mode: str = "sample"
    text: TextRows | None = None
    gaussian: bool = True

    def __len__(self) -> int:
        return sum(map(len, self.moments))

    @property
    def channels(self) -> int:
        return self.moments[0].shape[2] // (1 + self.gaussian)

    @property
    def image_size(self) -> int:
        """Height of the latents, which is the width too."""
        return self.moments[0].shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.moments) + (0 if self.text is None else self.text.nbytes)

    @property
    def noise_shape(self) -> tuple[int, ...] | None:
        """Of the noise per row that `floats` wants."""
        drawn = self.gaussian and self.mode == "sample"
        return (self.channels, self.image_size, self.image_size) if drawn else None

    def apply(self, function: Callable[[Tensor], Tensor]) -> LatentDataset:
        """The same rows with `function` of every tensor in its place."""
        labels = None if self.labels is None else function(self.labels)
        return replace(self, moments=tuple(map(function, self.moments)), labels=labels)

    def to(self, device: torch.device | str) -> LatentDataset:
        """The same rows on `device`, in one piece there. On the device where they are, nothing is copied."""
        device = torch.device(device)
        if self.moments[0].device == device or (device.type == "cpu" and self.moments[0].device.type == "cpu"):
            return self
        whole = torch.empty(len(self), *self.moments[0].shape[1:], dtype=self.moments[0].dtype, device=device)
        done = 0
        for piece in self.moments:
            whole[done : done + len(piece)] = piece
            done += len(piece)
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, moments=(whole,), labels=labels, text=None if self.text is None else self.text.to(device))

    def take(self, index: Tensor, flip: Tensor | None = None) -> LatentDataset:
        """The rows of `index` (int64 [B]) alone, those in `flip` (bool [B]) in the mirrored orientation."""
        if flip is not None and self.moments[0].shape[1] < 2:
            raise UsageError(f"{self.name} was encoded without mirrored images; set data.flip=false")
        side = torch.zeros_like(index) if flip is None else flip.to(index)
        rows = self._rows(index, side)
        labels = None if self.labels is None else self.labels[index]
        return replace(self, moments=(rows[:, None],), labels=labels, text=None)

    def _rows(self, index: Tensor, side: Tensor) -> Tensor:
        if len(self.moments) == 1:
            return self.moments[0][index, side]
        first = self.moments[0]
        rows = torch.empty(len(index), *first.shape[2:], dtype=first.dtype, device=first.device)
        piece = index // len(first)
        for number in piece.unique().tolist():
            there = (piece == number).nonzero()[:, 0]
            rows[there] = self.moments[number][index[there] - number * len(first), side[there]]
        return rows

    def floats(self, noise: Tensor | None = None) -> Tensor:
        """Rows that were taken, as scaled latents float32 [B, C, h, w]: their means, or with `noise` (standard normal
        [B, C, h, w]) draws from their Gaussians; or what is stored, where that is no Gaussian."""
        [piece] = self.moments
        if not self.gaussian:
            return piece[:, 0].float() * self.scale
        mean, logvar = piece[:, 0].float().chunk(2, dim=1)
        latents = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return latents * self.scale


@dataclass(frozen=True)
class LatentsConfig:
    """path: the folder that `gearshift encode` wrote. flip: draw the mirrored image for every other sample. mode:
    sample (draw anew each time) or mean; where latents are no Gaussians, either. autoencoder: which one decodes (a
    folder or a name), null for the one that encoded."""

    path: str
    flip: bool = True
    mode: str = "sample"
    autoencoder: str | None = None


class Latents:
    """Scaled latents, float [N, channels, image_size, image_size] with `image_size` that of the latents."""

    Config: ClassVar[type[LatentsConfig]] = LatentsConfig
    # Another folder is another data set.
    path_is_identity: ClassVar[bool] = True

    def __init__(self, config: LatentsConfig) -> None:
        """Reads the manifest. Raises UsageError where there are no finished latents or an option does not go with
        them, RunError for a manifest that was changed."""
        self.config = config
        self.folder = Path(config.path).expanduser()
        self.manifest = read_manifest(self.folder, f"data.path={config.path}")
        if config.mode not in MODES:
            raise UsageError(f"data.mode={config.mode} is not one of {', '.join(MODES)}")
        if config.flip and self.manifest.orientations < 2:
            raise UsageError(
                f"data.path={config.path} has no mirrored images; set data.flip=false or encode with flips=true"
            )
        self.flip = config.flip
        self.image_size, self.channels = self.manifest.latent_size, self.manifest.channels
        self.num_classes = self.manifest.num_classes
        text = self.manifest.text
        # [L, D] of the captions' features; None without captions.
        self.text_shape: tuple[int, int] | None = None if text is None else (text["length"], text["width"])

    def load(self, split: str) -> LatentDataset:
        """The split that was encoded. Raises UsageError for another one, RunError when files are missing or changed."""
        manifest = self.manifest
        name = f"latents of {manifest.data['name']}"
        check_split(split, name)
        if split != manifest.data["split"]:
            raise UsageError(
                f"data.path={self.config.path} holds the {manifest.data['split']} split and not {split}; "
                f"encode that one into a folder of its own (split={split})"
            )
        moments, labels = open_shards(self.folder, manifest)
        return LatentDataset(
            moments=tuple(map(torch.from_numpy, moments)),
            labels=None if labels is None else torch.from_numpy(labels),
            num_classes=self.num_classes,
            class_names=manifest.class_names,
            name=name,
            split=split,
            digest=manifest.digest,
            provenance=f"{manifest.data['provenance']}; latents by {Path(manifest.autoencoder['name']).name}"
            f"[encoder {manifest.autoencoder['encoder'][:8]}], {manifest.dtype}, x {manifest.scale:g}",
            scale=manifest.scale,
            mode=self.config.mode,
            text=None if manifest.text is None else open_text(self.folder, manifest),
            gaussian=manifest.gaussian,
        )

    def null_text(self) -> Tensor:
        """Features float32 [L, D] of the empty string. Raises RunError when their file was changed."""
        return read_null(self.folder, self.manifest)

    def captions(self) -> list[tuple[str, ...]]:
        """The captions of every image. Raises RunError for files that cannot be read."""
        return read_captions(self.folder, self.manifest)

    def decoder(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Autoencoder:
        """The autoencoder that decodes these latents, with their scale: `data.autoencoder`, or the one that made them.

        Raises UsageError when it cannot be found, and RunError when what lies in its place now is another one.
        """
        named, made = self.config.autoencoder, self.manifest.autoencoder
        found = Autoencoder.load(named or made["name"], scale=self.manifest.scale, device=device, dtype=dtype)
        if (found.latent_channels, found.latent_size(self.manifest.image_size)) != (self.channels, self.image_size):
            raise UsageError(
                f"data.autoencoder={named} has latents of {found.latent_channels} channels at 1/{found.factor} of the "
                f"size, and data.path={self.config.path} holds {self.channels} channels at "
                f"1/{self.manifest.image_size // self.image_size}"
            )
        if named is None and (found.encoder, found.decoder) != (made["encoder"], made["decoder"]):
            raise RunError(
                f"autoencoder {found.name} (encoder {found.encoder}, decoder {found.decoder}) is not the one that made "
                f"data.path={self.config.path} (encoder {made['encoder']}, decoder {made['decoder']}); name the one to "
                "decode with as data.autoencoder"
            )
        if found.encoder != made["encoder"]:
            note(
                f"note: latents made by encoder {made['encoder']} are decoded by {found.name}, whose encoder is "
                f"{found.encoder}: their latents may mean different things"
            )
        return found

    def pixels(self) -> DataSource:
        """The images that the latents were made from, as a data set. Raises UsageError where they are gone."""
        made: DataSource = configuration.build(self.manifest.source)
        return made


def pixels_behind(data: DataSource | Latents) -> DataSource:
    """Where the pixels are to which samples compare: the data set itself, or the images behind latents."""
    return data.pixels() if isinstance(data, Latents) else data


def text_shape_of(data: DataSource | Latents) -> tuple[int, int] | None:
    """[L, D] of the features of captions; None where there are none."""
    return data.text_shape if isinstance(data, Latents) else None
