"""A small convolutional classifier trained on the data set itself, to ask what a sample shows without any download.

Its labels give the agreement with the label a sample was asked for, its penultimate layer gives features for a Fréchet
distance. The accuracy on the held-out split is part of every number it takes part in. Training is a pure function of
data and recipe on one machine, and the result is kept on disk under a key of both.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.data.dataset import ImageDataset
from gearshift.data.pixels import to_pm1
from gearshift.evaluation.batches import in_batches
from gearshift.evaluation.weights import weights_digest
from gearshift.runtime import keys
from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.files import atomic_write

_BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """What decides the weights beside the data. `shift` in pixels and `flip` are the augmentation; `network` names
    the net."""

    network: str
    steps: int
    batch: int = 128
    peak_lr: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    shift: int = 1
    flip: bool = False
    seed: int = 0


def default_recipe(train: ImageDataset) -> Recipe:
    """Below 16 pixels a plain net for 300 steps (seconds on a CPU); from 16 on a small residual net for 1500
    (minutes)."""
    if train.image_size < 16:
        return Recipe("plain", steps=300)
    return Recipe("residual", steps=1500, shift=train.image_size // 8, flip=train.channels == 3)


class PlainNet(nn.Module):
    """Three 3x3 convolutions of 16, 32, 64 with poolings after the second and third, then 64 features."""

    feature_dim = 64

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(channels, 16), nn.ReLU(), *_conv(16, 32), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
            *_conv(32, 64), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(),
        )  # fmt: skip
        side = (size + 3) // 4
        self.neck = nn.Sequential(nn.Linear(64 * side * side, self.feature_dim), nn.ReLU())
        self.head = nn.Linear(self.feature_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> features [N, 64]."""
        out: Tensor = self.neck(self.body(images))
        return out


class ResidualNet(nn.Module):
    """A 3x3 stem of 32, three strided residual blocks of 32, 64, 128, and the mean over positions as 128 features."""

    feature_dim = 128

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(channels, 32), nn.ReLU(), _Residual(32, 32), _Residual(32, 64), _Residual(64, 128)
        )
        self.head = nn.Linear(self.feature_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> features [N, 128]."""
        out: Tensor = self.body(images)
        return out.mean(dim=(2, 3))


class _Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.main = nn.Sequential(*_conv(width, out, 2), nn.ReLU(), *_conv(out, out))
        self.side = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), *_conv(width, out, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.side(x))


_NETWORKS: dict[str, type[PlainNet] | type[ResidualNet]] = {"plain": PlainNet, "residual": ResidualNet}


class Classifier:
    """A trained network. `accuracy` in [0, 1] is on the held-out split; `test_images` says how many images that is."""

    batch = _BATCH

    def __init__(
        self, network: PlainNet | ResidualNet, recipe: Recipe, accuracy: float, test_images: int, data: str
    ) -> None:
        self._network = network.eval().requires_grad_(False)
        self.recipe = recipe
        self.accuracy = accuracy
        self.test_images = test_images
        self.data = data
        self.feature_dim = network.feature_dim
        self.num_classes = network.head.out_features

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    def describe(self) -> str:
        """For protocol strings: network, data, steps and accuracy."""
        return (
            f"{self.recipe.network} classifier trained on {self.data} ({self.recipe.steps} steps, seed "
            f"{self.recipe.seed}, accuracy {100 * self.accuracy:.1f} % on {self.test_images} held-out real images)"
        )

    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self._network)

    def outputs(self, images_u8: Tensor) -> tuple[Tensor, Tensor]:
        """One batch on the classifier's device, at whatever precision holds: features float32 [N, feature_dim] and
        logits float32 [N, classes]."""
        features = self._network(to_pm1(images_u8))
        return features, self._network.head(features)

    def features(self, images_u8: Tensor) -> Tensor:
        """Penultimate layer: uint8 [N, C, H, W] -> float32 [N, feature_dim], on the classifier's device."""
        return self._read(images_u8, 0, self.feature_dim)

    def logits(self, images_u8: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float32 [N, classes]."""
        return self._read(images_u8, 1, self.num_classes)

    def predict(self, images_u8: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> int64 [N], the most likely class of each image."""
        return self.logits(images_u8).argmax(dim=1)

    def _read(self, images_u8: Tensor, which: int, width: int) -> Tensor:
        """In exact float32, with bits that do not depend on the number of threads."""
        parts = in_batches(lambda part: self.outputs(part)[which], [images_u8], self.batch, self.device)
        return torch.cat(parts) if parts else torch.empty(0, width, device=self.device)


def get_classifier(
    train: ImageDataset,
    test: ImageDataset,
    cache_dir: str | Path,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    recipe: Recipe | None = None,
) -> Classifier:
    """The classifier of this data: from `cache_dir` where it was trained before, trained and stored there otherwise.

    `progress(done, total)` is called after every step. A stored file that does not check out is trained again. Raises
    UsageError for data without classes, RunError when the folder cannot be written.
    """
    if train.labels is None or test.labels is None or train.num_classes is None:
        raise UsageError(f"{train.name} has no classes, so no classifier can be trained on it; leave its metrics out")
    recipe = recipe or default_recipe(train)
    net_type = _NETWORKS[recipe.network]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = net_type(train.channels, train.image_size, train.num_classes)
    text = json.dumps({"train": train.digest, "test": test.digest, "recipe": asdict(recipe)}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    stem = Path(cache_dir) / f"{train.name}-{key}"
    known = _read(stem, network)
    if known is None:
        network = _train(network.to(device), train, recipe, progress)
        measured = Classifier(network, recipe, 0.0, len(test), train.name)
        hits = measured.predict(test.images_u8) == test.labels.to(device)
        known = hits.double().mean().item()
        _write(stem, network, {"accuracy": known, "test_images": len(test), "device": str(device), "key": text})
    return Classifier(network.to(device), recipe, known, len(test), train.name)


def _train(
    network: PlainNet | ResidualNet, train: ImageDataset, recipe: Recipe, progress: Callable[[int, int], None] | None
) -> PlainNet | ResidualNet:
    """AdamW under a linear warm-up (a tenth) and cosine decay, on keyed batches drawn with replacement."""
    device = next(network.parameters()).device
    data = train.to(device)
    assert data.labels is not None
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.peak_lr, weight_decay=recipe.weight_decay)
    slots = torch.arange(recipe.batch, device=device)
    network.train()
    for step in range(recipe.steps):
        ramp = (step + 1) / max(1, recipe.steps // 10)
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / recipe.steps))
        for group in optimiser.param_groups:
            group["lr"] = recipe.peak_lr * min(ramp, cosine)
        index = keys.integers(recipe.seed, "classifier_batch", slots, step, len(data))
        flip = keys.integers(recipe.seed, "classifier_flip", slots, step, 2).bool() if recipe.flip else None
        images, labels = data.gather(index, flip)
        assert labels is not None
        shifts = keys.integers(recipe.seed, "classifier_shift", slots, step, 2 * recipe.shift + 1, (2,))
        with torch.enable_grad():
            logits = network.head(network(_shift(images, shifts, recipe.shift)))
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
        optimiser.step()
        if progress is not None:
            progress(step + 1, recipe.steps)
    return network


def _shift(images: Tensor, shifts: Tensor, reach: int) -> Tensor:
    """Each image moved by its own (rows, columns) - reach, filled at the borders with the darkest value."""
    size = images.shape[-1]
    padded = F.pad(images, (reach,) * 4, value=-1.0)
    steps = torch.arange(size, device=images.device)
    rows = (shifts[:, 0, None] + steps)[:, None, :, None]
    columns = (shifts[:, 1, None] + steps)[:, None, None, :]
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[batch, channel, rows, columns]


def _read(stem: Path, network: nn.Module) -> float | None:
    """Load the stored weights into `network` and return their accuracy; None, and no change, where they do not check
    out."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        meta = json.loads(stem.with_suffix(".json").read_text())
        data = stem.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != meta["sha256"]:
            return None
        accuracy = float(meta["accuracy"])
        network.load_state_dict(load(data))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return accuracy


def _write(stem: Path, network: nn.Module, meta: dict[str, object]) -> None:
    """Weights first and their description last, each renamed into place, so that a description is never ahead of
    them."""
    from safetensors.torch import save

    data = save({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()})
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make the folder {stem.parent} for the classifier ({error.strerror or error}); "
            "set GEARSHIFT_CACHE to a folder that can be written"
        ) from error
    atomic_write(stem.with_suffix(".safetensors"), data)
    atomic_write(stem.with_suffix(".json"), json.dumps({**meta, "sha256": hashlib.sha256(data).hexdigest()}, indent=1))


def _conv(width: int, out: int, stride: int = 1, kernel: int = 3) -> tuple[nn.Module, nn.Module]:
    return (
        nn.Conv2d(width, out, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out),
    )
