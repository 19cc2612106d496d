from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gearshift.data.digits import Digits
from gearshift.data.latent_files import Manifest, write_manifest
from gearshift.runtime.config import build
from gearshift.runtime.errors import UsageError

LATENTS = Manifest(
    count=0,
    shard=4,
    orientations=2,
    dtype="fp16",
    channels=4,
    latent_size=32,
    image_size=256,
    scale=0.18215,
    num_classes=1000,
    class_names=(),
    data={"name": "imagenet", "split": "train", "provenance": "", "digest": ""},
    source={},
    autoencoder={"name": "sd-vae-ft-ema", "encoder": "", "decoder": ""},
    shards=(),
)
CONF = Path(__file__).resolve().parents[2] / "conf" / "data"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_file_builds_and_has_every_key_of_its_schema(name, tmp_path):
    node = OmegaConf.load(CONF / f"{name}.yaml")
    if OmegaConf.is_missing(node, "path"):
        node.path = str(tmp_path)
    if node._target_ == "gearshift.data.latents.Latents":
        write_manifest(tmp_path, LATENTS)
    data = build(node)
    assert set(node) - {"_target_"} == set(type(data).Config.__dataclass_fields__)
    assert data.image_size >= 8 and data.channels in (1, 3, 4) and data.flip == node.flip


def test_a_typo_is_refused():
    node = OmegaConf.load(CONF / "digits.yaml")
    node.flipp = True
    with pytest.raises(UsageError, match="flipp"):
        build(node)
    del node["flipp"]
    assert isinstance(build(node), Digits)
