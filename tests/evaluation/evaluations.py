"""Small evaluations in memory: a network, a data set, a classifier whose answers are scripted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.data.dataset import ImageDataset, content_digest
from gearshift.evaluation.evaluate import Evaluator
from gearshift.evaluation.features import FeatureExtractor
from gearshift.evaluation.results import results

Make = Callable[..., Evaluator]
DEPTH = 5
POLICIES = {
    f"depth {depth}": {"_target_": "gearshift.policies.FixedDepth", "depth": depth} for depth in range(1, DEPTH + 1)
}
SKIP = {"_target_": "gearshift.policies.SkipEvery", "k": 2, "keep_last": False}
EIGHT = dict(num_images=8, chunk=4, policies={"depth 2": POLICIES["depth 2"], "skip": SKIP}, metrics=["fd@random_conv"])


def ddim(steps: int) -> dict[str, Any]:
    return {"_target_": "gearshift.diffusion.solvers.ddim.DDIM", "steps": steps, "clip_x0": True}


def network(labels: bool, inert_end: bool) -> UViT:
    """Five blocks; `inert_end` makes the last one the identity, so that depth 4 gives the images of full compute."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = dict(image_size=8, in_channels=1, patch_size=4, embed_dim=8, depth=4, num_heads=2)
        made = UViT(UViTConfig(num_classes=3 if labels else None, null_class=labels, **shape))  # type: ignore[arg-type]
        for parameter in made.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    if inert_end:
        last = made.blocks[-1]
        assert last.skip_linear is not None
        for module in (last.attn.proj, last.mlp.fc2, last.skip_linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        with torch.no_grad():
            last.skip_linear.weight[:, :8] = torch.eye(8)
    return made.eval().requires_grad_(False)


def dataset(labels: bool) -> ImageDataset:
    images = torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(16) % 3 if labels else None
    digest = content_digest(images.numpy(), None if classes is None else classes.numpy())
    return ImageDataset(images, classes, 3 if labels else None, (), "noise", "train", digest, "16 images of noise")


class Stub(FeatureExtractor):
    """A classifier whose answers are scripted: the share of right labels for each row, by its number of calls to it."""

    name, dim, protocol, fingerprint = "stub", 3, "scripted", "0123456789abcdef"
    taps: ClassVar[Mapping[str, int]] = {"features": 3, "logits": 3}

    def __init__(self, shares: Mapping[int, float] | None = None) -> None:
        self.shares, self.asked = shares or {}, 0

    def read(self, images_u8: Tensor, taps: Collection[str] = ("features",)) -> dict[str, Tensor]:
        right = torch.arange(len(images_u8)) % 3  # labels are balanced
        wrong = round(len(images_u8) * (1 - self.shares.get(self.asked, 1.0)))
        self.asked += 1
        seen = torch.where(torch.arange(len(images_u8)) < wrong, (right + 1) % 3, right)
        return {tap: nn.functional.one_hot(seen, 3).float() for tap in taps}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _forward(self, images_u8: Tensor) -> Mapping[str, Tensor]:
        raise AssertionError


def rows(e: Evaluator) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in told(e)["rows"]}


def told(e: Evaluator) -> dict[str, Any]:
    return results(e, "runs/x", torch.float32, None)
