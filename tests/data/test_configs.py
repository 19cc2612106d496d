from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gearshift.data.digits import Digits
from gearshift.runtime.config import build
from gearshift.runtime.errors import UsageError

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_file_builds_and_has_every_key_of_its_schema(name, tmp_path):
    node = OmegaConf.load(CONF / f"{name}.yaml")
    if OmegaConf.is_missing(node, "path"):
        node.path = str(tmp_path)
    data = build(node)
    assert set(node) - {"_target_"} == set(type(data).Config.__dataclass_fields__)
    assert data.image_size >= 8 and data.channels in (1, 3) and data.flip == node.flip


def test_a_typo_is_refused():
    node = OmegaConf.load(CONF / "digits.yaml")
    node.flipp = True
    with pytest.raises(UsageError, match="flipp"):
        build(node)
    del node["flipp"]
    assert isinstance(build(node), Digits)
